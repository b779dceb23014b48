"""DistributedDataParallel and what belongs to it: many ranks train as one process does on the whole batch.

Every rank trains a copy alone, on all ranks' rows, and compares parameters with ==. A rank's loss is multiplied by the
number of ranks, so the average that torch takes is a sum of integers.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from hxcomm.verify.context import Context
from hxcomm.verify.models import STEP, Perceptron, Sum, backward, exact, rows_of
from hxcomm.verify.registry import check

STEPS = 3


def training(context: Context, **options: Any) -> tuple[DistributedDataParallel, Any]:
    """The model in parallel, and the copy that is trained alone. Only rank 0 has the right values, as torch allows."""
    alone = exact(Sum(Perceptron(), Perceptron()), context.device)
    model = copy.deepcopy(alone) if context.rank == 0 else exact(copy.deepcopy(alone), context.device, seed=7)
    return DistributedDataParallel(model, **options), alone


def whole_batch(context: Context, step: int) -> tuple[Tensor, Tensor]:
    parts = [rows_of(step, rank, context.device) for rank in range(context.world_size)]
    inputs, factors = zip(*parts, strict=True)
    return torch.cat(inputs), torch.cat(factors)


def descend(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=STEP)


def same_parameters(context: Context, model: Any, alone: Any, what: str) -> None:
    for (name, ours), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
        context.equal(ours, expected, f"{name} {what}")
        if expected.grad is not None:
            context.equal(ours.grad, expected.grad, f"gradient of {name} {what}")


DDP_OPTIONS: dict[str, dict[str, Any]] = {
    "one_bucket": {},
    # 16 KiB: several buckets, under way at once while the backward pass goes on.
    "buckets": {"bucket_cap_mb": 1 / 64},
    "bucket_view": {"gradient_as_bucket_view": True, "bucket_cap_mb": 1 / 64},
    "static_graph": {"static_graph": True, "bucket_cap_mb": 1 / 64},
}


@check(
    "parallel",
    says="DistributedDataParallel trains as one process does on the whole batch, however gradients are put in buckets",
    cases=DDP_OPTIONS,
)
def data_parallel(context: Context, how: str) -> None:
    model, alone = training(context, **DDP_OPTIONS[how])
    optimizers = descend(model), descend(alone)
    for step in range(STEPS):
        inputs, factors = rows_of(step, context.rank, context.device)
        backward(model(inputs), factors * context.world_size)
        inputs, factors = whole_batch(context, step)
        backward(alone(inputs), factors)
        same_parameters(context, model.module, alone, f"in step {step}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    same_parameters(context, model.module, alone, "at the end")


@check("parallel", says="no_sync() accumulates gradients and the next backward pass sums them over the ranks")
def data_parallel_accumulates(context: Context) -> None:
    model, alone = training(context, bucket_cap_mb=1 / 64)
    optimizers = descend(model), descend(alone)
    for step in range(2):
        with model.no_sync():
            for part in range(2):
                inputs, factors = rows_of(10 * step + part, context.rank, context.device)
                backward(model(inputs), factors * context.world_size)
        inputs, factors = rows_of(10 * step + 2, context.rank, context.device)
        backward(model(inputs), factors * context.world_size)
        for part in range(3):
            inputs, factors = whole_batch(context, 10 * step + part)
            backward(alone(inputs), factors)
        same_parameters(context, model.module, alone, f"in step {step}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


class Branches(nn.Module):
    """Runs one of its parts, by number."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Perceptron() for _ in range(3)])

    def forward(self, rows: Tensor, which: int) -> Tensor:
        out: Tensor = self.parts[which](rows)
        return out


@check("parallel", says="find_unused_parameters: each rank may leave out other parameters in each step")
def data_parallel_unused_parameters(context: Context) -> None:
    alone = exact(Branches(), context.device)
    model = DistributedDataParallel(copy.deepcopy(alone), find_unused_parameters=True, bucket_cap_mb=1 / 64)
    optimizers = descend(model), descend(alone)
    for step in range(STEPS):
        inputs, factors = rows_of(step, context.rank, context.device)
        backward(model(inputs, (step + context.rank) % 2), factors * context.world_size)
        for rank in range(context.world_size):
            inputs, factors = rows_of(step, rank, context.device)
            backward(alone(inputs, (step + rank) % 2), factors)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        same_parameters(context, model.module, alone, f"after step {step}")


