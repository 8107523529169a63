#!/usr/bin/env python3
"""Turns DIR/results.json of bench/roam.sh into DIR/README.md and DIR/*.svg.

    bench/roam/report.py DIR
"""

import json
import math
import statistics
import sys
from pathlib import Path
from xml.sax.saxutils import escape


def main():
    out = Path(sys.argv[1])
    results = json.loads((out / "results.json").read_text())
    moves = {}
    for run in results["runs"]:
        if run["kind"] not in ("tcp", "start", "strangers"):
            moves.setdefault((run["kind"], run["way"]), {}).setdefault(run["peer"], []).append(run)
    for (kind, way), of in moves.items():
        rows = [(peer, typical(kind, of[peer])) for peer in results["order"] if peer in of]
        (out / f"{kind}-{way}.svg").write_text(timeline(f"{WHAT[kind]}, {WAYS[way]}", kind, rows, results["limit"]))
    page = markdown(results, moves)
    (out / "README.md").write_text(page)
    print(page)


WHAT = {
    "address": "another address on the same carrier", "carrier": "to the other carrier, then the first goes",
    "failover": "the carrier in use is cut silently", "rebind": "the NAT gives UDP another port",
    "rebind-all": "the NAT gives everything another port", "outage": "no network for a while, then back",
    "restart": "the server is killed and started again", "link": "the preferred link goes down, and is back after 3 s",
    "resume": "to the other carrier, on a long path",
}
WAYS = {"up": "client to server", "down": "server to client"}


def silence(run):
    """Milliseconds that count for this move; infinite where it didn't recover, None where nothing was seen."""
    if not run.get("steady"):
        return None
    if not run.get("recovered"):
        return math.inf
    return run["first_ms" if run["kind"] in ("outage", "restart") else "silence_ms"]


def values(runs):
    return [v for v in map(silence, runs) if v is not None]


