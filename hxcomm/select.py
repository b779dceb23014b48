"""Which algorithm runs a collective, and the plan for it: Python's part of a call, done once per op and size.

The communicator asks a planner when it meets an (op, dtype, reduce op, root, bytes) for the first time, and keeps the
answer. Everything a choice depends on is equal on every rank, so every rank chooses alike; the plan's hash is in the
fingerprint, and a difference raises MismatchError before a byte moves. Knows nothing of torch, memory or sockets.
"""

from __future__ import annotations

import functools
import string
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from hxcomm import _core, algorithms, environment, tuning
from hxcomm.schedule import OPS, compile_plan, prove
from hxcomm.schedule.crossing import ranks_by_host, several

if TYPE_CHECKING:
    from hxcomm.sim.chips import Chip
    from hxcomm.sim.interconnect import Interconnect

# HXCOMM_SEGMENT=... torchrun --nproc-per-node 2 -m hxcomm.bench --ops all_reduce --sizes 16MiB, p50 in us: 16 KiB 3100,
# 64 KiB 1456, 128 KiB 1311, 256 KiB 1192, 512 KiB 1161, 2 MiB 1141, one piece 1745. Smaller windows pay more
# hand-overs; from 256 KiB on it is flat until the cache is too small, so the smallest of the flat ones.
SEGMENT_BYTES = 256 << 10

# Across hosts a window is frames and a way there and back, so larger ones pay, until what is on its way leaves the
# cache. HXCOMM_SEGMENT=..., all_reduce of 16 MiB over loopback, ms, two hosts with one rank each and with two: 128 KiB
# 13.5 and 20, 256 KiB 6.7 and 10.2, 512 KiB 7.0 and 9.3, 1 MiB 5 to 20 and 8.9, 2 MiB 12 to 25 and 14.
CROSSING_SEGMENT_BYTES = 512 << 10
MESSAGE_BYTES = 4 << 20  # the most that a frame carries
_ACCUMULATED_LARGER = {"float16": 2, "bfloat16": 2}  # times as large as the dtype are partial results, also in messages

# Up to this many bytes every rank reads everything: one hand-over instead of two. HXCOMM_ALGO=all_reduce:..., p50 in us
# of one_shot and two_shot: 2 ranks, 2 KiB 11.2 and 9.2, 4 KiB 12.6 and 9.5; 4 ranks on 2 cores, where a hand-over costs
# a scheduling round, 1 KiB 49 and 95, 2 KiB 52 and 48, 4 KiB 40 and 52.
# In mapped memory two_shot has one hand-over, too, and no copy aside: p50 in us of one_shot and two_shot, interleaved
# calls of the core on 2 cores: 2 ranks, 64 B 0.95 and 0.92, 1 KiB 0.97 and 0.97, 4 KiB 1.24 and 0.99; 3 ranks, 8.19 and
# 7.98, 8.31 and 8.19, 8.55 and 8.23; 4 ranks, 21.3 and 21.0, 21.5 and 21.1, 22.0 and 21.2.
ONE_SHOT_BYTES = 2 << 10
CROSSING_ONE_SHOT_BYTES = 8 << 10  # ranks each on a host of their own; not measured
# Two ranks, each on a host of its own, send as much either way; with two_shot each reduces half. Two network namespaces
# on 2 cores, p50 in ms of one_shot and two_shot: 256 KiB 0.08 to 0.18 and 0.19 to 0.23, 4 MiB 2.2 to 2.8 and 2.5 to
# 2.8, 16 MiB 10 to 11 and 5.0 to 6.8.
CROSSING_PAIR_ONE_SHOT_BYTES = 4 << 20


@dataclass(frozen=True)
class Layout:
    """Where the ranks of a group are, as far as choices may depend on it.

    hosts: the number of each rank's host, 0, 1 ... in the order of their first ranks; left out, all are on one.
    """

    world_size: int
    hosts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        several(self.hosts or None, self.world_size)  # raises where they are not numbered so
        if not self.hosts:
            object.__setattr__(self, "hosts", (0,) * self.world_size)

    @property
    def n_hosts(self) -> int:
        return max(self.hosts) + 1


@dataclass(frozen=True)
class Hints:
    """What one call asks of the choice; None: nothing.

    algorithm: of any op; algorithms: of these ops. Both win over everything else. segment_bytes: of a window.
    rank_order: as HXCOMM_DETERMINISM=layout (True) or without it (False).
    """

    algorithm: str | None = None
    algorithms: tuple[tuple[str, str], ...] = ()
    segment_bytes: int | None = None
    rank_order: bool | None = None


