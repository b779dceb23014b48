"""Init handles and reconfigure: how a communicator gets a group of survivors and newcomers."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from hxcomm.torchcomms.options import InitHandle
from hxcomm.torchcomms.work import TorchWork

if TYPE_CHECKING:
    from hxcomm.torchcomms.comm import TorchComm


def init_handle(comm: TorchComm) -> InitHandle:
    """What this process publishes of itself, for the others to name it in reconfigure."""
    raise NotImplementedError


def reconfigure(
    comm: TorchComm,
    uuid: int,
    init_handles: list[InitHandle] | set[InitHandle],
    timeout: timedelta | None,
    hints: dict[str, str] | None,
) -> TorchWork:
    """Makes a new group of the named processes."""
    raise NotImplementedError
