"""Communication inside torch.compile: one graph, gradients through the collectives.

torchrun --nproc-per-node 2 examples/08_compile.py
"""

import torch

from hxcomm import torchcomms
from hxcomm.torchcomms import ReduceOp

comm = torchcomms.new_comm("hxcomm", torch.device("cpu"), name="compiled")
rank = comm.get_rank()


@torch.compile(fullgraph=True)
def layer(comm: torchcomms.TorchComm, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A row-parallel linear layer: each rank has some of the input's features."""
    y = x @ weight
    comm.all_reduce(y, ReduceOp.SUM, async_op=False)
    return torch.relu(y)


x = torch.full((2, 3), rank + 1.0, requires_grad=True)
y = layer(comm, x, torch.ones(3, 4))
y.sum().backward()
print(f"rank {rank}: y {y[0, 0].item():g}, gradient of x {x.grad[0, 0].item():g}", flush=True)

comm.finalize()