def typical(kind, runs):
    """The run in the middle."""
    seen = sorted((r for r in runs if silence(r) is not None), key=silence)
    return seen[(len(seen) - 1) // 2] if seen else None


# -- Markdown

def markdown(results, moves):
    order, limit = results["order"], results["limit"]
    lines = ["# Moves", "", "Written by `bench/roam/report.py` from the JSON beside it; not by hand.", "",
             f"`{results['command']}`  ", f"{results['machine']}  ",
             f"{results['date']}, commit {results.get('commit') or 'unknown'}; load average before {results['load_before']}"
             f", after {results['load_after']}"]
    if results.get("note"):
        lines += ["", results["note"]]
    way = f"a path of {results['rtt']:g} ms RTT" if results["rtt"] else "a path without delay"
    counts = f"{results['moves']} moves of each kind"
    if results.get("peer_moves", results["moves"]) != results["moves"]:
        counts += f" for tunguard and {results['peer_moves']} for the others"
    if any(each.count(":") == 2 for each in results["kinds"]):
        counts += ", fewer where the kind says so"
    if results.get("jobs", 1) > 1:
        counts += f", {results['jobs']} VPNs at a time"
    lines += ["", f"IPv{results['family']} outside, {way}; {counts}, an outage of {results['outage']:g} s.",
              "Milliseconds without a packet, at 500 packets per second: the median, and the longest in parentheses; for outage",
              "and restart from the network, or the listening server, to the first packet. A second line says how many moves",
              "recovered, where not all did.", ""]
    failed = {r["peer"] for r in results["runs"] if r["kind"] == "start"}
    shown = [p for p in order if any(p in of for of in moves.values())]
    lines += table(["move", ""] + shown, [[WHAT[kind], WAYS[w]] + [cell(of.get(p, []), limit) for p in shown]
                                          for (kind, w), of in moves.items()])
    lines += ["", "Packets lost / received twice / received late, medians of the moves that recovered:", ""]
    lines += table(["move", ""] + shown, [[WHAT[kind], WAYS[w]] + [packets(of.get(p, [])) for p in shown]
                                          for (kind, w), of in moves.items()])
    resumed = {w: of for (kind, w), of in moves.items() if kind == "resume"}
    if resumed:
        rtt = max(r["rtt"] for of in resumed.values() for runs in of.values() for r in runs)
        lines += ["", f"Until there was a control connection by the other carrier, on a path of {rtt:g} ms RTT, in which the "
                  "session was resumed: milliseconds from the move, the median and the longest, in round trips in parentheses. "
                  "TCP takes one, TLS another, and the question and the answer inside the third. Packets didn't wait for that: "
                  "the longest time without one is in the first table.", ""]
        lines += table(["", *shown], [[WAYS[w], *(resumption(of.get(p, []), rtt) for p in shown)]
                                      for w, of in resumed.items()])
    tcp = [r for r in results["runs"] if r["kind"] == "tcp"]
    if tcp:
        lines += ["", "One TCP connection while addresses and carriers change; intact is the same SHA-256 at both ends:", ""]
        lines += table(["peer", "", "transfers", "intact", "moves", "longest standstill, ms"], [
            [p, WAYS[w], str(len(of)), str(sum(r["intact"] for r in of)), str(sum(r["moves"] for r in of)),
             number(max((r.get("standstill_ms", math.inf) for r in of)))]
            for p in shown for w in WAYS if (of := [r for r in tcp if (r["peer"], r["way"]) == (p, w)])])
    if failed:
        lines += ["", "Not started: " + ", ".join(p for p in order if p in failed) + "."]
    lines += ["", "Arrivals around the middle one of each kind's moves:", ""]
    lines += [f"![{WHAT[kind]}, {WAYS[w]}]({kind}-{w}.svg)" for kind, w in moves]
    paused = sum(r.get("sender_ms", 0) > 10 for of in moves.values() for runs in of.values() for r in runs)
    busy = [r["cores"] for r in results["runs"] if r["kind"] == "strangers"]
    lines += ["", f"Busy with something else before a turn: {min(busy):.2f} to {max(busy):.2f} cores. Around {paused} of the "
              f"{sum(len(runs) for of in moves.values() for runs in of.values())} moves the sender paused for more than 10 ms."]
    lines += ["", "Peers: " + "; ".join(f"{k}: {v}" for k, v in results["peers"].items()) + "."]
    lines += ["", (Path(__file__).parent / "method.md").read_text().rstrip()]
    return "\n".join(lines) + "\n"


def cell(runs, limit):
    seen = values(runs)
    if not seen:
        return "-"
    middle, longest = statistics.median_high(seen), max(seen)
    good = sum(map(math.isfinite, seen))
    if math.isinf(middle):
        text = f"not within {limit} s"
    else:
        text = number(middle) + (f" ({number(longest)})" if math.isfinite(longest) else f" (not within {limit} s)")
    return text + (f"<br>{good} of {len(seen)}" if 0 < good < len(seen) else "")


def resumption(runs, rtt):
    if not runs:
        return "-"
    took = [math.inf if r.get("logged_ms") is None else r["logged_ms"] for r in runs if r.get("steady")]
    if not took:
        return "-"
    return ", ".join("not in time" if math.isinf(ms) else f"{number(ms)} ({ms / rtt:.1f})"
                     for ms in (statistics.median_high(took), max(took)))


def packets(runs):
    good = [r for r in runs if r.get("recovered")]
    if not good:
        return "-"
    return " / ".join(number(statistics.median_high(r[k] for r in good)) for k in ("lost", "duplicated", "reordered"))


def number(value):
    if math.isinf(value):
        return "never"
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def table(head, rows):
    return ["| " + " | ".join(r) + " |" for r in [head, ["---"] * len(head)] + rows]


# -- timelines

def timeline(title, kind, rows, limit):
    """A row for each peer, 800 px wide: dark where packets arrived, from before the move until all have recovered."""
    left, width, right, row = 150, 510, 140, 28
    ends = [(r["took_ms"] if kind in ("outage", "restart") else 0) + silence(r)
            for _, r in rows if r and math.isfinite(silence(r))]
    took = statistics.median_low([r["took_ms"] for _, r in rows if r] or [0])
    ends += [took] if kind == "link" else []
    ends += [r["logged_ms"] for _, r in rows if r and r.get("logged_ms") is not None]
    if not ends and any(rows):
        ends = [took + limit * 1000]
    last = max(ends + [100]) * 1.15 + 25
    first = -last * 0.08

    def x(ms):
        return left + (min(max(ms, first), last) - first) / (last - first) * width

    # Of peers that don't recover, or do much later than others, the strip ends while it is still empty.
    top = 44
    bottom = top + len(rows) * row
    step = nice((last - first) / 7)
    ticks = [n * step for n in range(math.ceil(first / step), math.floor(last / step) + 1)]
    body = [f'<rect x="{left}" y="{top + n * row}" width="{width}" height="{row - 8}" fill="#eef0f3"/>' for n in range(len(rows))]
    body += [f'<line x1="{x(at):.1f}" y1="{top - 4}" x2="{x(at):.1f}" y2="{bottom}" stroke="#c9ccd2" stroke-width="0.7"/>'
             for at in ticks]
    for n, (peer, run) in enumerate(rows):
        y = top + n * row
        body.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(peer)}</text>')
        for begin, end in run["runs"] if run else ():
            if end >= first and begin <= last:
                body.append(f'<rect x="{x(begin):.1f}" y="{y}" width="{max(x(end) - x(begin), 0.8):.1f}" '
                            f'height="{row - 8}" fill="#2563a8"/>')
        if run and run.get("logged_ms") is not None:
            body.append(f'<circle cx="{x(run["logged_ms"]):.1f}" cy="{y + 10}" r="4.5" fill="#f39c12" stroke="#fff"/>')
        if run and math.isfinite(silence(run)):
            label = f"{number(silence(run))} ms"
        else:
            label = f"not within {limit:g} s" if run else "-"
        body.append(f'<text x="{left + width + 8}" y="{y + 14}">{label}</text>')
    marks = [(0, "move")] + ([(took, "back")] if kind in ("link", "outage") and took else [])
    for at, what in marks:
        body.append(f'<line x1="{x(at):.1f}" y1="{top - 6}" x2="{x(at):.1f}" y2="{bottom}" stroke="#c0392b" stroke-width="1.5"/>')
        body.append(f'<text x="{x(at):.1f}" y="{top - 9}" text-anchor="middle" font-size="11" fill="#c0392b">{what}</text>')
    in_seconds = last >= 5000
    for at in ticks:
        text = f"{at / 1000:g}" if in_seconds else f"{at:g}"
        body.append(f'<text x="{x(at):.1f}" y="{bottom + 12}" text-anchor="middle" fill="#444">{text}</text>')
    body.append(f'<text x="{left + width / 2}" y="{bottom + 30}" text-anchor="middle" fill="#444">'
                f'{"s" if in_seconds else "ms"} since the move; dark: packets received{", dot: session resumed" if kind == "resume" else ""}</text>')
    counted = {"outage": "from back to the first", "restart": "from back to the first"}.get(kind, "longest silence")
    body.append(f'<text x="{left + width + 8}" y="{bottom + 12}" fill="#444">{counted}</text>')
    height, whole = bottom + 42, left + width + right
    return "\n".join(
        [f'<svg xmlns="http://www.w3.org/2000/svg" width="{whole}" height="{height}" viewBox="0 0 {whole} {height}" '
         'font-family="sans-serif" font-size="12">',
         f'<rect width="{whole}" height="{height}" fill="#fff"/>',
         f'<text x="12" y="20" font-size="14" font-weight="bold">{escape(title)}</text>'] + body + ["</svg>", ""])


def nice(step):
    power = 10 ** math.floor(math.log10(step))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= step)


main()
