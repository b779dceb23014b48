"""What the machine allows, probed in the same run: plan transfers, memcpy, a flag's way, ZeroMQ over loopback.

The first three run in hxcomm's own core on a group of their own, in the same memory that the backend would use.
"""

from __future__ import annotations

import time
from statistics import median

import torch.distributed as dist
import zmq
from torch._C._distributed_c10d import PrefixStore

from hxcomm import _core, environment
from hxcomm.bench.operations import Case
from hxcomm.bench.results import Floor, ZmqProbe
from hxcomm.bench.timing import over_ranks

# Of one probe in one block: half as long as what is measured beside it gets there (BUDGET_S / BLOCKS).
PROBE_S = 0.02
HAND_OVERS = 5_000
ZMQ_BYTES = (8, 16 << 10, 1 << 20, 16 << 20)
ZMQ_TIMEOUT_MS = 30_000


class FloorProbe:
    """The floor under one all_reduce. sample() is collective; several samples are spread over a measurement."""

    def __init__(self, group: _core.Group, case: Case, touched: bool) -> None:
        self.group, self.case, self.touched = group, case, touched
        self.iterations = 0
        self.transfers_s: list[float] = []
        self.copies_s: list[float] = []

    def sample(self) -> None:
        if self.iterations == 0:
            each_s = max(over_ranks(self._transfers_s(8), op=dist.ReduceOp.MAX), 1e-7)
            self.iterations = max(8, min(4000, int(PROBE_S / each_s)))
        self.transfers_s.append(self._transfers_s(self.iterations))
        self.copies_s.append(_core.copy_seconds(nbytes=self.case.nbytes, iterations=self.iterations))

    def _transfers_s(self, iterations: int) -> float:
        return self.group.floor_all_reduce(
            nbytes=self.case.nbytes,
            dtype=self.case.dtype,
            iterations=iterations,
            touched=self.touched,
            device=self.case.device,
        )

    def result(self) -> Floor:
        """Medians, averaged over the ranks. Collective."""
        copy_s = over_ranks(median(self.copies_s))
        return Floor(
            nbytes=self.case.nbytes,
            transfers_us=over_ranks(median(self.transfers_s)) * 1e6,
            copy_gbps=self.case.nbytes / max(copy_s, 1e-12) / 1e9,
        )


class Probes:
    """All probes of one run; making it is collective."""

    def __init__(self, rank: int, world_size: int) -> None:
        from hxcomm import bootstrap
        from hxcomm.select import SEGMENT_BYTES, Layout, Planner

        self.rank, self.world_size = rank, world_size
        # As hxcomm.c10d makes it, so that the floor is under the plan that the backend runs.
        segment_bytes = environment.SEGMENT.get() or SEGMENT_BYTES
        planner = Planner(rank, Layout(world_size), "floor", dict(environment.ALGO.get()), segment_bytes)
        self.group = bootstrap.create_group(
            bootstrap.StoreMeeting(
                PrefixStore("hxcomm.bench", dist.distributed_c10d._get_default_store()), rank, "floor", timeout_s=60.0
            ),
            world_size=world_size,
            global_ranks=list(range(world_size)),
            settings=planner.settings(),
            planner=planner,
        )

    def floor(self, case: Case, touched: bool) -> FloorProbe:
        return FloorProbe(self.group, case, touched)

    def hand_over_ns(self) -> float | None:
        """A flag's way from rank 0 to rank 1 and back; None on one rank. Collective."""
        if self.world_size == 1:
            return None
        dist.barrier()
        seconds = median(self.group.floor_hand_over(iterations=HAND_OVERS) for _ in range(5))
        return over_ranks(seconds if self.rank == 0 else 0.0, op=dist.ReduceOp.MAX) * 1e9

    def zmq_one_way(self) -> list[ZmqProbe]:
        """Ping-pong between ranks 0 and 1 over TCP on 127.0.0.1; empty on other ranks. Collective."""
        address: list[str | None] = [None]
        with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
            socket.linger = 0
            socket.rcvtimeo = socket.sndtimeo = ZMQ_TIMEOUT_MS
            if self.rank == 0:
                address[0] = f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"
            dist.broadcast_object_list(address, src=0)
            probes = []
            if self.rank < 2 <= self.world_size:
                if self.rank == 1:
                    socket.connect(str(address[0]))
                probes = [self._ping_pong(socket, nbytes) for nbytes in ZMQ_BYTES]
            dist.barrier()
        return probes

    def _ping_pong(self, socket: zmq.SyncSocket, nbytes: int) -> ZmqProbe:
        payload = bytes(nbytes)
        copy = nbytes < 1 << 16  # as pyzmq itself decides: below, tracking a message costs more than copying it
        rounds = max(10, min(300, (64 << 20) // nbytes))
        samples = []
        for _ in range(rounds):
            begin = time.perf_counter()
            if self.rank == 0:
                socket.send(payload, 0, copy)
                socket.recv(copy=copy)
            else:
                socket.recv(copy=copy)
                socket.send(payload, 0, copy)
            samples.append(time.perf_counter() - begin)
        one_way_s = median(samples) / 2
        return ZmqProbe(nbytes, one_way_s * 1e6, nbytes / one_way_s / 1e9)
