"""What a check is given: who it is, the device, a store beside the backend, and ways to say what is wrong.

The store is torch's TCPStore, served by the driver: it works whatever the backend does, so ranks line up and compare
through it where a collective would beg the question.
"""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

Group = Any  # dist.ProcessGroup; torch types most of its functions as taking None, too
POLL_S = 0.005  # between two looks at something that can only be polled

# How c10d and the backends in torch say that they do not have something. Only words of refusal: an error about values,
# ranks or sizes is no refusal.
_REFUSAL = re.compile(
    r"(is|are|was) not (yet )?(supported|implemented)|unsupported|(does|do) not (yet )?(support|implement)"
    r"|not (yet )?(supported|implemented) (for|on|by|with)|only supports? "
    r"|(must|has to|have to) be contiguous|non-overlapping and dense"
    r"|invalid scalar type|unhandled data ?type|cannot use ReduceOp|has no reduce op|not built with",
    re.IGNORECASE,
)
_NOT_IMPLEMENTED = re.compile(r"Backend \S+ does not support \w+|Backend \S+ does not implement \w+")


class WrongError(AssertionError):
    """The backend did not do what the check demands. The text says what was expected and what was there."""


class Idle:
    """What a check returns on a rank that has no part in it, so that the rank has no say in whether it is supported."""


IDLE = Idle()


def lacks(error: BaseException) -> bool:
    """Whether the backend has not implemented the function at all: what c10d's own base class says, or its heirs."""
    return isinstance(error, NotImplementedError) or _NOT_IMPLEMENTED.search(str(error)) is not None


def refuses(error: BaseException) -> bool:
    """Whether this error says that the backend will not do this, in words that are not about these values."""
    return lacks(error) or _REFUSAL.search(str(error)) is not None


class Context:
    """One rank's view of one case. The default process group, or `comm`, is one of the backend, over all ranks."""

    def __init__(
        self,
        *,
        backend: str,
        device: torch.device,
        rank: int,
        world_size: int,
        timeout_s: float,
        store: Store,
        announce: Callable[[int], None],
        comm: Any = None,
    ) -> None:
        """comm: the TorchComm, where the checks are of torchcomms."""
        self.comm = comm
        self.backend = backend
        self.device = device
        self.rank = rank
        self.world_size = world_size
        self.timeout_s = timeout_s
        self.store = store
        self.notes: dict[str, str] = {}
        self._announce = announce
        self._groups: list[Group] = []
        self._meetings = 0

    @property
    def last(self) -> int:
        return self.world_size - 1

    def on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device)

    def full(self, count: int, value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full((count,), value, dtype=dtype, device=self.device)

    def new_group(self, ranks: Sequence[int] | None = None, timeout_s: float | None = None, **more: Any) -> Group:
        """As dist.new_group; the runner destroys it after the check. Collective over all ranks."""
        timeout = None if timeout_s is None else datetime.timedelta(seconds=timeout_s)
        group: Group = dist.new_group(None if ranks is None else list(ranks), timeout=timeout, **more)
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            self._groups.append(group)
        return group

    def destroy_groups(self) -> None:
        while self._groups:
            group = self._groups.pop()
            if group in dist.distributed_c10d._world.pg_map:  # the check may have destroyed it
                dist.destroy_process_group(group)

    def restart(self, name: str) -> None:
        """Makes a new default group after the check destroyed the last one. Collective; the check must be `spoils`."""
        dist.init_process_group(
            self.backend, store=PrefixStore(name, self.store), rank=self.rank, world_size=self.world_size
        )

    def meet(self, ranks: Sequence[int] | None = None) -> None:
        """Returns when all of `ranks` (default: all) are here. Goes over the store, not the backend."""
        self._meetings += 1
        self.tell(f"meeting {self._meetings}/{self.rank}")
        for rank in range(self.world_size) if ranks is None else ranks:
            self.await_key(f"meeting {self._meetings}/{rank}")

    def tell(self, key: str, text: str = "") -> None:
        """Leaves a text for the other ranks; it is there when this returns."""
        self.store.set(key, text)
        self.store.check([key])  # TCPStore's set() is not acknowledged, but what follows it is

    def await_key(self, key: str) -> str:
        """The text told under `key` by some rank, waiting for it. Raises dist.DistStoreError at the check's limit."""
        self.store.wait([key], datetime.timedelta(seconds=self.timeout_s))
        text: bytes = self.store.get(key)
        return text.decode()

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float | None = None) -> None:
        """Polls until `condition()`; raises WrongError saying that `what` never came, at half the check's limit."""
        deadline = time.monotonic() + (timeout_s or self.timeout_s / 2)
        while not condition():
            if time.monotonic() > deadline:
                raise WrongError(f"{what} did not happen")
            time.sleep(POLL_S)

    def note(self, about: str, text: str) -> None:
        """Reports something beside the verdict."""
        self.notes[about] = text

    def announce_end(self, status: int) -> None:
        """Says that this process is about to end with `status` (as subprocess has it: -9 is SIGKILL), as it should."""
        self._announce(status)

    def equal(self, actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
        """Raises WrongError unless both hold the same values (NaN equals NaN) in the same shape and dtype."""
        actual, expected = actual.detach().cpu(), expected.detach().cpu()
        if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
            raise WrongError(
                f"{what}: {actual.dtype} of shape {list(actual.shape)} instead of {expected.dtype} of shape "
                f"{list(expected.shape)}"
            )
        different = (actual != expected) & ~((actual != actual) & (expected != expected))
        if bool(different.any()):
            places = different.flatten().nonzero().flatten()
            first = int(places[0])
            raise WrongError(
                f"{what}: {len(places)} of {actual.numel()} elements are wrong; element {first} is "
                f"{actual.flatten()[first].item()}, expected {expected.flatten()[first].item()}"
            )

    def expect(self, condition: bool, what: str) -> None:
        """Raises WrongError(what) unless the condition holds."""
        if not condition:
            raise WrongError(what)

    def raises(self, call: Callable[[], object], what: str) -> Exception:
        """The exception that `call` raises; WrongError where it raises none. What lacks() passes on."""
        try:
            call()
        except Exception as error:
            if lacks(error):
                raise
            return error
        raise WrongError(f"{what} returned without an error")
