"""Who is linked to whom, and by which links a message travels: rings, lines, tori, meshes, switches, all nested.

Every topology here is a product of dimensions: a torus of 8x8 is a ring of 8 in both, a host ring with a network is a
ring and a switch. Ranks count through the inner dimension first. Ranks that differ in one dimension only are joined by
an instance of that dimension's kind; a message corrects its dimensions from the inner to the outer one, each on the
shortest way. Knows no Schedules and no sizes.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from itertools import product
from math import isqrt, prod
from typing import Literal, NamedTuple, cast

from hxcomm.sim import chips
from hxcomm.sim.chips import Chip, Links

_LEVEL = re.compile(r"(ring|line|torus|mesh|switch|full)(?::(\d+(?:x\d+)*))?$")
_FAULT = re.compile(r"(slow-link:(\d+)-(\d+):(\d+(?:\.\d+)?|\.\d+)x|dead-link:(\d+)-(\d+))$")


class InterconnectError(ValueError):
    """The ranks cannot be linked as asked. The text says which, and what is allowed."""


class Link(NamedTuple):
    """One direction of a cable. Ranks are nodes 0 ... n-1, switches have the numbers above."""

    source: int
    target: int
    bytes_per_s: Fraction
    latency_ps: int
    per_message_ps: int
    forwarding: chips.Forwarding
    tick_ps: int


class Fault(NamedTuple):
    """Both directions between two neighbours: with `speed` of their bandwidth, or dead where that is 0."""

    a: int
    b: int
    speed: Fraction


class Dimension(NamedTuple):
    kind: Literal["ring", "line", "switch", "full"]
    size: int
    directions: int
    level: Links


@dataclass(frozen=True, eq=False)
class Interconnect:
    """links: where the network rotates, those that are alike for all ranks stand together, in the order of ranks.
    dimensions: where there are none, only the links count, and messages take the fewest hops."""

    world_size: int
    links: tuple[Link, ...]
    dimensions: tuple[Dimension, ...] = ()
    faults: tuple[Fault, ...] = ()
    _routes: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def rotates(self) -> bool:
        """Whether renaming rank r to r+1 changes nothing."""
        kinds = [each.kind for each in self.dimensions if each.size > 1]
        if self.faults or not self.dimensions:
            return False
        return not kinds or (len(kinds) == 1 and kinds[0] != "line")

    @cached_property
    def identity(self) -> tuple[object, ...]:
        """Equal where times are."""
        dimensions = tuple([(each.kind, each.size, each.directions, *_values(each.level)) for each in self.dimensions])
        return self.world_size, dimensions or self.links, self.faults

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Interconnect) and self.identity == other.identity)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self.identity)

    @cached_property
    def hosts(self) -> tuple[int, ...] | None:
        """By the number of each rank's innermost ring, line or switch, for algorithms that depend on where ranks are:
        its row of a torus, its host of ring:8/switch:4. None where there is one such set only."""
        sizes = [each.size for each in self.dimensions if each.size > 1]
        return tuple([rank // sizes[0] for rank in range(self.world_size)]) if len(sizes) > 1 else None

    def route(self, source: int, target: int) -> tuple[int, ...]:
        """The links by which a message of a rank reaches another one, in order. Raises InterconnectError for none."""
        if not (0 <= source < self.world_size and 0 <= target < self.world_size):
            raise InterconnectError(
                f"no route from rank {source} to {target}: the ranks are 0 to {self.world_size - 1}"
            )
        found = self._routes.get((source, target))
        if found is None:
            found = tuple(self._by_dimensions(source, target))
            if not self.dimensions or any(self.links[each].bytes_per_s == 0 for each in found):
                found = self._fewest_hops(source, target)
            self._routes[source, target] = found
        return found

    def link(self, source: int, target: int) -> int | None:
        """The number of the link between two neighbours, None where they are none."""
        return self._by_ends.get((source, target))

    def text(self) -> str:
        """One line, for tables and summaries."""
        parts = [] if self.dimensions else [f"{self.world_size} ranks on {len(self.links)} links"]
        for each in self.dimensions:
            level = each.level
            ways = {1: ", one direction", 2: ", two directions"}[each.directions] if each.kind == "ring" else ""
            cost = f", {level.per_message_ns:g} ns a message" if level.per_message_ns else ""
            fraction = f" x {level.achieved:g}" if level.achieved != 1 else ""
            tick = f", ticks of {level.tick_ps} ps" if level.tick_ps != 1 else ""
            parts.append(
                f"{each.kind} of {each.size}{ways}, {level.bandwidth_bytes_per_s / 1e9:g} GB/s{fraction} a link, "
                f"{level.latency_ns:g} ns a hop{cost}, {level.forwarding}{tick}"
            )
        faults = [
            f"{'dead' if not each.speed else f'{float(each.speed):g}x'} link {each.a}-{each.b}" for each in self.faults
        ]
        return "; ".join([*parts, *faults])

    @cached_property
    def _by_ends(self) -> dict[tuple[int, int], int]:
        return {(link.source, link.target): number for number, link in reversed(list(enumerate(self.links)))}

    @cached_property
    def _starts(self) -> dict[tuple[int, tuple[int, ...]], int]:
        """Of each instance of a dimension, by the coordinates of the others: the number of its first link."""
        starts = {}
        number = 0
        for d, others in _instances(self.dimensions):
            starts[d, others] = number
            number += _link_count(self.dimensions[d])
        return starts

    def _by_dimensions(self, source: int, target: int) -> Iterator[int]:
        at, to = _coordinates(source, self.dimensions), _coordinates(target, self.dimensions)
        for d, dimension in enumerate(self.dimensions):
            if at[d] != to[d]:
                start = self._starts[d, (*at[:d], *at[d + 1 :])]
                yield from [start + each for each in _steps(dimension, at[d], to[d])]
                at = (*at[:d], to[d], *at[d + 1 :])

    def _fewest_hops(self, source: int, target: int) -> tuple[int, ...]:
        """The fewest hops over links that live, of several the one whose links have the lowest numbers."""
        came: dict[int, int] = {source: -1}
        queue = deque([source])
        while queue and target not in came:
            node = queue.popleft()
            for number in self._leaving.get(node, ()):
                if self.links[number].bytes_per_s and self.links[number].target not in came:
                    came[self.links[number].target] = number
                    queue.append(self.links[number].target)
        if target not in came:
            raise InterconnectError(
                f"rank {source} cannot reach rank {target}: {self.text()}. Leave one of the two out, or the fault"
            )
        way = []
        node = target
        while node != source:
            way.append(came[node])
            node = self.links[came[node]].source
        return tuple(reversed(way))

    @cached_property
    def _leaving(self) -> dict[int, list[int]]:
        leaving: dict[int, list[int]] = {}
        for number, link in enumerate(self.links):
            leaving.setdefault(link.source, []).append(number)
        return leaving


def interconnect(
    chip: Chip, world_size: int, topology: str | None = None, faults: Sequence[Fault | str] = ()
) -> Interconnect:
    """The links of `world_size` ranks on such chips.

    topology: "ring", "ring:8", "torus:4x4x4", "ring:8/switch:4" (inner first) instead of the chip's; its i-th level has
    the bandwidth and latency of the chip's i-th links, or of its last. Fewer ranks than a topology has places take the
    first ones: of a ring then an open line, as no message passes a chip that is not in the group.
    faults: as parse_fault reads them. A dead link is gone round where there is another way.
    Raises InterconnectError where the ranks do not fit, or are not connected.
    """
    if world_size < 1:
        raise InterconnectError(f"{world_size} ranks: there must be 1 or more")
    levels = _levels(chip, topology)
    dimensions = tuple(_dimensions(levels, world_size, topology or "the chip's links"))
    broken = tuple(parse_fault(each) if isinstance(each, str) else each for each in faults)
    network = Interconnect(world_size, tuple(_links(dimensions, world_size)), dimensions, broken)
    return _with_faults(network) if broken else network


def parse_fault(text: str) -> Fault:
    """Of "slow-link:3-4:0.5x" or "dead-link:3-4". Raises InterconnectError."""
    found = _FAULT.match(text)
    if found is None or (found[4] and not Fraction(found[4])):
        raise InterconnectError(
            f"there is no fault {text!r}; they are written slow-link:3-4:0.5x (half the bandwidth between ranks 3 and "
            "4) and dead-link:3-4"
        )
    if found[4]:
        return Fault(int(found[2]), int(found[3]), Fraction(found[4]))
    return Fault(int(found[5]), int(found[6]), Fraction(0))


def _levels(chip: Chip, topology: str | None) -> list[Links]:
    if topology is None:
        return list(chip.links)
    levels = []
    for i, word in enumerate(topology.split("/")):
        found = _LEVEL.match(word)
        of_chip = chip.links[min(i, len(chip.links) - 1)]
        shape = tuple(map(int, found[2].split("x"))) if found and found[2] else None
        if found is None or (shape is not None and not _fits(found[1], shape)):
            raise InterconnectError(
                f"topology {topology!r}: {word!r} is none of ring, ring:8, line:4, switch:8, full:8, torus:8x8, "
                "torus:4x4x4, mesh:4x4; several levels, inner first, as ring:8/switch:4"
            )
        kind = cast(chips.Topology, found[1])
        directions = of_chip.directions if kind == "ring" else 2
        levels.append(replace(of_chip, topology=kind, shape=shape, directions=directions))
    for word, level in zip(topology.split("/")[:-1], levels, strict=False):
        if level.shape is None:
            raise InterconnectError(f"topology {topology!r}: {word} needs a size, as another level follows: {word}:8")
    return levels


def _fits(kind: str, shape: tuple[int, ...]) -> bool:
    return min(shape) > 0 and len(shape) in ((2, 3) if kind in ("torus", "mesh") else (1,))


def _dimensions(levels: Sequence[Links], world_size: int, what: str) -> Iterator[Dimension]:
    """Ranks fill the inner dimensions first, whole ones only, but the outermost that they need."""
    left = world_size
    for level in levels:
        shape = level.shape or _shape_for(level, left)
        for size in shape:
            taken = min(size, left)
            if left % taken:
                raise InterconnectError(
                    f"{world_size} ranks do not fill {what}: {left} of them are no multiple of the {size} of a "
                    f"{level.topology}; give another topology or number of ranks"
                )
            left //= taken
            kind: Literal["ring", "line", "switch", "full"]
            if level.topology == "torus" or level.topology == "ring":
                kind = "ring" if taken == size else "line"
            elif level.topology == "mesh":
                kind = "line"
            else:
                kind = level.topology
            if taken < size and level.directions == 1 and taken > 1:
                raise InterconnectError(
                    f"{world_size} ranks of {what}: {taken} of a ring of {size} with one direction cannot answer each "
                    "other; take the whole ring, or links with two directions"
                )
            yield Dimension(kind, taken, level.directions, level)
    if left > 1:
        places = world_size // left
        raise InterconnectError(f"{world_size} ranks, but {what} has only {places} places: give a larger topology")


def _shape_for(level: Links, ranks: int) -> tuple[int, ...]:
    if level.topology not in ("torus", "mesh"):
        return (ranks,)
    short = next(side for side in range(isqrt(ranks), 0, -1) if ranks % side == 0)
    return ranks // short, short


def _coordinates(rank: int, dimensions: Sequence[Dimension]) -> tuple[int, ...]:
    at = []
    for each in dimensions:
        at.append(rank % each.size)
        rank //= each.size
    return tuple(at)


def _instances(dimensions: Sequence[Dimension]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(dimension, coordinates of the others) of each ring, line, switch or full set of chips."""
    for d in range(len(dimensions)):
        others = [range(each.size) for i, each in enumerate(dimensions) if i != d]
        yield from ((d, at) for at in product(*others))


