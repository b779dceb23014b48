"""Hierarchical broadcast: the data crosses to each other host once, and is copied there."""

from __future__ import annotations

from collections.abc import Iterator

from hxcomm.schedule import Location, Round, Schedule, copy, ranks_by_host


def broadcast_hierarchical(world_size: int, root: int, hosts: tuple[int, ...]) -> Schedule:
    """The ranks of the root's host, and the first rank of every other host, copy the root's buffer; the others there
    copy that rank's.

    Two rounds. Of S bytes the root sends S to each other host, where the direct algorithm sends S to each rank.
    """
    first = [ranks[0] for ranks in ranks_by_host(hosts)]

    def rounds() -> Iterator[Round]:
        ranks = range(world_size)
        yield [
            copy(r, Location(root, "input", 0), Location(r, "output", 0))
            for r in ranks
            if r != root and (hosts[r] == hosts[root] or r == first[hosts[r]])
        ]
        yield [
            copy(r, Location(first[hosts[r]], "output", 0), Location(r, "output", 0))
            for r in ranks
            if hosts[r] != hosts[root] and r != first[hosts[r]]
        ]

    return Schedule("broadcast", "hierarchical", world_size, rounds, root=root)
