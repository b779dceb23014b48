"""From a model, a chip and its links to what a user asks for: times, rates, energy, and whether it fits.

Records each number of ranks and batch once, and times it as often as is asked (with and without overlap).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hxcomm.predict.models import Model
from hxcomm.predict.steps import Collective, LinearAllReduce, Memory, Pass
from hxcomm.predict.timing import Parts, time_pass
from hxcomm.sim import choosing
from hxcomm.sim.chips import Chip
from hxcomm.sim.costs import CostModel
from hxcomm.sim.interconnect import Interconnect
from hxcomm.virtual.groups import gap_ps

PS_PER_MS = 10**9


@dataclass(frozen=True)
class CollectiveUse:
    """Of one decode step: calls with blocks of so many bytes, and how long one takes when all ranks are there."""

    op: str
    nbytes: int
    calls: int
    algorithm: str
    time_ps: int


@dataclass(frozen=True)
class Prediction:
    """Of one number of ranks and batch. What does not fit has no times."""

    ranks: int
    batch: int
    memory: Memory  # of the chip that needs most
    fits: bool
    decode: Parts | None = None
    prefill: Parts | None = None
    watts: float | None = None  # of one chip
    collectives: Sequence[CollectiveUse] = ()

    @property
    def ms_per_token(self) -> float | None:
        """Of one decode step, which gives every sequence a token."""
        return None if self.decode is None else self.decode.total / PS_PER_MS

    @property
    def ttft_ms(self) -> float | None:
        """Time to the first token: the prompts of the whole batch, in one pass."""
        return None if self.prefill is None else self.prefill.total / PS_PER_MS

    @property
    def tokens_per_s(self) -> float | None:
        return None if self.ms_per_token is None else self.batch * 1e3 / self.ms_per_token

    @property
    def joule_per_token(self) -> float | None:
        """All chips at the power that the chip file gives, whatever they do."""
        if self.watts is None or self.tokens_per_s is None:
            return None
        return self.watts * self.ranks / self.tokens_per_s

    def as_json(self) -> dict[str, Any]:
        """parts are milliseconds of one decode step; all but the hidden ones add up to ms_per_token."""
        parts = None
        if self.decode is not None:
            parts = {name: value / PS_PER_MS for name, value in vars(self.decode).items()}
        return {
            "ranks": self.ranks,
            "batch": self.batch,
            "ttft_ms": self.ttft_ms,
            "ms_per_token": self.ms_per_token,
            "tokens_per_s": self.tokens_per_s,
            "joule_per_token": self.joule_per_token,
            "parts": parts,
            "fits": self.fits,
        }


class Predictor:
    """Of one model on one chip, with weights stored as `weights` says."""

    def __init__(self, model: Model, chip: Chip, costs: CostModel, *, context: int, prompt: int, weights: str) -> None:
        self.model, self.chip, self.costs = model, chip, costs
        self.context, self.prompt, self.weights = context, prompt, weights
        self._recorded: dict[tuple[int, int], tuple[Pass, Pass]] = {}

    def passes(self, ranks: int, batch: int) -> tuple[Pass, Pass]:
        key = ranks, batch
        if key not in self._recorded:
            self._recorded[key] = self.model.record(
                ranks, batch=batch, context=self.context, prompt=self.prompt, stored=self.weights
            )
        return self._recorded[key]

    def memory(self, ranks: int, batch: int) -> Memory:
        return max((each.memory for each in self.passes(ranks, batch)), key=lambda memory: memory.total)

    def fits(self, ranks: int, batch: int) -> bool:
        return self.memory(ranks, batch).total <= self.chip.memory.capacity_bytes

    def smallest_that_fits(self, above: int, batch: int) -> int | None:
        """The number of ranks from which on it fits, of those that the model can be split over."""
        larger = (ranks for ranks in self.model.world_sizes() if ranks > above)
        return next((ranks for ranks in larger if self.fits(ranks, batch)), None)

    def predict(self, network: Interconnect, batch: int, *, chunks: int) -> Prediction:
        """Raises IllegalSchedule where the links can execute no algorithm of a collective that is needed."""
        ranks = network.world_size
        memory, fits = self.memory(ranks, batch), self.fits(ranks, batch)
        if not fits:
            return Prediction(ranks, batch, memory, fits)
        prefill, decode = (
            time_pass(each, self.costs, self._timer(network), chunks=chunks) for each in self.passes(ranks, batch)
        )
        watts = self.chip.power.watts if self.chip.power is not None else None
        uses = self._uses(self.passes(ranks, batch)[1], network, chunks)
        return Prediction(ranks, batch, memory, fits, decode, prefill, watts, uses)

    def _timer(self, network: Interconnect) -> Any:
        def time(collective: Collective, starts_ps: Sequence[int]) -> tuple[Sequence[int], int]:
            op, nbytes, itemsize = collective
            timing = choosing.time_collective(
                op, nbytes, self.chip, network, itemsize=itemsize, starts_ps=tuple(starts_ps)
            )
            return timing.finish_ps, gap_ps(timing)

        return time

    def _uses(self, recorded: Pass, network: Interconnect, chunks: int) -> list[CollectiveUse]:
        counted: Counter[Collective] = Counter()
        for step in recorded.streams[0].steps:
            if isinstance(step, Collective):
                counted[step] += 1
            elif isinstance(step, LinearAllReduce):
                counted.update(step.sum(columns) for columns in step.widths(chunks))
        uses = []
        for (op, nbytes, itemsize), calls in counted.items():
            choice = choosing.choose(op, nbytes, self.chip, network, itemsize=itemsize)
            uses.append(CollectiveUse(op, nbytes, calls, choice.algorithm, choice.timing.total_ps))
        return uses
