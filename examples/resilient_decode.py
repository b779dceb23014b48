"""Decode on three ranks, lose one to SIGKILL in mid-sentence, go on with two, and be three again for the next sentence.

    python examples/resilient_decode.py

starts its own ranks: the tensor-parallel decoder of examples/tp_decode, in float32, over one hxcomm communicator. First
they decode two sentences undisturbed. Then they do it again, and rank 1 is killed in the first one. The other two
notice, reconfigure the communicator, load the shards of a group of two, rebuild the KV cache from the tokens so far and
finish the sentence; a fresh process joins, and the second sentence runs on three. Ends with 0 only if both texts are
those of the undisturbed run. No process but the killed one ends, and nothing that was decoded is lost.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import queue
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "tp_decode"))

import torch
import torch.distributed as dist
from errors import UsageError
from generate import Timing, decode
from sampling import Sampler
from tokenizer import open_tokenizer
from weights import Random, load, open_model

import hxcomm
import hxcomm.torchcomms as torchcomms
from hxcomm.decoder.model import Decoder
from hxcomm.decoder.shards import split

PROMPTS = ("The capital of France is", "Water is made of")
VICTIM, KILLED_AFTER = 1, 6  # tokens
LIMIT = timedelta(seconds=60)


# --- a rank -----------------------------------------------------------------------------------------------------------


class Ranks:
    """What the decoder asks of its peers (examples/tp_decode/communication.py), from a TorchComm."""

    alone, time_ns = False, 0

    def __init__(self, comm: torchcomms.TorchComm) -> None:
        self.comm, self.rank, self.world_size = comm, comm.get_rank(), comm.get_size()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.comm.all_reduce(x, torchcomms.ReduceOp.SUM, False)
        return x

    def linear_all_reduce(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self.all_reduce(torch.nn.functional.linear(x, weight))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        gathered = x.new_empty(self.world_size, x.numel())
        self.comm.all_gather_single(gathered, x, False)
        return gathered

    def barrier(self) -> None:
        self.comm.barrier(False)


class Member:
    """One process: its communicator, and the part of the model that is its own in the present group."""

    def __init__(self, number: int, port: int, args: argparse.Namespace) -> None:
        self.number, self.new_tokens = number, args.new_tokens
        self.source = Random(args.random) if args.random else open_model(None)
        self.tokenizer = open_tokenizer(self.source)
        self.store = dist.TCPStore("127.0.0.1", port, is_master=False)
        self.comm = torchcomms.new_comm(
            "hxcomm",
            "cpu",
            "decode",
            store=self.store,
            enable_reconfigure=True,
            abort_process_on_timeout_or_error=False,
            timeout=LIMIT,
        )
        self.store.set(f"handle/{number}", self.comm.get_init_handle())

    def say(self, event: str, **more: object) -> None:
        print(json.dumps({"event": event, "number": self.number, "at": time.monotonic(), **more}), flush=True)

    def join(self, uuid: int, members: list[int]) -> None:
        """The group of these processes, and this one's shard in it."""
        self.members = members
        handles = [self.store.get(f"handle/{number}").decode() for number in members]
        self.comm.reconfigure(uuid, handles, LIMIT)
        self.say("group", size=len(members), uuid=uuid)
        self.shards = split(self.source.config, len(members))
        shard = self.shards[self.comm.get_rank()]
        self.weights = load(self.source, shard, torch.float32, torch.device("cpu"), loaded=lambda: None)
        self.say("loaded", size=len(members))

    def tokens(self, prompt: list[int]) -> Any:
        """Yields token after token with a fresh KV cache, which the first pass over the whole prompt fills."""
        ranks, shard = Ranks(self.comm), self.shards[self.comm.get_rank()]
        length = len(prompt) + self.new_tokens
        model = Decoder(self.source.config, shard, self.weights, ranks, length)  # type: ignore[arg-type]
        most = max(len(each.rows) for each in self.shards)
        sampler = Sampler(ranks, shard, most, temperature=0.0, top_k=0, top_p=1.0, seed=0)  # type: ignore[arg-type]
        yield from decode(model, sampler, prompt, self.new_tokens, frozenset(), Timing())

    def sentence(self, run: str, which: int) -> None:
        prompt = self.tokenizer.encode(PROMPTS[which])
        so_far: list[int] = []
        while len(so_far) < self.new_tokens:
            try:
                for token in self.tokens([*prompt, *so_far]):
                    so_far.append(token)
                    self.say("token", run=run, sentence=which, count=len(so_far), size=len(self.members))
                    if len(so_far) == self.new_tokens:
                        break
            except hxcomm.PeerFailedError as error:
                self.say("death", message=str(error))
                assert error.rank is not None
                self.join(2, [each for rank, each in enumerate(self.members) if rank != error.rank])
                so_far = self.longest(so_far)
        self.say("sentence", run=run, sentence=which, text=self.tokenizer.decode(so_far), size=len(self.members))

    def longest(self, so_far: list[int]) -> list[int]:
        """One survivor may have had the last token when the other missed it."""
        ranks = Ranks(self.comm)
        counts = ranks.all_gather(torch.tensor([float(len(so_far))])).flatten()
        known = torch.tensor([*so_far, *[0] * (self.new_tokens - len(so_far))])
        self.comm.broadcast(known, int(counts.argmax()), False)
        return known[: int(counts.max())].tolist()

    def live(self, newcomer: bool) -> None:
        if not newcomer:
            self.join(1, [0, 1, 2])
            self.sentence("undisturbed", 0)
            self.sentence("undisturbed", 1)
            self.sentence("disturbed", 0)
            self.store.set("members", json.dumps([*self.members, 3]))
        self.join(3, json.loads(self.store.get("members")))
        self.sentence("disturbed", 1)
        self.comm.finalize()


