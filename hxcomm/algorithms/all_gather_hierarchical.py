"""Hierarchical all_gather: every input crosses to each other host once, and is copied there."""

from __future__ import annotations

from collections.abc import Iterator

from hxcomm.schedule import Location, Round, Schedule, copy, ranks_by_host


def all_gather_hierarchical(world_size: int, hosts: tuple[int, ...]) -> Schedule:
    """Rank r copies the inputs of its host. On every other host one rank copies rank r's input, and its neighbours copy
    it from there; ranks of a host share the inputs by the place that these have on their own hosts.

    Two rounds. Of blocks of S bytes a rank sends S to each other host, where the direct algorithm sends S to each rank.
    """
    local = ranks_by_host(hosts)
    place = {rank: index for ranks in local for index, rank in enumerate(ranks)}

    def first_there(host: int, rank: int) -> int:
        return local[host][place[rank] % len(local[host])]

    def rounds() -> Iterator[Round]:
        ranks = range(world_size)
        yield [
            copy(r, Location(s, "input", 0), Location(r, "output", s))
            for r in ranks
            for s in ranks
            if hosts[s] == hosts[r] or first_there(hosts[r], s) == r
        ]
        yield [
            copy(r, Location(first_there(hosts[r], s), "output", s), Location(r, "output", s))
            for r in ranks
            for s in ranks
            if hosts[s] != hosts[r] and first_there(hosts[r], s) != r
        ]

    return Schedule("all_gather", "hierarchical", world_size, rounds)
