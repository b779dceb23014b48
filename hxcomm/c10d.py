"""`backend="hxcomm"` for torch.distributed: registration, group creation, statistics.

A thin front end: it turns torch's store and options into a group of the communicator and hands that to the C++ process
group. Knows torch; knows nothing of algorithms beyond their names, nor of shared memory.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Backend as BackendBase
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.distributed_c10d import BackendConfig

from hxcomm import build_check, environment

if TYPE_CHECKING:
    from hxcomm import _C, _core, bootstrap
    from hxcomm.virtual.groups import SimulatedGroup

BACKEND = "hxcomm"


class Options(BackendBase.Options):
    """What `pg_options=` takes: `hxcomm.Options(algorithms={"all_reduce": "ring"})`.

    algorithms: op -> algorithm, instead of the selector's choice, for this group; wins over HXCOMM_ALGO.
    segment_bytes: bytes of a staging window; None: HXCOMM_SEGMENT, or the default.
    """

    def __init__(self, algorithms: dict[str, str] | None = None, segment_bytes: int | None = None) -> None:
        super().__init__(BACKEND, datetime.timedelta(minutes=30))
        self.algorithms = dict(algorithms or {})
        if segment_bytes is not None and segment_bytes < 1:
            raise ValueError(f"segment_bytes is {segment_bytes}; it must be positive")
        self.segment_bytes = segment_bytes

    def __deepcopy__(self, memo: dict[int, Any]) -> Options:
        """torch copies those of the parent for split_group."""
        return Options(self.algorithms, self.segment_bytes)


class Statistic(TypedDict):
    """What one group has done with one algorithm of one op, seen by this rank."""

    group: str
    op: str
    algorithm: str
    dtype: str
    calls: int
    nbytes: int
    """Payload bytes: of one block (a tensor, or one rank's part of it) per call, added up."""
    memory: str
    """How peers met: `mapped` (in the tensors themselves, on device hx) or `staged` (copied through scratch)."""
    time_ns: int
    """Inside the collective, waiting for peers included."""
    waiting_ns: int
    """Of that, waiting: for peers, or for a thread that moves an async op on. 0 where HXCOMM_STATS is not set."""
    hop_bytes: list[int]
    """Bytes that all ranks' transfers moved over the ring's hop i -> i+1, both directions, as the schedule says."""


def register_backend() -> None:
    """Makes `backend="hxcomm"` known to torch.distributed, for cpu and, where it is registered, the device hx. Harmless
    when called twice."""
    if not dist.is_available() or hasattr(dist.Backend, BACKEND.upper()):
        return
    from hxcomm.device import registration

    default = dist.Backend.default_device_backend_map.get("cpu")
    devices = ["cpu", registration.NAME] if registration.is_registered() else ["cpu"]
    dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=devices)
    # Registering must not change what a program gets that does not name us.
    if default is not None:
        dist.Backend.default_device_backend_map["cpu"] = default
        BackendConfig.__init__ = _nameless_as_without_hx(BackendConfig.__init__, default)  # type: ignore[method-assign]


def require_backend() -> None:
    """Raises ImportError where a process group of backend "hxcomm" cannot be made, which some programs answer with
    another backend."""
    if (problem := build_check.problem()) is not None:
        raise ImportError(problem)
    if not dist.is_backend_available(BACKEND):
        raise ImportError(
            f"torch.distributed does not know the backend {BACKEND}: `import torch` registers it, unless "
            "TORCH_DEVICE_BACKEND_AUTOLOAD=0 forbids that"
        )


def _nameless_as_without_hx(original: Callable[..., None], cpu_backend: str) -> Callable[..., None]:
    """torch gives a group without a named backend that of the default accelerator only, and CPU tensors none.

    Where that accelerator is hx, such a group is what it would be without hx, CPU's; and hx's too, where torchrun says
    that all ranks are on one host: the others would fail for a backend that they never named.
    """

    def __init__(self: BackendConfig, backend: Any) -> None:  # noqa: N807
        nameless = str(backend) == dist.Backend.UNDEFINED
        accelerator = torch.accelerator.current_accelerator() if nameless else None
        if accelerator is not None and accelerator.type == "hx":
            backend = f"cpu:{cpu_backend},hx:{BACKEND}" if environment.launched_on_one_host() else f"cpu:{cpu_backend}"
        original(self, backend)

    return __init__


