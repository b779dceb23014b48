"""Where a new communicator's rank, size and store come from, when the program does not say."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from hxcomm.errors import InitError

# In this order; TorchComms' own name first.
_RANK = ("TORCHCOMM_RANK", "RANK")
_SIZE = ("TORCHCOMM_SIZE", "WORLD_SIZE")

_own_stores: dict[tuple[str, int], Store] = {}


def _number(names: tuple[str, ...], environment: Mapping[str, str]) -> int:
    for name in names:
        if (text := environment.get(name)) is not None:
            if not text.isdigit():
                raise InitError(f"{name} is {text!r}, which is not a number")
            return int(text)
    raise InitError(
        f"new_comm does not know its {'rank' if names is _RANK else 'size'}: neither {' nor '.join(names)} is set; "
        "start the program with torchrun, or set them"
    )


def rank_and_size(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Of this process in a new communicator. InitError where the environment does not say, or contradicts itself."""
    rank, size = _number(_RANK, environment), _number(_SIZE, environment)
    if not rank < size:
        raise InitError(f"rank {rank} of a communicator of {size} ranks; ranks are 0 to {size - 1}")
    return rank, size


def store_for(name: str, given: Store | None, rank: int, timeout: timedelta) -> Store:
    """The part of the store that belongs to the communicator `name`. Blocks until the store answers.

    Of the given store, or of the one at MASTER_ADDR and MASTER_PORT, which rank 0 opens where no launcher has.
    """
    return PrefixStore(f"hxcomm/torchcomms/{name}", given if given is not None else _own_store(name, rank, timeout))


def _own_store(name: str, rank: int, timeout: timedelta) -> Store:
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not address or not port or not port.isdigit():
        raise InitError(
            f"communicator '{name}' has no store: none was given, and MASTER_ADDR ({address!r}) and MASTER_PORT "
            f"({port!r}) do not name one; start the program with torchrun, or pass store="
        )
    key = (address, int(port))
    if key not in _own_stores or not _answers(_own_stores[key]):
        opened = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            # multi_tenant: init_process_group in this process may have opened the same port.
            _own_stores[key] = TCPStore(
                address,
                int(port),
                is_master=rank == 0 and not opened,
                timeout=timeout,
                wait_for_workers=False,
                multi_tenant=True,
            )
        except (RuntimeError, ValueError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise InitError(f"communicator '{name}': no store at {address}:{port}: {first}") from None
    return _own_stores[key]


def _answers(store: Store) -> bool:
    """Whether whoever held the store when it was opened still does: another job may have its own there by now."""
    try:
        store.check([])
        return True
    except RuntimeError:
        return False
