"""What an operation on hx takes over the same on CPU: microseconds an operator, small tensors, one thread.

`python scripts/bench_device.py` alternates between the devices and prints the fastest and the median of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

CALLS = 1500
Case = Callable[[], object]


def cases(device: str) -> dict[str, Case]:
    """Operators by name; those that have no fast path are marked with a star."""
    torch.manual_seed(0)
    a, b, c = (torch.randn(4, 16, device=device) for _ in range(3))
    square, vector, table = (torch.randn(n, 16, device=device) for n in (16, 1, 100))
    vector, batch, heads = vector[0], torch.randn(2, 4, 4, device=device), torch.randn(1, 2, 4, 8, device=device)
    rows = torch.tensor([1, 2], device=device)
    return {
        "empty": lambda: torch.empty(16, device=device),
        "view": lambda: a.view(2, 32),
        "slice": lambda: a[1:],
        "copy_": lambda: a.copy_(c),
        "add": lambda: a + c,
        "add_": lambda: b.add_(c),
        "mul": lambda: a * c,
        "mm": lambda: a @ square,
        "addmm": lambda: torch.addmm(vector, a, square),
        "bmm": lambda: torch.bmm(batch, batch),
        "silu": lambda: F.silu(a),
        "softmax": lambda: a.softmax(-1),
        "rms_norm": lambda: F.rms_norm(a, (16,), vector),
        "embedding": lambda: F.embedding(rows, table),
        "index": lambda: table[rows],
        "cat": lambda: torch.cat((a, c)),
        "attention": lambda: F.scaled_dot_product_attention(heads, heads, heads),
        "argmax": lambda: a.argmax(-1),
        "item": lambda: vector[0].item(),
        "layer_norm *": lambda: F.layer_norm(a, (16,)),
        "abs *": lambda: a.abs(),
        "tanh *": lambda: a.tanh(),
        "eq *": lambda: a == c,
        "maximum *": lambda: torch.maximum(a, c),
    }


def microseconds(case: Case) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        case()
    return (time.perf_counter() - start) / CALLS * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"{'operator':14}{'cpu us':>9}{'hx us':>9}{'added, fastest':>16}{'median':>9}")
    with torch.inference_mode():
        cpu, hx = cases("cpu"), cases("hx")
        for name in cpu:
            times = [(microseconds(cpu[name]), microseconds(hx[name])) for _ in range(rounds)]
            ours, theirs = [hx_us for _, hx_us in times], [cpu_us for cpu_us, _ in times]
            median = statistics.median(hx_us - cpu_us for cpu_us, hx_us in times)
            fastest = min(ours) - min(theirs)
            print(f"{name:14}{min(theirs):9.2f}{min(ours):9.2f}{fastest:16.2f}{median:9.2f}")


if __name__ == "__main__":
    main()
