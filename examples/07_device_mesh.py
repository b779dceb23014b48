"""PyTorch's own parallelism over communicators: a tensor-parallel MLP by parallelize_module, and a DTensor.

torchrun --nproc-per-node 2 examples/07_device_mesh.py
"""

import torch
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from hxcomm import torchcomms
from hxcomm.torchcomms.device_mesh import init_device_mesh

comm = torchcomms.new_comm("hxcomm", torch.device("cpu"), name="tensor parallel")
mesh = init_device_mesh((comm,), ("tp",))

torch.manual_seed(0)  # the same weights on every rank
mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
x = torch.randn(4, 8)
alone = mlp(x)
parallelize_module(mlp, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
together = mlp(x)  # one all_reduce, by the communicator
shard = mlp[0].weight.to_local()
print(
    f"rank {comm.get_rank()}: {list(shard.shape)} of the first weight, equal: {torch.allclose(alone, together)}",
    flush=True,
)

rows = distribute_tensor(torch.arange(8.0), mesh, [Shard(0)])
print(f"rank {comm.get_rank()}: {rows.to_local().tolist()} of {rows.sum().full_tensor().item():g} in all", flush=True)

comm.finalize()
