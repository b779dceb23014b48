"""The handle of an operation that was started."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import Any, Protocol

from hxcomm.errors import CommTimeoutError


class WorkStatus(Enum):
    """How far an operation is."""

    NOT_STARTED = auto()
    INPROGRESS = auto()
    COMPLETED = auto()
    TIMEDOUT = auto()
    ERROR = auto()


class Waitable(Protocol):
    """What a backend gives for an operation that runs: a c10d Work, or any object that can be waited for."""

    def wait(self) -> Any:
        """Blocks until the operation has ended; raises its error."""


class TorchWork:
    """An operation that was started, or has ended.

    It may be dropped before the operation has ended: the operation goes on, and its tensors live until then.
    """

    __slots__ = ("__weakref__", "_handle", "_on_error", "_status", "_then")

    def __init__(
        self, handle: Waitable | None = None, on_error: Callable[[Exception], Exception] = lambda error: error
    ) -> None:
        """handle: None where the operation has ended well. on_error: what to raise for an error of it."""
        self._handle = handle
        self._on_error = on_error
        self._status = WorkStatus.COMPLETED if handle is None else WorkStatus.INPROGRESS
        self._then: list[Callable[[WorkStatus], None]] = []

    @property
    def status(self) -> WorkStatus:
        """Does not block. An error is seen here without being raised."""
        self.is_completed()
        return self._status

    def is_completed(self) -> bool:
        """Whether the operation has ended, well or not. Does not block."""
        if self._status is not WorkStatus.INPROGRESS:
            return self._status is not WorkStatus.NOT_STARTED
        done = getattr(self._handle, "is_completed", None)
        if done is None or not done():
            return False
        assert self._handle is not None
        try:
            self._handle.wait()  # it has ended, so this says only how
        except Exception as error:
            self._set_status(_status_of(error))
        else:
            self._set_status(WorkStatus.COMPLETED)
        return True

    def wait(self) -> None:
        """Blocks until the operation has ended, and the tensors hold its result. Raises its error, again each time."""
        if self._handle is None:
            return
        try:
            self._handle.wait()
        except Exception as error:
            self._set_status(_status_of(error))
            raise self._on_error(error) from None
        self._set_status(WorkStatus.COMPLETED)

    def wait_blocking(self) -> None:
        """As wait(): on a device with streams, wait() would only make the current stream wait."""
        self.wait()

    def _set_status(self, status: WorkStatus) -> None:
        self._status = status
        if status not in (WorkStatus.NOT_STARTED, WorkStatus.INPROGRESS):
            then, self._then = self._then, []
            for function in then:
                function(status)

    def _on_end(self, function: Callable[[WorkStatus], None]) -> None:
        """Calls it once, when the end is seen: by wait(), is_completed() or status; at once if it has been."""
        if self.is_completed():
            function(self._status)
        else:
            self._then.append(function)


class Together:
    """Several works as one to wait for."""

    def __init__(self, works: list[TorchWork]) -> None:
        self._works = works

    def wait(self) -> None:
        """Waits for all; raises the first error."""
        errors = []
        for work in self._works:
            try:
                work.wait()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)


def _status_of(error: object) -> WorkStatus:
    return WorkStatus.TIMEDOUT if isinstance(error, CommTimeoutError) else WorkStatus.ERROR


DONE = TorchWork()  # of every operation that ended well before its call returned
