"""A program for torchrun: prints its rank, its host and the sum of 1 to the world size, by the backend it is given."""

from __future__ import annotations

import socket
import sys

import torch
import torch.distributed as dist

dist.init_process_group(sys.argv[1])
tensor = torch.tensor([dist.get_rank() + 1])
dist.all_reduce(tensor)
print(dist.get_rank(), socket.gethostname(), tensor.item())
dist.destroy_process_group()
