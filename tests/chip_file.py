"""A chip for tests: round numbers, so that what a run should cost can be worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

TEXT = """
name = "round"
description = "1 TB/s of memory, 1 TFLOP/s, 1 GB/s and 1 us to the next chip"
overlap_chunks = 4
[memory]
bandwidth_bytes_per_s = 1e12
capacity_bytes = 16e9
[compute]
fixed_ns_per_op = 10
[compute.flops_per_s]
float32 = 1e12
[collective]
reduce_bytes_per_s = 1e12
[[links]]
topology = "ring"
bandwidth_bytes_per_s = 1e9
latency_ns = 1000
forwarding = "cut_through"
[legal]
neighbours_only = true
[sources]
"""


def write_chip(folder: Path, name: str, changes: Mapping[str, str] = MappingProxyType({})) -> str:
    """A file of the chip above with other values: {"compute.fixed_ns_per_op": "20"}. Returns its path."""
    lines, section, left = [], "", dict(changes)
    for line in TEXT.splitlines():
        section = f"{line.strip('[]')}." if line.startswith("[") else section
        key = section + line.partition(" = ")[0]
        lines.append(f"{key.removeprefix(section)} = {left.pop(key)}" if key in left else line)
    assert not left, f"the chip has no {', '.join(left)}"
    path = folder / f"{name}.toml"
    path.write_text("\n".join(lines))
    return str(path)
