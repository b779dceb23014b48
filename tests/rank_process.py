"""The child's side of ranks.py: one process that is one rank, and runs the functions it is sent, one after another.

Started as `python rank_process.py FD`, FD being its end of a socket pair. A Job comes in, an Answer goes out, until the
parent closes its end. The rank dies with its parent. SIGUSR1 prints the stacks of all threads.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib.util
import itertools
import os
import pickle
import signal
import sys
import traceback
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """One call: fn(rank, world_size, *args), where fn is a module-level function of a test file."""

    file: str
    module: str
    function: str
    args: bytes  # pickled; the classes in it may be the test file's own, so that is imported first
    backend: str | None  # None: no process group is made
    op_timeout_s: float
    env: Mapping[str, str]


@dataclass(frozen=True)
class Answer:
    value: bytes = b""  # pickled, when there is no error
    error: str = ""  # the class of what was raised
    message: str = ""
    text: str = ""  # its traceback


def load(file: str, module: str, function: str) -> Callable[..., Any]:
    """The function of that name in a test file, imported once under the name that pytest gave it."""
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, file)
        assert spec is not None and spec.loader is not None, f"cannot import {file}"
        loaded = importlib.util.module_from_spec(spec)
        for package in itertools.accumulate(module.split(".")[:-1], "{}.{}".format):
            sys.modules.setdefault(package, types.ModuleType(package))  # pickle imports a module's packages, too
        sys.modules[module] = loaded
        spec.loader.exec_module(loaded)
    return getattr(sys.modules[module], function)


def run(job: Job) -> Answer:
    before = dict(os.environ)
    os.environ.update(job.env)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        function = load(job.file, job.module, job.function)
        args = pickle.loads(job.args)
        if job.backend is None:
            value = function(rank, world_size, *args)
        else:
            value = in_process_group(job, lambda: function(rank, world_size, *args))
        return Answer(value=pickle.dumps(value))
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        return Answer(error=type(error).__name__, message=str(error), text=traceback.format_exc())
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def in_process_group(job: Job, call: Callable[[], Any]) -> Any:
    """Calls between init_process_group and destroy_process_group, as torchrun's programs do (env://)."""
    from datetime import timedelta

    import torch.distributed as dist

    dist.init_process_group(job.backend, timeout=timedelta(seconds=job.op_timeout_s))
    try:
        return call()
    finally:
        # A test may have destroyed it itself.
        if dist.is_initialized():
            dist.destroy_process_group()


def main() -> None:
    parent_died = signal.SIGKILL
    ctypes.CDLL(None).prctl(1, parent_died)  # PR_SET_PDEATHSIG: nothing outlives a killed pytest
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    connection = Connection(int(sys.argv[1]))
    os.set_inheritable(connection.fileno(), False)
    # Job and Answer must be the classes of the module `rank_process`, not of `__main__`: the parent unpickles them.
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import rank_process

    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        answer = rank_process.run(job)
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send(answer)


if __name__ == "__main__":
    main()
