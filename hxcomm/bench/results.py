"""What was measured, as data: the lines of the table and the JSON file. Knows nothing of torch or of printing."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One backend on one op and size. Bandwidths as nccl-tests defines them, in 1e9 bytes per second.

    algbw is size / time; busbw is algbw times what each rank's link must at least carry of the size.
    """

    backend: str
    op: str
    nbytes: int
    count: int
    dtype: str
    reduce_op: str  # "" for ops that do not reduce
    touched: bool
    iterations: int
    time_us: float  # the mean, as in nccl-tests
    p50_us: float
    p99_us: float
    algbw_gbps: float
    busbw_gbps: float
    n_wrong: int  # elements, over all ranks; of barrier: ranks that left too early


@dataclass(frozen=True)
class Floor:
    """What the machine allows for an all_reduce of this size."""

    nbytes: int
    transfers_us: float  # the plan's transfers, with no fingerprint, deadline, Python or torch around them
    copy_gbps: float  # memcpy of as many bytes, every rank at the same time


@dataclass(frozen=True)
class ZmqProbe:
    """One way between two ranks over loopback TCP, through pyzmq."""

    nbytes: int
    one_way_us: float
    gbps: float


TORCHCOMM = "torchcomm"  # the name of hxcomm measured through its own API


@dataclass
class Report:
    """Everything of one run."""

    world_size: int
    backend: str
    compare: str | None
    device: str  # of the backend's tensors
    cores: int
    torch: str
    command: str
    rows: list[Row] = field(default_factory=list)
    floors: list[Floor] = field(default_factory=list)
    hand_over_ns: float | None = None  # a flag there and back between two ranks
    zmq: list[ZmqProbe] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # what a backend refused, and why

    def row(self, backend: str, op: str, nbytes: int) -> Row | None:
        return next((r for r in self.rows if (r.backend, r.op, r.nbytes) == (backend, op, nbytes)), None)

    def floor(self, nbytes: int) -> Floor | None:
        return next((floor for floor in self.floors if floor.nbytes == nbytes), None)

    def n_wrong(self) -> int:
        """Wrong elements of the backends that were asked for: the probe that does nothing is always wrong."""
        return sum(row.n_wrong for row in self.rows if row.backend in (self.backend, self.compare))

    def ratio(self, op: str, nbytes: int) -> float | None:
        """How many times faster the measured backend is than the one compared with, by medians."""
        ours = self.row(self.backend, op, nbytes)
        theirs = self.row(self.compare, op, nbytes) if self.compare else None
        return theirs.p50_us / ours.p50_us if ours and theirs and ours.p50_us > 0 else None

    def floor_ratio(self, op: str, nbytes: int) -> float | None:
        """(time - what c10d costs with a backend that does nothing) / the transfers alone, by medians. Calls that do
        not go through c10d are taken as they are."""
        ours, nothing, floor = self.row(self.backend, op, nbytes), self.row("nothing", op, nbytes), self.floor(nbytes)
        if op != "all_reduce" or not (ours and nothing and floor) or floor.transfers_us <= 0:
            return None
        return (ours.p50_us - (nothing.p50_us if self.by_c10d else 0)) / floor.transfers_us

    @property
    def by_c10d(self) -> bool:
        return self.backend != TORCHCOMM

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def bandwidths(nbytes: int, seconds: float, bus_factor: float) -> tuple[float, float]:
    """(algbw, busbw) in 1e9 bytes per second; (0, 0) for a time too short to be told from none."""
    algbw = nbytes / seconds / 1e9 if seconds > 0 else 0.0
    return algbw, algbw * bus_factor
