"""Says what is wrong with this installation, if anything: extension not built, or built for another torch.

Needs no import of torch: versions come from package metadata. Knows nothing of what the extensions do.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util

REINSTALL = "pip install --no-build-isolation --force-reinstall --no-deps ."


def torch_built_for() -> str | None:
    """The version of torch that the extensions were compiled against; None when they were not built."""
    if importlib.util.find_spec("hxcomm._core") is None or importlib.util.find_spec("hxcomm._C") is None:
        return None
    from hxcomm._build_info import TORCH_VERSION

    return TORCH_VERSION


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split("+")[0].split(".")[:2])


def problem() -> str | None:
    """What is wrong and what to do about it, or None."""
    built_for = torch_built_for()
    if built_for is None:
        return (
            "hxcomm's extension modules are not built. In a checkout run `bash scripts/test.sh` (it sets everything "
            f"up), or with torch 2.13 installed `{REINSTALL}`."
        )
    try:
        found = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        wanted = built_for.split("+")[0]
        return f"torch is not installed; hxcomm was built for torch {built_for}: pip install torch=={wanted}"
    if _minor(found) != _minor(built_for):
        return (
            f"hxcomm was built for torch {built_for}, but torch {found} is installed. Its C++ interface differs "
            f"between minor versions: install that torch, or build hxcomm again with `{REINSTALL}` in a checkout."
        )
    return None
