"""Cases of `hxcomm verify` on ranks that are already there: a start of ranks on hosts costs more than many cases."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from hxcomm.verify import registry
from hxcomm.verify.context import Context


def run_cases(rank: int, world_size: int, device: str, timeout_s: float, patterns: Sequence[str]) -> tuple[int, str]:
    """Runs all that match but those that end the group; how many passed, and the first that did not."""
    torch.set_num_threads(1)
    registry.load()
    store = dist.distributed_c10d._get_default_store()
    passed = 0
    for case in registry.matching(patterns):
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
