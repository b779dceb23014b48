"""Failure: ranks that die, stop, abort or leave, and what a group leaves behind.

torch promises little here: a collective may wait for its timeout, half an hour by default. The measure is MPI's ULFM,
widened: after a failure no call blocks, and every survivor gets an error. So groups here have torch's default timeout,
and waiting for it is no answer.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from hxcomm.verify.collectives import Call
from hxcomm.verify.context import Context, Group, WrongError, lacks
from hxcomm.verify.registry import check

# In these every rank needs every other, so none can end before the dead one was noticed.
NEED_EVERYONE = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")
SHORT_S = 1.0  # the timeout of groups that are to run into it
STOPPED_S = 0.3
GROUPS = 5  # made and destroyed in search of leaks, after a first one


def die(context: Context) -> None:
    context.announce_end(-signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def note_error(context: Context, error: Exception, victim: int) -> None:
    """Reports whether the error says who it was."""
    named = f"rank {victim}" in str(error)
    context.note("the error", f"{type(error).__name__}, {'names' if named else 'does not name'} rank {victim}")


@check(
    "failure",
    says="A rank that is killed before it joins a collective ends it on every other rank, at once",
    cases=[*itertools.product((*NEED_EVERYONE, "barrier"), ("last",)), ("all_reduce", "first"), ("broadcast", "first")],
    min_ranks=2,
    spoils=True,
)
def killed_before(context: Context, op: str, which: str) -> None:
    victim = 0 if which == "first" else context.last
    call = Call(context, op) if op != "barrier" else None
    dist.barrier()  # connections are made
    context.meet()
    if context.rank == victim:
        die(context)
    error = context.raises(call.issue if call else dist.barrier, f"{op}, although rank {victim} was killed,")
    note_error(context, error, victim)


@check(
    "failure",
    says="The same, where it is killed while it moves data: a stream of 4 MiB all_reduces",
    cases=["sync", "async"],
    min_ranks=2,
    spoils=True,
)
def killed_within(context: Context, how: str) -> None:
    victim = context.world_size // 2
    tensor = context.full(1 << 20, 0.0)
    dist.all_reduce(tensor)
    if context.rank == victim:
        context.announce_end(-signal.SIGKILL)
        # From a thread while the main one is in some all_reduce, in some phase of it.
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def stream() -> None:
        while True:
            work = dist.all_reduce(tensor, async_op=how == "async")
            if work is not None:
                work.wait()

    note_error(context, context.raises(stream, "a stream of all_reduces"), victim)


@check("failure", says="Calls that follow a death raise, too, at once", min_ranks=3, spoils=True)
def calls_after_a_death_raise(context: Context) -> None:
    dist.barrier()
    context.meet()
    if context.rank == context.last:
        die(context)
    for turn in range(3):
        context.raises(lambda: dist.all_reduce(context.full(100, 1.0)), f"all_reduce {turn} after a death")


@check("failure", says="A death is noticed in a group that it is in, while others go on", min_ranks=3, spoils=True)
def other_groups_survive(context: Context) -> None:
    survivors = context.new_group(range(context.last))
    dist.barrier()
    context.meet()
    if context.rank == context.last:
        die(context)
    context.raises(dist.barrier, "a barrier with a dead rank")
    tensor = context.full(100, 1.0)
    dist.all_reduce(tensor, group=survivors)
    context.equal(tensor, torch.full((100,), float(context.last)), "all_reduce among the survivors")


@check("failure", says=f"A rank that stands still for {STOPPED_S} s is slow, not dead", min_ranks=2)
def stopped_for_a_moment(context: Context) -> None:
    context.tell(f"pid {context.rank}", str(os.getpid()))
    victim = int(context.await_key(f"pid {context.last}"))
    over = threading.Event()

    def stop() -> None:
        os.kill(victim, signal.SIGSTOP)
        time.sleep(STOPPED_S)
        os.kill(victim, signal.SIGCONT)
        over.set()

    if context.rank == 0:
        threading.Thread(target=stop, daemon=True).start()
    turns = 0
    ended = False
    while not ended:  # all ranks learn of the end in the same turn
        turns += 1
        tensor = context.full(10_000, 1.0)
        tensor[0] = float(over.is_set())
        dist.all_reduce(tensor)
        ended = tensor[0].item() > 0
        context.equal(tensor[1:], torch.full((9_999,), float(context.world_size)), f"all_reduce {turns}")


@check(
    "failure",
    says="A group's timeout ends a collective that a peer never joins (new_group, timeout)",
    cases=["sync", "async"],
    min_ranks=2,
    spoils=True,
)
def group_timeout(context: Context, how: str) -> None:
    group = context.new_group(timeout_s=SHORT_S)
    dist.all_reduce(context.full(10, 1.0), group=group)
    if context.rank == 0:

        def call() -> None:
            work = dist.all_reduce(context.full(10, 1.0), group=group, async_op=how == "async")
            if work is not None:
                work.wait()

        context.raises(call, "all_reduce without the others")
        context.tell("raised")
    context.await_key("raised")


@check(
    "failure",
    says="abort() from another thread releases a blocked collective (ProcessGroup.abort)",
    cases=["sync", "async"],
    min_ranks=2,
    optional=True,
    spoils=True,
)
def abort_releases(context: Context, how: str) -> None:
    group: Group = dist.distributed_c10d._get_default_group()
    dist.all_reduce(context.full(10, 1.0))
    if context.rank != 0:
        context.await_key("released")
        return
    blocked = threading.Event()
    refused: list[Exception] = []

    def abort() -> None:
        blocked.wait()
        time.sleep(0.05)  # to be inside of the collective by then; too early is no worse for the backend
        try:
            group.abort()
        except Exception as error:
            refused.append(error)

    aborting = threading.Thread(target=abort, daemon=True)
    aborting.start()

    def call() -> None:
        work = dist.all_reduce(context.full(10, 1.0), async_op=how == "async")
        blocked.set()
        if work is not None:
            work.wait()

    try:
        if how == "sync":
            blocked.set()
        error = context.raises(call, "all_reduce without the others")
        context.note("raised", type(error).__name__)
    finally:
        context.tell("released")
    aborting.join(context.timeout_s)
    if refused:
        raise refused[0]


@check(
    "failure",
    says="A rank that destroys its group while a peer still needs it ends the peer's call",
    min_ranks=2,
    spoils=True,
)
def leaving_ends_the_peers(context: Context) -> None:
    dist.all_reduce(context.full(10, 1.0))
    context.meet()
    if context.rank == context.last:
        dist.destroy_process_group()
        context.await_key("raised 0")
        return
    context.raises(lambda: dist.all_reduce(context.full(10, 1.0)), "all_reduce with a rank that has left")
    context.tell(f"raised {context.rank}")


@check("failure", says="Ranks may destroy a group in any order (destroy_process_group)", min_ranks=2, spoils=True)
def destroy_in_any_order(context: Context) -> None:
    for turn in range(context.world_size):
        dist.all_reduce(context.full(1000, 1.0))
        context.meet()
        place = (context.rank + turn) % context.world_size
        if place > 0:
            context.await_key(f"{turn}/{place - 1}")
        dist.destroy_process_group()
        context.tell(f"{turn}/{place}")
        context.restart(f"turn {turn}")
    dist.all_reduce(context.full(10, 1.0))


@check(
    "failure",
    says="Subgroups may be destroyed before and after one another, in another order on each rank",
    min_ranks=2,
    spoils=True,
)
def destroy_subgroups_in_any_order(context: Context) -> None:
    groups = [context.new_group() for _ in range(6)]
    for group in groups:
        dist.all_reduce(context.full(10, 1.0), group=group)
    order = groups[context.rank :] + groups[: context.rank]
    for group in order if context.rank % 2 else reversed(order):
        dist.destroy_process_group(group)
    dist.all_reduce(context.full(10, 1.0))
    dist.destroy_process_group()


@check(
    "failure",
    says="A process may end with its group destroyed, or not, and exits with its own status",
    cases=["destroyed", "kept", "kept_by_one"],
    min_ranks=2,
    spoils=True,
)
def exit_status(context: Context, how: str) -> None:
    dist.all_reduce(context.full(1000, 1.0))
    dist.all_reduce(context.full(1000, 1.0), async_op=True).wait()
    if how == "destroyed" or (how == "kept_by_one" and context.rank != 0):
        dist.destroy_process_group()
    context.announce_end(7)
    raise SystemExit(7)


def leftovers() -> dict[str, int]:
    """What this process holds."""
    return {
        "file descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "threads": len(list(Path("/proc/self/task").iterdir())),
    }


def shared_files() -> set[str]:
    """Files under /dev/shm that this process has open or mapped."""
    opened = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            opened.add(str(descriptor.readlink()))
        except OSError:  # closed since the listing
            continue
    mapped = {
        line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/" in line
    }
    return {path for path in opened | mapped if path.startswith("/dev/shm/") and not path.endswith("(deleted)")}


@check(
    "failure",
    says="Descriptors, threads and /dev/shm files go with their group, so none pile up",
    cases=["subgroup", "default_group"],
    min_ranks=2,
    spoils=True,
)
def nothing_is_left(context: Context, which: str) -> None:
    baseline: dict[str, int] = {}
    shared: set[str] = set()
    for turn in range(1 + GROUPS):
        if which == "default_group" and turn > 0:
            context.restart(f"turn {turn}")
        # Not context.new_group(), which would keep the group alive.
        group = dist.new_group() if which == "subgroup" else None
        for count in (10, 300_001):
            dist.all_reduce(context.full(count, 1.0), group=group)
            dist.all_reduce(context.full(count, 1.0), group=group, async_op=True).wait()
        shared |= shared_files()
        context.meet()  # nobody destroys what others still use
        dist.destroy_process_group(group)
        del group
        context.meet()
        if turn == 0:
            settled(context)
            baseline = leftovers()
    # What a process makes once, whenever it comes to need it, is no leak; that grows with every group.
    limits = {what: before + GROUPS - 1 for what, before in baseline.items()}
    try:
        context.until(lambda: all(now <= limits[what] for what, now in leftovers().items()), "")
    except WrongError as error:
        raise WrongError(f"after {GROUPS} more groups {leftovers()}, after the first {baseline}") from error
    if which == "subgroup":
        dist.destroy_process_group()
    kept = [path for path in shared if Path(path).exists() and path not in shared_files()]
    context.expect(not kept, f"left behind: {', '.join(kept)}")


def settled(context: Context) -> None:
    """Waits until what a destroyed group leaves has stopped becoming less."""
    seen = leftovers()
    steady_since = time.monotonic()
    while time.monotonic() - steady_since < 0.2:
        if (now := leftovers()) != seen:
            seen, steady_since = now, time.monotonic()
        time.sleep(0.01)


@check("failure", says="Nothing stays in /dev/shm of ranks that were all killed", min_ranks=2, spoils=True)
def nothing_is_left_of_the_killed(context: Context) -> None:
    """Rank 0 kills the others, so that it can look afterwards."""
    dist.all_reduce(context.full(300_001, 1.0))
    context.tell(f"shared {context.rank}", "\n".join(shared_files()))
    before = {path for rank in range(context.world_size) for path in context.await_key(f"shared {rank}").splitlines()}
    context.meet()
    if context.rank != 0:
        die(context)
    try:
        dist.destroy_process_group()
    except Exception as error:
        if lacks(error):
            raise
        context.note("destroying", f"raised {type(error).__name__}")
    context.until(lambda: not any(Path(path).exists() for path in before), f"removal of {', '.join(sorted(before))}")