def bfloat16_hook(_, bucket):  # type: ignore[no-untyped-def]  # torch compares annotations, and ours are strings
    """As a user may write it; torch's own is for CUDA and XPU only."""
    small = bucket.buffer().to(torch.bfloat16) / dist.get_world_size()
    work = dist.all_reduce(small, async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: bucket.buffer().copy_(done.value()[0]))


HOOKS: dict[str, Any] = {
    "allreduce": default_hooks.allreduce_hook,
    "fp16": default_hooks.fp16_compress_hook,
    "bfloat16": bfloat16_hook,
}


@check(
    "parallel",
    says="A communication hook's future brings the gradients back (register_comm_hook), compressed or not",
    cases=HOOKS,
)
def data_parallel_hook(context: Context, hook: str) -> None:
    """One step of one layer pair: its gradients are integers up to 200, exact in bfloat16."""
    alone = exact(Perceptron(), context.device)
    model = DistributedDataParallel(copy.deepcopy(alone), bucket_cap_mb=1 / 64)
    model.register_comm_hook(None, HOOKS[hook])
    inputs, factors = rows_of(0, context.rank, context.device)
    backward(model(inputs), factors * context.world_size)
    inputs, factors = whole_batch(context, 0)
    backward(alone(inputs), factors)
    same_parameters(context, model.module, alone, f"with the hook {hook}")


@check("parallel", says="Ranks with fewer batches take part in the others' steps with zeros (Join)", min_ranks=2)
def data_parallel_join(context: Context) -> None:
    """Rank r has r + 1 batches, in buckets."""
    model, alone = training(context, bucket_cap_mb=1 / 64)
    optimizers = descend(model), descend(alone)
    with Join([model]):
        for step in range(context.rank + 1):
            optimizers[0].zero_grad()
            inputs, factors = rows_of(step, context.rank, context.device)
            backward(model(inputs), factors * context.world_size)
            optimizers[0].step()
    for step in range(context.world_size):
        optimizers[1].zero_grad()
        for rank in range(step, context.world_size):
            inputs, factors = rows_of(step, rank, context.device)
            backward(alone(inputs), factors)
        optimizers[1].step()
    for (name, ours), expected in zip(model.module.named_parameters(), alone.parameters(), strict=True):
        context.equal(ours, expected, f"{name} after all have joined")


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Perceptron()
        self.shift: Tensor
        self.register_buffer("shift", torch.zeros((), dtype=torch.float64))

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.inner(rows + self.shift)
        return out


@check("parallel", says="Each forward pass begins with rank 0's buffers")
def data_parallel_buffers(context: Context) -> None:
    alone = exact(Shifted(), context.device)
    model = DistributedDataParallel(copy.deepcopy(alone))
    for step in range(1, 3):
        model.module.shift.fill_(step if context.rank == 0 else -100)
        alone.shift.fill_(step)
        inputs, _ = rows_of(step, context.rank, context.device)
        context.equal(model(inputs), alone(inputs), f"output of step {step}")
        context.equal(model.module.shift, torch.tensor(float(step), dtype=torch.float64), "the buffer")


@check("parallel", says="ZeroRedundancyOptimizer: a rank keeps the state of some parameters, and all get every update")
def data_parallel_zero(context: Context) -> None:
    # Here, since its package compiles deprecated things as it is imported, and warns of each.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, alone = training(context)
    ours = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=STEP, momentum=0.5)
    expected = torch.optim.SGD(alone.parameters(), lr=STEP, momentum=0.5)
    for step in range(2):
        inputs, factors = rows_of(step, context.rank, context.device)
        backward(model(inputs), factors * context.world_size)
        inputs, factors = whole_batch(context, step)
        backward(alone(inputs), factors)
        ours.step()
        expected.step()
        ours.zero_grad()
        expected.zero_grad()
        same_parameters(context, model.module, alone, f"after step {step}")
    ours.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        kept = ours.state_dict()["state"]
        for number, state in expected.state_dict()["state"].items():
            context.equal(kept[number]["momentum_buffer"], state["momentum_buffer"], f"momentum of parameter {number}")
