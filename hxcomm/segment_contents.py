"""What this process's shared segment is to hold beside its groups: decided in `import torch`, before there is one.

A module of its own because it must cost nothing there: bootstrap.py, which makes the segment, takes 5 ms to import.
"""

from __future__ import annotations

has_chips = False
"""The memory of HXCOMM_CHIPS chips of the device hx; set where that is registered."""
