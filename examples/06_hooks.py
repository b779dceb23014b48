"""Who called what: hooks of one's own, the flight recorder, and the search for NaN.

torchrun --nproc-per-node 2 examples/06_hooks.py
"""

import json
import time

import torch

from hxcomm import torchcomms
from hxcomm.torchcomms import ReduceOp
from hxcomm.torchcomms.hooks import FlightRecorderHook, NanCheckHook

comm = torchcomms.new_comm("hxcomm", torch.device("cpu"), name="watched", abort_process_on_timeout_or_error=False)
rank = comm.get_rank()

began: dict[int, tuple[str, float]] = {}


def before(name: torchcomms.OpName, op_id: int, args: torchcomms.PreHookArgs) -> None:
    began[op_id] = (name.name, time.perf_counter())


def after(op_id: int, args: torchcomms.PostHookArgs) -> None:
    name, then = began[op_id]
    if rank == 0:
        print(f"operation {op_id}, {name}: {1e6 * (time.perf_counter() - then):.0f} us", flush=True)


handles = [comm.register_pre_hook(before), comm.register_post_hook(after)]
recorder = FlightRecorderHook(max_entries=100)
recorder.register_with_comm(comm)

x = torch.ones(1000)
comm.all_reduce(x, ReduceOp.SUM, async_op=False)
comm.broadcast(x, 0, async_op=False)
comm.barrier(async_op=False)
for handle in handles:
    handle.remove()

# What torch's fr_trace reads (python -m torch.distributed.flight_recorder.fr_trace), from every rank.
if rank == 0:
    for entry in json.loads(recorder.dump_json())["entries"]:
        print(f"recorded {entry['profiling_name']} of {entry['input_sizes']}: {entry['state']}", flush=True)

check = NanCheckHook()
check.register_with_comm(comm)
x[3] = float("nan")
try:
    comm.all_reduce(x, ReduceOp.SUM, async_op=False)
except RuntimeError as error:
    print(f"rank {rank}: {error}", flush=True)

check.unregister()
recorder.unregister()
comm.finalize()
