#!/usr/bin/env python3
"""Turns DIR/results.json and DIR/scale.json, where they are, into DIR/README.md, DIR/targets.json and DIR/*.svg.

    bench/report.py DIR
"""

import json
import statistics
import sys
from pathlib import Path
from xml.sax.saxutils import escape


def main():
    out = Path(sys.argv[1])
    results, scale = load(out / "results.json"), load(out / "scale.json")
    tcp, many = medians(results), medians(scale)
    targets = [judge(*row) for row in bounds(tcp, many)]
    (out / "targets.json").write_text(json.dumps(targets, indent=1) + "\n")
    for name, title, peers, series in plots(tcp, many):
        (out / f"{name}.svg").write_text(bars(title, peers, series))
    page = markdown(out, results, scale, tcp, many, targets)
    (out / "README.md").write_text(page)
    print(page)


def load(path):
    return json.loads(path.read_text()) if path.exists() else {"runs": []}


def medians(results):
    """{peer: {measure: median of the rounds}}, in the order of the run."""
    values = {}
    for run in results["runs"]:
        if run["value"] is not None:
            values.setdefault(run["peer"], {}).setdefault(run["measure"], []).append(run["value"])
    return {p: {m: statistics.median(v) for m, v in of.items()} for p, of in values.items()}


# -- targets

def bounds(tcp, many):
    """(what, figure, bound, sense): one row each; the figure is None where a measure is missing."""
    ours, classic = tcp.get("tunguard", {}), tcp.get("tunguard-ctr-hmac", {})
    fleet, openssl = many.get("tunguard", {}), many.get("openssl", {})
    openvpn, wireguard, veth = (tcp.get(p, {}) for p in ("openvpn", "wireguard-go", "veth"))

    def of(a, key, b, other=None):
        x, y = a.get(key), b.get(other or key)
        return x / y if x is not None and y else None

    ways = (("tcp_up", "client to server"), ("tcp_down", "server to client"))
    for peer, name, least in ((veth, "the bare veth", (0.42, 0.36)), (openvpn, "OpenVPN", (12, 11)),
                              (wireguard, "wireguard-go", (12, 11))):
        for (key, way), bound in zip(ways, least):
            yield f"TCP one stream, {way}, of {name}", of(ours, key, peer), bound, "least"
    single = {"best": max((ours.get(k, 0) for k, _ in ways), default=0)}
    yield "both directions at once, sum, of the better single direction", of(ours, "tcp_both", single, "best"), 0.95, "least"
    for key, way in (("cpu_up", "client to server"), ("cpu_down", "server to client")):
        yield f"CPU seconds per GB, {way}, of OpenVPN's", of(ours, key, openvpn), 1 / 13, "most"
    yield "UDP 100-byte packets per second, of OpenVPN's", of(ours, "udp_100", openvpn), 2.5, "least"
    yield "ping RTT idle, of OpenVPN's", of(ours, "rtt_idle", openvpn), 1.3, "most"
    for key, way in (("rtt_up", "up"), ("rtt_down", "down")):
        yield f"ping RTT while a bulk stream runs {way}, of OpenVPN's", of(ours, key, openvpn), 1, "most"
    yield "sessions per second, of mutual TLS 1.3 handshakes", of(fleet, "sessions", openssl, "handshakes"), 0.5, "least"
    other = many.get("openvpn", {})
    yield "30 clients at once, one process each, of OpenVPN's time", of(fleet, "start", other), 1, "most"
    yield "30 clients at once, one process in all, of OpenVPN's time", of(many.get("tunguard-swarm", {}), "start", other), 1, "most"
    other = many.get("ocserv", {})
    yield "server memory per idle session, of ocserv's, 30 sessions each", of(fleet, "memory_30", other), 1, "most"
    yield "throughput of 100 active sessions, of one's", of(fleet, "throughput_100", fleet, "throughput_1"), 0.85, "least"
    yield "Jain fairness of 100 active sessions", fleet.get("jain"), 0.9, "least"
    for key, load in (("guard_ten", "10 of them active"), ("guard", "1,000 pings under way in all"), ("guard_lone", "one for each session")):
        yield (f"guard's CPU per packet with 1,000 sessions, of that with 10, {load}",
               of(fleet, f"{key}_us_1000", fleet, f"{key}_us_10"), 1.1, "most")
    yield "classic suite, of AES-256-GCM, client to server", of(classic, "tcp_up", ours), 0.55, "least"
    yield "classic suite, of AES-256-GCM, server to client", of(classic, "tcp_down", ours), 0.55, "least"