def _link_count(dimension: Dimension) -> int:
    kind, n = dimension.kind, dimension.size
    if n == 1:
        return 0
    if kind == "ring":
        return n if dimension.directions == 1 or n == 2 else 2 * n
    return {"line": 2 * (n - 1), "switch": 2 * n, "full": n * (n - 1)}[kind]


def _ends(dimension: Dimension) -> Iterator[tuple[int, int]]:
    """(source, target) of each link of an instance, in the order of their numbers; n stands for the switch."""
    kind, n = dimension.kind, dimension.size
    if n == 1:
        return
    if kind == "ring":
        yield from ((i, (i + 1) % n) for i in range(n))
        if _link_count(dimension) > n:
            yield from ((i, (i - 1) % n) for i in range(n))
    elif kind == "line":
        yield from ((i, i + 1) for i in range(n - 1))
        yield from ((i + 1, i) for i in range(n - 1))
    elif kind == "switch":
        yield from ((i, n) for i in range(n))
        yield from ((n, i) for i in range(n))
    else:
        yield from ((i, (i + distance) % n) for distance in range(1, n) for i in range(n))


def _steps(dimension: Dimension, at: int, to: int) -> list[int]:
    """The links of an instance, counted from its first, that lead from one place to another; ties go upwards."""
    kind, n = dimension.kind, dimension.size
    up = (to - at) % n
    if kind == "ring":
        if _link_count(dimension) == n or up <= n - up:
            return [(at + i) % n for i in range(up)]
        return [n + (at - i) % n for i in range(n - up)]
    if kind == "line":
        return list(range(at, to)) if at < to else [n - 1 + i for i in range(at - 1, to - 1, -1)]
    if kind == "switch":
        return [at, n + to]
    return [(up - 1) * n + at]


