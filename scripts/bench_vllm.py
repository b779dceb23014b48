"""vLLM's decoding by what connects its ranks: hxcomm, vLLM's own shared memory, or gloo through torch.distributed.

    source scripts/setup.sh; source scripts/vllm_environment.sh
    PYTHONPATH=scripts HXCOMM_CPU=1 "$VLLM_BIN/python" scripts/bench_vllm.py "$MODEL" --ranks 2 --dtype bfloat16

One engine, whose workers change their communicator between answers: everything else is the same, and rounds are
interleaved. Eager mode, since a compiled graph keeps the communicator that it was traced with. Prints medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

WAYS = ("hxcomm", "vllm", "gloo")
NAMES = {"hxcomm": "hxcomm", "vllm": "vLLM's shared memory", "gloo": "gloo"}


class Communicators:
    """vLLM adds it to its worker class, in the workers."""

    made: dict[str, Any]

    def make_communicators(self) -> None:
        """All ranks together."""
        from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
        from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
        from vllm.distributed.parallel_state import get_tp_group

        group = get_tp_group()
        self.made = {
            "hxcomm": group.device_communicator,
            "vllm": CpuCommunicator(group.cpu_group, group.device, group.device_group, "tp:bench"),
            "gloo": DeviceCommunicatorBase(group.cpu_group, group.device, group.cpu_group, "tp:gloo"),
        }
        if not self.made["vllm"].supports_tensor_dict:
            raise RuntimeError("vLLM's shared memory is not available here")

    def communicate_by(self, way: str) -> None:
        """From the next forward on."""
        from vllm.distributed.parallel_state import get_tp_group

        get_tp_group().device_communicator = self.made[way]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("--ranks", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="prompts at once (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="new ones of each prompt (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    args = parser.parse_args()
    from vllm import LLM, SamplingParams

    # Random weights where the model's 9 heads cannot be shared: they take as long.
    evenly = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 512}
    other = {"load_format": "dummy", "hf_overrides": evenly} if args.ranks == 2 else {}
    engine = LLM(
        args.model,
        dtype=args.dtype,
        tensor_parallel_size=args.ranks,
        enforce_eager=True,
        max_model_len=1024,
        enable_prefix_caching=False,
        worker_extension_cls="bench_vllm.Communicators",
        **other,
    )
    engine.collective_rpc("make_communicators")
    prompts = [f"Chapter {number}. Once upon a time" for number in range(args.batch)]

    def seconds(way: str, tokens: int) -> tuple[float, list[Any]]:
        engine.collective_rpc("communicate_by", args=(way,))
        wanted = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        begin = time.perf_counter()
        answers = engine.generate(prompts, wanted, use_tqdm=False)
        return time.perf_counter() - begin, [each.outputs[0].token_ids for each in answers]

    totals: dict[str, list[float]] = {way: [] for way in WAYS}
    steps: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(args.rounds + 1):  # the first one warms up
        for way in WAYS[number % 3 :] + WAYS[: number % 3]:
            first, _ = seconds(way, 1)
            total, _ = seconds(way, args.tokens)
            if number:
                totals[way].append(total)
                steps[way].append((total - first) / (args.tokens - 1))
    print(f"TP={args.ranks}, {args.dtype}, batch {args.batch}, {args.tokens} tokens, median of {args.rounds} rounds")
    for way in WAYS:
        total, step = statistics.median(totals[way]), statistics.median(steps[way])
        rate, against = args.batch * args.tokens / total, statistics.median(totals["hxcomm"]) / total
        print(f"{NAMES[way]:24}{rate:9.1f} tokens/s{step * 1e3:9.2f} ms a token{against:8.2f} x the speed of hxcomm")


if __name__ == "__main__":
    main()
