"""One rank: a process that makes a process group and runs the cases it is sent, one after another.

Forked from a server that has imported this module, and torch with it, so a fresh rank takes milliseconds. It dies with
its parent. SIGUSR1 writes the stack of every thread to its output file.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import traceback
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from hxcomm import c10d
from hxcomm.verify import registry
from hxcomm.verify.context import Context, Idle, WrongError, lacks, refuses

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Setup:
    """What a rank is started with."""

    api: str  # one of registry.APIS
    backend: str
    device: str
    world_size: int
    store_port: int  # of the driver's TCPStore
    incarnation: int  # no two groups of a run share one, so their keys in the store differ
    modules: tuple[str, ...]  # imported before anything else
    rank: int = 0
    output: str = ""  # the file that gets what the rank prints


@dataclass(frozen=True)
class Job:
    number: int  # no two jobs of a run share one, so their keys in the store differ
    case: str
    timeout_s: float
    afterwards: bool = False


@dataclass(frozen=True)
class Answer:
    """How a job ended on one rank. `kind`: passed, idle, wrong, raised, refused, lacking, or ending (announce_end)."""

    kind: str
    message: str = ""
    notes: dict[str, str] = field(default_factory=dict)
    status: int = 0  # with ending


def serve(setup: Setup, connection: Connection) -> None:
    """The life of a rank: makes the default group, answers, then runs jobs until the driver closes its end."""
    _prepare(setup)
    try:
        if (device := _device(setup)).index is not None:
            # As programs for accelerators do: fake tensors and DTensor take a device without an index for this one.
            torch.accelerator.set_device_index(device)
        registry.load(setup.modules)
        c10d.register_backend()
        store = TCPStore("127.0.0.1", setup.store_port, is_master=False)
        comm = _join(setup, PrefixStore(f"group {setup.incarnation}", store), device)
    except BaseException as error:
        connection.send(_answer(error))
        return
    connection.send(Answer("passed"))
    while True:
        try:
            job: Job = connection.recv()
        except EOFError:
            break
        connection.send(_run(setup, job, store, connection, comm))
    if dist.is_initialized():
        dist.destroy_process_group()
    if comm is not None:
        comm.finalize()


def _join(setup: Setup, store: Store, device: torch.device) -> Any:
    """Makes the default group, or returns the communicator over all ranks."""
    if setup.api == "c10d":
        dist.init_process_group(setup.backend, store=store, rank=setup.rank, world_size=setup.world_size)
        return None
    from hxcomm import torchcomms

    os.environ.update(TORCHCOMM_RANK=str(setup.rank), TORCHCOMM_SIZE=str(setup.world_size))
    return torchcomms.new_comm(
        setup.backend, device, name="verify", abort_process_on_timeout_or_error=False, store=store
    )


def _prepare(setup: Setup) -> None:
    # Hung or not, ranks die with the server, and the server with the driver: it ends when nobody holds this descriptor,
    # which multiprocessing hands to every child so that the child may start processes of its own.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.close(vars(forkserver._forkserver)["_forkserver_alive_fd"])
    output = os.open(setup.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(1)  # the ranks of a test share few cores


def _device(setup: Setup) -> torch.device:
    """One device a rank, as far as they go round, unless the index was given."""
    if setup.device == "cpu" or ":" in setup.device:
        return torch.device(setup.device)
    return torch.device(setup.device, setup.rank % max(1, torch.accelerator.device_count()))


def _run(setup: Setup, job: Job, store: Store, connection: Connection, comm: Any) -> Answer:
    context = Context(
        comm=comm,
        backend=setup.backend,
        device=_device(setup),
        rank=setup.rank,
        world_size=setup.world_size,
        timeout_s=job.timeout_s,
        store=PrefixStore(f"job {job.number}", store),
        announce=lambda status: connection.send(Answer("ending", status=status)),
    )
    case = registry.find(job.case, setup.api)
    function = case.check.afterwards if job.afterwards else case.check.function
    assert function is not None
    try:
        returned = function(context, *case.arguments)
        context.destroy_groups()
    except Exception as error:  # SystemExit passes: a check may end its process
        return _answer(error, context.notes)
    return Answer("idle" if isinstance(returned, Idle) else "passed", notes=context.notes)


def _answer(error: BaseException, notes: dict[str, str] | None = None) -> Answer:
    traceback.print_exception(error)
    if isinstance(error, WrongError):
        return Answer("wrong", str(error), notes or {})
    kind = "lacking" if lacks(error) else "refused" if refuses(error) else "raised"
    lines = str(error).split("\nException raised from ")[0].strip()  # c10 appends its C++ stack
    return Answer(kind, f"{type(error).__name__}: {lines}{_place(error)}", notes or {})


def _place(error: BaseException) -> str:
    """Where in the checks it was raised."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).parent.name == "checks":
            return f" ({Path(frame.filename).name}:{frame.lineno})"
    return ""
