"""hxcomm.torchcomms under the name that programs import: `import torchcomms`.

A file `torchcomms.py` on the program's path is all it takes:

    import hxcomm.as_torchcomms

    hxcomm.as_torchcomms.install()

Every module of that name is then ours, not a copy of it: a class is the same under both names. Outside of the package,
since torch tries `import torchcomms` in the middle of `import torch`, when what the package needs is not there yet.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAME = "torchcomms"
OURS = "hxcomm.torchcomms"


class _Alias(MetaPathFinder, Loader):
    def __init__(self, name: str) -> None:
        self.name = name

    def ours(self, fullname: str) -> str:
        return OURS + fullname[len(self.name) :]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name and not fullname.startswith(self.name + "."):
            return None
        return ModuleSpec(fullname, self) if importlib.util.find_spec(self.ours(fullname)) is not None else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.ours(spec.name))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has been executed. The import system has just given it the spec of the other name."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def install(name: str = NAME) -> None:
    """Makes `import NAME` and `import NAME.module` give hxcomm.torchcomms and its modules. Harmless twice.

    Under the name torchcomms, torch.distributed.config.use_torchcomms then makes groups over our communicators, too.
    ImportError inside `import torch`: torch goes on without, and the program's own import comes later.
    """
    torch = sys.modules.get("torch")
    if torch is not None and getattr(torch.__spec__, "_initializing", False):
        raise ImportError(f"{name} needs torch, which is being imported")
    package = importlib.import_module(OURS)
    if not any(isinstance(finder, _Alias) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Alias(name))
    sys.modules[name] = package
    if name == NAME:
        _tell_torch()


def _tell_torch() -> None:
    """torch looked for torchcomms when it was imported, too early for us, and remembers what it found."""
    from torch.distributed import distributed_c10d

    from hxcomm.torchcomms import new_comm
    from hxcomm.torchcomms.backend_wrapper import _BackendWrapper
    from hxcomm.torchcomms.hooks import FlightRecorderHook

    if distributed_c10d._TORCHCOMM_AVAILABLE:
        return
    there: Any = distributed_c10d
    there._BackendWrapper, there.new_comm, there.FlightRecorderHook = _BackendWrapper, new_comm, FlightRecorderHook
    there._TORCHCOMM_AVAILABLE = True
