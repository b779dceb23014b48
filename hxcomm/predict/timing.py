"""How long a recorded pass takes on chips: ops one after another on each rank, collectives among all of them.

Each rank has a clock. An op advances its rank's; a collective begins on each rank when the rank's clock says so, and
the simulated links say when it ends there. Knows neither torch nor models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from hxcomm.predict.steps import Collective, LinearAllReduce, Pass, Step
from hxcomm.sim.costs import KINDS, CostModel, OpRecord

# Of a collective that the ranks begin at these times: when each is done, in picoseconds of the same clock, and how long
# after its start the next one may begin, when the links have carried it (the rest is latency).
TimeCollective = Callable[[Collective, Sequence[int]], tuple[Sequence[int], int]]


@dataclass(frozen=True)
class Parts:
    """Where the time of one rank went, in picoseconds. What is hidden passed while others of these did."""

    weights: int
    kv_cache: int
    other: int
    exposed_communication: int
    hidden_communication: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.other + self.exposed_communication


@dataclass
class _Clock:
    """Of one rank."""

    now: int = 0
    ops: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    exposed: int = 0
    hidden: int = 0


def time_pass(recorded: Pass, costs: CostModel, time_collective: TimeCollective, *, chunks: int) -> Parts:
    """Of the rank that is done last. `chunks` is how many pieces of a product travel while the next one is computed."""
    clocks = [_Clock() for _ in recorded.stream_of_rank]
    # Ranks with shares of other shapes may need other ops (a copy more), but all make the same calls in the same order.
    for between in zip(*(_up_to_each_call(stream.steps) for stream in recorded.streams), strict=True):
        of_ranks = [between[stream] for stream in recorded.stream_of_rank]
        for clock, (ops, _) in zip(clocks, of_ranks, strict=True):
            _compute(clock, ops, costs)
        calls = [call for _, call in of_ranks]
        if isinstance(calls[0], Collective):
            _communicate(clocks, calls, time_collective)
        elif isinstance(calls[0], LinearAllReduce):
            _overlap(clocks, calls, costs, time_collective, chunks)
    last = max(clocks, key=lambda clock: clock.now)
    return Parts(**last.ops, exposed_communication=last.exposed, hidden_communication=last.hidden)


def _up_to_each_call(steps: Sequence[Step]) -> Iterator[tuple[list[OpRecord], Collective | LinearAllReduce | None]]:
    """The ops up to each call that all ranks make, and the call; in the end the ops after the last one, and None."""
    ops: list[OpRecord] = []
    for step in steps:
        if isinstance(step, OpRecord):
            ops.append(step)
        else:
            yield ops, step
            ops = []
    yield ops, None


def _compute(clock: _Clock, ops: Sequence[OpRecord], costs: CostModel) -> None:
    for record in ops:
        time_ps = costs.op_ps(record)
        clock.now += time_ps
        clock.ops[record.kind] += time_ps


def _communicate(clocks: list[_Clock], of_ranks: Sequence[object], time_collective: TimeCollective) -> None:
    collective = of_ranks[0]
    assert isinstance(collective, Collective)
    finish, _ = time_collective(collective, [clock.now for clock in clocks])
    for clock, done in zip(clocks, finish, strict=True):
        clock.exposed += done - clock.now
        clock.now = done


def _overlap(
    clocks: list[_Clock],
    of_ranks: Sequence[object],
    costs: CostModel,
    time_collective: TimeCollective,
    chunks: int,
) -> None:
    """Chunk k travels while chunk k + 1 is computed; a rank's links take its chunks one after another.

    The same rule as for asynchronous collectives of a run under HXCOMM_SIM.
    """
    linears = [step for step in of_ranks if isinstance(step, LinearAllReduce)]
    computed = [clock.now for clock in clocks]
    free = [0] * len(clocks)  # when the links take the next chunk
    done = [0] * len(clocks)
    travelled = [0] * len(clocks)
    for width in linears[0].widths(chunks):
        for rank, linear in enumerate(linears):
            time_ps = costs.op_ps(linear.product(width))
            clocks[rank].ops["weights"] += time_ps
            computed[rank] += time_ps
        starts = [max(pair) for pair in zip(computed, free, strict=True)]
        finish, gap = time_collective(linears[0].sum(width), starts)
        for rank, (start, end) in enumerate(zip(starts, finish, strict=True)):
            travelled[rank] += max(end, done[rank]) - max(start, done[rank])
            done[rank] = max(end, done[rank])
            free[rank] = start + gap
    for rank, clock in enumerate(clocks):
        exposed = done[rank] - computed[rank]
        clock.now = done[rank]
        clock.exposed += exposed
        clock.hidden += travelled[rank] - exposed
