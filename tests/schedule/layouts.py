"""Where ranks may be: on how many hosts, evenly or not, in blocks or interleaved."""

from __future__ import annotations

from collections.abc import Iterable

MOST_HOSTS = 4

Hosts = tuple[int, ...]


def renumbered(hosts: Iterable[int]) -> Hosts:
    """As groups number their hosts: in the order of their first ranks."""
    each = list(hosts)
    number = {host: index for index, host in enumerate(dict.fromkeys(each))}
    return tuple(number[host] for host in each)


def layouts(n: int) -> list[Hosts]:
    """Of n ranks, on 1 to 4 hosts: blocks as even as can be, one rank and the rest, interleaved, and there and back."""
    found = {(0,) * n}
    for hosts in range(2, min(n, MOST_HOSTS) + 1):
        found.add(tuple(rank * hosts // n for rank in range(n)))
        found.add(tuple(min(rank, hosts - 1) for rank in range(n)))
        found.add(tuple(rank % hosts for rank in range(n)))
        found.add(renumbered(min(rank % (2 * hosts), 2 * hosts - 1 - rank % (2 * hosts)) for rank in range(n)))
        found.add(renumbered(max(rank - n + hosts, 0) for rank in range(n)))
    return sorted(found)
