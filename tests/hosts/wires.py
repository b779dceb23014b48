"""A network in user space between namespaces: its packets can be late or lost, which this kernel cannot do by itself.

Started as root with the names of the namespaces; each gets a TUN device eth0, whose packets this process reads and
hands to the one that has the destination's number (the last byte of an address, counted from 1). Prints one line when
the devices are there and one after each command, a line of JSON on standard input: {"delay_s": 0.01} for every packet,
{"lost": 0.02} a fraction, {"cut": [0]} the hosts that nothing reaches or leaves. Ends with its input.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import itertools
import json
import os
import random
import selectors
import struct
import sys
import time
from typing import Any

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
MOST_QUEUED = 20_000  # packets; what comes beyond is lost, as in a router


def in_namespace(name: str, do: Any) -> Any:
    """Does it with this thread in a network namespace; sockets and devices stay in the one they were made in."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    there = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(there, 0) != 0:
            raise OSError(ctypes.get_errno(), f"setns to {name}: {os.strerror(ctypes.get_errno())}")
        try:
            return do()
        finally:
            assert libc.setns(home, 0) == 0
    finally:
        os.close(home)
        os.close(there)


def make_device() -> int:
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", b"eth0", IFF_TUN | IFF_NO_PI))
    return device


def destination(packet: bytes) -> int:
    """The host that a packet is for: 10.0.0.1 and fd00::1 are host 0's."""
    return (packet[19] if packet[0] >> 4 == 4 else packet[39]) - 1


def forward(devices: list[int], wait: selectors.BaseSelector) -> None:
    chance = random.Random(0)
    count = itertools.count()  # so that packets which are due together stay in order
    queue: list[tuple[float, int, int, bytes]] = []
    state: dict[str, Any] = {"delay_s": 0.0, "lost": 0.0, "cut": []}
    while True:
        for key, _ in wait.select(max(0.0, queue[0][0] - time.monotonic()) if queue else None):
            if key.data is None:
                line = sys.stdin.readline()
                if not line:
                    return
                state.update(json.loads(line))
                print("done", flush=True)
                continue
            packet = os.read(key.fd, 65536)
            to = destination(packet) if len(packet) >= 20 else -1
            if to not in range(len(devices)) or key.data in state["cut"] or to in state["cut"]:
                continue
            if chance.random() >= state["lost"] and len(queue) < MOST_QUEUED:
                heapq.heappush(queue, (time.monotonic() + state["delay_s"], next(count), to, packet))
        while queue and queue[0][0] <= time.monotonic():
            _, _, to, packet = heapq.heappop(queue)
            try:
                os.write(devices[to], packet)
            except OSError:  # its end is down: lost
                continue


def main(names: list[str]) -> None:
    devices = [in_namespace(name, make_device) for name in names]
    wait = selectors.DefaultSelector()
    wait.register(sys.stdin, selectors.EVENT_READ)
    for host, device in enumerate(devices):
        wait.register(device, selectors.EVENT_READ, host)
    print("done", flush=True)
    forward(devices, wait)


if __name__ == "__main__":
    main(sys.argv[1:])
