"""Random numbers on hx: one generator a chip, and the numbers that CPU's gives with the same seed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from hxcomm.device import lifecycle
from hxcomm.device.chips import Device, device_count, index_of


def default_generator(device: Device = None) -> torch.Generator:
    """The generator of a chip that operations use which are given none."""
    generator: torch.Generator = lifecycle.extension().device_generator(index_of(device))
    return generator


def manual_seed(seed: int) -> None:
    """Seeds the current chip's generator."""
    default_generator().manual_seed(int(seed))


def manual_seed_all(seed: int) -> None:
    """Seeds every chip's generator; torch.manual_seed() calls it."""
    lifecycle.seed_at_start(int(seed))
    if lifecycle.is_initialized():
        for chip in range(device_count()):
            default_generator(chip).manual_seed(int(seed))


def seed() -> int:
    """Seeds the current chip's generator with a number that nobody knows, and returns it."""
    return int(default_generator().seed())


def seed_all() -> None:
    manual_seed_all(seed())


def initial_seed(device: Device = None) -> int:
    return int(default_generator(device).initial_seed())


def get_rng_state(device: Device = "hx") -> torch.Tensor:
    """16 bytes: the seed, and how many numbers were drawn since, as on CUDA (DTensor relies on it)."""
    return default_generator(device).get_state()


def set_rng_state(new_state: torch.Tensor, device: Device = "hx") -> None:
    default_generator(device).set_state(new_state)


def get_rng_state_all() -> list[torch.Tensor]:
    return [get_rng_state(chip) for chip in range(device_count())]


def set_rng_state_all(new_states: Iterable[Any]) -> None:
    for chip, state in enumerate(new_states):
        set_rng_state(state, chip)
