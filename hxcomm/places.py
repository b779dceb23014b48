"""Where the ranks of a group are: who shares memory with whom, and by which address the others reach them.

Two ranks are on one host exactly when the handshake between them has mapped each other's memory (bootstrap.py). Ranks
that have others than those beside them publish a Place and connect to every rank of another host. What comes out of
the store is an untrusted hint: Places have a strict schema, and who a peer is the wire proves.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import msgpack

from hxcomm import _core, addresses, secret

_MAX_PLACE_BYTES = 1 << 16
_PAUSE_S = 0.001
# A connection that was refused, or whose handshake failed, does not come later: nobody tries again.
_PATIENCE_WITH_TROUBLE_S = 1.0


@dataclass(frozen=True)
class Place:
    """local: the ranks that this one shares memory with, itself among them. address, port: for all others. security:
    how what comes there is protected."""

    local: list[int]
    address: str
    port: int
    security: str

    def pack(self) -> str:
        return bytes(msgpack.packb(self.__dict__)).hex()

    @classmethod
    def unpack(cls, text: bytes, rank: int, world_size: int) -> Place:
        """Raises ValueError saying what is wrong with it."""
        wrong = ValueError(f"rank {rank} published no place: {text[:60]!r}")
        if len(text) > _MAX_PLACE_BYTES:
            raise wrong
        try:
            raw = msgpack.unpackb(
                bytes.fromhex(text.decode("ascii")), max_map_len=4, max_array_len=world_size, max_ext_len=0
            )
        except ValueError:
            raise wrong from None
        if not isinstance(raw, dict) or raw.keys() != {"local", "address", "port", "security"}:
            raise wrong
        local = raw["local"]
        if {type(raw["address"]), type(raw["security"])} != {str} or type(raw["port"]) is not int:
            raise wrong
        if type(local) is not list:
            raise wrong
        if not all(type(each) is int and 0 <= each < world_size for each in local) or rank not in local:
            raise wrong
        return cls(sorted(set(local)), raw["address"], raw["port"], raw["security"])


def host_numbers(places: Sequence[Place]) -> tuple[int, ...]:
    """The host of each rank, numbered by its first rank. Raises ValueError where ranks disagree about who shares
    memory."""
    numbers: dict[tuple[int, ...], int] = {}
    for rank, place in enumerate(places):
        numbers.setdefault(tuple(place.local), len(numbers))
        for peer in place.local:
            if places[peer].local != place.local:
                raise ValueError(
                    f"rank {rank} shares memory with the ranks {_listed(place.local)}, but rank {peer}, one of them, "
                    f"with {_listed(places[peer].local)}; HXCOMM_HOST_ID must be equal on all ranks of a host"
                )
    return tuple(numbers[tuple(place.local)] for place in places)


def check_security(places: Sequence[Place], labels: Sequence[str]) -> None:
    """Raises ValueError where ranks protect their connections in different ways: they would never understand."""
    for rank, place in enumerate(places):
        if place.security != places[0].security:
            raise ValueError(
                f"{labels[0]} protects its connections with {_SECURITY.get(places[0].security, '?')}, {labels[rank]} "
                f"with {_SECURITY.get(place.security, '?')}: set the same HXCOMM_SECRET_FILE (or HXCOMM_SECRET), "
                "HXCOMM_SECURITY and HXCOMM_INSECURE for every rank"
            )


_SECURITY = {"none": "nothing (it has no secret)", "curve": "CURVE", "mac": "authentication codes"}


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


@dataclass(frozen=True)
class Door:
    """Where this process listens for those of other hosts."""

    address: addresses.Address
    port: int
    security: str

    def place(self, local: list[int]) -> Place:
        return Place(local, self.address.text, self.port, self.security)


_opened: dict[int, Door] = {}  # by process id: a forked child has nothing open
_opening = threading.Lock()


def open_wire(process: _core.Runtime) -> Door:
    """This process's port for other hosts; bound at the first call.

    Raises ValueError where HXCOMM_IFNAME or the secret is wrong, InitError where there is no secret or no libzmq.
    """
    with _opening:
        if os.getpid() not in _opened:
            address = addresses.choose()
            security = secret.load(loopback=address.is_loopback)
            endpoint = process.open_wire(address.text, **security.__dict__)
            _opened[os.getpid()] = Door(address, int(endpoint.rsplit(":", 1)[1]), security.mode)
        return _opened[os.getpid()]


def connect(
    process: _core.Runtime,
    mine: addresses.Address,
    peers: Mapping[int, tuple[bytes, Place]],
    deadline: float,
    fail: Callable[[str], NoReturn],
    labels: Sequence[str],
) -> None:
    """Connects to the processes of other hosts, by rank, and waits until all connections stand.

    `fail(what)` raises; called naming the rank, its address and the cause where one does not stand at the deadline (of
    time.monotonic).
    """
    for rank, (nonce, place) in peers.items():
        try:
            process.connect_wire(nonce, addresses.endpoint_of_peer(place.address, place.port, mine))
        except ValueError as error:
            fail(f"{labels[rank]} cannot be reached: {error}")
    waiting = dict(peers)
    troubled: dict[int, float] = {}
    while waiting:
        now = time.monotonic()
        for rank, (nonce, place) in list(waiting.items()):
            if process.is_wired(nonce):
                del waiting[rank]
                continue
            trouble = process.wire_trouble(nonce)
            # The one with the smaller nonce connects; what the other one knows may be about a stranger.
            since = troubled.setdefault(rank, now) if trouble and process.nonce < nonce else now
            if now > deadline or now - since > _PATIENCE_WITH_TROUBLE_S:
                why = trouble or "nothing came back (a firewall? another secret? another interface? see HXCOMM_IFNAME)"
                fail(f"no connection with {labels[rank]} at {place.address} port {place.port}: {why}")
        if waiting:
            time.sleep(_PAUSE_S)
