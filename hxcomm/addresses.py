"""By which address ranks on other hosts reach this one, and how to write addresses for ZeroMQ.

HXCOMM_IFNAME chooses the interface, with the syntax of NCCL_SOCKET_IFNAME; otherwise it is the one whose address the
kernel would use towards MASTER_ADDR. Loopback is given to nobody unless every rank knows from the launcher that all are
on one machine. Knows nothing of groups and sends nothing.

    >>> addresses.choose().endpoint("*")
    'tcp://10.0.0.1:*'
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hxcomm import environment

_IFF_UP = 1
# NCCL takes these only where there is nothing else: addresses on them rarely lead to other hosts.
_UNLIKELY = ("docker", "virbr")
# For documentation only (RFC 5737, RFC 3849), so in no network: the route towards them is the default route.
_ELSEWHERE = ("192.0.2.1", "2001:db8::1")


@dataclass(frozen=True)
class Address:
    """An address of this host, and the interface that has it."""

    text: str  # numeric, without a scope: what other hosts are told
    interface: str

    @property
    def is_loopback(self) -> bool:
        return ipaddress.ip_address(self.text).is_loopback

    def endpoint(self, port: int | str) -> str:
        """For bind; port "*" lets the kernel choose. A socket needs ZMQ_IPV6 for an address of IPv6."""
        return _endpoint(ipaddress.ip_address(self.text), port, self.interface)


def endpoint_of_peer(text: str, port: int, mine: Address) -> str:
    """For connect, from what a peer on another host published, which is untrusted.

    A link-local address means something on one link only: it is looked for on the link of this rank's own address.
    Raises ValueError saying what is wrong with it.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError(f"{text[:60]!r} is not an IP address") from None
    address = getattr(address, "ipv4_mapped", None) or address  # ::ffff:127.0.0.1 is loopback, too
    if not 0 < port < 1 << 16:
        raise ValueError(f"{port} is not a port")
    if address.is_unspecified or address.is_multicast or "%" in text:
        raise ValueError(f"{text[:60]} is no address of one host")
    if address.is_loopback and not mine.is_loopback:
        raise ValueError(
            f"{text} is the loopback address of the host it comes from, and this rank's is {mine.text}; set "
            "HXCOMM_IFNAME there, or the same MASTER_ADDR on every rank"
        )
    return _endpoint(address, port, mine.interface)


def choose() -> Address:
    """The address to bind and to publish to other hosts.

    Raises ValueError, listing what there is, where HXCOMM_IFNAME matches nothing or no address leads to other hosts.
    """
    there = local_addresses()
    wanted = environment.IFNAME.get()
    master = environment.master_address()
    on_one_machine = environment.launched_on_one_host() or (master is not None and _means_loopback(master))
    if wanted is None:
        found = [address for address in there if address.is_loopback == on_one_machine]
    else:
        # A list of what not to take asks for no loopback: NCCL would take it, and tell it to other hosts.
        with_loopback = on_one_machine or not wanted.startswith("^")
        found = [a for a in there if _matches(wanted, a.interface) and (with_loopback or not a.is_loopback)]
    if not found:
        problem = "none leads to other hosts" if wanted is None else f"HXCOMM_IFNAME={wanted!r} matches none"
        listed = ", ".join(f"{address.interface} {address.text}" for address in there) or "there are none"
        raise ValueError(f"{problem} of this host's interfaces that are up and have an address: {listed}")
    for target in (*_resolved(master), *_ELSEWHERE):
        # The master's own address where it is ours: towards it the kernel would use the interface's first one.
        for local, _, scope in (target.partition("%"), _source_towards(target).partition("%")):
            for address in found:
                if address.text == local and scope in ("", address.interface):
                    return address
    return min(found, key=_unlikeliness)  # equals stay in the kernel's order, as with NCCL


def local_addresses() -> list[Address]:
    """Every address of an interface that is up, in the kernel's order."""
    first = ctypes.POINTER(_Entry)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.getifaddrs(ctypes.byref(first)) != 0:
        raise OSError(ctypes.get_errno(), f"getifaddrs: {os.strerror(ctypes.get_errno())}")
    try:
        return list(_addresses_from(first))
    finally:
        libc.freeifaddrs(first)


class _Entry(ctypes.Structure):
    """struct ifaddrs, as far as it is read here."""


_Entry._fields_ = [
    ("next", ctypes.POINTER(_Entry)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
]
# Offset and bytes of the address in sockaddr_in and sockaddr_in6.
_ADDRESS_AT: dict[int, tuple[int, int]] = {socket.AF_INET: (4, 4), socket.AF_INET6: (8, 16)}


def _addresses_from(entry: ctypes._Pointer[_Entry]) -> Iterator[Address]:
    while entry:
        now = entry.contents
        entry = now.next
        if not now.address or not now.flags & _IFF_UP:
            continue
        place = _ADDRESS_AT.get(ctypes.c_uint16.from_address(now.address).value)
        if place is not None:
            raw = ctypes.string_at(now.address + place[0], place[1])
            yield Address(str(ipaddress.ip_address(raw)), os.fsdecode(now.name))


def _matches(wanted: str, name: str) -> bool:
    """NCCL's rule: ^ and = stand once, before the whole list; without = the words are prefixes."""
    excludes, words = wanted.startswith("^"), wanted.removeprefix("^")
    exact, words = words.startswith("="), words.removeprefix("=")
    listed = [word.strip() for word in words.split(",") if word.strip()]
    return excludes != any(name == word if exact else name.startswith(word) for word in listed)


def _means_loopback(master: str) -> bool:
    """By its text, which is the same on every rank: a host may know its own name as loopback where others do not."""
    try:
        return ipaddress.ip_address(master.strip("[]")).is_loopback
    except ValueError:
        return master.lower() == "localhost"


def _resolved(name: str | None) -> list[str]:
    """The addresses of a name, with their scope; none where it has none: the store was found by other means."""
    try:
        found = socket.getaddrinfo(name.strip("[]"), None, type=socket.SOCK_DGRAM) if name else []
    except OSError:
        return []
    return [_numeric(each[4]) for each in found]


def _source_towards(target: str) -> str:
    """The address that packets to `target` would carry; "" where there is no way. Connecting UDP sends nothing."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as sock:
            sock.connect(address)
            return _numeric(sock.getsockname())
    except OSError:  # no route, or no such family here
        return ""


def _numeric(address: tuple[Any, ...]) -> str:
    """Of an address of the socket module, with the scope of a link-local one: fe80::1%eth0."""
    return socket.getnameinfo(address, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)[0]


def _unlikeliness(address: Address) -> tuple[bool, bool, bool]:
    ip = ipaddress.ip_address(address.text)
    return (ip.is_loopback, address.interface.startswith(_UNLIKELY), ip.is_link_local)


def _endpoint(address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int | str, interface: str) -> str:
    if address.version == 4:
        return f"tcp://{address}:{port}"
    scope = f"%{interface}" if address.is_link_local else ""
    return f"tcp://[{address}{scope}]:{port}"
