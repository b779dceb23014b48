"""Hugging Face transformers: which backend it makes its process group with, where the program has made none.

`from_pretrained(folder, tp_plan="auto")` looks its device up in a dict, and hx is not in it. This adds it, and with
HXCOMM_CPU=1 gives CPU to hxcomm, too. Nothing of transformers is replaced.
"""

from __future__ import annotations

import importlib.metadata
from types import ModuleType

from hxcomm import environment

BACKEND = "hxcomm"


def set_up(module: ModuleType) -> None:
    """`module` is transformers.distributed.utils. Raises ImportError where HXCOMM_CPU=1 would have no effect."""
    backends: dict[str, str] | None = getattr(module, "DISTRIBUTED_BACKEND_MAP", None)
    if backends is None:
        if environment.CPU.get():
            raise ImportError(
                f"HXCOMM_CPU=1: transformers {importlib.metadata.version('transformers')} keeps its backends elsewhere "
                "than the versions that hxcomm knows (5.23 and later): call "
                'torch.distributed.init_process_group("hxcomm") before from_pretrained instead, without HXCOMM_CPU'
            )
        return
    backends.setdefault("hx", BACKEND)
    if environment.CPU.get():
        backends["cpu"] = BACKEND