def _links(dimensions: Sequence[Dimension], world_size: int) -> Iterator[Link]:
    strides = [prod(each.size for each in dimensions[:d]) for d in range(len(dimensions))]
    switch = world_size
    for d, others in _instances(dimensions):
        dimension, values = dimensions[d], _values(dimensions[d].level)
        rest = [stride for i, stride in enumerate(strides) if i != d]
        base = sum(at * stride for at, stride in zip(others, rest, strict=True))
        nodes = [*(base + place * strides[d] for place in range(dimension.size)), switch]
        yield from (Link(nodes[source], nodes[target], *values) for source, target in _ends(dimension))
        if dimension.kind == "switch" and dimension.size > 1:
            switch += 1


def _values(level: Links) -> tuple[Fraction, int, int, chips.Forwarding, int]:
    return level.achieved_bytes_per_s, level.latency_ps, level.per_message_ps, level.forwarding, level.tick_ps


def _with_faults(network: Interconnect) -> Interconnect:
    links = list(network.links)
    for fault in network.faults:
        hit = [i for i, link in enumerate(links) if {link.source, link.target} == {fault.a, fault.b}]
        if not hit:
            near = sorted({link.target for link in links if link.source == fault.a})
            beside = f"beside {fault.a} are {', '.join(map(str, near))}" if near else f"there is no node {fault.a}"
            raise InterconnectError(f"there is no link {fault.a}-{fault.b}: {beside}")
        for i in hit:
            links[i] = links[i]._replace(bytes_per_s=links[i].bytes_per_s * fault.speed)
    broken = replace(network, links=tuple(links))
    if any(not fault.speed for fault in network.faults):
        for rank in range(1, network.world_size):  # all reach 0 and 0 reaches all, so all reach all
            broken.route(0, rank)
            broken.route(rank, 0)
    return broken
