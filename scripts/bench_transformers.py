"""Tokens/s of transformers' tensor parallelism over hxcomm and over gloo, in interleaved rounds, as markdown.

    python examples/smollm2_folder.py smollm2
    python scripts/bench_transformers.py smollm2 --rounds 5

Each run is a program without distributed code under torchrun; what differs is the environment. Medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from statistics import median

# What connects the ranks, and where they compute: by variables alone.
WAYS = {
    "gloo, cpu": ({"HXCOMM_DEVICE": "0"}, "cpu:gloo"),
    "hxcomm, cpu": ({"HXCOMM_CPU": "1"}, "cpu:hxcomm"),
    "hxcomm, hx": ({}, "hx:hxcomm"),
}
RUN_TIMEOUT_S = 300.0


def worker(folder: str, new_tokens: int) -> None:
    """One rank. Rank 0 prints one line of JSON."""
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.distributed import DistributedConfig

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto"))
    inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)

    def decode(count: int) -> list[int]:
        with torch.inference_mode():
            made = model.generate(**inputs, min_new_tokens=count, max_new_tokens=count, do_sample=False)
        return made[0].tolist()

    decode(8)  # warms up
    begin = time.perf_counter()
    tokens = decode(new_tokens)
    seconds = time.perf_counter() - begin
    if dist.get_rank() == 0:
        print(json.dumps({"rate": new_tokens / seconds, "tokens": tokens, "backends": dist.get_backend_config()}))


def measure(way: str, folder: str, ranks: int, new_tokens: int) -> tuple[float, list[int]]:
    """Runs it once. Raises RuntimeError with what it printed where it fails, or used another backend."""
    variables, backend = WAYS[way]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [sys.executable, *launcher, __file__, folder, "--new-tokens", str(new_tokens), "--worker"],
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not lines:
        raise RuntimeError(f"{way}: {done.stdout}{done.stderr}")
    result = json.loads(lines[-1])
    if backend not in result["backends"].split(","):
        raise RuntimeError(f"{way}: the process group has {result['backends']}")
    return result["rate"], result["tokens"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="Hugging Face folder")
    parser.add_argument("--ranks", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.folder, args.new_tokens)
        return 0
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    made: set[tuple[int, ...]] = set()
    for number in range(args.rounds):
        for way in WAYS:
            rate, tokens = measure(way, args.folder, args.ranks, args.new_tokens)
            rates[way].append(rate)
            made.add(tuple(tokens))
            print(f"round {number + 1}: {way}: {rate:.1f} tokens/s", file=sys.stderr)
    print("| backend, device | tokens/s | against gloo |\n|---|---|---|")
    for way, each in rates.items():
        print(f"| {way} | {median(each):.1f} | {median(each) / median(rates['gloo, cpu']):.2f}x |")
    print("\nAll runs made the same tokens." if len(made) == 1 else f"\n{len(made)} different texts were made.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
