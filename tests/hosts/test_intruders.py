"""Who is no member of a job: a wrong secret is refused on every side, and strangers at its ports change nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hosts.disturbances import Job, meanwhile, sum_until_told
from hosts.networks import Network

HERE = Path(__file__).resolve().parent
Networks = Callable[..., Network]
SECRET, ANOTHER = "a secret of a test's job", "another secret of the same length"
HANG_S = 20.0  # the timeout of the groups is longer

MODES = {
    "curve": {"HXCOMM_SECRET": SECRET},
    "mac": {"HXCOMM_SECRET": SECRET, "HXCOMM_SECURITY": "mac"},
    "insecure": {"HXCOMM_INSECURE": "1"},
}


def listening(pid: int) -> set[int]:
    """The TCP ports that a process listens at."""
    sockets = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()}  # noqa: PTH115
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return {int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}


def summed(rank: int, world_size: int, folder: str) -> int:
    return sum_until_told(folder)


@pytest.mark.ranks
@pytest.mark.parametrize("mode", MODES)
def test_a_job_goes_on_whoever_talks_to_its_ports(network: Networks, tmp_path: Path, mode: str) -> None:
    net, job = network(3), Job(tmp_path)  # the intruders are on the third host

    def disturb() -> None:
        intruders = []
        for rank, pid in enumerate(job.pids(3)):
            ports = listening(pid)
            assert len(ports) == 1, "one port a process"
            address = net.hosts[min(rank, 1)].address
            argv = [sys.executable, str(HERE / "intruder.py"), address, *map(str, ports)]
            intruders.append(net.hosts[2].start(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        for intruder in intruders:
            assert intruder.stdout is not None and intruder.stdout.readline() == "done\n"
        job.goes_on(20)
        for intruder in intruders:
            assert intruder.stdin is not None
            intruder.stdin.close()
            intruder.wait(timeout=20)
        job.goes_on(20)
        job.is_enough()

    with meanwhile(disturb):
        assert min(net.run_ranks(summed, (1, 2), str(tmp_path), env=MODES[mode], op_timeout_s=20)) > 40


# --- who is let in ---

# Of the first and the second rank of each pair.
PAIRS = [
    (MODES["curve"], {"HXCOMM_SECRET": ANOTHER}),
    (MODES["mac"], {"HXCOMM_SECRET": ANOTHER, "HXCOMM_SECURITY": "mac"}),
    (MODES["curve"], MODES["insecure"]),
    (MODES["insecure"], MODES["curve"]),
    (MODES["curve"], MODES["mac"]),
    ({}, MODES["curve"]),
    ({}, {}),
]


def meet_in_pairs(rank: int, world_size: int) -> list[tuple[str, str, float]]:
    """Every pair makes a group of its own, in a process of its own: a process has one wire, and one secret."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    told = []
    for number, pair in enumerate(PAIRS):
        store.set(f"{number}/{rank} begins", "")
        store.wait([f"{number}/{1 - rank} begins"])
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            told_now = meet(dist.PrefixStore(str(number), store.clone()), rank, pair[rank])
            os.write(writing, "\0".join(told_now).encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            kind, message, seconds = pipe.read().split("\0")
        os.waitpid(child, 0)
        told.append((kind, message, float(seconds)))
    return told


def meet(store: dist.Store, rank: int, variables: dict[str, str]) -> tuple[str, str, str]:
    os.environ.update(variables)
    start = time.monotonic()
    try:
        dist.init_process_group("hxcomm", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=40))
        dist.all_reduce(torch.ones(3))
    except Exception as error:
        return type(error).__name__, str(error), str(time.monotonic() - start)
    return "", "they met", str(time.monotonic() - start)


@pytest.mark.ranks
def test_ranks_with_different_secrets_both_get_an_error_that_says_so_soon(network: Networks) -> None:
    results = network(2).run_ranks(meet_in_pairs, (1, 1), backend=None, timeout_s=170)
    for number, pair in enumerate(PAIRS):
        for rank, found in enumerate(results):
            kind, message, seconds = found[number]
            print(f"{pair}, rank {rank}: {seconds:.1f} s: {kind}: {message}\n")
            assert kind == "InitError", message
            assert seconds < HANG_S
            if not pair[rank]:
                assert re.search(r"openssl rand -hex 32 .*HXCOMM_SECRET_FILE=.*Or set HXCOMM_INSECURE=1", message)
            else:
                assert f"rank {1 - rank} " in message, message
        # With mac the one that connects sees only that the other one has gone.
        assert any("secret" in found[number][1].lower() for found in results), [found[number] for found in results]
