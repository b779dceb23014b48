"""What a put into another rank's window costs on one host, beside memcpy of the same bytes.

    python scripts/bench_windows.py [--sizes 16KiB,16MiB] [--device hx] [--rounds 200]

Two ranks. Rank 0 puts, rank 1 waits in a collective. Put and memcpy take turns, so that what disturbs the machine
disturbs both: each round copies from one buffer to another of this rank (memcpy) and puts the same buffer into rank
1's window (put). Prints the medians, their ratio, and what put and signal take until rank 1 has seen the signal and
signalled back, halved.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import torch

from hxcomm import environment, torchcomms

TIMEOUT_S = 300


def microseconds(call: Callable[[], object]) -> float:
    began = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - began) / 1e3


def measure(comm: torchcomms.TorchComm, nbytes: int, rounds: int) -> None:
    rank, device = comm.get_rank(), comm.get_device()
    copy = ctypes.CDLL(None).memcpy
    copy.argtypes, copy.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t], ctypes.c_void_p
    with comm.mem_allocator:
        source, target = (torch.full((nbytes,), rank, dtype=torch.uint8, device=device) for _ in range(2))
        window = comm.new_window(torch.zeros(nbytes, dtype=torch.uint8, device=device))
    to, given = target.data_ptr(), source.data_ptr()
    times: dict[str, list[float]] = {"memcpy": [], "put": [], "put, signal, wait": []}
    if rank == 0:
        for turn in range(rounds + rounds // 10 + 1):
            memcpy, put = (
                microseconds(lambda: copy(to, given, nbytes)),
                microseconds(lambda: window.put(source, 1, 0, False)),
            )
            if turn > rounds // 10:
                times["memcpy"].append(memcpy)
                times["put"].append(put)
    comm.barrier(False)

    def there_and_back() -> None:
        if rank == 1:
            window.wait_signal(0, False)
        window.put(source, 1 - rank, 0, False)
        window.signal(1 - rank, False)
        if rank == 0:
            window.wait_signal(1, False)

    for turn in range(rounds):
        took = microseconds(there_and_back)
        if turn >= rounds // 10:
            times["put, signal, wait"].append(took / 2)
    if rank == 0:
        medians = {name: statistics.median(each) for name, each in times.items()}
        shown = "  ".join(f"{name} {value:9.2f} us" for name, value in medians.items())
        print(f"{nbytes:>10} bytes  {shown}  put/memcpy {medians['put'] / medians['memcpy']:.2f}", flush=True)
    window.tensor_deregister()


def run_rank(sizes: list[int], device: str, rounds: int) -> None:
    torch.set_num_threads(1)
    comm = torchcomms.new_comm("hxcomm", device, "bench_windows", timeout=timedelta(seconds=TIMEOUT_S))
    for nbytes in sizes:
        measure(comm, nbytes, rounds if nbytes <= 1 << 20 else max(rounds // 2, 20))
    comm.finalize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="16KiB,16MiB", help="of a put, such as 16KiB,16MiB")
    parser.add_argument("--device", default="hx", choices=("cpu", "hx"))
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    sizes = [environment.parse_nbytes(each) for each in arguments.sizes.split(",")]
    if "RANK" in os.environ:
        run_rank(sizes, arguments.device, arguments.rounds)
        return 0
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    told = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": "2",
    }
    ranks = [
        subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, **told, "RANK": str(rank)}) for rank in (0, 1)
    ]
    return max(abs(rank.wait(timeout=2 * TIMEOUT_S)) for rank in ranks)


if __name__ == "__main__":
    sys.exit(main())
