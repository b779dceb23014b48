"""Waits, from `import torch` on, for engines that ask for no plug-ins, and sets each up once it has been imported.

vLLM and SGLang find hxcomm by entry points of their own. transformers has none.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

# Module of an engine -> ours, whose `set_up(module)` is called once that module has been imported.
WATCHED = {"transformers.distributed.utils": "hxcomm.engines.transformers"}


class _Watcher(MetaPathFinder):
    """Python asks it for every module that it looks for. It finds none: it only looks whether one of those that it
    waits for is there by now. (They cannot be caught while they load: `import torch` may be a line of theirs.)"""

    def __init__(self) -> None:
        self.waiting = dict(WATCHED)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        for theirs, ours in list(self.waiting.items()):
            module = sys.modules.get(theirs)
            if module is None or getattr(module.__spec__, "_initializing", False):
                continue
            if self.waiting.pop(theirs, None) is not None:  # else another thread was faster
                importlib.import_module(ours).set_up(module)


def watch() -> None:
    """Sets up each engine as soon as it has been imported. Imports nothing now. Harmless when called twice."""
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
