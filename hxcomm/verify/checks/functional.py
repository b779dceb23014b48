"""Functional collectives, which return new tensors, and what torch.compile makes of them and of parallel models.

The compiler here is one that generates no code, so it needs no C++ compiler and takes no seconds.

Inputs are integers, so results compare with == in any order of addition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from hxcomm.verify.context import Context
from hxcomm.verify.models import STEP, Perceptron, backward, exact, rows_of
from hxcomm.verify.registry import check

COLUMNS = 3


def of_rank(rank: int, world_size: int, device: torch.device) -> Tensor:
    """Two rows for each rank."""
    count = 2 * world_size * COLUMNS
    return (torch.arange(float(count), device=device) + 100 * rank).reshape(-1, COLUMNS)


def all_forms(mine: Tensor, root: int, sizes: tuple[list[int], list[int]]) -> list[Tensor]:
    """Every functional collective once, each of them a result and all of different inputs."""
    world = dist.group.WORLD
    assert world is not None
    results = [
        functional.all_reduce(mine, "sum", world),
        functional.all_reduce(mine * 2, "avg", world),
        functional.all_reduce(mine + 1, "max", world),
        functional.all_gather_single(mine, 0, world),
        functional.all_gather_single(mine + 2, 1, world),
        functional.reduce_scatter_single(mine + 3, "sum", 0, world),
        functional.reduce_scatter_single((mine + 4).t(), "sum", 1, world),
        functional.all_to_all_single(mine + 5, None, None, world),
        functional.all_to_all_single(mine + 6, *sizes, world),
        functional.broadcast(mine + 7, root, world),
        *functional.all_reduce_coalesced([mine + 8, mine[:1] + 9], "sum", world),
        *functional.all_gather_single_coalesced([mine + 10, mine[:1] + 11], world),
        *functional.reduce_scatter_single_coalesced([mine + 12, mine + 13], "sum", [0, 0], world),
    ]
    return [each + 1 for each in results]  # computes with each, as a program does


def expected_forms(context: Context, root: int) -> list[Tensor]:
    me, world_size = context.rank, context.world_size
    every = [of_rank(rank, world_size, context.device) for rank in range(world_size)]
    stacked = torch.stack(every)
    total = stacked.sum(0)

    def part(whole: Tensor, plus: float, dimension: int = 0) -> Tensor:
        return (whole + plus * world_size).chunk(world_size, dimension)[me]

    def cut(rank: int) -> list[Tensor]:
        return list(torch.split(every[rank], splits(rank, world_size)))

    results = [
        total,
        total * 2 / world_size,
        stacked.max(0).values + 1,
        torch.cat(every),
        torch.cat(every, 1) + 2,
        part(total, 3),
        part(total.t(), 4, 1),
        torch.cat([each.chunk(world_size)[me] for each in every]) + 5,
        torch.cat([cut(rank)[me] for rank in range(world_size)]) + 6,
        every[root] + 7,
        total + 8 * world_size,
        total[:1] + 9 * world_size,
        torch.cat(every) + 10,
        torch.cat([each[:1] for each in every]) + 11,
        part(total, 12),
        part(total, 13),
    ]
    return [each + 1 for each in results]


def splits(rank: int, world_size: int) -> list[int]:
    """How many of its rows a rank sends to each: none to itself but all that are left to the next one."""
    counts = [2] * world_size
    counts[rank] -= 2 if world_size > 1 else 0
    counts[(rank + 1) % world_size] += 2 if world_size > 1 else 0
    return counts


def run_all_forms(context: Context, call: Callable[..., list[Tensor]]) -> None:
    me, world_size = context.rank, context.world_size
    mine = of_rank(me, world_size, context.device)
    sizes = [splits(rank, world_size)[me] for rank in range(world_size)], splits(me, world_size)
    for _ in range(2):
        results = call(mine, context.last, sizes)
        for number, (ours, theirs) in enumerate(zip(results, expected_forms(context, context.last), strict=True)):
            context.equal(ours, theirs, f"result {number} of all_forms()")
        context.equal(mine, of_rank(me, world_size, context.device), "input")


@check("parallel", says="All functional collectives together are right, and their input stays as it was")
def functional_collectives(context: Context) -> None:
    run_all_forms(context, all_forms)


@check(
    "parallel",
    says="torch.compile puts all functional collectives into one graph, which gives what they give eagerly",
    cases=["eager", "aot_eager"],
)
def compiled_collectives(context: Context, compiler: str) -> None:
    torch._dynamo.reset()
    try:
        run_all_forms(context, torch.compile(all_forms, fullgraph=True, backend=compiler))
    finally:
        torch._dynamo.reset()


def with_gradient(mine: Tensor) -> Tensor:
    """The four that have one, one after another; the last has one row for each rank again."""
    world = dist.group.WORLD
    assert world is not None
    one = functional.all_gather_single_autograd(mine * 2, 0, world)
    two = functional.reduce_scatter_single_autograd(one * 3, "sum", 0, world)
    three = functional.all_to_all_single_autograd(two * 5, None, None, world)
    total: Tensor = functional.all_reduce(three * 7, "sum", world)
    return total


@check("parallel", says="Gradients of functional collectives are collectives, too", cases=["eager", "aot_eager"])
def gradients(context: Context, compiler: str) -> None:
    me, world_size = context.rank, context.world_size
    torch._dynamo.reset()
    call = with_gradient if compiler == "eager" else torch.compile(with_gradient, fullgraph=True, backend=compiler)
    mine: Any = of_rank(me, world_size, context.device).requires_grad_()
    weights = of_rank(0, world_size, context.device)
    backward(call(mine), weights)
    # Everybody's loss has everybody's rows in it, all to all moves blocks, and so do their gradients.
    rows = 2 * world_size
    with_respect_to = torch.stack([weights] * world_size).sum(0) * 7 * 5  # every rank adds to the sum
    blocks = with_respect_to.chunk(world_size)
    received = [torch.cat([blocks[rank]] * world_size) for rank in range(world_size)]  # of all_to_all's input, by rank
    gathered = torch.cat(received) * 3 * 2  # of the gathered tensor, on every rank
    expected = gathered[me * rows : (me + 1) * rows] * world_size
    context.equal(mine.grad, expected, "gradient")


@check("parallel", says="A compiled model trains under DistributedDataParallel as one process does")
def compiled_data_parallel(context: Context) -> None:
    torch._dynamo.reset()
    alone, ours = (exact(Perceptron(), context.device) for _ in range(2))
    model: Any = torch.compile(DistributedDataParallel(ours), backend="aot_eager")
    for step in range(2):
        for rank in range(context.world_size):
            inputs, factors = rows_of(step, rank, context.device)
            backward(alone(inputs), factors)
            if rank == context.rank:
                backward(model(inputs), factors * context.world_size)
        for (name, mine), theirs in zip(ours.named_parameters(), alone.parameters(), strict=True):
            context.equal(mine.grad, theirs.grad, f"gradient of {name} in step {step}")
        for each in (ours, alone):
            optimizer = torch.optim.SGD(each.parameters(), lr=STEP)
            optimizer.step()
            optimizer.zero_grad()


@check("parallel", says="A tensor-parallel model is compiled as one graph, gradients included")
def compiled_tensor_parallel(context: Context) -> None:
    torch._dynamo.reset()
    mesh = init_device_mesh(context.device.type, (context.world_size,))
    alone, ours = (exact(Perceptron(), context.device) for _ in range(2))
    with torch.no_grad():
        for each in (alone, ours):
            each.down.bias.zero_()  # torch adds a part of it on each rank
    parallel = parallelize_module(ours, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    model: Any = torch.compile(parallel, fullgraph=True, backend="aot_eager")
    inputs, factors = rows_of(0, 0, context.device)
    for _ in range(2):
        expected, output = alone(inputs), model(inputs)
        context.equal(output, expected, "output")
        backward(expected, factors)
        backward(output, factors)
    for (name, mine), theirs in zip(parallel.named_parameters(), alone.parameters(), strict=True):
        gradient: Any = mine.grad
        context.equal(gradient.full_tensor(), theirs.grad, f"gradient of {name}")
