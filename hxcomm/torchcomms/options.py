"""Options of a communicator and of one call, with their real defaults.

The names, fields and order are TorchComms'. Knows nothing of communicators: every other module of this package may
import it. Every operation has its own class because programs name them; they differ in nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from torch._C._distributed_c10d import Store
from torch._library.opaque_object import register_opaque_type
from torch._opaque_base import OpaqueBaseMeta

if TYPE_CHECKING:
    from typing_extensions import Self

InitHandle = str  # what a member of a group to come says about itself, see TorchComm.get_init_handle

# TorchComms' own: long enough for a rank that loads a checkpoint while the others already wait.
DEFAULT_TIMEOUT = timedelta(seconds=600)
# In the options of one call: the communicator's timeout holds.
NO_TIMEOUT = timedelta(0)


class Timeout(timedelta, metaclass=OpaqueBaseMeta):
    """A timedelta that torch.compile takes as a constant: a plain timedelta would break the graph.

    A compiled function is compiled again when it is called with another value.
    """

    def __fx_repr__(self) -> tuple[str, dict[str, type]]:
        """How generated code writes this value, and the names which that text needs."""
        return f"Timeout({self.days}, {self.seconds}, {self.microseconds})", {"Timeout": Timeout}


register_opaque_type(Timeout, typ="value")


@dataclass
class CommOptions:
    """What `new_comm` was asked for."""

    # True: a timeout or a failed peer ends the process, as TorchComms does. False: it raises, and the caller may abort
    # and reconfigure.
    abort_process_on_timeout_or_error: bool = True
    timeout: timedelta = DEFAULT_TIMEOUT
    high_priority_stream: bool = False
    store: Store | None = None
    # True: the communicator has no group until reconfigure() gives it one.
    enable_reconfigure: bool = False
    hints: dict[str, str] = field(default_factory=dict)


@dataclass
class CallOptions:
    """Options of one call. A timeout of zero means the communicator's."""

    timeout: timedelta = NO_TIMEOUT
    hints: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, timeout: timedelta | None, hints: Mapping[str, str] | None) -> Self:
        """From the two arguments that every operation takes."""
        return cls(NO_TIMEOUT if timeout is None else timeout, {} if hints is None else dict(hints))


class SendOptions(CallOptions):
    """Options of one send."""


class RecvOptions(CallOptions):
    """Options of one recv."""


class BatchP2POptions(CallOptions):
    """Options of one batch of sends and receives."""


class BroadcastOptions(CallOptions):
    """Options of one broadcast."""


class AllReduceOptions(CallOptions):
    """Options of one all_reduce."""


class ReduceOptions(CallOptions):
    """Options of one reduce."""


class AllGatherOptions(CallOptions):
    """Options of one all_gather or all_gather_v."""


class AllGatherSingleOptions(CallOptions):
    """Options of one all_gather_single."""


class ReduceScatterOptions(CallOptions):
    """Options of one reduce_scatter or reduce_scatter_v."""


class ReduceScatterSingleOptions(CallOptions):
    """Options of one reduce_scatter_single."""


class AllToAllOptions(CallOptions):
    """Options of one all_to_all."""


class AllToAllSingleOptions(CallOptions):
    """Options of one all_to_all_single."""


class AllToAllvSingleOptions(CallOptions):
    """Options of one all_to_all_v_single."""


class BarrierOptions(CallOptions):
    """Options of one barrier."""


class ScatterOptions(CallOptions):
    """Options of one scatter."""


class GatherOptions(CallOptions):
    """Options of one gather."""


class GatherSingleOptions(CallOptions):
    """Options of one gather_single."""


class AllGatherPInitOptions(CallOptions):
    """Options of the setup of a persistent all_gather."""


class AllGatherPExecOptions(CallOptions):
    """Options of one run of a persistent all_gather."""


@dataclass
class ReconfigureOptions:
    """Options of TorchComm.reconfigure.

    init_handles: a list gives the ranks in this order; a set leaves the order to the communicator.
    """

    uuid: int = 0
    init_handles: list[InitHandle] | set[InitHandle] = field(default_factory=list)
    timeout: timedelta | None = None
    hints: dict[str, str] | None = None

    def __post_init__(self) -> None:
        if self.hints is None:
            self.hints = {}
