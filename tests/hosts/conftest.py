"""The fixture of tests that need several hosts: networks.py makes them of namespaces of this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hosts.networks import Network, sweep, why_not


@pytest.fixture(scope="session")
def _namespaces() -> None:
    if reason := why_not():
        pytest.skip(reason)
    sweep()


@pytest.fixture
def network(_namespaces: None) -> Iterator[Callable[..., Network]]:
    """network(n_hosts, in_user_space=False): hosts that reach each other, removed after the test whatever happens."""
    made: list[Network] = []

    def make(n_hosts: int, *, in_user_space: bool = False) -> Network:
        if in_user_space and not Path("/dev/net/tun").exists():
            pytest.skip("this machine has no TUN devices (/dev/net/tun), which wires in user space need")
        made.append(Network(n_hosts, in_user_space=in_user_space))
        return made[-1]

    yield make
    for each in made:
        each.close()
