"""Hierarchical reduce: reduced within each host, then on the root's host."""

from __future__ import annotations

from collections.abc import Iterator

from hxcomm.schedule import Location, Round, Schedule, ranks_by_host, reduce


def reduce_hierarchical(world_size: int, root: int, hosts: tuple[int, ...]) -> Schedule:
    """As many slices as the largest host has ranks; each host deals them out to its ranks. The owner of a slice reduces
    it within its host; on the root's host the owner reduces those of all hosts, in their order, and stores the result
    to the root.

    Two rounds. Of S bytes every other host sends S to the root's, where the direct algorithm sends S for each rank.
    Reduces within hosts first, so not in rank order where a host but the first has several ranks.
    """
    local = ranks_by_host(hosts)
    slices = max(map(len, local))
    home = hosts[root]

    def owner(host: int, slice_: int) -> int:
        return local[host][slice_ % len(local[host])]

    def partial(host: int, slice_: int) -> Location:
        if len(local[host]) == 1:
            return Location(local[host][0], "input", slice_)
        return Location(owner(host, slice_), "scratch", slice_ // len(local[host]))

    def inputs(host: int, slice_: int) -> list[Location]:
        return [Location(rank, "input", slice_) for rank in local[host]]

    def rounds() -> Iterator[Round]:
        if len(local) == 1:
            yield [reduce(owner(0, s), inputs(0, s), Location(root, "output", s)) for s in range(slices)]
            return
        yield [
            reduce(owner(host, s), inputs(host, s), partial(host, s))
            for host in range(len(local))
            for s in range(slices)
            if len(local[host]) > 1
        ]
        yield [
            reduce(owner(home, s), [partial(host, s) for host in range(len(local))], Location(root, "output", s))
            for s in range(slices)
        ]

    fewest = min([len(ranks) for ranks in local if len(ranks) > 1], default=0)
    scratch = -(-slices // fewest) if fewest and len(local) > 1 else 0
    return Schedule("reduce", "hierarchical", world_size, rounds, root=root, pieces=slices, scratch=scratch)
