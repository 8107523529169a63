#!/usr/bin/env python3
"""Turns DIR/results.json of bench/floods.sh into DIR/README.md.

    bench/flood/report.py DIR
"""

import json
import statistics
import sys
from pathlib import Path

FLOODS = {
    "connect": "TCP connections that say nothing",
    "unknown": "UDP garbage from strangers",
    "live": "UDP garbage in the client's name",
}


def main():
    out = Path(sys.argv[1])
    results = json.loads((out / "results.json").read_text())
    page = markdown(results)
    (out / "README.md").write_text(page)
    print(page)


def markdown(results):
    lines = [
        "# Floods", "", "Written by `bench/flood/report.py` from the JSON beside it; not by hand.", "",
        f"`{results['command']}`  ", f"{results['machine']}  ", f"{results['date']}, commit {results['commit'] or 'unknown'}", "",
        "What of an offered stream still arrives during a flood, against the same stream just before; medians of "
        "all rounds, with the least and the most.", "",
        "| flood | per second | offered | tunguard | openvpn |", "|---|---|---|---|---|",
    ]
    for flood, words in FLOODS.items():
        runs = [run for run in results["runs"] if run["flood"] == flood]
        if not runs:
            continue
        cells = [kept([run for run in runs if run["peer"] == peer]) for peer in ("tunguard", "openvpn")]
        sent = statistics.median(run["sent"] for run in runs)
        note = "" if runs[0]["halved"] == "yes" else " (all that the attacker could)"
        lines.append(
            f"| {words} | {sent:,.0f}{note} | {runs[0]['load'] / 1e6:.0f} Mbit/s | {' | '.join(cells)} |"
        )
    lines += ["", "Programs: " + "; ".join(results["peers"].values()) + ".", ""]
    return "\n".join(lines)


def kept(runs):
    shares = [run["during"] / run["before"] for run in runs if run["before"]]
    if not shares:
        return "doesn't start"
    return f"{statistics.median(shares):.2f} ({min(shares):.2f} - {max(shares):.2f})"


if __name__ == "__main__":
    main()
