"""A communicator that does nothing, so that a recorder can be shown any rank's calls in one process, and fr_trace."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.distributed.flight_recorder import fr_trace

from hxcomm.torchcomms import hook_args
from hxcomm.torchcomms.hook_args import Hooks, OpName
from hxcomm.torchcomms.options import CommOptions
from hxcomm.torchcomms.work import DONE, TorchWork


class SilentComm:
    """One rank's communicator; call() runs the hooks of a call and nothing else."""

    def __init__(self, rank: int, size: int, name: str = "world") -> None:
        self.rank, self.size, self.name = rank, size, name
        self._uuid: int | None = None
        self.hooks = Hooks()
        self.op_ids = iter(range(1 << 20))
        self.register_pre_hook = self.hooks.register_pre
        self.register_post_hook = self.hooks.register_post
        self.register_abort_hook = self.hooks.register_abort

    def get_rank(self) -> int:
        return self.rank

    def get_size(self) -> int:
        return self.size

    def get_name(self) -> str:
        return self.name

    def get_backend(self) -> str:
        return "hxcomm"

    def get_options(self) -> CommOptions:
        return CommOptions()

    def call(self, op: OpName, *fields: Any, work: TorchWork = DONE, result: Any = None) -> None:
        """fields: those of the operation's pre hook arguments but the last, async_op."""
        stem = {"all_to_all_v_single": "AllToAllVSingle"}.get(op.name, op.name.title().replace("_", ""))
        pre = getattr(hook_args, f"{stem}PreHookArgs")
        post = getattr(hook_args, f"{stem}PostHookArgs")
        op_id = next(self.op_ids)
        self.hooks.pre(op, op_id, pre(*fields, *([] if op in (OpName.split, OpName.new_window) else [False])))
        self.hooks.post(op_id, post(result if op in (OpName.split, OpName.new_window) else work))


def analysed(dumps: Sequence[dict[str, Any]], folder: Path) -> tuple[Any, str]:
    """fr_trace's database and what it printed, of one dump for each rank."""
    traces = folder / "traces"
    traces.mkdir()
    for rank, dump in enumerate(dumps):
        (traces / f"trace_{rank}").write_bytes(pickle.dumps(dump))
    return run_fr_trace(traces, folder / "database")


def run_fr_trace(traces: Path, output: Path) -> tuple[Any, str]:
    """Runs torch's tool over a folder of dumps, as `python -m torch.distributed.flight_recorder.fr_trace` does."""
    printed = io.StringIO()
    handler = logging.StreamHandler(printed)
    logger = logging.getLogger("Flight Recorder")
    logger.addHandler(handler)
    try:
        with contextlib.redirect_stdout(printed):
            fr_trace.main([str(traces), "-o", str(output)])
    finally:
        logger.removeHandler(handler)
        gc.enable()  # the tool switches it off for its process
    _types, database = pickle.loads(output.read_bytes())
    return database, printed.getvalue()
