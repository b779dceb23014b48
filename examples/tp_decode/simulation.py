"""What the run would have cost on a simulated chip: hxcomm's virtual time of the moments that generate.py takes.

Nothing here does anything unless HXCOMM_SIM (or --simulate) names a chip.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from errors import UsageError

if TYPE_CHECKING:
    from generate import Timing


def prepare(chip: str | None, device: str, backend: str | None) -> None:
    """Names the chip to hxcomm before it makes the device. Raises UsageError where it cannot be simulated.

    backend: None where there is no process group."""
    asked = "--simulate" if chip else "HXCOMM_SIM"
    chip = chip or os.environ.get("HXCOMM_SIM")
    if not chip:
        return
    if not device.startswith("hx"):
        raise UsageError(f"{asked} {chip}: virtual time is told of tensors on hx: add --device hx")
    if backend not in (None, "hxcomm"):
        raise UsageError(f"{asked} {chip}: backend {backend} tells no virtual time: use --backend hxcomm")
    os.environ["HXCOMM_SIM"] = chip
    from hxcomm.virtual import clock

    try:
        clock.start()
    except (ValueError, OSError) as error:
        raise UsageError(f"{asked}: {error}") from error


def region(part: str) -> None:
    """What follows belongs to that part of the model."""
    if "HXCOMM_SIM" in os.environ:
        from hxcomm import virtual

        virtual.enter(part)


def report() -> Any:
    """Virtual time up to now, or None."""
    if not os.environ.get("HXCOMM_SIM"):
        return None
    from hxcomm import virtual

    return virtual.report()


def summary(timing: Timing, new_tokens: int) -> str:
    """The screen about the chips; times are of the decode steps, as the program's own."""
    from hxcomm.virtual import summary

    prefill_ms = (timing.virtual_first_token.total_ps - timing.virtual_begin.total_ps) / 1e9
    steps = new_tokens - 1
    if not steps:
        return f"time to first token, predicted: {prefill_ms:.3f} ms; ms/token needs --max-new-tokens 2 or more"
    text = summary.text(report() - timing.virtual_first_token, steps, timing.decode_s * 1e3 / steps)
    return f"{text}\ntime to first token, predicted: {prefill_ms:.3f} ms"


def as_json(timing: Timing, new_tokens: int) -> dict[str, Any]:
    from hxcomm.virtual import summary

    steps = max(1, new_tokens - 1)
    decode = summary.as_json(report() - timing.virtual_first_token, steps, timing.decode_s * 1e3 / steps)
    return {**decode, "ttft_ms": (timing.virtual_first_token.total_ps - timing.virtual_begin.total_ps) / 1e9}
