"""FSDP2 (fully_shard), checkpoints and pipelines: a model of which no rank has all, against one process.

As in data_parallel.py, values are exact and compare with ==, and losses are multiplied by the number of ranks.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from hxcomm.verify.context import IDLE, Context, Idle
from hxcomm.verify.models import STEP, Perceptron, Sum, backward, exact, rows_of
from hxcomm.verify.registry import check

STEPS = 3


def mesh_of(context: Context, *shape: int) -> DeviceMesh:
    names = ("replicate", "shard")[-len(shape) :]
    return init_device_mesh(context.device.type, shape, mesh_dim_names=names)


def sharded(context: Context, mesh: DeviceMesh, **options: Any) -> tuple[Any, Any]:
    """The model, each part sharded by itself and then the rest, and the copy that is trained alone."""
    alone = exact(Sum(Perceptron(), Perceptron()), context.device)
    model = copy.deepcopy(alone)
    for part in model.parts:
        fully_shard(part, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options), alone


def train_both(context: Context, model: Any, alone: Any, step: int) -> None:
    """Adds the gradients of one step to both."""
    for rank in range(context.world_size):
        inputs, factors = rows_of(step, rank, context.device)
        backward(alone(inputs), factors)
        if rank == context.rank:
            backward(model(inputs), factors * context.world_size)


def whole(tensor: Any) -> Tensor:
    full: Tensor = tensor.full_tensor()
    return full


def same_gradients(context: Context, model: Any, alone: Any, what: str) -> None:
    for (name, ours), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
        context.equal(whole(ours.grad), expected.grad, f"gradient of {name} {what}")


def same_parameters(context: Context, model: Any, alone: Any, what: str) -> None:
    for (name, ours), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
        context.equal(whole(ours), expected, f"{name} {what}")


FSDP_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "kept_after_forward": {"reshard_after_forward": False},
    # With float32 and bfloat16 torch asks the backend for AVG, with others for sums.
    "float32": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)},
}


@check("parallel", says="FSDP2 trains as one process does on the whole batch (fully_shard)", cases=FSDP_OPTIONS)
def fully_sharded(context: Context, how: str) -> None:
    model, alone = sharded(context, mesh_of(context, context.world_size), **FSDP_OPTIONS[how])
    optimizers = [torch.optim.SGD(each.parameters(), lr=STEP) for each in (model, alone)]
    for step in range(1 if how == "float32" else STEPS):  # one step's gradients fit in its 24 bits
        train_both(context, model, alone, step)
        same_gradients(context, model, alone, f"in step {step}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        same_parameters(context, model, alone, f"after step {step}")


@check("parallel", says="FSDP2 on a mesh of two dimensions shards in one and replicates in the other", min_ranks=4)
def hybrid_sharded(context: Context) -> Idle | None:
    if context.world_size % 2:
        return IDLE
    model, alone = sharded(context, mesh_of(context, context.world_size // 2, 2))
    train_both(context, model, alone, 0)
    same_gradients(context, model, alone, "on two dimensions")
    return None


@check("parallel", says="FSDP2 computes and reduces in bfloat16 when told to (MixedPrecisionPolicy), here exactly")
def fully_sharded_bfloat16(context: Context) -> None:
    """One layer pair and one step, whose gradients are integers up to 200: exact in bfloat16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    alone = exact(Perceptron(), context.device)
    model: Any = fully_shard(copy.deepcopy(alone), mesh=mesh_of(context, context.world_size), mp_policy=policy)
    train_both(context, model, alone, 0)
    same_gradients(context, model, alone, "in bfloat16")


@check(
    "parallel",
    says="FSDP2 scales gradients by a factor of the program's choice (set_gradient_divide_factor)",
    optional=True,
)
def fully_sharded_divide_factor(context: Context) -> None:
    """torch asks for PREMUL_SUM, which not every backend has."""
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    alone = exact(Perceptron(), context.device)
    model: Any = fully_shard(copy.deepcopy(alone), mesh=mesh_of(context, context.world_size), mp_policy=policy)
    model.set_gradient_divide_factor(8.0)
    train_both(context, model, alone, 0)
    share = context.world_size / 8
    for (name, ours), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
        context.equal(whole(ours.grad), expected.grad * share, f"gradient of {name}")


