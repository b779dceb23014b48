"""Hierarchical reduce_scatter: every block reduced within each host, then by the rank that gets it."""

from __future__ import annotations

from collections.abc import Iterator

from hxcomm.schedule import Location, Round, Schedule, ranks_by_host, reduce


def reduce_scatter_hierarchical(world_size: int, hosts: tuple[int, ...]) -> Schedule:
    """On every host one rank reduces block r of the inputs there; rank r reduces those of all hosts, in their order.
    Ranks of a host share the blocks by the place that their receivers have on their own hosts.

    Two rounds. Of blocks of S bytes a host sends S to each rank of other hosts, where the direct algorithm sends S for
    each pair of ranks. Reduces within hosts first, so not in rank order where a host but the first has several ranks.
    """
    local = ranks_by_host(hosts)
    place = {rank: index for ranks in local for index, rank in enumerate(ranks)}

    def reducer(host: int, rank: int) -> int:
        return local[host][place[rank] % len(local[host])]

    partial: dict[tuple[int, int], Location] = {}  # by host and the rank that gets it
    used = [0] * world_size  # scratch chunks
    for host, ranks in enumerate(local):
        for rank in range(world_size):
            by = reducer(host, rank)
            partial[host, rank] = Location(by, "scratch", used[by]) if len(ranks) > 1 else Location(by, "input", rank)
            used[by] += len(ranks) > 1

    def inputs(host: int, rank: int) -> list[Location]:
        return [Location(each, "input", rank) for each in local[host]]

    def rounds() -> Iterator[Round]:
        if len(local) == 1:
            yield [reduce(rank, inputs(0, rank), Location(rank, "output", 0)) for rank in range(world_size)]
            return
        yield [reduce(at.rank, inputs(host, rank), at) for (host, rank), at in partial.items() if len(local[host]) > 1]
        yield [
            reduce(rank, [partial[host, rank] for host in range(len(local))], Location(rank, "output", 0))
            for rank in range(world_size)
        ]

    scratch = max(used) if len(local) > 1 else 0
    return Schedule("reduce_scatter", "hierarchical", world_size, rounds, scratch=scratch)
