"""Tokens/s of examples/tp_decode over hxcomm, over gloo and in one process, in interleaved rounds, as markdown.

    python scripts/bench_decode.py --rounds 3 --max-new-tokens 64

Every configuration runs once a round, so that a machine that slows down slows all of them down; medians of the rounds.
The model of 135M parameters is the real one, that of 15M is random.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
MODELS = {"135M": [], "15M random": ["--random", "15M"]}
RUN_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Configuration:
    """One row of the table for one model. backend None: one process without a process group."""

    backend: str | None
    ranks: int
    threads: int  # of each rank
    device: str = "cpu"

    def title(self) -> str:
        where = "" if self.device == "cpu" else f", device {self.device}"
        if self.backend is None:
            return f"1 process, {self.threads} threads{where}"
        return f"{self.ranks} ranks, {self.backend}{where}"


CONFIGURATIONS = (
    Configuration(None, 1, 2),
    Configuration(None, 1, 2, "hx"),
    Configuration("hxcomm", 2, 1),
    Configuration("hxcomm", 2, 1, "hx"),
    Configuration("gloo", 2, 1),
    Configuration("hxcomm", 4, 1),
    Configuration("gloo", 4, 1),
)


@dataclass(frozen=True)
class Decoded:
    tokens_per_s: float
    communication_share: float
    token_ids: tuple[int, ...]


def decode(configuration: Configuration, model: str, max_new_tokens: int) -> Decoded:
    """Runs the example once. Raises RuntimeError with what it printed where it fails."""
    command = [sys.executable]
    if configuration.backend is not None:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(configuration.ranks)]
    command += [str(ROOT / "examples" / "tp_decode" / "generate.py"), "--json", "--ignore-eos", *MODELS[model]]
    command += ["--threads", str(configuration.threads), "--device", configuration.device]
    command += ["--max-new-tokens", str(max_new_tokens)]
    if configuration.backend is not None:
        command += ["--backend", configuration.backend]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(configuration.threads)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise RuntimeError(
            f"{configuration.title()}, model {model}: exit status {done.returncode}\n{done.stderr[-2000:]}"
        )
    result = json.loads(done.stdout.strip().splitlines()[-1])
    return Decoded(result["tokens_per_s"], result["communication_share"], tuple(result["token_ids"]))


def markdown(results: dict[tuple[str, Configuration], list[Decoded]], rounds: int, max_new_tokens: int) -> str:
    lines = [
        f"Greedy decode in float32 of {max_new_tokens} tokens on {len(os.sched_getaffinity(0))} cores: "
        f"medians of {rounds} rounds.",
        "",
        "| model | configuration | tokens/s | in collectives | against gloo | against 1 process | time of CPU's |",
        "|---|---|---|---|---|---|---|",
    ]
    speed = {key: median(run.tokens_per_s for run in runs) for key, runs in results.items()}
    for (model, configuration), runs in results.items():
        mine = speed[model, configuration]
        share = median(run.communication_share for run in runs)
        gloo = next(
            (
                speed[key]
                for key in speed
                if key[0] == model and (key[1].backend, key[1].ranks) == ("gloo", configuration.ranks)
            ),
            None,
        )
        alone = next((speed[key] for key in speed if key[0] == model and key[1] == CONFIGURATIONS[0]), None)
        cells = [model, configuration.title(), f"{mine:.1f}"]
        cells.append("-" if configuration.backend is None else f"{100 * share:.0f} %")
        cells.append(f"{mine / gloo:.2f}x" if gloo and configuration.backend == "hxcomm" else "-")
        cells.append(f"{mine / alone:.2f}x" if alone and configuration.ranks > 1 else "-")
        on_cpu = speed.get((model, replace(configuration, device="cpu")))
        cells.append(f"{on_cpu / mine:.2f}x" if on_cpu and configuration.device != "cpu" else "-")
        lines.append("| " + " | ".join(cells) + " |")
    for model in dict.fromkeys(model for model, _ in results):
        texts = {run.token_ids for (name, _), runs in results.items() if name == model for run in runs}
        lines.append(
            f"\n{model}: all runs made {'the same tokens' if len(texts) == 1 else f'{len(texts)} DIFFERENT texts'}."
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--ranks", default="2,4", help="comma-separated (default: %(default)s)")
    options = parser.parse_args()
    models = options.models.split(",")
    if unknown := [model for model in models if model not in MODELS]:
        parser.error(f"--models {unknown[0]}: known are {', '.join(MODELS)}")
    if options.rounds < 1 or options.max_new_tokens < 2:
        parser.error("--rounds must be at least 1 and --max-new-tokens at least 2")
    if unknown := [ranks for ranks in options.ranks.split(",") if ranks not in ("2", "4")]:
        parser.error(f"--ranks {unknown[0]}: measured are 2 and 4")
    configurations = [each for each in CONFIGURATIONS if str(each.ranks) in ("1", *options.ranks.split(","))]
    results: dict[tuple[str, Configuration], list[Decoded]] = {(m, c): [] for m in models for c in configurations}
    for number in range(options.rounds):
        for (model, configuration), runs in results.items():
            try:
                runs.append(decode(configuration, model, options.max_new_tokens))
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                print(f"bench_decode.py: {error}", file=sys.stderr)
                return 1
            what = f"round {number + 1}: {model}, {configuration.title()}: {runs[-1].tokens_per_s:.1f} tokens/s"
            print(what, file=sys.stderr, flush=True)
    print(markdown(results, options.rounds, options.max_new_tokens))
    return 0


if __name__ == "__main__":
    sys.exit(main())