@dataclass(frozen=True)
class Target:
    """The simulated chips of a group and what links them: for tensors of device hx, what they would do is done."""

    chip: Chip
    network: Interconnect

    def refusal(self, op: str, algorithm: str, root: int | None) -> str | None:
        """The rule of the chip that the algorithm breaks, or None."""
        n = self.network.world_size
        roots = {root} if not OPS[op].rooted or root is not None else {0, n - 1}
        return next((why for each in roots if (why := _refusal(self, op, algorithm, each)) is not None), None)

    def fastest(self, op: str, nbytes: int, itemsize: int, root: int | None) -> Iterator[tuple[str, str]]:
        """(algorithm, reason) of those that the chip can execute, the fastest first. ValueError where it can none."""
        from hxcomm.sim import choosing

        choice = choosing.choose(op, max(nbytes, itemsize), self.chip, self.network, itemsize=itemsize, root=root)
        times = sorted(
            {choice.algorithm: choice.timing.total_ps, **dict(choice.others)}.items(), key=lambda row: row[1]
        )
        times.sort(key=lambda row: row[0] != choice.algorithm)
        for name, ps in times:
            yield name, f"{self.chip.name} would take {ps / 1e6:g} us"


@functools.cache
def _refusal(target: Target, op: str, algorithm: str, root: int | None) -> str | None:
    from hxcomm.sim import legality

    root = root if OPS[op].rooted else None
    network = target.network
    return legality.legal(
        algorithms.build(op, algorithm, network.world_size, root, network.hosts), target.chip, network
    )


def _itemsize(dtype: str) -> int:
    return int(dtype.lstrip(string.ascii_letters) or 8) // 8  # bool has one byte


_NO_HINTS = Hints()
_hint_numbers: dict[Hints, int] = {_NO_HINTS: 0}
_hints = [_NO_HINTS]
_hints_lock = threading.Lock()


def hint_number(hints: Hints) -> int:
    """The number of these hints in this process, which a call carries. Numbers may differ by rank: what is compared
    between ranks is the choice."""
    with _hints_lock:
        if hints not in _hint_numbers:
            _hints.append(hints)
            _hint_numbers[hints] = len(_hints) - 1
        return _hint_numbers[hints]


Selector = Callable[[str, int, str, Layout, "str | None"], "str | None"]
_selectors: list[Selector] = []


def register_selector(selector: Selector) -> Selector:
    """Asks `selector(op, nbytes, dtype, layout, chip)` before the built-in choice; usable as a decorator.

    `nbytes` are of one block of the call (0 for all_to_all and for a reduce_scatter of an uneven list, whose counts
    differ by rank), `chip` is the name of the simulated chip, None outside simulation. It returns the name of an
    algorithm of that op, or None to leave the choice to the next one. Every rank must register the same selectors
    before it makes a group, and they may depend on nothing else than their arguments: ranks that choose differently
    raise MismatchError. The answer is kept for each (op, dtype, reduce op, root, nbytes).
    """
    _selectors.append(selector)
    return selector


def default_algorithm(
    op: str, nbytes: int, layout: Layout, mapped: bool = False, rank_order: bool = False
) -> tuple[str, str]:
    """The built-in choice and the reason for it. On one host only algorithms that reduce in rank order are chosen
    unasked; on several where `rank_order` asks for them."""
    if layout.n_hosts > 1:
        return _across_hosts(op, nbytes, layout, rank_order)
    if op == "all_reduce":
        if mapped and layout.world_size > 1:
            return "two_shot", "tensors that peers reach: one hand-over, and each rank reduces its share once"
        if layout.world_size == 1 or nbytes <= ONE_SHOT_BYTES:
            return "one_shot", f"at most {ONE_SHOT_BYTES} bytes: one hand-over"
        return "two_shot", f"more than {ONE_SHOT_BYTES} bytes: each rank reduces its share once"
    return "direct", "one hand-over, every byte read once"


def keeps_rank_order(op: str, algorithm: str, layout: Layout) -> bool:
    """Whether the op reduces in rank order there, or does not reduce: the same bits wherever the ranks are."""
    if not OPS[op].reduces:
        return True
    n = layout.world_size
    return all(
        prove(algorithms.build(op, algorithm, n, root, layout.hosts)).order == "rank order"
        for root in ({0, n - 1} if OPS[op].rooted else {None})
    )


def _across_hosts(op: str, nbytes: int, layout: Layout, rank_order: bool) -> tuple[str, str]:
    shared = max(map(len, ranks_by_host(layout.hosts))) > 1
    if shared and "hierarchical" in algorithms.names(op) and not (rank_order and OPS[op].reduces):
        return "hierarchical", f"{layout.n_hosts} hosts: what ranks of a host need or have in common crosses once"
    if op != "all_reduce":
        return "direct", "one hand-over between hosts"
    most = CROSSING_PAIR_ONE_SHOT_BYTES if layout.world_size == 2 else CROSSING_ONE_SHOT_BYTES
    if nbytes <= most:
        return "one_shot", f"at most {most} bytes: one hand-over between hosts"
    return "two_shot", f"more than {most} bytes: each rank reduces its share only"


