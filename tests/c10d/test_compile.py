"""torch.compile with its default compiler, which generates C++: collectives inside the code that it generates.

What needs no generated code stands in hxcomm/verify/checks/functional.py; the function compiled here is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hxcomm.verify.checks import functional
from hxcomm.verify.context import Context


def generated(rank: int, world_size: int) -> None:
    context = Context(
        backend="hxcomm",
        device=torch.device("cpu"),
        rank=rank,
        world_size=world_size,
        timeout_s=100,
        store=dist.distributed_c10d._get_default_store(),
        announce=lambda _: None,
    )
    torch._dynamo.reset()
    # One thread: otherwise each rank starts processes that compile, beside as many of the other ranks.
    with torch._inductor.config.patch(compile_threads=1):
        functional.run_all_forms(context, torch.compile(functional.all_forms, fullgraph=True))
    torch._dynamo.reset()


@pytest.mark.parametrize("world_size", [2])
def test_generated_code_calls_every_functional_collective(rank_pool: Callable[[int], Any], world_size: int) -> None:
    rank_pool(world_size).run(generated, timeout_s=150, op_timeout_s=150)
