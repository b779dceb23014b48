"""One-sided: each rank writes into its neighbour's memory and signals; the neighbour only waits for the signal.

torchrun --nproc-per-node 2 examples/05_window.py
"""

import torch

from hxcomm import torchcomms

comm = torchcomms.new_comm("hxcomm", torch.device("cpu"), name="main")
rank, size = comm.get_rank(), comm.get_size()
right, left = (rank + 1) % size, (rank - 1) % size

# Memory that the peers can map: a tensor of device hx, or a CPU tensor that the allocator made.
with comm.mem_allocator:
    mailbox = torch.zeros(8)
window = comm.new_window(mailbox)  # blocks until every rank has registered its tensor

window.put(torch.full((4,), rank + 1.0), dst_rank=right, target_offset_nelems=4, async_op=False)
window.signal(right, async_op=False)  # what was put before is there when the signal is
window.wait_signal(left, async_op=False)
print(f"rank {rank}: my mailbox holds {mailbox.tolist()}", flush=True)

# On one host a peer's memory is a tensor like any other: no copy, no message.
comm.barrier(async_op=False)
theirs = window.map_remote_tensor(right)
print(f"rank {rank}: I read {theirs[4].item():g} in the mailbox of rank {right}", flush=True)

window.tensor_deregister()
comm.finalize()
