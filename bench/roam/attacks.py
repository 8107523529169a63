#!/usr/bin/env python3
"""Turns DIR/results.json of bench/attacks.sh into DIR/README.md; fails where tunguard didn't keep its word.

    bench/roam/attacks.py DIR
"""

import json
import statistics
import sys
from pathlib import Path

ATTACKS = {
    "race": "a copy of each datagram, ahead of it, for 2 s",
    "replay": "a delivered datagram once more, 2 s later",
    "older": "an older datagram that was not delivered",
    "held": "the newest datagram, the client cut off for 1 s",
}
# Of what came from an address that hasn't answered (docs/threat-model.md).
MOST = 3


def main():
    out = Path(sys.argv[1])
    results = json.loads((out / "results.json").read_text())
    runs = {}
    for run in results["attacks"]:
        runs.setdefault((run["peer"], run["attack"]), []).append(run)
    page = markdown(results, runs)
    (out / "README.md").write_text(page)
    print(page)
    broken = promises(results, runs)
    for line in broken:
        print(line, file=sys.stderr)
    sys.exit(1 if broken else 0)


def promises(results, runs):
    """What tunguard promises and didn't keep."""
    broken = []
    for peer in (p for p in results["order"] if p.startswith("tunguard")):
        for attack in ATTACKS:
            of = runs.get((peer, attack), [])
            if len(of) < results["times"]:
                broken.append(f"{peer}: {attack}: {len(of)} of {results['times']} attacks were made")
            for run in of:
                if run["moved_ms"] > 0:
                    broken.append(f"{peer}: {attack}: its traffic moved for {run['moved_ms']:.0f} ms")
                if run["caught_bytes"] > MOST * run["sent_bytes"]:
                    broken.append(f"{peer}: {attack}: {run['caught_bytes']} bytes for {run['sent_bytes']}")
    return broken


def markdown(results, runs):
    order = results["order"]
    rows = {
        attack: [runs.get((peer, attack), []) for peer in order] for attack in ATTACKS
    }
    lines = [
        "# Attacks", "", "Written by `bench/roam/attacks.py` from the JSON beside it; not by hand.", "",
        f"`{results['command']}`  ", f"{results['machine']}  ", f"{results['date']}, commit {results['commit'] or 'unknown'}", "",
        "Somebody without keys sends what the client sealed from an address of his own, and answers nothing that comes there. "
        "`bench/attacks.sh` says at its top how. Who moves: how long the traffic to the client went to him instead, and how "
        f"many packets he got until 3 s after the last that he sent; medians of {results['times']}, and how many moved where "
        "not all did.", "",
        *table(["attack", *order], [[ATTACKS[a], *map(moved, of)] for a, of in rows.items()]),
        "", "Bytes that he got for each byte that he sent, the most of all tries:", "",
        *table(["attack", *order], [[ATTACKS[a], *map(factor, of)] for a, of in rows.items()]),
        "", "The client's longest time without a packet, ms, the longest of all tries:", "",
        *table(["attack", *order], [[ATTACKS[a], *map(silence, of)] for a, of in rows.items()]),
        "", "Peers: " + "; ".join(f"{k}: {v}" for k, v in results["peers"].items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def moved(of):
    if not of:
        return "-"
    went = [r for r in of if r["moved_ms"] > 0]
    if not went:
        return "stays"
    text = f"{statistics.median_high(r['moved_ms'] for r in went):,.0f} ms, " \
           f"{statistics.median_high(r['caught'] for r in went):,} packets to the attacker"
    return text + (f" ({len(went)} of {len(of)})" if len(went) < len(of) else "")


def factor(of):
    return f"{max(r['caught_bytes'] / r['sent_bytes'] for r in of):,.1f}" if of else "-"


def silence(of):
    return f"{max(r['silence_ms'] for r in of):,.0f}" if of else "-"


def table(head, rows):
    return ["| " + " | ".join(r) + " |" for r in [head, ["---"] * len(head)] + rows]


main()
