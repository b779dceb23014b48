"""The memory of all ranks together while examples/tp_decode decodes on hx, at 1, 2 and 4 ranks, as markdown.

    python scripts/bench_memory.py --max-new-tokens 32
    python scripts/bench_memory.py --random 15M --max-new-tokens 8

Arguments but --ranks are those of the example. Each rank measures itself, after the last token and before any of them
leaves: the most bytes that its tensors on hx had, the pages that its segment holds (the chips' memory, used since or
not, and what hxcomm shares with its peers), and its proportional set size, in which a page of n processes counts 1/n.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "examples" / "tp_decode")]
RUN_TIMEOUT_S = 300.0
MIB = 1 << 20


@dataclass(frozen=True)
class Memory:
    """Of one rank, or of all of them added, in bytes."""

    tensors: int
    segment: int
    pss: int


def segment_bytes() -> int:
    """What this process's segment holds: tmpfs counts the pages of a memfd as blocks of 512 bytes."""
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists the folder
            if str(fd.readlink()).startswith("/memfd:hxcomm"):
                return fd.stat().st_blocks * 512
    return 0


def proportional_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) << 10


def measure(arguments: Sequence[str]) -> Memory:
    """Decodes as the example does, as one rank of those that the environment names, and measures this process."""
    import generate
    import torch
    import torch.distributed as dist

    options = generate.parse_arguments([*arguments, "--device", "hx", "--ignore-eos", "--json"])
    prepared = generate.prepare(options, int(os.environ["WORLD_SIZE"]), launched=True)
    dist.init_process_group("hxcomm")
    torch.hx.empty_cache()  # of a process that has done something before
    torch.hx.reset_peak_memory_stats()
    with contextlib.redirect_stdout(io.StringIO()):
        generate.run(options, *prepared)
    dist.barrier()  # every rank has its memory
    memory = Memory(torch.hx.max_memory_allocated(), segment_bytes(), proportional_bytes())
    dist.barrier()  # and has measured it
    dist.destroy_process_group()
    return memory


def added(ranks: Sequence[Memory]) -> Memory:
    return Memory(sum(m.tensors for m in ranks), sum(m.segment for m in ranks), sum(m.pss for m in ranks))


def run(ranks: int, arguments: Sequence[str]) -> Memory:
    """That of all ranks. Raises RuntimeError with what they printed where one fails."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [*launcher, __file__, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False)
    measured = [Memory(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or len(measured) != ranks:
        raise RuntimeError(f"{ranks} ranks: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return added(measured)


def markdown(results: dict[int, Memory]) -> str:
    first = next(iter(results.values()))
    lines = [
        "| ranks | tensors on hx, MiB | against the first row | segments, MiB | against the first row | PSS, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for ranks, memory in results.items():
        lines.append(
            f"| {ranks} | {memory.tensors / MIB:.1f} | {memory.tensors / first.tensors:.3f}x "
            f"| {memory.segment / MIB:.1f} | {memory.segment / first.segment:.3f}x | {memory.pss / MIB:.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2,4", help="comma-separated (default: %(default)s)")
    if "RANK" in os.environ:
        print(json.dumps(asdict(measure(sys.argv[1:]))), flush=True)
        return 0
    options, arguments = parser.parse_known_args()
    try:
        print(markdown({int(ranks): run(int(ranks), arguments) for ranks in options.ranks.split(",")}))
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        print(f"bench_memory.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
