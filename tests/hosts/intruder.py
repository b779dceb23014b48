"""A program that is no part of a job and talks to its ports: `intruder.py ADDRESS PORT...`. Prints one line when all is
done, and keeps what it has open until its input ends."""

from __future__ import annotations

import os
import socket
import struct
import sys
from contextlib import suppress

import zmq

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01"  # of ZMTP 3.1; 20 bytes of a mechanism, 1 of a role and 31 more follow
MAGIC, VERSION, HELLO, MESSAGE = 0x5758_4148, 1, 1, 5  # csrc/transport/frame.h


def crc32c(data: bytes) -> int:
    crc = 0xFFFF_FFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F6_3B78 if crc & 1 else 0)
    return crc ^ 0xFFFF_FFFF


def header(kind: int, payload: bytes, version: int = VERSION) -> bytes:
    front = struct.pack("<IHHQQQIiiIQI", MAGIC, version, kind, 0, 1, 0, 0, 0, 1, len(payload), 0, 0)
    return front + struct.pack("<I", crc32c(front))


def scan(address: tuple[str, int]) -> None:
    for _ in range(50):
        socket.create_connection(address, timeout=10).close()


def babble(address: tuple[str, int]) -> list[socket.socket]:
    """What no program of ours sends, each on a connection that stays open; half of them say nothing at all."""
    null, curve = b"NULL".ljust(20, b"\0") + bytes(32), b"CURVE".ljust(20, b"\0") + bytes(32)
    spoken = [
        os.urandom(4096),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        GREETING,
        GREETING + null + b"\x02" + struct.pack(">Q", 1 << 62) + b"x" * 1000,  # the length of a frame
        GREETING + null + b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER" + os.urandom(4096),
        GREETING + curve + b"\x04\xc8\x05HELLO" + os.urandom(194),
        GREETING + b"PLAIN".ljust(20, b"\0") + bytes(32) + b"\x04\x08\x05HELLO\x00\x00",
        *[b""] * 8,
    ]
    opened = []
    for each in spoken:
        opened.append(socket.create_connection(address, timeout=10))
        opened[-1].sendall(each)
    return opened


def pretend(context: zmq.Context, address: tuple[str, int], curve: bool) -> zmq.Socket:
    """Says a hello as a member would, of another version, of unknown names and cut short, and more."""
    dealer = context.socket(zmq.DEALER)
    if curve:
        dealer.curve_publickey, dealer.curve_secretkey = zmq.curve_keypair()
        dealer.curve_serverkey = zmq.curve_keypair()[0]
    dealer.connect(f"tcp://{address[0]}:{address[1]}")
    names = os.urandom(32)
    for frames in (
        [header(HELLO, names, version=2), names],
        [header(HELLO, names), names],
        [header(HELLO, names[:16]), names[:16]],
        [header(MESSAGE, names), names],
        [header(HELLO, names)],
        [os.urandom(64), os.urandom(4 << 20)],
        [os.urandom(5)],
        [b""] * 20,
    ):
        with suppress(zmq.Again):  # thrown out already
            dealer.send_multipart(frames, zmq.DONTWAIT)
    return dealer


def main() -> None:
    kept: list[object] = []
    context = zmq.Context()
    context.linger = 0
    for port in sys.argv[2:]:
        address = (sys.argv[1], int(port))
        scan(address)
        kept += babble(address)
        kept += [pretend(context, address, curve) for curve in (False, True)]
    print("done", flush=True)
    sys.stdin.read()
    context.destroy()


if __name__ == "__main__":
    main()
