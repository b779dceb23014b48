"""Mixed precision on hx: torch.autocast("hx") and torch.amp.GradScaler("hx") under the names that torch.cuda has."""

from __future__ import annotations

import functools

import torch

autocast = functools.partial(torch.autocast, "hx")
GradScaler = functools.partial(torch.amp.GradScaler, "hx")


def get_amp_supported_dtype() -> list[torch.dtype]:
    """What torch.autocast("hx") may cast to; the first is the default."""
    return [torch.bfloat16, torch.float16]
