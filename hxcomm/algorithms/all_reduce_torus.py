"""Torus all_reduce: rings along rows and columns, of which every link carries some at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hxcomm.schedule import Location, Round, Schedule, Transfer, copy, ranks_by_host, reduce

Grid = Sequence[Sequence[int]]  # rows of ranks, all of the same length


def all_reduce_torus(world_size: int, hosts: tuple[int, ...]) -> Schedule:
    """The ranks of a host are a row; those in the same place of each row are a column. A fourth of the data is reduced
    along the rows, then along the columns, and spread along the columns, then the rows; another fourth takes the ways
    round the other way; the last two begin with the columns. Where rows differ in length all ranks are one row.

    2(c-1) + 2(r-1) rounds for r rows of c ranks, between neighbours of a torus only. Of S bytes each hop carries about
    S/2, where the ring of all ranks carries 2S. Each chunk of a row's or column's share is a message of its own.
    Source: Jain and Sabharwal, Optimal bucket algorithms for large MPI collectives on torus interconnects, ICS (2010).
    """
    rows: Grid = ranks_by_host(hosts)
    if len({len(row) for row in rows}) > 1:
        rows = [range(world_size)]
    if world_size == 1:
        return Schedule(
            "all_reduce", "torus", 1, lambda: [[reduce(0, [Location(0, "input", 0)], Location(0, "output", 0))]]
        )
    columns = list(zip(*rows, strict=True))
    grids = [each for grid in ([rows, columns] if len(rows) > 1 else [rows]) for each in (grid, _turned_round(grid))]
    slots = 2 * (max(len(rows), len(columns)) if len(rows) > 1 else 1) + 2  # of scratch, for each grid

    def rounds() -> Iterator[Round]:
        each = [_rounds(grid, number * world_size, number * slots) for number, grid in enumerate(grids)]
        for together in zip(*each, strict=True):
            yield [transfer for transfers in together for transfer in transfers]

    return Schedule(
        "all_reduce", "torus", world_size, rounds, pieces=len(grids) * world_size, scratch=len(grids) * slots
    )


def _turned_round(grid: Grid) -> Grid:
    return [list(reversed(row)) for row in reversed(grid)]


def _rounds(grid: Grid, first_chunk: int, first_slot: int) -> Iterator[list[Transfer]]:
    """Of the part that begins with the rows. Share b of it is r chunks: rank (a, b) gathers share b+1 of its row, and
    of that chunk a+1 of its column, as ranks do in all_reduce_ring."""
    r, c = len(grid), len(grid[0])
    places = [(a, b) for a in range(r) for b in range(c)]

    def at(a: int, b: int) -> int:
        return grid[a % r][b % c]

    def chunk(share: int, a: int) -> int:
        return first_chunk + share % c * r + a % r

    def of_row(a: int, b: int, k: int, share: int, part: int) -> Location:
        """What rank (a, b) has of a chunk after round k along its row."""
        if k == 0:
            return Location(at(a, b), "input", chunk(share, part))
        if k == c - 1 and r == 1:
            return Location(at(a, b), "output", chunk(share, part))
        return Location(at(a, b), "scratch", first_slot + k % 2 * r + part % r)

    def of_column(a: int, b: int, k: int) -> Location:
        """After round k along its column: of chunk a-k, which is complete after the last one."""
        if k == 0:
            return of_row(a, b, c - 1, b + 1, a)
        if k == r - 1:
            return Location(at(a, b), "output", chunk(b + 1, a + 1))
        return Location(at(a, b), "scratch", first_slot + 2 * r + k % 2)

    def passed(a: int, b: int, to: int, share: int, part: int) -> Transfer:
        return copy(to, Location(at(a, b), "output", chunk(share, part)), Location(to, "output", chunk(share, part)))

    for k in range(1, c):
        yield [
            reduce(
                at(a, b),
                [of_row(a, b - 1, k - 1, b - k, part), of_row(a, b, 0, b - k, part)],
                of_row(a, b, k, b - k, part),
            )
            for a, b in places
            for part in range(r)
        ]
    for k in range(1, r):
        yield [
            reduce(at(a, b), [of_column(a - 1, b, k - 1), of_row(a, b, c - 1, b + 1, a - k)], of_column(a, b, k))
            for a, b in places
        ]
    for k in range(r - 1):
        yield [passed(a - 1, b, at(a, b), b + 1, a - k) for a, b in places]
    for k in range(c - 1):
        yield [passed(a, b - 1, at(a, b), b - k, part) for a, b in places for part in range(r)]