@dataclass(frozen=True)
class Membership:
    """What makes a process group of this rank, but for its options."""

    store: Any
    name: str
    rank: int
    world_size: int
    global_ranks: list[int]
    timeout_s: float

    def without(self, excluded: list[int]) -> Membership:
        """Of the group that remains. Its keys are its own: `excluded` tells one attempt from the next."""
        remaining = [rank for rank in range(self.world_size) if rank not in excluded]
        without = "-".join(map(str, excluded))
        return Membership(
            store=PrefixStore(f"hxcomm/without/{without}", self.store),
            name=f"{self.name} without {without}",
            rank=remaining.index(self.rank),
            world_size=len(remaining),
            global_ranks=[self.global_ranks[rank] for rank in remaining],
            timeout_s=self.timeout_s,
        )

    def of(self, ranks: list[int], store: Any, name: str, timeout: datetime.timedelta) -> Membership:
        """Of a group of some of the ranks, this one among them."""
        return Membership(
            store=store,
            name=name,
            rank=ranks.index(self.rank),
            world_size=len(ranks),
            global_ranks=[self.global_ranks[rank] for rank in ranks],
            timeout_s=timeout.total_seconds(),
        )


@dataclass(frozen=True)
class Made:
    """A process group that was made, and what is asked of its group of the core."""

    process_group: _C.ProcessGroup
    member: Membership
    group: _core.Group
    death_of: Callable[[int], str]
    """How the process of a rank ended; "": it lives, as far as this one knows."""


def _create(options: Any, pg_options: Any) -> Any:
    """Called by torch for each new group of this rank. Raises InitError, or ImportError where the build is wrong."""
    return make_process_group(
        Membership(
            store=options.store,
            name=options.group_id or "default",
            rank=options.group_rank,
            world_size=options.group_size,
            global_ranks=list(options.global_ranks_in_group) or list(range(options.group_size)),
            timeout_s=options.timeout.total_seconds(),
        ),
        pg_options,
    ).process_group


def make_process_group(
    member: Membership,
    pg_options: Any,
    death_of: Callable[[int], str] = lambda rank: "",
    meet: bootstrap.Meeting | None = None,
) -> Made:
    """Blocks until every rank of the group has come, or InitError says which did not. `death_of`: how the process of
    a rank of the new group ended, where that is known before the group is made. `meet`: where the ranks meet; None: in
    the member's store."""
    if (problem := build_check.problem()) is not None:
        raise ImportError(problem)
    from hxcomm import _C, _core, bootstrap, interpreted
    from hxcomm.select import Layout, Planner

    environment.warn_about_unknown()
    if not isinstance(pg_options, Options):
        if pg_options is not None and type(pg_options) is not BackendBase.Options:
            raise TypeError(f"pg_options for hxcomm is hxcomm.Options(...), not {type(pg_options).__name__}")
        pg_options = Options()
    asked = {**environment.ALGO.get(), **pg_options.algorithms}
    segment_bytes = pg_options.segment_bytes or environment.SEGMENT.get()
    if meet is None:
        meet = bootstrap.StoreMeeting(member.store, member.rank, member.name, member.timeout_s, death_of)
    try:
        simulated = _simulated(member)
        target = simulated.target if simulated is not None else None
        planner = Planner(member.rank, Layout(member.world_size), member.name, asked, segment_bytes, target)
    except ValueError as error:
        meet.decline(str(error))
        raise

    def lay_out(hosts: tuple[int, ...]) -> None:
        planner.layout = Layout(member.world_size, hosts)
        if simulated is not None and planner.layout.n_hosts > 1:
            meet.fail(
                f"HXCOMM_SIM={environment.SIM.get()} with ranks on {planner.layout.n_hosts} hosts: virtual time is "
                "told where all ranks are on one host; the chips are simulated, so start all ranks there"
            )

    group = bootstrap.create_group(
        meet,
        world_size=member.world_size,
        global_ranks=member.global_ranks,
        settings=planner.settings(),
        planner=planner,
        transfer=interpreted.transfer if environment.EXECUTOR.get() == "python" else None,
        lay_out=lay_out,
    )

    def shrink(excluded: list[int], shrunk_options: Any) -> BackendBase:
        remaining = [rank for rank in range(member.world_size) if rank not in excluded]
        return make_process_group(
            member.without(excluded), shrunk_options or pg_options, lambda rank: group.death_of(remaining[rank])
        ).process_group

    def split(store: Any, ranks: list[int], split_options: BackendBase.Options) -> BackendBase:
        part = member.of(ranks, store, split_options.group_name, split_options._timeout)
        return make_process_group(part, split_options, lambda rank: group.death_of(ranks[rank])).process_group

    process_group = _C.ProcessGroup(
        rank=member.rank,
        size=member.world_size,
        api=_core.api(),
        group=group.capsule(),
        timeout_s=member.timeout_s,
        options=pg_options,
        shrink=shrink,
        split=split,
        timer=simulated.times if simulated is not None else None,
        name=member.name,
    )
    return Made(process_group, member, group, group.death_of)


