"""A communicator: an object with a device and explicit async_op, instead of torch.distributed's global state.

torchrun --nproc-per-node 2 examples/02_communicator.py
"""

from datetime import timedelta

import torch

from hxcomm import torchcomms
from hxcomm.torchcomms import ReduceOp

device = torch.device("cpu")  # or "hx", whose tensors peers read in place
comm = torchcomms.new_comm(
    "hxcomm",
    device,
    name="main",
    timeout=timedelta(seconds=60),
    abort_process_on_timeout_or_error=False,  # raise hxcomm's typed errors instead of ending the process
)
rank, size = comm.get_rank(), comm.get_size()

# Blocking: the result is there when the call returns.
x = torch.full((4,), float(rank + 1), device=device)
comm.all_reduce(x, ReduceOp.SUM, async_op=False)
print(f"rank {rank} of {size}: the sum is {x[0].item():g}", flush=True)

# Asynchronous: the work says when. It may be dropped, and so may the tensor.
whole = torch.empty(4 * size, device=device)
work = comm.all_gather_single(whole, torch.full((4,), float(rank), device=device), async_op=True)
work.wait()
print(f"rank {rank}: gathered {whole[::4].tolist()}, {work.status.name}", flush=True)

# Each rank's contribution counted a different number of times.
y = torch.ones(1, device=device)
comm.all_reduce(y, ReduceOp.PREMUL_SUM(float(10**rank)), async_op=False)
print(f"rank {rank}: ranks counted by tens {y.item():g}", flush=True)

# Hints choose how a call is carried out; an unknown one is an error that lists what there is.
comm.all_reduce(x, ReduceOp.MAX, async_op=False, hints={"algorithm": "ring"}, timeout=timedelta(seconds=5))
try:
    comm.all_reduce(x, ReduceOp.MAX, async_op=False, hints={"algorihtm": "ring"})
except ValueError as error:
    print(f"rank {rank}: {str(error).split(';')[0]}", flush=True)

comm.finalize()
