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
    "restart": "the server is killed and started again",
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
    lines += ["", f"IPv{results['family']} outside, {way}; {results['moves']} moves of each kind, an outage of {results['outage']:g} s.",
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
    """A row for each peer: dark where packets arrived, from before the move until all have recovered."""
    left, width, row = 170, 560, 26
    ends = [(r["took_ms"] if kind in ("outage", "restart") else 0) + silence(r) for _, r in rows if r and math.isfinite(silence(r))]
    took = max((r["took_ms"] for _, r in rows if r), default=0)
    lost = any(r and math.isinf(silence(r)) for _, r in rows)
    last = max(ends + [took + limit * 1000 if lost and not ends else 0, 200]) * 1.15 + 50
    first = -last * 0.08

    def x(ms):
        return left + (min(max(ms, first), last) - first) / (last - first) * width

    y, body = 44, []
    for peer, run in rows:
        body.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(peer)}</text>')
        body.append(f'<rect x="{left}" y="{y}" width="{width}" height="{row - 8}" fill="#eef0f3"/>')
        for begin, end in run["runs"] if run else ():
            if end >= first and begin <= last:
                body.append(f'<rect x="{x(begin):.1f}" y="{y}" width="{max(x(end) - x(begin), 0.5):.1f}" height="{row - 8}" fill="#2563a8"/>')
        if run and math.isfinite(silence(run)):
            label = f"{number(silence(run))} ms"
        else:
            label = f"not within {limit} s" if run else "-"
        body.append(f'<text x="{left + width + 8}" y="{y + 14}">{label}</text>')
        y += row
    step = nice((last - first) / 7)
    at = math.ceil(first / step) * step
    while at <= last:
        body.append(f'<line x1="{x(at):.1f}" y1="40" x2="{x(at):.1f}" y2="{y}" stroke="{"#c0392b" if at == 0 else "#c9ccd2"}" stroke-width="{1.5 if at == 0 else 0.5}"/>')
        body.append(f'<text x="{x(at):.1f}" y="{y + 14}" text-anchor="middle" fill="#555">{at / 1000:g} s</text>')
        at += step
    height = y + 26
    return "\n".join(
        [f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 130}" height="{height}" font-family="sans-serif" font-size="12">',
         f'<rect width="{left + width + 130}" height="{height}" fill="#fff"/>',
         f'<text x="12" y="20" font-size="14" font-weight="bold">{escape(title)}</text>'] + body + ["</svg>", ""])


def nice(step):
    power = 10 ** math.floor(math.log10(step))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= step)


main()