def judge(what, seen, bound, sense):
    met = None if seen is None else (seen >= bound if sense == "least" else seen <= bound)
    return {"what": what, "sense": sense, "bound": bound, "seen": seen, "met": met}


# -- Markdown

# measure, heading, factor, digits
COLUMNS = (
    ("tcp_up", "TCP up", 1e-9, 2), ("tcp_down", "down", 1e-9, 2), ("tcp_both", "both", 1e-9, 2),
    ("tcp_four", "four up", 1e-9, 2), ("udp_100", "UDP 100 B", 1e-3, 0), ("udp_1200", "1,200 B", 1e-3, 0),
    ("rtt_idle", "RTT idle", 1, 2), ("rtt_up", "up", 1, 2), ("rtt_down", "down", 1, 2),
    ("cpu_up", "CPU up", 1, 2), ("cpu_down", "down", 1, 2),
    ("cpu_machine_up", "machine up", 1, 2), ("cpu_machine_down", "down", 1, 2), ("pss", "PSS", 1e-6, 0),
)
MANY = (
    ("handshakes", "mutual TLS 1.3 handshakes per second (`openssl s_time`)", 1, 0),
    ("sessions", "sessions made per second", 1, 0),
    ("start", "30 clients at once, all connected after, s", 1, 2),
    ("memory_30", "server memory per idle session, 30 sessions, MB", 1e-6, 2),
    ("memory_100", "server memory per idle session, 100 sessions, MB", 1e-6, 2),
    ("throughput_1", "pings of 1400 bytes, 1 active session of 100, Gbit/s each way", 1e-9, 2),
    ("throughput_100", "the same, 100 active sessions", 1e-9, 2),
    ("jain", "Jain fairness of those", 1, 3),
) + tuple(
    (f"{key}_{what}_{n}", f"{title}, {n:,} sessions, {load}", 1, digits)
    for key, load in (("guard_ten", "10 active"), ("guard", "1,000 pings under way"), ("guard_lone", "one ping each"))
    for what, title, digits in (("us", "guard's CPU µs per packet", 2), ("packets", "packets per second meanwhile", 0))
    for n in (10, 100, 1000)
)


def markdown(out, results, scale, tcp, many, targets):
    lines = ["# Measurements", "", "Written by `bench/report.py` from the JSON beside it; not by hand.", ""]
    for part in (results, scale):
        if part["runs"]:
            lines += [f"`{part['command']}`  "]
    about = results if results["runs"] else scale
    lines += [f"{about['machine']}  "]
    if about.get("date"):
        lines += [f"{about['date']}, commit {about.get('commit') or 'unknown'}; load average before {about['load_before']}"
                  f", after {about.get('load_after', 'unknown')}"]
    if about.get("note"):
        lines += ["", about["note"]]
    if tcp:
        lines += ["", "Medians. TCP in Gbit/s (both: the sum of one stream each way), UDP in 1,000 packets per second that",
                  "arrived, RTT in ms (idle, and beside one stream up or down), CPU in seconds per 10^9 bytes (of the peer's",
                  "processes, and of the whole machine, traffic generator included), PSS of both ends in MB.", ""]
        lines += table(["peer"] + [c[1] for c in COLUMNS],
                       [[peer] + [number(of.get(k), f, d) for k, _, f, d in COLUMNS] for peer, of in tcp.items()])
        lines += ["", "![TCP throughput](tcp.svg)", "", "![UDP](udp.svg)", "", "![RTT](rtt.svg)", "", "![CPU](cpu.svg)"]
        lines += ["", "Each round: TCP up and down in Gbit/s, and how many cores were busy with something else just before.", ""]
        lines += table(["peer", "up", "down", "strangers"],
                       [[peer] + [spread(results, peer, k, f) for k, f in (("tcp_up", 1e-9), ("tcp_down", 1e-9), ("strangers", 1))]
                        for peer in tcp])
    if many:
        rows = [[title] + [number(of.get(k), f, d) for of in many.values()] for k, title, f, d in MANY]
        lines += ["", "## Many sessions", ""] + table([""] + list(many), rows)
        lines += ["", "![30 clients at once](start.svg)", "", "![Guard](guard.svg)"]
    lines += ["", "## Targets", ""]
    lines += table(["", "bound", "seen", "met"],
                   [[t["what"], f"{'at least' if t['sense'] == 'least' else 'at most'} {short(t['bound'])}",
                     "-" if t["seen"] is None else short(t["seen"]),
                     {True: "yes", False: "no", None: "not measured"}[t["met"]]] for t in targets])
    if results.get("peers"):
        lines += ["", "Peers: " + "; ".join(f"{k}: {v}" for k, v in results["peers"].items()) + "."]
    lines += ["", (Path(__file__).parent / "method.md").read_text().rstrip()]
    return "\n".join(lines) + "\n"


