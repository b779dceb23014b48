"""The clock of this rank in virtual time, and what it has been advanced by.

The clock itself is in C++ (csrc/torch/device/virtual_clock.*), which asks `_cost_of` once for each operator and shape.
A Python mode around every op would cost more than many of them do.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

from hxcomm import environment
from hxcomm.sim import chips
from hxcomm.sim.costs import KINDS, CostModel
from hxcomm.virtual.op_records import TensorMeta, record_of

OUTSIDE = "outside of any region"
# C++ has torch's old names of the dtypes; of those not here, the new name is the old one in small letters.
_DTYPES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
}
_lock = threading.Lock()
_regions: dict[str, int] = {OUTSIDE: 0}
_model: CostModel | None = None
_started_as: tuple[str | None, str | None, str | None] | None = None


@dataclass(frozen=True)
class Parts:
    """Picoseconds of virtual time. `hidden` is the communication that ran beside something else: no part of the sum."""

    weights: int = 0
    kv_cache: int = 0
    other: int = 0
    exposed: int = 0
    hidden: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.other + self.exposed

    def __sub__(self, before: Parts) -> Parts:
        return Parts(**{each.name: getattr(self, each.name) - getattr(before, each.name) for each in fields(self)})

    def __add__(self, more: Parts) -> Parts:
        return Parts(**{each.name: getattr(self, each.name) + getattr(more, each.name) for each in fields(self)})


@dataclass(frozen=True)
class Collectives:
    """What this rank's calls of one op, algorithm and size in one group have taken, waiting for peers included."""

    calls: int
    ps: int


@dataclass(frozen=True)
class CollectiveKey:
    group: str
    op: str
    algorithm: str
    nbytes: int  # of one block
    itemsize: int
    root: int | None


@dataclass(frozen=True)
class Report:
    """Virtual time up to a moment, or between two of them (`later - earlier`)."""

    chip: str
    total_ps: int
    regions: Mapping[str, Parts]
    collectives: Mapping[CollectiveKey, Collectives]
    untimed: Mapping[str, int]
    """Calls that took no virtual time: collectives of CPU tensors (and barriers), messages, operations on windows."""
    ops: int = field(default=0)

    @property
    def parts(self) -> Parts:
        return sum(self.regions.values(), Parts())

    def __sub__(self, before: Report) -> Report:
        none = Collectives(0, 0)
        collectives = {
            key: Collectives(now.calls - was.calls, now.ps - was.ps)
            for key, now in self.collectives.items()
            if now.calls > (was := before.collectives.get(key, none)).calls
        }
        regions = {name: parts - before.regions.get(name, Parts()) for name, parts in self.regions.items()}
        return Report(
            self.chip,
            self.total_ps - before.total_ps,
            {name: parts for name, parts in regions.items() if parts != Parts()},
            collectives,
            {what: count - before.untimed.get(what, 0) for what, count in self.untimed.items()},
            self.ops - before.ops,
        )


@cache
def chip() -> chips.Chip:
    """The one that HXCOMM_SIM names, looked at once. Raises ChipError, a ValueError."""
    name = environment.SIM.get()
    if name is None:
        raise ValueError("HXCOMM_SIM is not set: it names the chip that is simulated (`hxcomm chips` lists them)")
    return chips.load(name)


def is_running() -> bool:
    """Whether this process tells virtual time."""
    return _model is not None


def start() -> None:
    """From now on ops of hx take virtual time. Harmless when called again. Raises ValueError where the chip or the
    costs that the environment names are wrong."""
    global _model, _started_as
    asked = environment.SIM.get(), environment.SIM_COSTS.get(), environment.SIM_OUT.get()
    with _lock:
        if _model is not None:
            if asked != _started_as:
                raise ValueError(
                    f"HXCOMM_SIM, HXCOMM_SIM_COSTS and HXCOMM_SIM_OUT are {asked}, but this process began with "
                    f"{_started_as}: a process simulates one chip from its first use of hx or its first group on"
                )
            return
        from hxcomm import _C

        out = environment.SIM_OUT.get()
        model = CostModel(chip(), environment.SIM_COSTS.get())
        _C.clock_start(_cost_of, records=out is not None)
        _model, _started_as = model, asked
    from hxcomm.virtual import recording, summary

    if out is not None:
        recording.write_at_exit(out)
    atexit.register(summary.tell_at_exit)


def _cost_of(name: str, arguments: Sequence[Any], results: Sequence[Any]) -> tuple[int, int]:
    """What an op takes, and the number of its kind. Asked by C++: tensors are tuples, lists are lists."""
    if _model is None:
        raise RuntimeError("the virtual clock has no costs: hxcomm.virtual.clock.start() has not been called")
    outputs = [each for each in map(_meta, results) for each in (each if isinstance(each, list) else [each])]
    tensors = [each for each in outputs if isinstance(each, TensorMeta)]
    record = record_of(name.partition(".")[0], [_meta(each) for each in arguments], tensors)
    return _model.op_ps(record), KINDS.index(record.kind)


def _meta(value: Any) -> Any:
    if isinstance(value, tuple):
        shape, strides, dtype, nbytes = value
        return TensorMeta(shape, strides, _DTYPES.get(dtype, dtype.lower()), nbytes)
    return [_meta(each) for each in value] if isinstance(value, list) else value


def now_ps() -> int:
    """This rank's clock. Raises RuntimeError where none runs."""
    return _extension().clock_now_ps()  # type: ignore[no-any-return]


def _extension() -> Any:
    if _model is None:
        raise RuntimeError("no chip is simulated in this process: set HXCOMM_SIM, and use tensors of device hx")
    from hxcomm import _C

    return _C


def enter(name: str) -> int:
    """What follows is part of that region, until another is entered. Returns the number of the one before.

    A tenth of a microsecond; harmless where no clock runs."""
    if _model is None:
        return 0
    number = _regions.get(name)
    if number is None:
        with _lock:
            number = _regions.setdefault(name, _extension().clock_add_region())
    return int(_extension().clock_enter(number))


@contextlib.contextmanager
def region(name: str) -> Iterator[None]:
    """Context manager: the ops and collectives inside are summed up under that name."""
    before = enter(name)
    try:
        yield
    finally:
        if _model is not None:
            _extension().clock_enter(before)


def report() -> Report:
    """What has taken virtual time on this rank since the clock started."""
    from hxcomm import algorithms

    extension = _extension()
    names = {number: name for name, number in _regions.items()}
    regions = {}
    ops = 0
    for number, (times, calls, exposed, communication) in enumerate(extension.clock_regions()):
        weights, kv_cache, other = times
        regions[names[number]] = Parts(weights, kv_cache, other, exposed, communication - exposed)
        ops += sum(calls)
    collectives: dict[CollectiveKey, Collectives] = {}
    untimed = {"collectives of CPU tensors": 0, "messages": 0, "operations on windows": 0}
    for group, _, rows, counts, _ in extension.clock_collectives():
        for (op, algorithm, nbytes, itemsize, root), calls, ps in rows:
            key = CollectiveKey(group, algorithms.OPS[op], algorithm, nbytes, itemsize, root if root >= 0 else None)
            before = collectives.get(key, Collectives(0, 0))  # of an earlier group of this name
            collectives[key] = Collectives(before.calls + calls, before.ps + ps)
        for what, count in zip(untimed, counts, strict=True):
            untimed[what] += count
    return Report(chip().name, extension.clock_now_ps(), regions, collectives, untimed, ops)
