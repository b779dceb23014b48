"""One-sided communication: a tensor of each rank that every rank of a communicator puts into by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from hxcomm import _C
from hxcomm.torchcomms.hints import number_of
from hxcomm.torchcomms.native import BACKEND, Native, milliseconds
from hxcomm.torchcomms.work import TorchWork

if TYPE_CHECKING:
    from hxcomm.torchcomms.comm import TorchComm


class TorchCommWinAccessType(Enum):
    """Whether a rank's part of a window can be mapped (UNIFIED), or only be put into (SEPARATE)."""

    WIN_ACCESS_TYPE_UNIFIED = auto()
    WIN_ACCESS_TYPE_SEPARATE = auto()


@dataclass
class TorchCommWindowAttr:
    """What get_attr() says of a rank's part of a window."""

    access_type: TorchCommWinAccessType = TorchCommWinAccessType.WIN_ACCESS_TYPE_UNIFIED


class TorchCommWindow:
    """One tensor of each rank, with one dtype and one device on all, that all ranks may put into. Made by
    TorchComm.new_window().

    A put changes another rank's tensor without a call there; that rank may read what was put once wait_signal() has
    seen the signal that followed it. A signal covers the puts of its rank to the same rank before it, and no others.
    On one host a put is one copy into the peer's memory, and has ended when the call returns, also with async_op=True.
    To another host it has ended when the tensor may be changed again, and is carried out there in the background.

    The tensors lie in memory that peers map: on device hx, or CPU tensors made in `with comm.mem_allocator:`. A call
    that is wrong (a rank, range, dtype or device that does not fit) raises ValueError with the values, and nothing was
    written. A peer's death, abort() and timeouts end puts and waits with the typed error, as any operation.
    """

    def __init__(self, comm: TorchComm) -> None:
        """Without a tensor yet. NotImplementedError where the backend has no windows."""
        if not isinstance(comm.get_backend_impl(), Native):
            raise NotImplementedError(f"TorchCommWindow is for backend {BACKEND}, not {comm.get_backend()!r}")
        self._comm = comm
        self._calls: Native | None = None  # of the communicator when the tensor was registered
        self._window: _C.Window | None = None
        self._tensor: torch.Tensor | None = None
        self._dtype: torch.dtype = torch.float32
        self._shape: list[int] = []
        self._device = comm.get_device()
        self._nbytes = 0

    # -- the tensor ---------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Of the registered tensor."""
        return self._dtype

    @property
    def shape(self) -> list[int]:
        """Of this rank's registered tensor; [] without one."""
        return list(self._shape)

    @property
    def device(self) -> torch.device:
        """Of the registered tensor, else the communicator's."""
        return self._device

    def get_size(self) -> int:
        """Bytes of this rank's registered tensor; 0 without one."""
        return self._nbytes

    def get_tensor(self) -> torch.Tensor | None:
        """This rank's registered tensor. None without one, or where it was registered with owning=False."""
        return self._tensor

    def tensor_register(self, tensor: torch.Tensor, owning: bool = True) -> None:
        """Makes the tensor this rank's part of the window. Blocks until every rank has called it.

        The parts may differ in shape. owning: the window holds the tensor, until no peer writes into it any more; with
        False the caller must. RuntimeError where the window has a tensor. ValueError where the tensor cannot be one
        (not in memory that peers map, not contiguous); the other ranks then raise MismatchError quoting it, as all do
        where dtypes or devices differ, and no window was registered.
        """
        if self._window is not None:
            raise RuntimeError("tensor_register: the window has a tensor already; call tensor_deregister() first")
        self._comm._open()
        calls = self._comm.get_backend_impl()
        self._window = self._tried(
            lambda: _C.Window(calls.process_group, tensor, owning=owning, timeout_ms=self._timeout(None))
        )
        self._calls = calls
        self._tensor = tensor if owning else None
        self._dtype, self._shape, self._device = tensor.dtype, list(tensor.shape), tensor.device
        self._nbytes = tensor.numel() * tensor.element_size()

    def tensor_deregister(self) -> None:
        """Ends the window. Blocks until every rank has called it; then what was put is there, and no peer writes any
        more.

        After abort() or an error of the communicator it ends on this rank alone, and the memory is held until the peers
        have left. RuntimeError where there is no tensor; MismatchError where the ranks deregister different windows,
        which leaves them as they were.
        """
        window = self._registered("tensor_deregister")
        if self._comm._aborted or self._comm._calls is not self._calls:
            window.drop()
        else:
            self._tried(lambda: window.close(self._timeout(None)), window)
        self._forget()

    def _forget(self) -> None:
        self._window = self._calls = self._tensor = None
        self._shape, self._nbytes = [], 0

    # -- what is done with it -----------------------------------------------------------------------------------------

    def put(
        self,
        tensor: torch.Tensor,
        dst_rank: int,
        target_offset_nelems: int,
        async_op: bool,
        hints: Mapping[str, str] | None = None,
        timeout: timedelta | None = None,
    ) -> TorchWork:
        """Writes the tensor into the window of `dst_rank`, from its element `target_offset_nelems` on.

        The tensor has the window's dtype and device, any shape and any strides. Bytes moved: its own.
        """
        return self._started(
            "put",
            hints,
            lambda window: window.put(tensor, dst_rank, target_offset_nelems, async_op, self._timeout(timeout)),
        )

    def signal(
        self, dst_rank: int, async_op: bool, hints: Mapping[str, str] | None = None, timeout: timedelta | None = None
    ) -> TorchWork:
        """Tells `dst_rank` that what this rank has put into its window is there. Signals are counted."""
        return self._started("signal", hints, lambda window: window.signal(dst_rank, async_op, self._timeout(timeout)))

    def wait_signal(
        self, peer_rank: int, async_op: bool, hints: Mapping[str, str] | None = None, timeout: timedelta | None = None
    ) -> TorchWork:
        """Waits for a signal of `peer_rank`: each wait for one more."""
        return self._started(
            "wait_signal", hints, lambda window: window.wait_signal(peer_rank, async_op, self._timeout(timeout))
        )

    def map_remote_tensor(self, rank: int) -> torch.Tensor:
        """The tensor of that rank, in its shape: a view, not a copy. ValueError where its host is another one.

        It may be read once wait_signal() or a collective says that it is written, and kept as long as one likes: after
        tensor_deregister() it shows what that rank does with the memory then.
        """
        window = self._current("map_remote_tensor")
        if self._calls is not None and rank == self._calls.rank and self._tensor is not None:
            return self._tensor
        return window.map_remote(rank)

    def get_attr(self, peer_rank: int) -> TorchCommWindowAttr:
        """Whether map_remote_tensor(peer_rank) works."""
        mapped = self._current("get_attr").is_mapped(peer_rank)
        kinds = TorchCommWinAccessType
        return TorchCommWindowAttr(kinds.WIN_ACCESS_TYPE_UNIFIED if mapped else kinds.WIN_ACCESS_TYPE_SEPARATE)

    # -- of GPUs ------------------------------------------------------------------------------------------------------

    def get_device_window(self, signal_count: int = -1, counter_count: int = -1, barrier_count: int = 1) -> int:
        """NotImplementedError: it is for kernels that communicate, and hx runs none."""
        self._of_gpus("get_device_window")

    def register_local_buffer(self, tensor: torch.Tensor) -> int:
        """NotImplementedError, as get_device_window; put() takes any tensor."""
        self._of_gpus("register_local_buffer")

    def deregister_local_buffer(self, handle: int) -> None:
        """NotImplementedError, as get_device_window."""
        self._of_gpus("deregister_local_buffer")

    def _of_gpus(self, name: str) -> NoReturn:
        raise NotImplementedError(
            f"{name} is for kernels on a GPU that communicate by themselves, and hx has none: use put(), signal() and "
            "wait_signal(), which take any tensor"
        )

    # -- how calls are made -------------------------------------------------------------------------------------------

    def _registered(self, name: str) -> _C.Window:
        if self._window is None:
            raise RuntimeError(f"{name}: the window has no tensor; call tensor_register() on every rank first")
        return self._window

    def _current(self, name: str) -> _C.Window:
        """The window, where the communicator still has the group that it belongs to."""
        window = self._registered(name)
        if self._comm._open() is not self._calls:
            raise RuntimeError(f"{name}: the window was registered before reconfigure(); register its tensor again")
        return window

    def _timeout(self, timeout: timedelta | None) -> int:
        return milliseconds(self._comm.get_options().timeout if timeout is None else timeout)

    def _tried(self, function: Callable[[], Any], window: _C.Window | None = None) -> Any:
        try:
            return function()
        except Exception as error:
            if window is not None and not window.is_open:
                self._forget()
            raise self._comm._failed(error) from None

    def _started(self, name: str, hints: Mapping[str, str] | None, start: Callable[[_C.Window], Any]) -> TorchWork:
        window = self._current(name)
        if hints:
            number_of(hints)  # none of them changes how a window works; a wrong one is an error all the same
        return self._comm._started(lambda: start(window))

    def __repr__(self) -> str:
        if self._window is None:
            return "TorchCommWindow(no tensor)"
        return f"TorchCommWindow({self._dtype}, shape {self._shape}, {self._device})"
