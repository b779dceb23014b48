"""What a peer on another host can make a rank hold: messages wait at their sender until they are wanted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hosts.host_ids import group_on
from ranks import run_ranks

CALLS, NBYTES = 150, 2 << 20
MESSAGES, MESSAGE_BYTES = 4000, 16 << 10
# 8 messages (csrc/communicator/crossing.h: kCredits) of a window of 512 KiB, 16 packets of 16 KiB, and room for noise.
MOST_BYTES = 24 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


def flooded(rank: int, world_size: int) -> int:
    """How much this rank grew while its peer sent what it did not ask for. It gets all of it afterwards."""
    with group_on((0, 1)):
        store = dist.distributed_c10d._get_default_store()
        tensor, small = torch.full((NBYTES // 4,), float(rank)), torch.full((MESSAGE_BYTES // 4,), float(rank))
        dist.broadcast(tensor, 0)  # whatever the first call needs
        dist.send(small, 1) if rank == 0 else dist.recv(small, 0)
        if rank == 0:
            works = [dist.broadcast(tensor, 0, async_op=True) for _ in range(CALLS)]
            works += [dist.isend(small, 1) for _ in range(MESSAGES)]
            store.set("sent", "")
            store.wait(["measured"])
            for work in works:
                work.wait()
            return 0
        before = resident_bytes()
        store.wait(["sent"])
        grown = resident_bytes() - before
        store.set("measured", "")
        for _ in range(CALLS):
            dist.broadcast(tensor, 0)
        for _ in range(MESSAGES):
            small.fill_(-1)
            dist.recv(small, 0)
            assert bool((small == 0).all())
        return grown


@pytest.mark.ranks
def test_what_a_peer_sends_unasked_waits_at_the_sender() -> None:
    _, grown = run_ranks(flooded, 2, backend=None, timeout_s=60)
    assert grown < MOST_BYTES, f"{grown >> 20} MiB of {(CALLS * NBYTES + MESSAGES * MESSAGE_BYTES) >> 20} MiB"
