"""A program for torchcomms runs when the package is installed under that name, unchanged."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

INSTALLED = "import hxcomm.as_torchcomms\n\nhxcomm.as_torchcomms.install()\n"

PROGRAM = """
import sys
from datetime import timedelta

import torch
import torchcomms
from torchcomms import BatchP2POptions, CommOptions, ReduceOp, TorchComm, objcol
from torchcomms._comms import OpName, RedOpType, TorchWork
from torchcomms.coalescing import coalesce
from torchcomms.device_mesh import init_device_mesh
from torchcomms.hooks import FlightRecorderHook

device = torch.device(sys.argv[1])
comm = torchcomms.new_comm(
    "hxcomm", device, name="main", timeout=timedelta(seconds=30), abort_process_on_timeout_or_error=False
)
rank, size = comm.get_rank(), comm.get_size()
assert isinstance(comm, TorchComm) and comm.get_backend() == "hxcomm" and comm.get_device() == device
assert isinstance(comm.get_options(), CommOptions)
recorder = FlightRecorderHook(max_entries=100)
recorder.register_with_comm(comm)
seen = []
handle = comm.register_pre_hook(lambda name, op_id, args: seen.append(name))

tensor = torch.full((8,), float(rank + 1), device=device)
comm.all_reduce(tensor, ReduceOp.SUM, async_op=False)
assert tensor.tolist() == [size * (size + 1) / 2] * 8
work = comm.all_reduce(tensor, ReduceOp.PREMUL_SUM(0.5), async_op=True)
assert isinstance(work, TorchWork)
work.wait()
assert tensor.tolist() == [size * size * (size + 1) / 4] * 8
handle.remove()
assert seen == [OpName.all_reduce] * 2 and ReduceOp.AVG.type is RedOpType.AVG

batch, received = comm.batch_op_create(), torch.empty(1, device=device)
batch.recv(received, (rank - 1) % size)
batch.send(torch.tensor([float(rank)], device=device), (rank + 1) % size)
batch.issue(async_op=False, options=BatchP2POptions())
assert received.item() == (rank - 1) % size

gathered = [None] * size
objcol.all_gather_object(comm, gathered, {"rank": rank})
assert gathered == [{"rank": each} for each in range(size)]

one, two = torch.ones(2, device=device), torch.ones(3, device=device)
with coalesce(comm) as block:
    comm.all_reduce(one, ReduceOp.SUM, async_op=True)
    comm.broadcast(two, root=0, async_op=True)
block.wait()
assert one.tolist() == [size] * 2

part = comm.split([each for each in range(size) if each % 2 == rank % 2], name=f"part{rank % 2}")
part.barrier(async_op=False)

def step(x):
    comm.all_reduce(x, ReduceOp.SUM, async_op=False)
    return x * 2

compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
assert compiled(torch.ones(2, device=device)).tolist() == [2.0 * size] * 2

mesh = init_device_mesh(mesh_dim_comms=(comm,), mesh_dim_names=("main",))
sharded = torch.distributed.tensor.distribute_tensor(
    torch.arange(float(size), device=device), mesh, [torch.distributed.tensor.Shard(0)]
)
assert sharded.sum().full_tensor().item() == size * (size - 1) / 2

assert "all_reduce" in recorder.dump_json()
part.finalize()
comm.finalize()
import hxcomm.torchcomms, hxcomm.torchcomms.device_mesh
assert torchcomms is hxcomm.torchcomms and sys.modules["torchcomms.device_mesh"] is hxcomm.torchcomms.device_mesh
print("done")
"""


def named(folder: Path) -> dict[str, str]:
    """The environment in which `import torchcomms` finds ours."""
    (folder / "torchcomms.py").write_text(INSTALLED)
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


@pytest.mark.parametrize("device", ["cpu", "hx"])
def test_a_program_that_imports_torchcomms_runs_on_ours(
    run_ranks: Callable[..., list[object]], tmp_path: Path, device: str
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    outputs = run_ranks(tmp_path / "program.py", 2, device, env=named(tmp_path), timeout_s=120)
    assert all(str(output).rstrip().endswith("done") for output in outputs)


TORCHS_OWN = """
import torch
import torch.distributed as dist
import torchcomms

assert dist.distributed_c10d._use_torchcomms_enabled()
dist.init_process_group("hxcomm", device_id=None)
tensor = torch.full((4,), float(dist.get_rank() + 1))
dist.all_reduce(tensor)
backend = dist.group.WORLD._get_backend(torch.device("cpu"))
assert isinstance(backend.get_comm(), torchcomms.TorchComm)
gathered = [torch.empty(1) for _ in range(2)] if dist.get_rank() == 0 else None
dist.gather(torch.tensor([float(dist.get_rank())]), gathered, dst=0)
assert gathered is None or [each.item() for each in gathered] == [0.0, 1.0]
part = dist.new_group([0, 1])
other = torch.ones(2)
dist.all_reduce(other, group=part)
objects = [None, None]
dist.all_gather_object(objects, dist.get_rank())
assert objects == [0, 1]
peer = 1 - dist.get_rank()
received = torch.empty(4)
for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, tensor, peer), dist.P2POp(dist.irecv, received, peer)]):
    work.wait()
print(tensor.tolist(), other.tolist(), received.tolist())
dist.destroy_process_group()
"""


def test_torch_itself_makes_its_groups_over_communicators_of_ours_when_told_to_use_torchcomms(
    run_ranks: Callable[..., list[object]], tmp_path: Path
) -> None:
    """TORCH_DISTRIBUTED_USE_TORCHCOMMS=1 is torch's own switch."""
    (tmp_path / "program.py").write_text(TORCHS_OWN)
    env = {**named(tmp_path), "TORCH_DISTRIBUTED_USE_TORCHCOMMS": "1"}
    for output in run_ranks(tmp_path / "program.py", 2, env=env, timeout_s=120):
        assert str(output).rstrip().endswith("[3.0, 3.0, 3.0, 3.0] [2.0, 2.0] [3.0, 3.0, 3.0, 3.0]")


def test_a_module_under_the_other_name_is_the_module_itself() -> None:
    import importlib
    import sys

    from hxcomm import as_torchcomms

    as_torchcomms.install("communicators")
    try:
        assert importlib.import_module("communicators") is importlib.import_module("hxcomm.torchcomms")
        found = importlib.import_module("communicators.objcol")
        assert found is importlib.import_module("hxcomm.torchcomms.objcol")
        assert found.__spec__ is not None
        assert found.__spec__.name == "hxcomm.torchcomms.objcol"
        with pytest.raises(ModuleNotFoundError, match=r"communicators\.absent"):
            importlib.import_module("communicators.absent")
    finally:
        sys.meta_path[:] = [each for each in sys.meta_path if getattr(each, "name", "") != "communicators"]
        for name in [each for each in sys.modules if each.split(".")[0] == "communicators"]:
            del sys.modules[name]
