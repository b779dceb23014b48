"""DTensor and what is built on it: redistribution, tensor-parallel layers, the loss over a sharded vocabulary.

Each rank computes the whole alone and compares with ==, except where a softmax or a norm rounds.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional as F

from hxcomm.verify.context import IDLE, Context, Idle
from hxcomm.verify.models import WIDTH, Attention, Perceptron, backward, exact, integers, rows_of
from hxcomm.verify.registry import check

PLACEMENTS: dict[str, Any] = {
    "shard0": Shard(0),
    "shard1": Shard(1),
    "replicate": Replicate(),
    "sum": Partial("sum"),
    "max": Partial("max"),
}
SHAPES = ((12, 24), (5, 7), (1, 3), (2, 0))  # evenly, unevenly, with ranks that get nothing, and nothing at all


def mesh_of(context: Context) -> DeviceMesh:
    return init_device_mesh(context.device.type, (context.world_size,))


def numbers(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


def placed(mesh: DeviceMesh, tensor: Tensor, placements: list[Any]) -> DTensor:
    """A DTensor that is `tensor`. Partial: each rank of a dimension contributes another part."""
    known = [Replicate() if isinstance(each, Partial) else each for each in placements]
    shared = distribute_tensor(tensor, mesh, known)
    local = shared.to_local()
    for dimension, each in enumerate(placements):
        if isinstance(each, Partial):
            own, size = mesh.get_local_rank(dimension), mesh.size(dimension)
            # The last one makes up for what the others contribute; a maximum is that of rank 0.
            if each.reduce_op == "sum":
                local = local * (1 - 2 * (size - 1)) if own == size - 1 else local * 2
            else:
                local = local - own
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


@check(
    "parallel",
    says="redistribute() brings a DTensor from every placement to every other one, unevenly sharded as well",
    cases=itertools.product(PLACEMENTS, ("shard0", "shard1", "replicate")),
)
def redistribute(context: Context, source: str, target: str) -> None:
    mesh = mesh_of(context)
    for shape in SHAPES:
        expected = numbers(shape).to(context.device)
        ours = placed(mesh, expected, [PLACEMENTS[source]]).redistribute(mesh, [PLACEMENTS[target]])
        context.equal(
            ours.to_local(),
            distribute_tensor(expected, mesh, [PLACEMENTS[target]], src_data_rank=None).to_local(),
            f"part of {shape}",
        )
        context.equal(ours.full_tensor(), expected, f"whole of {shape}")


@check("parallel", says="The same on a mesh of two dimensions, every pair of pairs of placements", min_ranks=2)
def redistribute_in_two_dimensions(context: Context) -> None:
    """2 ranks by as many as there are; with an odd number of ranks the second dimension is all of them."""
    rows = 2 if context.world_size % 2 == 0 else 1
    mesh = init_device_mesh(context.device.type, (rows, context.world_size // rows), mesh_dim_names=("a", "b"))
    expected = numbers((5, 7)).to(context.device)
    kinds = ("shard0", "shard1", "replicate", "sum")
    targets = kinds[:-1]
    for source, target in itertools.product(itertools.product(kinds, kinds), itertools.product(targets, targets)):
        ours = placed(mesh, expected, [PLACEMENTS[each] for each in source])
        ours = ours.redistribute(mesh, [PLACEMENTS[each] for each in target])
        context.equal(ours.full_tensor(), expected, f"{source} to {target}")
    along = mesh["b"]
    context.expect(along.size() == context.world_size // rows, "the part of the mesh has another size")
    tensor = context.full(3, context.rank + 1.0)
    torch.distributed.all_reduce(tensor, group=along.get_group())
    first = context.rank // along.size() * along.size()
    context.equal(tensor, torch.full((3,), float(sum(range(first + 1, first + along.size() + 1)))), "sum in one row")


@check("parallel", says="Operators on DTensors communicate as their placements demand: forward and gradients")
def operators(context: Context) -> None:
    mesh = mesh_of(context)
    left, right = integers(1, 6, WIDTH).to(context.device), integers(2, WIDTH, 5).to(context.device)
    for places in itertools.product((Shard(0), Shard(1), Replicate()), repeat=2):
        alone: list[Any] = [left.clone().requires_grad_(), right.clone().requires_grad_()]
        ours: list[Any] = [
            distribute_tensor(each.detach(), mesh, [place]).requires_grad_()
            for each, place in zip(alone, places, strict=True)
        ]
        expected = (alone[0] @ alone[1]).relu().sum(0)
        product: Any = (ours[0] @ ours[1]).relu().sum(0)
        context.equal(product.full_tensor(), expected, f"product of {places}")
        backward(expected, 1)
        backward(product, 1)
        for mine, theirs in zip(ours, alone, strict=True):
            context.equal(mine.grad.full_tensor(), theirs.grad, f"gradient of {places}")


PLANS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "perceptron": (Perceptron, {"up": ColwiseParallel(), "down": RowwiseParallel()}),
    "perceptron_of_sharded_rows": (
        Perceptron,
        {
            "up": ColwiseParallel(input_layouts=Shard(0)),
            "down": RowwiseParallel(output_layouts=Shard(0)),
        },
    ),
    "attention": (
        Attention,
        {
            "query": ColwiseParallel(),
            "key": ColwiseParallel(),
            "value": ColwiseParallel(),
            "out": RowwiseParallel(),
        },
    ),
}


@check(
    "parallel",
    says="Layers split by columns and rows give output and gradients of the whole layers (parallelize_module)",
    cases=PLANS,
)
def tensor_parallel(context: Context, which: str) -> Idle | None:
    kind, plan = PLANS[which]
    if kind is Attention and 12 % context.world_size:
        return IDLE
    mesh = mesh_of(context)
    alone = exact(kind(), context.device)
    with torch.no_grad():
        for parameter in alone.parameters():
            if parameter.dim() == 1:  # torch adds a part of the bias on each rank: up to 6 ranks divide 60
                parameter.mul_(60)
    model = parallelize_module(copy.deepcopy(alone), mesh, plan)
    given = [each.requires_grad_() for each in rows_of(0, 0, context.device, rows=7 * context.world_size)]
    expected = alone(given[0])
    backward(expected, given[1])
    # As torch has it, what a rank holds of a tensor that is sharded outside is a plain tensor.
    split = Shard(0) if which == "perceptron_of_sharded_rows" else Replicate()
    rows, factors = (distribute_tensor(each.detach(), mesh, [split]).to_local() for each in given)
    output = model(rows.requires_grad_())
    context.equal(output, distribute_tensor(expected.detach(), mesh, [split]).to_local(), "output")
    backward(output, factors)
    expected_gradient: Any = given[0].grad
    of_rows: Any = rows.grad
    context.equal(of_rows, distribute_tensor(expected_gradient, mesh, [split]).to_local(), "gradient of the input")
    for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        grad: Any = ours.grad
        context.equal(grad.full_tensor(), theirs.grad, f"gradient of {name}")
    return None


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = Perceptron()

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.inner(self.norm(rows))
        return out


def near(context: Context, actual: Tensor, expected: Tensor, what: str) -> None:
    """Values of up to a few hundred in float64, rounded some hundred times: 2**-36 is more than that can add up to."""
    different = float((actual - expected).detach().abs().max())
    context.expect(actual.shape == expected.shape and different < 2.0**-36, f"{what} is off by {different}")


@check("parallel", says="A norm over rows that are split among the ranks (SequenceParallel) is the whole norm")
def sequence_parallel(context: Context) -> None:
    mesh = mesh_of(context)
    alone = exact(Block(), context.device)
    plan = {
        "norm": SequenceParallel(sequence_dim=0),
        "inner": PrepareModuleInput(input_layouts=Shard(0), desired_input_layouts=Replicate()),
        "inner.up": ColwiseParallel(),
        "inner.down": RowwiseParallel(output_layouts=Shard(0)),
    }
    model = parallelize_module(copy.deepcopy(alone), mesh, plan)
    rows, factors = rows_of(0, 0, context.device, rows=12 if 12 % context.world_size == 0 else context.world_size)
    expected = alone(rows)
    backward(expected, factors)
    part = distribute_tensor(rows, mesh, [Shard(0)]).to_local()
    output = model(part)
    own = distribute_tensor(factors, mesh, [Shard(0)]).to_local()
    near(context, output, distribute_tensor(expected.detach(), mesh, [Shard(0)]).to_local(), "output")
    backward(output, own)
    for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        grad: Any = ours.grad
        near(context, grad.full_tensor(), theirs.grad, f"gradient of {name}")


@check("parallel", says="Cross entropy over a vocabulary split among the ranks (loss_parallel) is that of the whole")
def loss_over_shards(context: Context) -> None:
    mesh = mesh_of(context)
    logits, labels = integers(3, 8, 29).to(context.device), torch.arange(8, device=context.device) * 3
    alone: Any = logits.clone().requires_grad_()
    expected = F.cross_entropy(alone, labels)
    backward(expected, 1)
    ours = distribute_tensor(logits, mesh, [Shard(1)]).requires_grad_()
    with loss_parallel():
        loss: Any = F.cross_entropy(ours, labels)
        backward(loss, 1)
    near(context, loss.full_tensor(), expected, "loss")
    grad: Any = ours.grad
    near(context, grad.full_tensor(), alone.grad, "gradient of the logits")
