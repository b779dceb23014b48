"""Several operations as one to wait for: `with coalesce(comm) as block: ...`, then `block.wait()`.

Every operation inside begins at once, as it would outside; hxcomm needs no grouping for speed. What the block adds is
one handle. It also works inside torch.compile: there the operations wait in `block.wait()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from hxcomm.torchcomms.comm import TorchComm
    from hxcomm.torchcomms.work import TorchWork


class CoalescingManager:
    """What `with coalesce(comm)` gives."""

    def __init__(self) -> None:
        self.work: TorchWork | None = None  # of all operations of the block, when it has ended; None: there were none
        self.tensors: list[Tensor] = []
        self._waited = False

    def wait(self) -> None:
        """Blocks until all operations of the block have ended; raises the first error. Once only: RuntimeError."""
        if self._waited:
            raise RuntimeError("the block of coalesce() has been waited for: each block can be waited for once")
        self._waited = True
        if self.work is not None:
            self.work.wait()


@contextmanager
def coalesce(comm: TorchComm) -> Iterator[CoalescingManager]:
    """Operations of `comm` inside the block have one handle, `wait()` of what it gives. Blocks may not be nested."""
    manager = CoalescingManager()
    comm.start_coalescing()
    try:
        yield manager
    finally:
        manager.work = comm.end_coalescing()
