"""Python imports it at its start where this folder is on its path: torch then finds a processor without AVX-512."""

from __future__ import annotations

import torch

torch.cpu._is_avx512_supported = lambda: False
torch.cpu._is_avx512_bf16_supported = lambda: False
