"""PEP 517 build backend: setuptools' own, made to find the torch that is already installed.

pip builds in an isolated environment, without torch. Listing torch as a build requirement would download a second one
(gigabytes where the default is the CUDA build), and the extension would be built for that one rather than for the one
it runs with. So this backend appends the site-packages that the isolation hid; what the isolated environment carries
itself still comes first. It knows nothing of what is built: setup.py does.
"""

from __future__ import annotations

import importlib.util
import site
import sys
import sysconfig
from pathlib import Path
from typing import TypeAlias


def _show_installed_packages() -> None:
    hidden = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if site.ENABLE_USER_SITE is not False and sys.prefix == sys.base_prefix:
        hidden.append(site.getusersitepackages())
    sys.path.extend(path for path in dict.fromkeys(hidden) if path not in sys.path and Path(path).is_dir())


def _require_torch() -> None:
    if importlib.util.find_spec("torch") is not None:
        return
    raise SystemExit(
        f"hxcomm is compiled against the torch it will run with, and {sys.executable} has none.\n"
        "Install torch 2.13.0 first, then hxcomm again; the CPU build is enough:\n"
        "  pip install torch==2.13.0\n"
        "(where pip's default is the CUDA build, README.md says how to get the CPU one). `bash scripts/test.sh` in\n"
        "the source tree does all of it in a virtual environment."
    )


_show_installed_packages()

from setuptools import build_meta  # noqa: E402  (the path must be complete first)
from setuptools.build_meta import (  # noqa: E402, F401
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

Settings: TypeAlias = "dict[str, str | list[str]] | None"


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    return build_meta.build_sdist(sdist_directory, config_settings)


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    _require_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    _require_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
