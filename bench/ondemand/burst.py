#!/usr/bin/env python3
"""A burst of numbered UDP packets, for bench/ondemand.sh.

    burst.py receive ADDRESS PORT SECONDS     listens, says "ready", then what came, as JSON
    burst.py send ADDRESS PORT COUNT MILLIS   sends COUNT packets, evenly within MILLIS; says how long it took
"""

import json
import socket
import struct
import sys
import time


def receive(address, port, seconds):
    listening = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    listening.bind((address, port))
    print("ready", flush=True)
    numbers = []
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        listening.settimeout(left)
        try:
            numbers.append(struct.unpack("!I", listening.recv(64)[:4])[0])
        except TimeoutError:
            break
    print(json.dumps({
        "arrived": len(set(numbers)),
        "duplicates": len(numbers) - len(set(numbers)),
        "out_of_order": sum(later < earlier for earlier, later in zip(numbers, numbers[1:])),
    }))


def send(address, port, count, millis):
    sending = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sending.connect((address, port))
    start = time.monotonic()
    for number in range(count):
        # Sleeping would be too coarse.
        while time.monotonic() < start + number * millis / 1e3 / count:
            pass
        sending.send(struct.pack("!I", number) + bytes(60))
    print(json.dumps({"sent": count, "sent_within_ms": round((time.monotonic() - start) * 1e3, 1)}))


verb, address, port, *numbers = sys.argv[1:]
if verb == "receive":
    receive(address, int(port), float(numbers[0]))
else:
    send(address, int(port), int(numbers[0]), float(numbers[1]))
