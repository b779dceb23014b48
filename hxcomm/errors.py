"""The typed errors of hxcomm. All derive from torch's DistBackendError, so existing handlers catch them.

A message says what happened, on which rank (host, pid), the values on every side, and what to do. Usage errors found
before anything was sent are ValueError. This is the only module of the package's base that imports torch, and it is
imported only when an error is raised or a torch front end is in use.
"""

from __future__ import annotations

import re

from torch.distributed import DistBackendError


class PeerFailedError(DistBackendError):
    """A peer died, or left the group, while this rank needed it. The group is closed on every rank."""

    @property
    def rank(self) -> int | None:
        """The rank that failed, in the numbering of its group: what `shrink_group` takes. None: no single one."""
        # The core throws text only; its messages begin "OP #41 on rank 0 (host a, pid 1) ended: rank 3 (host a, ...".
        found = re.search(r"(?:^|ended: )rank (\d+) \(", str(self))
        return int(found[1]) if found else None


class MismatchError(DistBackendError):
    """The ranks called different collectives, or one refused its call. Nothing was sent; the group stays usable.

    Raised by every rank of the group in the very same collective, with a table of what each rank called.
    """


class AbortedError(DistBackendError):
    """The group was ended by abort(), an interrupt or an internal fault on some rank, which the message names."""


class CommTimeoutError(DistBackendError):
    """A collective's deadline passed on some rank. The group is closed on every rank."""


class AuthError(DistBackendError):
    """A peer could not prove that it belongs to this job."""


class InitError(DistBackendError):
    """A group could not be set up: peers missing, memory exhausted, versions or settings that differ."""