# --- who starts them --------------------------------------------------------------------------------------------------


class Cast:
    """The processes, and what they say."""

    def __init__(self) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes: dict[int, subprocess.Popen[str]] = {}
        self.events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def start(self, number: int) -> None:
        command = [sys.executable, __file__, *sys.argv[1:], "--member", str(number), "--port", str(self.store.port)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.processes[number] = process
        threading.Thread(target=self.listen, args=(number, process), daemon=True).start()

    def listen(self, number: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.events.put(json.loads(line))
        self.events.put({"event": "ended", "number": number, "status": process.wait()})

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


def play(cast: Cast) -> tuple[list[dict[str, Any]], float]:
    """Starts the ranks, kills one, starts its successor. What all have said, and when the kill was."""
    said: list[dict[str, Any]] = []
    killed_at = 0.0
    deadline = time.monotonic() + 5 * LIMIT.total_seconds()
    for number in range(3):
        cast.start(number)
    running = {0, 1, 2}
    while running:
        event = cast.events.get(timeout=max(0.0, deadline - time.monotonic()))
        said.append(event)
        if event["event"] == "ended":
            running.discard(event["number"])
            if event["status"] != (-signal.SIGKILL if event["number"] == VICTIM else 0):
                raise RuntimeError(f"rank process {event['number']} ended with {event['status']}")
        is_time = event.get("run") == "disturbed" and event.get("count") == KILLED_AFTER
        if is_time and event["number"] == VICTIM and not killed_at:
            killed_at = time.monotonic()
            cast.processes[VICTIM].kill()
            cast.start(3)
            running.add(3)
    return said, killed_at


def timeline(said: list[dict[str, Any]], killed_at: float) -> str:
    """When the last of those concerned had got so far."""

    def at(event: str, **where: object) -> str:
        times = [
            each["at"]
            for each in said
            if each["event"] == event
            and each["at"] > killed_at
            and all(each.get(key) == value for key, value in where.items())
        ]
        return f"{1e3 * (max(times) - killed_at):8.0f} ms  " if times else "       - ms  "

    first = min((e["count"] for e in said if e["event"] == "token" and e["size"] == 2), default=0)
    death = next((e["message"] for e in said if e["event"] == "death"), "nobody noticed")
    return "\n".join(
        [
            f"       0 ms  rank {VICTIM} of 3 is killed with SIGKILL after {KILLED_AFTER} tokens",
            f"{at('death')}death seen by both others: {death.split('. ')[0]}",
            f"{at('group', size=2)}group rebuilt, two ranks",
            f"{at('loaded', size=2)}lost shards loaded",
            f"{at('token', size=2, count=first)}first token after it: the KV cache is rebuilt",
            f"{at('sentence', size=2)}sentence finished on two ranks",
            f"{at('group', size=3)}a fresh process has joined, three ranks",
            f"{at('sentence', size=3)}next sentence finished on three ranks",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new-tokens", type=int, default=16, help="of each sentence (default %(default)s)")
    parser.add_argument("--random", choices=Random.SHAPES, help="random weights of this size instead of the real model")
    parser.add_argument("--member", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.new_tokens <= KILLED_AFTER:
        parser.error(f"--new-tokens {args.new_tokens}: must be more than {KILLED_AFTER}, after which a rank is killed")
    if args.member is not None:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives the program
        torch.set_num_threads(1)
        Member(args.member, args.port, args).live(newcomer=args.member > 2)
        return 0
    try:
        Random(args.random) if args.random else open_model(None)
    except UsageError as error:
        print(f"resilient_decode.py: error: {error}", file=sys.stderr)
        return 2
    cast = Cast()
    try:
        said, killed_at = play(cast)
    finally:
        cast.end()
    texts = {(e["run"], e["sentence"]): e["text"] for e in said if e["event"] == "sentence"}
    sizes = {e["sentence"]: e["size"] for e in said if e["event"] == "sentence" and e["run"] == "disturbed"}
    print(timeline(said, killed_at))
    same = True
    for which, prompt in enumerate(PROMPTS):
        text, expected = texts.get(("disturbed", which)), texts.get(("undisturbed", which))
        print(f"\n{prompt}{text}")
        if text != expected:
            same = False
            print(f"DIFFERS from the undisturbed run: {prompt}{expected}")
    same = same and sizes == {0: 2, 1: 3}
    print("\nboth texts equal those of the undisturbed run" if same else "\nFAILED")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
