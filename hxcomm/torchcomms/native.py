"""hxcomm's own backend under the TorchComms API: calls go straight to C++."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import PrefixStore

from hxcomm import _C, c10d
from hxcomm.torchcomms.hints import number_of
from hxcomm.torchcomms.hook_args import OpName
from hxcomm.torchcomms.options import CommOptions

BACKEND = c10d.BACKEND


def milliseconds(timeout: timedelta | None) -> int:
    """As the C++ front end takes a timeout; -1: the communicator's. ValueError where it is not positive."""
    if timeout is None:
        return -1
    if not isinstance(timeout, timedelta):
        raise TypeError(f"a timeout is a datetime.timedelta, not {timeout!r}")
    result = round(timeout.total_seconds() * 1e3)
    if result < 1:
        raise ValueError(f"a timeout of {timeout.total_seconds()} s; it must be positive, at least 1 ms")
    return result


class Native:
    """The calls of one communicator of backend hxcomm."""

    def __init__(self, made: c10d.Made, device: torch.device, hints: int) -> None:
        """hints: of calls that give none, by their number."""
        self.process_group = made.process_group
        self.member = made.member
        self.group, self.death_of = made.group, made.death_of
        self.rank, self.size = made.member.rank, made.member.world_size
        self.communicator = _C.Communicator(made.process_group, device.type)
        self._device, self.hints = device, hints

    @property
    def backend(self) -> Native:
        """What get_backend_impl() returns."""
        return self

    @classmethod
    def create(cls, rank: int, size: int, *, device: torch.device, name: str, options: CommOptions) -> Native:
        """Blocks until all `size` ranks have come. InitError naming who did not."""
        member = c10d.Membership(
            store=options.store,
            name=name,
            rank=rank,
            world_size=size,
            global_ranks=list(range(size)),
            timeout_s=options.timeout.total_seconds(),
        )
        return cls(c10d.make_process_group(member, None), device, number_of(options.hints))

    def split(self, ranks: list[int], name: str, options: CommOptions) -> Native:
        """The communicator of these ranks, this one among them. Blocks until all of them have called it."""
        store = PrefixStore(f"split/{name}/{'-'.join(map(str, ranks))}", self.member.store)
        part = self.member.of(ranks, store, name, options.timeout)
        made = c10d.make_process_group(part, None, lambda rank: self.death_of(ranks[rank]))
        return Native(made, self._device, number_of(options.hints))

    def call(
        self,
        op: OpName,
        operands: tuple[Any, ...],
        async_op: bool,
        hints: Mapping[str, str] | None,
        timeout: timedelta | None,
    ) -> Any:
        """Carries the operation out (None) or starts it (a c10d Work)."""
        method = getattr(self.communicator, op.name)
        return method(*operands, async_op, number_of(hints) or self.hints, milliseconds(timeout))

    def batch(
        self,
        sends: list[bool],
        tensors: list[torch.Tensor],
        peers: list[int],
        async_op: bool,
        hints: Mapping[str, str] | None,
        timeout: timedelta | None,
    ) -> Any:
        """Starts all of them at once."""
        return self.communicator.batch(
            sends, tensors, peers, async_op, number_of(hints) or self.hints, milliseconds(timeout)
        )
