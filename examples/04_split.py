"""Communicators inside a communicator: 2 replicas, each tensor-parallel over half of the ranks.

torchrun --nproc-per-node 4 examples/04_split.py
"""

import torch

from hxcomm import torchcomms
from hxcomm.torchcomms import ReduceOp

world = torchcomms.new_comm("hxcomm", torch.device("cpu"), name="world")
rank, size = world.get_rank(), world.get_size()
half = size // 2
replica, place = divmod(rank, half)

# Ranks that are not listed get None, and need not call at all: each makes the two that it is in.
tensor_parallel = world.split([replica * half + i for i in range(half)], name="tensor parallel")
data_parallel = world.split([i * half + place for i in range(2)], name="data parallel")

# y = W x, with the columns of W shared out within a replica, and gradients averaged between replicas.
columns = 6 // half
weight = torch.arange(12.0).view(2, 6)[:, place * columns : (place + 1) * columns]
y = weight @ torch.ones(columns)
tensor_parallel.all_reduce(y, ReduceOp.SUM, async_op=False)
gradient = torch.full((2,), float(replica))
data_parallel.all_reduce(gradient, ReduceOp.AVG, async_op=False)
print(f"rank {rank}, replica {replica}: y {y.tolist()}, mean gradient {gradient[0].item():g}", flush=True)

for comm in (data_parallel, tensor_parallel, world):
    comm.finalize()
