"""The extension modules of hxcomm; everything else about the package is in pyproject.toml.

hxcomm._core links nothing of torch and sees none of its headers but pybind11's: the compiler and the linker, not
goodwill, keep the layers apart. hxcomm._C is the glue that a torch upgrade rebuilds. hxcomm._torchcomms is there only
where the torchcomms package is installed with its headers. All are compiled by ninja through torch's BuildExtension
(objects and header dependencies are kept in build/, so touching one file recompiles that file), and through ccache
where there is one.
"""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path

from setuptools import Command, Extension, setup

try:
    import torch
    from torch.utils import cpp_extension
except ModuleNotFoundError as missing:
    if missing.name != "torch":
        raise
    torch = None  # an sdist and the metadata need no compiler and no torch; build_backend.py refuses the rest

ROOT = Path(__file__).resolve().parent
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
# Floating-point contraction is off: the scalar kernels must give the bits of the AVX2 ones. No -march: kernels choose
# at run time, and one build runs on every x86-64 machine.
CORE_FLAGS = [
    "-O3",
    "-g1",
    "-std=c++20",
    *WARNINGS,
    "-Wconversion",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-pthread",
]
# -O2, and no -Wconversion: torch's macros expand into our files and do not pass it.
GLUE_FLAGS = ["-O2", "-g1", "-std=c++20", *WARNINGS, "-fvisibility=hidden", "-pthread"]


def sources(*folders: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / "csrc" / folder).glob("*.cpp"))


def system_include(*folders: str | Path) -> list[str]:
    """Their warnings are not ours to fix; -isystem also overrides the -I that distutils adds for Python's headers."""
    return [word for folder in folders for word in ("-isystem", str(folder))]


def pybind11_alone() -> Path:
    """A folder with pybind11 and nothing of torch beside it, so that an ATen header in the core does not compile."""
    folder = ROOT / "build" / "pybind11"
    folder.mkdir(parents=True, exist_ok=True)
    link, target = folder / "pybind11", Path(torch.__file__).parent / "include" / "pybind11"
    if not link.is_symlink() or link.resolve() != target.resolve():
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    return folder


def torchcomms_folder() -> Path | None:
    """Of the installed torchcomms package, if it brought its headers."""
    spec = importlib.util.find_spec("torchcomms")
    folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else None
    has_headers = folder is not None and (folder / "include/comms/torchcomms/TorchCommBackend.hpp").is_file()
    return folder if has_headers else None


def plug_in(folder: Path) -> Extension:
    """Optional: torchcomms' C++ interface is young, and a version of it that differs must not keep hxcomm from being
    installed. hxcomm.torchcomms.plugin then takes its Python class."""
    return Extension(
        "hxcomm._torchcomms",
        sources("torchcomms"),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=GLUE_FLAGS
        + system_include(folder / "include", *cpp_extension.include_paths("cpu"), sysconfig.get_path("include")),
        library_dirs=[str(folder), *cpp_extension.library_paths("cpu")],
        libraries=["torchcomms", "torch", "torch_cpu", "torch_python", "c10"],
        optional=True,
    )


def extension_modules() -> list[Extension]:
    # setuptools skips an extension none of whose `depends` is newer; ninja then looks at each object's own headers.
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))
    python_include = sysconfig.get_path("include")
    core = Extension(
        "hxcomm._core",
        sources("core", "transport", "communicator", "simulation", "bindings"),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=CORE_FLAGS + system_include(pybind11_alone(), python_include),
        extra_link_args=["-pthread"],
        libraries=["dl"],
        depends=["setup.py", *headers],
    )
    glue = Extension(
        "hxcomm._C",
        sources("torch", "torch/device"),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=GLUE_FLAGS + system_include(*cpp_extension.include_paths("cpu"), python_include),
        library_dirs=cpp_extension.library_paths("cpu"),
        libraries=["torch", "torch_cpu", "torch_python", "c10"],
        depends=["setup.py", *headers],
    )
    folder = torchcomms_folder()
    return [each for each in (core, glue, *([plug_in(folder)] if folder else [])) if each.sources]


def commands() -> dict[str, type[Command]]:
    class BuildExtensions(cpp_extension.BuildExtension):
        """Keeps objects in build/ whoever builds, one ninja file an extension, and records the torch built with."""

        def finalize_options(self) -> None:
            super().finalize_options()
            self.objects_root = ROOT / "build" / f"objects-{sysconfig.get_config_var('SOABI')}"

        def build_extension(self, extension: Extension) -> None:
            # pip gives every editable build a fresh temporary folder; ninja needs the one of last time.
            self.build_temp = str(self.objects_root / extension.name)
            Path(self.build_temp).mkdir(parents=True, exist_ok=True)
            try:
                super().build_extension(extension)
            except RuntimeError as error:  # ninja's, which setuptools does not know as a failed build
                if not extension.optional:
                    raise
                print(f"{extension.name} is left out, it could not be built: {error}", file=sys.stderr)

        def run(self) -> None:
            super().run()
            text = (
                '"""What the extension modules were built with; written by setup.py."""\n\n'
                f'TORCH_VERSION = "{torch.__version__}"\n'
            )
            folders = {Path(self.build_lib) / "hxcomm"} | ({ROOT / "hxcomm"} if self.inplace else set())
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "_build_info.py").write_text(text)

    return {"build_ext": BuildExtensions}


if __name__ == "__main__":  # scripts/bench_safety.py reads the flags
    if torch is None:
        setup()
    else:
        setup(ext_modules=extension_modules(), cmdclass=commands())