def table(head, rows):
    return ["| " + " | ".join(r) + " |" for r in [head, ["---"] * len(head)]] + ["| " + " | ".join(r) + " |" for r in rows]


def number(value, factor, digits):
    return "-" if value is None else f"{value * factor:,.{digits}f}"


def short(value):
    return f"{value:.3g}"


def spread(results, peer, measure, factor):
    values = [r["value"] for r in results["runs"] if r["peer"] == peer and r["measure"] == measure]
    return ", ".join(number(v, factor, 2) for v in values)


# -- plots

def plots(tcp, many):
    """(file, title, peers, [(what, [value per peer], digits)])"""
    peers = list(tcp)

    def series(key, what, factor, digits, of=tcp):
        return what, [None if of[p].get(key) is None else of[p][key] * factor for p in of], digits

    if peers:
        yield "tcp", "TCP, Gbit/s", peers, [
            series("tcp_up", "one stream up", 1e-9, 2), series("tcp_down", "one stream down", 1e-9, 2),
            series("tcp_both", "one each way, sum", 1e-9, 2), series("tcp_four", "four streams up", 1e-9, 2)]
        yield "udp", "UDP, 1,000 packets per second that arrived", peers, [
            series("udp_100", "100 bytes", 1e-3, 0), series("udp_1200", "1,200 bytes", 1e-3, 0)]
        yield "rtt", "Ping, median RTT in ms", peers, [
            series("rtt_idle", "idle", 1, 2), series("rtt_up", "beside a stream up", 1, 2),
            series("rtt_down", "beside a stream down", 1, 2)]
        yield "cpu", "CPU seconds per GB, processes of the peer", peers, [
            series("cpu_up", "stream up", 1, 2), series("cpu_down", "stream down", 1, 2)]
    if many:
        start = {p: of for p, of in many.items() if "start" in of}
        yield "start", "30 clients at once, seconds until all are connected", list(start), [
            series("start", "seconds", 1, 2, start)]
        guard, sizes = many.get("tunguard", {}), (10, 100, 1000)
        yield "guard", "Guard's CPU per packet, µs", [f"{n:,} sessions" for n in sizes], [
            (what, [guard.get(f"{key}_us_{n}") for n in sizes], 2)
            for key, what in (("guard_ten", "10 active"), ("guard", "1,000 pings under way"), ("guard_lone", "one ping for each session"))]


def bars(title, groups, series):
    """Horizontal bars, a group for each peer and a bar for each series in it."""
    bar, gap, left, width = 15, 12, 170, 480
    colours = ("#2563a8", "#7fb0dd", "#d98b2b", "#8a8f98")
    most = max((v for _, values, _ in series for v in values if v), default=1)
    y, body = 34, []
    if len(series) > 1:
        x = left
        for (what, _, _), colour in zip(series, colours):
            body.append(f'<rect x="{x}" y="{y}" width="11" height="11" fill="{colour}"/>')
            body.append(f'<text x="{x + 16}" y="{y + 10}">{escape(what)}</text>')
            x += 30 + 7 * len(what)
        y += 26
    for i, group in enumerate(groups):
        middle = y + bar * len(series) / 2 + 4
        body.append(f'<text x="{left - 8}" y="{middle:.0f}" text-anchor="end">{escape(group)}</text>')
        for (_, values, digits), colour in zip(series, colours):
            value = values[i]
            length = (value or 0) / most * width
            label = "-" if value is None else f"{value:,.{digits}f}"
            body.append(f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{bar - 2}" fill="{colour}"/>')
            body.append(f'<text x="{left + length + 5:.1f}" y="{y + 11}">{label}</text>')
            y += bar
        y += gap
    return "\n".join(
        [f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 80}" height="{y}" font-family="sans-serif" font-size="12">',
         f'<rect width="{left + width + 80}" height="{y}" fill="#fff"/>',
         f'<text x="12" y="20" font-size="14" font-weight="bold">{escape(title)}</text>'] + body + ["</svg>", ""])


main()
