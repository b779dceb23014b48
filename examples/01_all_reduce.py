"""The smallest program: every rank contributes its number, every rank gets the sum. No import of hxcomm is needed.

torchrun --nproc-per-node 4 examples/01_all_reduce.py
"""

import torch
import torch.distributed as dist

dist.init_process_group(backend="hxcomm")
rank = dist.get_rank()
x = torch.full((4,), float(rank))
dist.all_reduce(x)
print(f"rank {rank} of {dist.get_world_size()}: {x.tolist()}", flush=True)
dist.destroy_process_group()
