"""How long survivors take from a peer's SIGKILL to their PeerFailedError, on one host.

    python scripts/bench_deaths.py --ranks 8 --kills 6

The highest rank of a group kills itself while the others are in all_reduce; the survivors make a new group and so on.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TIMEOUT_S = 300


def rank_main(rank: int, ranks: int, kills: int, folder: str) -> None:
    """Prints "kill ROUND SECONDS" or "raise ROUND SECONDS CLASS" by the host's monotonic clock."""
    import torch
    import torch.distributed as dist

    for number in range(kills):
        world_size = ranks - number
        store = dist.FileStore(str(Path(folder) / str(number)), world_size)
        dist.init_process_group("hxcomm", store=store, rank=rank, world_size=world_size)
        tensor = torch.ones(64)
        for _ in range(20):
            dist.all_reduce(tensor)
        if rank == world_size - 1:
            time.sleep(0.3)  # until the others wait in their next all_reduce, asleep
            print("kill", number, time.monotonic(), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            while True:
                dist.all_reduce(tensor)
        except dist.DistBackendError as error:
            print("raise", number, time.monotonic(), type(error).__name__, flush=True)
        dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not 1 <= args.kills < args.ranks:
        parser.error(f"--kills {args.kills}: must be at least 1 and leave a rank of {args.ranks}")
    if args.rank is not None:
        rank_main(args.rank, args.ranks, args.kills, args.folder)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, f"--ranks={args.ranks}", f"--kills={args.kills}", f"--folder={folder}"]
        processes = [
            subprocess.Popen([*command, f"--rank={rank}"], stdout=subprocess.PIPE, text=True)
            for rank in range(args.ranks)
        ]
        lines = [line.split() for each in processes for line in each.communicate(timeout=TIMEOUT_S)[0].splitlines()]
    killed = {line[1]: float(line[2]) for line in lines if line[0] == "kill"}
    raised = [line for line in lines if line[0] == "raise"]
    times_ms = [1e3 * (float(line[2]) - killed[line[1]]) for line in raised]
    expected = sum(args.ranks - 1 - number for number in range(args.kills))
    classes = ", ".join(sorted({line[3] for line in raised}))
    print(f"{args.ranks} ranks at first, {args.kills} kills: {len(raised)} of {expected} survivors raised ({classes})")
    print(f"ms: min {min(times_ms):.1f}, median {statistics.median(times_ms):.1f}, max {max(times_ms):.1f}")
    return 0 if len(raised) == expected else 1


if __name__ == "__main__":
    sys.exit(main())
