from collections.abc import Callable

from torch._C._distributed_c10d import Backend

class ProcessGroup(Backend):
    """torch.distributed's backend over a group of the communicator."""

    def __init__(
        self,
        *,
        rank: int,
        size: int,
        api: object,
        group: object,
        timeout_s: float,
        shrink: Callable[[list[int], Backend.Options | None], Backend],
    ) -> None: ...

class NothingProcessGroup(Backend):
    """Completes every collective at once and touches no tensor: what torch.distributed itself costs a call."""

    def __init__(self, *, rank: int, size: int) -> None: ...
