"""Sends and receives that begin together: a ring in both directions, whatever the order they are added in.

torchrun --nproc-per-node 3 examples/03_batch.py
"""

import torch

from hxcomm import torchcomms

comm = torchcomms.new_comm("hxcomm", torch.device("cpu"), name="ring")
rank, size = comm.get_rank(), comm.get_size()
right, left = (rank + 1) % size, (rank - 1) % size

mine = torch.full((100_000,), float(rank))
from_left, from_right = torch.empty_like(mine), torch.empty_like(mine)

batch = comm.batch_op_create()
batch.send(mine, right)  # every rank sends first: one by one, blocking, this would wait for ever
batch.send(mine, left)
batch.recv(from_left, left)
batch.recv(from_right, right)
batch.issue(async_op=False)
print(f"rank {rank}: {from_left[0].item():g} from the left, {from_right[0].item():g} from the right", flush=True)

comm.finalize()
