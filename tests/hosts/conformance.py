"""Cases of `hxcomm verify` on ranks that are already there: a start of ranks on hosts costs more than many cases."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist

from hxcomm import torchcomms
from hxcomm.verify import registry
from hxcomm.verify.context import Context


def run_cases(
    rank: int, world_size: int, device: str, timeout_s: float, patterns: Sequence[str], api: str = "c10d"
) -> tuple[int, str]:
    """Runs all that match but those that end the group; how many passed, and the first that did not."""
    torch.set_num_threads(1)
    registry.load()
    store = dist.distributed_c10d._get_default_store()
    comm = None
    if api == "torchcomms":
        os.environ.update(TORCHCOMM_RANK=str(rank), TORCHCOMM_SIZE=str(world_size))
        comm = torchcomms.new_comm(
            "hxcomm", device, name="verify", abort_process_on_timeout_or_error=False, store=store
        )
    passed = 0
    for case in registry.matching(patterns, api):
        if case.check.spoils or case.check.min_ranks > world_size:
            continue
        context = Context(
            backend="hxcomm",
            device=torch.device(device),
            rank=rank,
            world_size=world_size,
            timeout_s=timeout_s,
            store=dist.PrefixStore(case.id, store),
            announce=lambda status: None,
            comm=comm,
        )
        try:
            case.check.function(context, *case.arguments)
            if case.check.afterwards is not None:
                case.check.afterwards(context, *case.arguments)
            context.destroy_groups()
        except Exception as error:
            return passed, f"{case.id}: {type(error).__name__}: {error}"
        passed += 1
    return passed, ""