class Choice(NamedTuple):
    """`segment_bytes`: of a window, where a measured one belongs to the algorithm."""

    algorithm: str
    why: str
    segment_bytes: int | None = None


@dataclass
class Planner:
    """The planner of one rank of one group.

    `overrides` maps an op to the algorithm that the user asked for (HXCOMM_ALGO or Options); it wins over selectors.
    Unknown ops and algorithms are refused here, when the group is made: ValueError listing those that exist.
    `segment_bytes`: of a window, where the user asked for it. `layout` may be set when it is known where the ranks are.
    The table that HXCOMM_TUNING names is read here, too, and wins over the built-in choice: ValueError where it is
    wrong. `target`: the chips that are simulated; they choose for tensors of device hx instead of table and built-in
    choice, and what they cannot execute is a ValueError.
    """

    rank: int
    layout: Layout
    group: str
    overrides: Mapping[str, str]
    segment_bytes: int | None = None
    target: Target | None = None
    _plans: dict[tuple[str, str, int, bool, tuple[int, ...], bool], _core.Plan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rank_order = environment.DETERMINISM.get() == "layout"
        file = environment.TUNING.get()
        self.table = tuning.load(file) if file is not None else None
        for op, algorithm in self.overrides.items():
            self._check(op, algorithm, "asked for (HXCOMM_ALGO or Options)")
            self._check_order(op, algorithm, self.rank_order)
            self._check_target(op, algorithm, "asked for (HXCOMM_ALGO or Options)")

    def _check_target(self, op: str, algorithm: str, by: str, root: int | None = None) -> None:
        if self.target is not None and (why := self.target.refusal(op, algorithm, root)) is not None:
            raise ValueError(f"{op} {algorithm}, {by}, cannot run on the simulated chip {self.target.chip.name}: {why}")

    def _check(self, op: str, algorithm: str, by: str) -> None:
        if op not in algorithms.OPS:
            raise ValueError(f"there is no op {op!r}, {by}; the ops are: {', '.join(algorithms.OPS)}")
        known = algorithms.names(op)
        if algorithm not in known:
            raise ValueError(f"{op} has no algorithm {algorithm!r}, {by}; it has: {', '.join(known)}")

    def _check_order(self, op: str, algorithm: str, rank_order: bool) -> None:
        if rank_order and not keeps_rank_order(op, algorithm, self.layout):
            raise ValueError(
                f"{op} {algorithm} does not reduce in rank order on {self.layout.n_hosts} hosts, which "
                "HXCOMM_DETERMINISM=layout asks for (as the hint does): choose another algorithm, or do not ask"
            )

    def settings(self) -> str:
        """What must be equal on every rank for their choices to agree."""
        asked = ",".join(f"{op}:{name}" for op, name in sorted(self.overrides.items())) or "default"
        segment = f"{self.segment_bytes} bytes" if self.segment_bytes else "default"
        order = "rank order" if self.rank_order else "any order"
        table = f"tuning {self.table.identity()}" if self.table else "no tuning"
        chip = f"simulating {self.target.chip.name} {self.target.chip.digest[:16]}" if self.target else "no simulation"
        return f"algorithms {asked}; segment {segment}; {order}; {len(_selectors)} selectors; {chip}; {table}"

    def _ordered(self, hints: Hints) -> bool:
        return self.rank_order if hints.rank_order is None else hints.rank_order

    def choose(
        self, op: str, nbytes: int, dtype: str, mapped: bool = False, hints: Hints = _NO_HINTS, root: int | None = None
    ) -> Choice:
        """By authority: the call's hints, what the user asked for, a registered selector, the simulated chip, the
        table, the built-in choice. `root`: None where the op has none, or any will do."""
        hinted = dict(hints.algorithms).get(op, hints.algorithm)
        asked = self._asked(op, nbytes, dtype, hinted)
        if asked is not None:
            if mapped:
                self._check_target(op, asked.algorithm, asked.why, root)
            return asked
        rank_order = self._ordered(hints)
        if self.target is not None and mapped:
            return self._of_target(self.target, op, nbytes, dtype, root, rank_order)
        measured = self._measured(op, nbytes, mapped, rank_order)
        if isinstance(measured, Choice):
            return measured
        name, why = default_algorithm(op, nbytes, self.layout, mapped, rank_order)
        return Choice(name, f"{why}{measured}")

    def _asked(self, op: str, nbytes: int, dtype: str, hinted: str | None) -> Choice | None:
        """What somebody has asked for, if anybody has."""
        if hinted is not None:
            self._check(op, hinted, "asked for by a hint")
            return Choice(hinted, "asked for by a hint")
        if op in self.overrides:
            return Choice(self.overrides[op], "asked for (HXCOMM_ALGO or Options)")
        chip = self.target.chip.name if self.target is not None else None
        for selector in reversed(_selectors):
            name = selector(op, nbytes, dtype, self.layout, chip)
            if name is not None:
                self._check(op, name, f"chosen by the selector {getattr(selector, '__name__', selector)!r}")
                return Choice(name, f"the selector {getattr(selector, '__name__', selector)!r}")
        return None

    def _of_target(
        self, target: Target, op: str, nbytes: int, dtype: str, root: int | None, rank_order: bool
    ) -> Choice:
        for name, why in target.fastest(op, nbytes, _itemsize(dtype), root):
            if not rank_order or keeps_rank_order(op, name, self.layout):
                return Choice(name, why)
        raise ValueError(
            f"{op}: HXCOMM_DETERMINISM=layout, and nothing that {target.chip.name} can execute reduces in rank order"
        )

    def _measured(self, op: str, nbytes: int, mapped: bool, rank_order: bool) -> Choice | str:
        """What the table says, or why it says nothing here: to be added to the reason for the built-in choice."""
        if self.table is None:
            return ""
        if self.table.hosts != self.layout.hosts:
            group = f"{self.layout.world_size} on {','.join(map(str, self.layout.hosts))}"
            return f" (not by {self.table.name}: it is for {self.table.where()}, this group has {group})"
        device = "hx" if mapped else "cpu"
        row = self.table.row(op, nbytes, device)
        if row is None:
            return f" (not by {self.table.name}: it has no row for {op} of {nbytes} bytes on {device})"
        if rank_order and not keeps_rank_order(op, row.algorithm, self.layout):
            return f" (not by {self.table.name}: HXCOMM_DETERMINISM=layout, and {row.algorithm} is not in rank order)"
        how = "simulated" if self.table.simulated else "measured"
        why = f"{how} ({self.table.name}): {row.us:g} us for {row.measured_bytes} bytes"
        if row.runner_up is not None:
            why += f", {row.runner_up.algorithm} {row.runner_up.us:g} us"
        return Choice(row.algorithm, why, row.segment_bytes)

    def plan(self, op: str, algorithm: str, root: int, mapped: bool, hints: Hints = _NO_HINTS) -> _core.Plan:
        """The compiled plan of this rank; compiled once. ValueError where it does not keep the order asked for."""
        hosts = self.layout.hosts
        ordered = self._ordered(hints)
        key = (op, algorithm, root, mapped, hosts, ordered)
        if key not in self._plans:
            self._check_order(op, algorithm, ordered)
            # What is timed is what runs: a simulated chip may lie on another host than this rank does.
            of_chips = self.target.network.hosts if self.target is not None and mapped else None
            schedule = algorithms.build(
                op, algorithm, self.layout.world_size, root if root >= 0 else None, of_chips or hosts
            )
            compiled = compile_plan(schedule, self.rank, private=not mapped, hosts=hosts)
            self._plans[key] = _core.Plan(words=list(compiled.words), hash=compiled.plan_hash, algorithm=algorithm)
        return self._plans[key]

    def window_bytes(self, dtype: str, measured: int | None = None, hinted: int | None = None) -> int:
        """Of a block, for ops that are cut into windows; `measured` is what the table says, `hinted` the call."""
        asked = hinted or self.segment_bytes or measured
        if self.layout.n_hosts == 1:
            return asked or SEGMENT_BYTES
        # Where a window is one chunk, all of it is one message.
        return min(asked or CROSSING_SEGMENT_BYTES, MESSAGE_BYTES // _ACCUMULATED_LARGER.get(dtype, 1))

    def __call__(
        self, op: str, dtype: str, reduce_op: str, root: int, nbytes: int, mapped: bool = False, hints: int = 0
    ) -> tuple[_core.Plan, int]:
        """`mapped`: peers reach the tensors of the call, so the plan touches them; else it goes through scratch.
        `hints`: by their number."""
        asked = _hints[hints]
        choice = self.choose(op, nbytes, dtype, mapped, asked, root if root >= 0 else None)
        window = self.window_bytes(dtype, choice.segment_bytes, asked.segment_bytes)
        if "algo" in environment.DEBUG.get():
            print(
                f"hxcomm: rank {self.rank} of '{self.group}': {op} of {nbytes} bytes {dtype} runs "
                f"{choice.algorithm}: {choice.why}",
                file=sys.stderr,
                flush=True,
            )
        return self.plan(op, choice.algorithm, root, mapped, asked), window