def _simulated(member: Membership) -> SimulatedGroup | None:
    """The group on the chips that HXCOMM_SIM names, or None where it names none. Raises ValueError where it cannot."""
    if environment.SIM.get() is None:
        return None
    from hxcomm.virtual import groups  # most programs do without

    known = dist.get_world_size() if dist.is_initialized() else 0
    ranks_in_all = max(known, member.world_size, max(member.global_ranks) + 1)
    return groups.join(member.name, member.rank, member.global_ranks, ranks_in_all)


def monitored_barrier(
    group: dist.ProcessGroup | None = None, timeout: datetime.timedelta | None = None, wait_all_ranks: bool = False
) -> None:
    """A barrier that says who is missing. Blocks until every rank of the group (default: all ranks) has called it.

    timeout: how long this one call waits; None: the group's, which it may not exceed. When it passes, every rank that
    came raises CommTimeoutError naming the missing ones with host and pid (the first of them, or with `wait_all_ranks`
    all), and the group is closed, as after any timeout. Raises ValueError where the group is not of backend hxcomm, or
    this rank is not in it; PeerFailedError where a rank died.
    """
    chosen = dist.group.WORLD if group is None else group
    if chosen is None:
        raise ValueError("there is no process group yet: call init_process_group first")
    if not isinstance(chosen, dist.ProcessGroup):
        raise ValueError("this rank is not in the group that monitored_barrier was called with")
    backends = dist.get_backend_config(chosen)
    if f"cpu:{BACKEND}" not in backends.split(","):
        raise ValueError(f"hxcomm.monitored_barrier is for groups of backend {BACKEND}, and this one has {backends}")
    if timeout is not None and timeout <= datetime.timedelta(0):
        raise ValueError(f"monitored_barrier: a timeout of {timeout.total_seconds()} s; it must be positive")
    chosen.monitored_barrier(timeout, wait_all_ranks)  # type: ignore[attr-defined]  # torch's stub lacks it


def statistics() -> list[Statistic]:
    """What every live group of this process has done so far, one entry per (group, op, algorithm, root, dtype,
    memory)."""
    from hxcomm import algorithms, bootstrap
    from hxcomm.schedule import lower, ring_hop_bytes

    rows: list[Statistic] = []
    for row in bootstrap.runtime().statistics():
        if row["op"] not in algorithms.OPS:  # messages, which HXCOMM_STATS counts as well
            continue
        root = row["root"] if row["root"] >= 0 else None
        schedule = lower(
            algorithms.build(row["op"], row["algorithm"], row["world_size"], root, tuple(row["hosts"])),
            private=row["memory"] == "staged",
            hosts=tuple(row["hosts"]),
        )
        rows.append(
            Statistic(
                group=row["group"],
                op=row["op"],
                algorithm=row["algorithm"],
                calls=row["calls"],
                dtype=row["dtype"],
                nbytes=row["elements"] * row["item_bytes"],
                memory=row["memory"],
                time_ns=row["time_ns"],
                waiting_ns=row["waiting_ns"],
                hop_bytes=ring_hop_bytes(
                    schedule, row["elements"], row["item_bytes"], accumulation_itemsize=row["accumulation_bytes"]
                ),
            )
        )
    return rows
