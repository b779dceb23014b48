"""A chip for tests whose numbers are round, and what is changed of it."""

from __future__ import annotations

from typing import Any

from hxcomm.sim import chips
from hxcomm.sim.chips import Chip

TEXT = """\
name = "round"
overlap_chunks = 1

[memory]
bandwidth_bytes_per_s = 1e12
capacity_bytes = 16e9

[compute.flops_per_s]
float16 = 100e12

[[links]]
topology = "ring"
bandwidth_bytes_per_s = 1e9     # a byte takes 1 ns
latency_ns = 500
forwarding = "store_and_forward"

[sources]
"links.0.latency_ns" = "assumed: a test"
"""


def chip(**changes: Any) -> Chip:
    """The round chip; links__0__latency_ns=100 changes links.0.latency_ns."""
    made = chips.read(TEXT, "round.toml")
    for key, value in changes.items():
        made = chips.replace(made, key.replace("__", "."), value)
    return made
