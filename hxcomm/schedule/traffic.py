"""What a Schedule moves over each hop of the ring of chips, on the shortest way round, messages too."""

from __future__ import annotations

from hxcomm.schedule.extents import piece_extent
from hxcomm.schedule.schedule import Buffer, Schedule
from hxcomm.schedule.symbolic import Mark, State, Value, steps


def ring_hop_chunks(schedule: Schedule) -> list[list[tuple[Buffer, int]]]:
    """Per hop i (from rank i to rank i+1 modulo n, both directions) the ("input", chunk) whose extent each value has
    that crosses it. Ties between the two ways round go upwards. Empty lists for one rank."""
    return [[("input", value.chunk) for value in hop] for hop in _hops(schedule)]


def ring_hop_bytes(
    schedule: Schedule, count: int, itemsize: int, accumulation_itemsize: int | None = None
) -> list[int]:
    """Bytes over each hop i -> i+1, both directions added, as len n list, for blocks of `count` elements each.

    Where partial results are wider than the elements (float32 for 16-bit floats), accumulation_itemsize says so.
    """
    sizes = [end - first for first, end in (piece_extent(count, schedule.pieces, p) for p in range(schedule.pieces))]
    wide = itemsize if accumulation_itemsize is None else accumulation_itemsize
    return [
        sum(sizes[v.chunk % schedule.pieces] * (wide if v.mark == Mark.PARTIAL else itemsize) for v in hop)
        for hop in _hops(schedule)
    ]


def _hops(schedule: Schedule) -> list[list[Value]]:
    n = schedule.world_size
    hops: list[list[Value]] = [[] for _ in range(n)]

    def move(source: int, destination: int, value: Value) -> None:
        upwards = (destination - source) % n
        first, length = (source, upwards) if upwards <= n - upwards else (destination, n - upwards)
        for hop in range(first, first + length):
            hops[hop % n].append(value)

    for _, found in steps(schedule, State(schedule)):
        for transfer, loaded, stored in found:
            for at, value in zip(transfer.sources, loaded, strict=True):
                if at.rank != transfer.rank:
                    move(at.rank, transfer.rank, value)
            for at in transfer.destinations:
                if at.rank != transfer.rank:
                    move(transfer.rank, at.rank, stored)
    return hops
