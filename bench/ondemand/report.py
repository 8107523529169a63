#!/usr/bin/env python3
"""Turns DIR/results.json of bench/ondemand.sh into DIR/README.md.

    bench/ondemand/report.py DIR
"""

import json
import statistics
import sys
from pathlib import Path


def main():
    out = Path(sys.argv[1])
    page = markdown(json.loads((out / "results.json").read_text()))
    (out / "README.md").write_text(page)
    print(page)


KINDS = {"fresh": "tunguard, just started", "again": "tunguard, after a connection that was idle"}
PEERS = {"openvpn": "OpenVPN, from the start of its client", "wireguard-go": "wireguard-go, without a session"}


def target(rtt):
    """Milliseconds until the first packet is answered."""
    return 60 + 3 * rtt


def markdown(results):
    runs, rtts = results["runs"], results["rtts"]
    lines = ["# On demand", "", "Written by `bench/ondemand/report.py` from the JSON beside it; not by hand.", "",
             f"`{results['command']}`  ", f"{results['machine']}  ",
             f"{results['date']}, commit {results.get('commit') or 'unknown'}; load average before {results['load_before']}"
             f", after {results['load_after']}"]
    if results.get("note"):
        lines += ["", results["note"]]
    lines += ["", "## The first ping", "",
              "Milliseconds from the first ping, sent while there is no connection, to its answer: the median, and the longest",
              "in parentheses. The target is 60 ms and three round trips.", ""]
    rows = [[name] + [cell([r for r in runs if (r["kind"], r["rtt"]) == (kind, rtt)]) for rtt in rtts]
            for kind, name in KINDS.items()]
    rows.append(["target"] + [f"{target(rtt):g}" for rtt in rtts])
    rows += [[PEERS.get(peer, peer)] + [cell([r for r in runs if (r["kind"], r["peer"], r["rtt"]) == ("start", peer, rtt)]) for rtt in rtts]
             for peer in results["peers"] if any((r["kind"], r["peer"]) == ("start", peer) for r in runs)]
    lines += table(["RTT"] + [f"{rtt:g} ms" for rtt in rtts], rows)
    starts = [r for r in runs if r["kind"] in KINDS]
    within = sum(r["ms"] is not None and r["ms"] <= target(r["rtt"]) for r in starts)
    warm = sum(r.get("warm") is True for r in starts)
    lines += ["", f"{within} of {len(starts)} starts of tunguard were within the target; {warm} were warm, as its status calls it."]
    if any(r["kind"] == "start" for r in runs):
        lines += ["", "OpenVPN has nothing of the kind: its figure is what a user, or a script, waits for who starts it when it is",
                  "needed. wireguard-go has no connection: its first packet waits for a handshake of one round trip."]

    bursts = [r for r in runs if r["kind"] == "burst"]
    if bursts:
        lines += ["", "## 200 packets to a client that sleeps", ""]
        lines += table(["RTT", "bursts", "sent within, ms", "arrived, at least", "received twice", "out of order"], [
            [f"{rtt:g} ms", str(len(of)), f"{max(r.get('sent_within_ms', 0) for r in of):g}", str(min(r.get("arrived", 0) for r in of)),
             str(sum(r.get("duplicates", 0) for r in of)), str(sum(r.get("out_of_order", 0) for r in of))]
            for rtt in rtts if (of := [r for r in bursts if r["rtt"] == rtt])])

    quiet = [r for r in runs if r["kind"] == "quiet"]
    if quiet:
        lines += ["", "## Asleep", ""]
        lines += table(["RTT", "seconds", "bytes of the tunnel", "bytes of anything on the link"],
                       [[f"{r['rtt']:g} ms", str(r["seconds"]), str(r["tunnel_bytes"]), str(r["link_bytes"])] for r in quiet])
        lines += ["", "What else is on the link is the kernel's, such as neighbour discovery."]

    held = [r for r in runs if r["kind"] == "held"]
    if held:
        lines += cycles(held, [r for r in runs if r["kind"] == "cycles"])
    lines += ["", "Peers: " + "; ".join(f"{k}: {v}" for k, v in results["peers"].items()) + "."]
    return "\n".join(lines) + "\n"


def cycles(held, over):
    of = next((r for r in over), {"cycles": "?", "unanswered": "?"})
    lines = ["", "## Awake and asleep again", "",
             f"{of['cycles']} times; {of['unanswered']} of the pings that woke it weren't answered. What both ends hold asleep,",
             "the first time after a few cycles:", ""]
    rows = []
    for process in held[0]["of"]:
        for what in held[0]["of"][process]:
            rows.append([f"{process}: {what}" + (" (kB)" if what in ("rss", "pss") else "")]
                        + [shown(what, r["of"].get(process, {}).get(what)) for r in held])
    for what in ("processes", "queues", "sessions"):
        rows.append([what] + [str(r[what]) for r in held])
    lines += table([""] + [f"after {r['cycles']}" for r in held], rows)
    for what, name in (("rules", "nftables rules of the server"), ("client_rules", "nftables rules of the client"),
                       ("routes", "routes of the server"), ("client_routes", "routes of the client")):
        same = len({r[what] for r in held}) == 1
        lines += ["", f"The {name} are {'the same each time' if same else 'NOT the same each time'}."]
    return lines


def shown(what, value):
    if value is None:
        return "-"
    return f"{value / 1000:,.0f}" if what in ("rss", "pss") else str(value)


def cell(runs):
    seen = [r["ms"] for r in runs if r["ms"] is not None]
    if not runs:
        return "-"
    if not seen:
        return "no answer"
    text = f"{statistics.median(seen):.1f} ({max(seen):.1f})"
    return text if len(seen) == len(runs) else f"{text}<br>{len(seen)} of {len(runs)} answered"


def table(head, rows):
    return ["| " + " | ".join(r) + " |" for r in [head, ["---"] * len(head)] + rows]


main()
