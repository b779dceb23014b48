"""Hierarchical all_reduce: reduced within each host, exchanged between hosts, spread within each host."""

from __future__ import annotations

from collections.abc import Iterator

from hxcomm.schedule import Location, Round, Schedule, copy, ranks_by_host, reduce

# Of a slice each of h hosts sends h-1 when all reduce all of it, 2(h-1)/h when each reduces its part and sends that to
# the others: less from 3 hosts on, by enough to pay for one more hand-over between hosts from 4 on.
HOSTS_THAT_SHARE_SLICES = 4


def all_reduce_hierarchical(world_size: int, hosts: tuple[int, ...]) -> Schedule:
    """As many slices as the largest host has ranks; each host deals them out to its ranks. The owner of a slice reduces
    it within its host; the owners of the same slice exchange their partial results and reduce them in the order of
    hosts; each stores the result to all ranks of its host.

    Of S bytes all ranks of a host together send S to every other host, where flat algorithms send S for each rank; from
    4 hosts on less, 2S/h. Two rounds, three from 4 hosts on. Reduces within hosts first, so not in rank order where a
    host but the first has several ranks.
    Source: Cho et al., BlueConnect: Decomposing All-Reduce for Deep Learning on Heterogeneous Network Hierarchy (2019).
    """
    local = ranks_by_host(hosts)
    everywhere = range(len(local))
    slices = max(map(len, local))
    parts = len(local) if len(local) >= HOSTS_THAT_SHARE_SLICES else 1  # of a slice

    def owner(host: int, slice_: int) -> int:
        return local[host][slice_ % len(local[host])]

    def partial(host: int, slice_: int, part: int) -> Location:
        if len(local[host]) == 1:
            return Location(local[host][0], "input", slice_ * parts + part)
        return Location(owner(host, slice_), "scratch", slice_ // len(local[host]) * parts + part)

    def outputs(host: int, chunk: int) -> list[Location]:
        return [Location(rank, "output", chunk) for rank in local[host]]

    def rounds() -> Iterator[Round]:
        owners = [(host, slice_) for host in everywhere for slice_ in range(slices)]
        if len(local) == 1:
            yield [
                reduce(owner(0, slice_), [Location(rank, "input", slice_) for rank in local[0]], *outputs(0, slice_))
                for slice_ in range(slices)
            ]
            return
        yield [
            reduce(
                owner(host, slice_),
                [Location(rank, "input", slice_ * parts + part) for rank in local[host]],
                partial(host, slice_, part),
            )
            for host, slice_ in owners
            for part in range(parts)
            if len(local[host]) > 1
        ]
        mine = [(host, slice_, host if parts > 1 else 0) for host, slice_ in owners]
        yield [
            reduce(
                owner(host, slice_),
                [partial(each, slice_, part) for each in everywhere],
                *outputs(host, slice_ * parts + part),
            )
            for host, slice_, part in mine
        ]
        if parts > 1:
            yield [
                copy(
                    owner(host, slice_),
                    Location(owner(part, slice_), "output", slice_ * parts + part),
                    *outputs(host, slice_ * parts + part),
                )
                for host, slice_ in owners
                for part in everywhere
                if part != host
            ]

    fewest = min([len(ranks) for ranks in local if len(ranks) > 1], default=0)
    scratch = -(-slices // fewest) * parts if fewest and len(local) > 1 else 0
    return Schedule("all_reduce", "hierarchical", world_size, rounds, pieces=slices * parts, scratch=scratch)