@check("parallel", says="The norm of sharded gradients is that of the whole (clip_grad_norm_)", cases=[1.0, 2.0, "inf"])
def clipped_norm(context: Context, kind: float | str) -> None:
    """Norm 2 is the root of the sum of squared norms of shards, so it rounds a few times: 8 of the 53 bits are left
    to that."""
    model, alone = sharded(context, mesh_of(context, context.world_size))
    train_both(context, model, alone, 0)
    total: Any = nn.utils.clip_grad_norm_(model.parameters(), 1.0, norm_type=float(kind))
    expected = nn.utils.clip_grad_norm_(alone.parameters(), 1.0, norm_type=float(kind))
    ours = float(whole(total))
    context.expect(abs(ours / float(expected) - 1) < 2.0**-45, f"the norm is {ours}, alone it is {float(expected)}")
    for (name, parameter), alone_parameter in zip(model.named_parameters(), alone.parameters(), strict=True):
        difference = (whole(parameter.grad) - alone_parameter.grad).abs().max()
        context.expect(float(difference) < 2.0**-45, f"clipped gradient of {name} is off by {float(difference)}")


def shared_folder(context: Context) -> str:
    """One for all ranks; rank 0 removes it."""
    if context.rank == 0:
        context.tell("folder", tempfile.mkdtemp(prefix="verify-checkpoint-"))
    return context.await_key("folder")


@check("parallel", says="A sharded model's full state can be gathered, loaded from rank 0, saved and loaded in shards")
def checkpoints(context: Context) -> None:
    mesh = mesh_of(context, context.world_size)
    model, alone = sharded(context, mesh)
    full = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    gathered: dict[str, Any] = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    for name, expected in alone.state_dict().items():
        context.equal(gathered[name], expected, f"{name} in the full state")

    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    set_model_state_dict(model, alone.state_dict() if context.rank == 0 else {}, options=full)
    same_parameters(context, model, alone, "loaded from rank 0")

    folder = shared_folder(context)
    try:
        save({"model": get_model_state_dict(model)}, checkpoint_id=folder)
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        state = {"model": get_model_state_dict(model)}
        load(state, checkpoint_id=folder)
        set_model_state_dict(model, state["model"])
        same_parameters(context, model, alone, "saved and loaded")
        context.meet()
    finally:
        if context.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


SCHEDULES: dict[str, Any] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}


@check(
    "parallel",
    says="A pipeline passes rows and gradients from stage to stage (torch.distributed.pipelining)",
    cases=SCHEDULES,
    min_ranks=2,
)
def pipeline(context: Context, how: str) -> None:
    """One layer a stage; interleaved, rank r has stages r and r + world_size. Each layer's weight moves columns, so
    that values stay small in however many."""
    micro_batches, stages = 2 * context.world_size, context.world_size * (2 if how == "interleaved" else 1)
    alone = exact(nn.Sequential(*(nn.Linear(24, 24) for _ in range(stages))), context.device)
    with torch.no_grad():
        for number, layer in enumerate(alone):
            layer.weight.copy_(torch.eye(24).roll(number + 1, dims=0))
    mine = [
        PipelineStage(copy.deepcopy(alone[number]), number, stages, context.device)
        for number in range(context.rank, stages, context.world_size)
    ]

    def loss(output: Any, factors: Any) -> Any:
        return (output * factors).sum()

    schedule = SCHEDULES[how](mine if how == "interleaved" else mine[0], micro_batches, loss_fn=loss, scale_grads=False)
    inputs, factors = rows_of(0, 0, context.device, rows=2 * micro_batches)
    losses: list[Tensor] = []
    for _ in range(2):
        first, final = context.rank == 0, context.rank == context.last
        output = schedule.step(*([inputs] if first else []), **({"target": factors, "losses": losses} if final else {}))
        expected = alone(inputs)
        loss(expected, factors).backward()
        if final:
            context.equal(output, expected, "output of the last stage")
            context.equal(torch.stack(losses).sum(), loss(expected, factors), "loss")
    for stage in mine:
        for ours, theirs in zip(stage.submod.parameters(), alone[stage.stage_index].parameters(), strict=True):
            grad: Any = ours.grad
            context.equal(grad, theirs.grad, f"gradient in stage {stage.stage_index}")
