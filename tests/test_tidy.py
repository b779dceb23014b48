"""Holds the tree to the conventions that a machine can check. Each failure names file and line and says what to do."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SKIPPED_FOLDERS = {"build", "dist", "__pycache__", "node_modules"}
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 70

# Longer than the limits, each with the reason why splitting it would not help a reader.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}

BANNED_FILE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}

# Who may not import whom (architecture.md, "Data's way through"): folder or module -> forbidden beginnings. An import
# under TYPE_CHECKING counts, too: a type is knowledge.
PURE = ("torch", "socket", "zmq", "hxcomm._C", "hxcomm._core", "hxcomm.c10d", "hxcomm.bootstrap", "hxcomm.select")
FORBIDDEN_IMPORTS: dict[str, tuple[str, ...]] = {
    "hxcomm/schedule": (*PURE, "hxcomm.algorithms", "hxcomm.sim"),
    "hxcomm/algorithms": (*PURE, "numpy", "hxcomm.sim"),
    "hxcomm/sim": tuple(each for each in PURE if each != "hxcomm._core"),  # the engine's inner loop is C++
    "hxcomm/environment.py": ("torch", "numpy", "hxcomm"),
    "hxcomm/build_check.py": ("torch", "numpy"),
    "hxcomm/cli.py": ("torch", "hxcomm._C"),
    "hxcomm/inspection.py": ("torch", "numpy", "hxcomm"),
    "hxcomm/top.py": ("torch", "numpy", "hxcomm._C", "hxcomm._core"),
    "hxcomm/bootstrap.py": ("torch", "hxcomm._C", "hxcomm.c10d"),
    "hxcomm/select.py": ("torch", "hxcomm._C", "hxcomm.c10d", "hxcomm.bootstrap"),
    "hxcomm/tuning.py": ("torch", "numpy", "hxcomm._C", "hxcomm._core", "hxcomm.select", "hxcomm.bootstrap"),
    "hxcomm/places.py": ("torch", "numpy", "hxcomm._C", "hxcomm.bootstrap", "hxcomm.select", "hxcomm.c10d"),
    "hxcomm/addresses.py": ("torch", "numpy", "hxcomm._C", "hxcomm._core", "hxcomm.bootstrap"),
    "hxcomm/secret.py": ("torch", "numpy", "hxcomm._C", "hxcomm._core", "hxcomm.bootstrap"),
    "hxcomm/__init__.py": ("torch", "numpy", "zmq"),
    "hxcomm/device": (
        "hxcomm.c10d",
        "hxcomm.select",
        "hxcomm.schedule",
        "hxcomm.algorithms",
        "hxcomm.sim",
        "hxcomm.virtual",
    ),
    "hxcomm/linear_all_reduce.py": ("hxcomm",),
    "hxcomm/virtual": ("hxcomm.c10d", "hxcomm.bootstrap", "hxcomm.torchcomms", "hxcomm._core"),
    "hxcomm/decoder": ("hxcomm._C", "hxcomm._core", "hxcomm.c10d", "hxcomm.sim", "hxcomm.virtual", "hxcomm.predict"),
    "hxcomm/predict": ("hxcomm._C", "hxcomm._core", "hxcomm.c10d", "hxcomm.bootstrap", "hxcomm.select"),
    "hxcomm/predict/arguments.py": ("torch", "transformers"),
    "hxcomm/predict/presets.py": ("torch", "transformers"),
    "hxcomm/predict/steps.py": ("torch", "transformers"),
    "hxcomm/predict/timing.py": ("torch", "transformers", "hxcomm.virtual"),
    "hxcomm/verify": (
        "hxcomm._C",
        "hxcomm._core",
        "hxcomm.bootstrap",
        "hxcomm.select",
        "hxcomm.schedule",
        "hxcomm.errors",
    ),
    "hxcomm/torchcomms/options.py": ("hxcomm",),
    "hxcomm/torchcomms/hook_args.py": ("hxcomm",),
    "hxcomm/torchcomms/backend.py": ("hxcomm._C", "hxcomm.c10d", "hxcomm.torchcomms.comm", "hxcomm.torchcomms.native"),
    "hxcomm/torchcomms/validation.py": ("hxcomm._C", "hxcomm.c10d", "hxcomm.torchcomms.comm"),
    "hxcomm/torchcomms/hooks": ("hxcomm._C", "hxcomm.c10d", "hxcomm.torchcomms.comm", "hxcomm.torchcomms.native"),
    "examples": ("hxcomm._C", "hxcomm._core"),
}
# numpy in the schedule layer belongs to the interpreter alone: the rest imports in milliseconds.
NUMPY_IN_SCHEDULE = {"hxcomm/schedule/interpret.py"}

# What each folder of csrc may include of ours, and whether it may include torch's headers.
INCLUDES: dict[str, tuple[str, ...]] = {
    "core": ("core/",),
    "transport": ("core/", "transport/"),
    "communicator": ("core/", "transport/", "communicator/"),
    "simulation": ("simulation/",),
    "bindings": ("core/", "transport/", "communicator/", "simulation/", "bindings/"),
    "torch": ("communicator/api.h", "communicator/memory_api.h", "torch/"),
    "torchcomms": ("torchcomms/",),
    "tests": ("core/", "transport/", "communicator/", "tests/"),
}
TORCH_HEADERS = ("torch/csrc/", "torch/library.h", "torch/torch.h", "ATen/", "c10/", "torch/headeronly/")
PYTHON_HEADERS = ("pybind11/", "Python.h")


@cache
def files() -> tuple[Path, ...]:
    """Every text file of the project, in order; what is built, hidden or generated is not the project's."""

    def walk(folder: Path) -> Iterator[Path]:
        for path in sorted(folder.iterdir()):
            if path.name in SKIPPED_FOLDERS or path.name.endswith(".egg-info"):
                continue
            if path.name.startswith(".") and path.name not in {".ci", ".gitignore", ".clang-format"}:
                continue
            if path.is_dir():
                yield from walk(path)
            elif path.suffix not in {".so", ".png", ".svg", ".gguf", ".pyc"} and path.name != "_build_info.py":
                yield path

    return tuple(walk(ROOT))


def named(*suffixes: str, under: str = "") -> list[Path]:
    return [path for path in files() if path.suffix in suffixes and relative(path).startswith(under)]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(text(path), filename=str(path))


def matches(pattern: str, paths: Iterable[Path]) -> Iterator[tuple[Path, int, re.Match[str]]]:
    """Each match with its file and line."""
    for path in paths:
        for match in re.finditer(pattern, text(path), re.MULTILINE):
            yield path, text(path).count("\n", 0, match.start()) + 1, match


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def report(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Each imported module and, for `from a import b`, also a.b, with its line."""
    package = relative(path).removesuffix(".py").removesuffix("/__init__").split("/")
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + (path.name == "__init__.py")] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def begins(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


@pytest.mark.parametrize("layer", FORBIDDEN_IMPORTS)
def test_a_layer_imports_nothing_from_above_it(layer: str) -> None:
    problems = {
        f"{relative(path)}:{line}: imports {name}, which {layer} must not know (FORBIDDEN_IMPORTS): "
        "turn the dependency round, or move the code to the layer that may"
        for path in named(".py", ".pyi", under=layer)
        for line, name in imports(path)
        for module in FORBIDDEN_IMPORTS[layer]
        if begins(name, module)
    }
    report(sorted(problems))


def test_only_the_interpreter_of_schedules_imports_numpy() -> None:
    report(
        [
            f"{relative(path)}:{line}: imports {name}; the schedule layer imports in milliseconds: use array"
            for path in named(".py", under="hxcomm/schedule")
            if relative(path) not in NUMPY_IN_SCHEDULE
            for line, name in imports(path)
            if begins(name, "numpy")
        ]
    )


def test_a_cpp_file_includes_only_its_own_layer_and_those_below() -> None:
    problems = []
    for path, line, match in matches(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', named(".cpp", ".h", under="csrc/")):
        folder, header = path.relative_to(ROOT / "csrc").parts[0], match[2]
        where = f"{relative(path)}:{line}: includes {header}"
        if folder not in INCLUDES:
            problems.append(f"{where}, and the folder {folder} has no row in INCLUDES: add it")
        elif header == "torch/extension.h":
            problems.append(f"{where}, which costs 30 s and 1.4 GB a file: include the narrow header instead")
        elif header.startswith(TORCH_HEADERS):
            if folder not in {"torch", "torchcomms"}:
                problems.append(f"{where}; only csrc/torch and csrc/torchcomms may know torch")
        elif header.startswith(PYTHON_HEADERS):
            if folder not in {"torch", "torchcomms", "bindings"}:
                problems.append(f"{where}; only csrc/bindings, csrc/torch and csrc/torchcomms may know Python")
        elif match[1] == '"' and not header.startswith(INCLUDES[folder]):
            allowed = ", ".join(INCLUDES[folder])
            problems.append(f"{where}; {folder} may include {allowed} (paths begin at csrc/)")
    report(problems)


def test_environment_variables_are_read_in_one_place_only() -> None:
    python = [
        f"{relative(path)}:{line}: reads the environment; declare the variable in hxcomm/environment.py and ask there"
        for path, line, _ in matches(r"\bos\.(environ|getenv)\b|from os import .*\b(environ|getenv)\b", named(".py"))
        if relative(path).startswith("hxcomm/") and relative(path) not in READ_OTHERS_VARIABLES
        if relative(path) != "hxcomm/environment.py"
    ]
    cpp = [
        f"{relative(path)}:{line}: reads the environment; take the value as an argument from Python"
        for path, line, _ in matches(r"\b(secure_)?getenv\s*\(|\benviron\b", named(".cpp", ".h", under="csrc/"))
    ]
    report(python + cpp)


# Modules that read variables which are not ours (RANK and the like, set by the launcher), with the reason.
READ_OTHERS_VARIABLES: dict[str, str] = {
    "hxcomm/engines/sglang.py": "SGLANG_USE_CPU_ENGINE, by which SGLang's users ask it to compute on CPU",
    "hxcomm/torchcomms/rendezvous.py": "RANK, WORLD_SIZE, MASTER_ADDR ... of launchers, and TorchComms' own names",
    "hxcomm/verify/rank.py": "sets TORCHCOMM_RANK and TORCHCOMM_SIZE, by which a rank is told to new_comm",
    "hxcomm/torchcomms/hooks/flight_recorder.py": "TORCHCOMM_FR_DUMP_TEMP_FILE, TorchComms' own",
}


def test_every_variable_is_declared_and_every_declared_one_is_used() -> None:
    from hxcomm import environment

    mentioned: dict[str, list[str]] = {}
    documents = {"environment.py", "test_tidy.py", "CHANGELOG.md"}  # say what exists, or what does not, but use nothing
    own_tests = "tests/test_environment.py"  # gives wrong names on purpose
    for path, line, match in matches(r"\bHXCOMM_[A-Z][A-Z0-9_]*\b", files()):
        if relative(path) != own_tests and path.name not in documents and not is_guard(path, match[0]):
            mentioned.setdefault(match[0], []).append(f"{relative(path)}:{line}")
    problems = [
        f"{places[0]}: {name} is not declared in hxcomm/environment.py: declare it, or correct the name"
        for name, places in mentioned.items()
        if name not in environment.VARIABLES
    ]
    code = "".join(text(path) for path in named(".py", under="hxcomm/") if path.name != "environment.py")
    for name in environment.VARIABLES:
        if f"environment.{name.removeprefix('HXCOMM_')}" not in code:
            problems.append(f"hxcomm/environment.py: nothing asks for {name}: use it or remove it")
    report(problems)


def is_guard(path: Path, name: str) -> bool:
    """A macro of ours, not a variable: defined in C++."""
    return path.suffix in {".cpp", ".h"} and bool(re.search(rf"#\s*(define|ifn?def|undef)\s+{name}\b", text(path)))


def test_files_are_short_enough_to_read() -> None:
    problems = []
    for path in named(".py", ".pyi", ".cpp", ".h", ".sh"):
        lines = text(path).count("\n")
        if lines > MAX_FILE_LINES and relative(path) not in LONG_FILES:
            problems.append(
                f"{relative(path)}:{MAX_FILE_LINES}: {lines} lines, the limit is {MAX_FILE_LINES}: split it by "
                "what its parts know, or name the reason in LONG_FILES"
            )
    stale = [
        f"tests/test_tidy.py: LONG_FILES names {name}, which does not exist"
        for name in LONG_FILES
        if not (ROOT / name).exists()
    ]
    report(problems + stale)


def test_functions_are_short_enough_to_read() -> None:
    problems = []
    for path in named(".py"):
        for node in functions(path):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if ast.get_docstring(node):
                first = node.body[0]
                lines -= (first.end_lineno or first.lineno) - first.lineno + 1
            if lines > MAX_FUNCTION_LINES and f"{relative(path)}:{node.name}" not in LONG_FUNCTIONS:
                problems.append(
                    f"{relative(path)}:{node.lineno}: {node.name} has {lines} lines without its docstring, the limit "
                    f"is {MAX_FUNCTION_LINES}: take a part out and give it a name"
                )
    for path in named(".cpp", ".h", under="csrc/"):
        problems += [
            f"{relative(path)}:{line}: {count} lines between the braces, the limit is {MAX_FUNCTION_LINES}: take a "
            "part out and give it a name"
            for line, count in cpp_bodies(text(path))
            if count > MAX_FUNCTION_LINES and f"{relative(path)}:{line}" not in LONG_FUNCTIONS
        ]
    report(problems)


def cpp_bodies(source: str) -> Iterator[tuple[int, int]]:
    """(line, lines) of each function in clang-format's layout: its body ends at the next `}` in its first column."""
    lines = source.split("\n")
    for last_of_head, line in enumerate(lines):
        if not re.search(r"\)[^;=()]*\{$", line):
            continue
        first = last_of_head  # parameters and initializers may take several lines
        while first > 0 and lines[first - 1].strip() and not re.search(r"[;{}:]$|^\s*(//|#)", lines[first - 1]):
            first -= 1
        head = re.match(r"( *)(?!namespace\b|class\b|struct\b|enum\b|extern\b)\w", lines[first])
        if head is None or re.match(r" *(if|for|while|switch|else|do|catch|try|return)\b", lines[first]):
            continue
        if "(" not in lines[first]:  # a chain of calls with a lambda among them, not the head of a function
            continue
        end = next((i for i in range(first + 1, len(lines)) if lines[i].startswith(head[1] + "}")), first)
        yield first + 1, end - first + 1


def test_no_file_is_named_after_nothing() -> None:
    report(
        [
            f"{relative(path)}:1: {path.stem!r} gathers what belongs elsewhere: name the file after what it knows"
            for path in files()
            if path.stem.lower() in BANNED_FILE_NAMES or path.parent.name.lower() in BANNED_FILE_NAMES
        ]
    )


def test_nothing_is_left_to_be_done_later() -> None:
    words = "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK"))
    report(
        [
            f"{relative(path)}:{line}: {match[0]}: do it now, or write an issue and remove the note"
            for path, line, match in matches(rf"\b({words})\b", files())
            if path.name != "LICENSE"
        ]
    )


def test_no_file_holds_a_path_of_one_machine() -> None:
    folders = "|".join(("wo" + "rk", "ro" + "ot", "ho" + "me", "Use" + "rs"))
    report(
        [
            f"{relative(path)}:{line}: {match[0]}: a path of one machine; make it relative, or find it at run time"
            for path, line, match in matches(rf"(?<![\w.$}}/])/({folders})/\w*", files())
        ]
    )


def test_an_algorithm_file_has_one_public_function_named_like_it() -> None:
    problems = []
    for path in named(".py", under="hxcomm/algorithms/"):
        if path.name == "__init__.py":
            continue
        public = [
            node.name
            for node in tree(path).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        ]
        if public != [path.stem]:
            problems.append(
                f"{relative(path)}:1: public names {public}; an algorithm's file has one, the function {path.stem}"
            )
    report(problems)


def test_test_names_are_sentences() -> None:
    report(
        [
            f"{relative(path)}:{node.lineno}: {node.name} does not say what holds; write it as a sentence "
            "(test_survivors_raise_when_a_rank_is_killed)"
            for path in named(".py", under="tests/")
            for node in functions(path)
            if node.name.startswith("test_") and len(node.name.split("_")) < 4
        ]
    )


def test_tests_neither_sleep_nor_skip_without_a_reason() -> None:
    tests = [path for path in named(".py", under="tests/") if path.name != "test_tidy.py"]
    sleeps = [
        f"{relative(path)}:{line}: sleeps: wait for the event itself, with a deadline"
        for path, line, _ in matches(r"\btime\.sleep\(", tests)
    ]
    skips = [
        f"{relative(path)}:{line}: a skip without a reason: say one that a user would accept"
        for path, line, _ in matches(r"pytest\.mark\.(skip|xfail)(\(\s*\))?$|pytest\.skip\(\s*\)", tests)
    ]
    report(sleeps + skips)


def test_every_module_says_what_it_is() -> None:
    report(
        [
            f"{relative(path)}:1: no docstring: say what this module is, why it is here, what it does not know"
            for path in named(".py")
            if text(path).strip() and not ast.get_docstring(tree(path))
        ]
    )


def test_every_command_of_the_readme_exists() -> None:
    """Each word of a fenced shell block that names a file of the tree, a module of ours or a subcommand."""
    readme = ROOT / "README.md"
    assert readme.exists(), "README.md:1: is missing"
    problems = []
    for block in re.finditer(r"^```(?:bash|sh|console|shell)?\n(.*?)^```", text(readme), re.MULTILINE | re.DOTALL):
        line = text(readme).count("\n", 0, block.start()) + 1
        for word in re.findall(r"(?<![\w/.-])(?:scripts|examples|tests|docs|csrc|hxcomm|\.ci)/[\w./-]*\w", block[1]):
            if not (ROOT / word).exists():
                problems.append(f"README.md:{line}: {word} does not exist")
        for module in re.findall(r"-m (hxcomm[\w.]*)", block[1]):
            if not any((ROOT / (module.replace(".", "/") + end)).exists() for end in (".py", "/__main__.py")):
                problems.append(f"README.md:{line}: python -m {module}: there is no such module")
        for command in re.findall(r"^(?:\$ )?hxcomm ([a-z]\w*)", block[1], re.MULTILINE):
            if f'add_parser("{command}"' not in text(ROOT / "hxcomm" / "cli.py"):
                problems.append(f"README.md:{line}: hxcomm {command}: hxcomm/cli.py has no such command")
    report(problems)


def test_the_stubs_name_what_the_extension_modules_have() -> None:
    """_core.pyi and _C.pyi: what a user's editor shows is what is there."""
    import importlib

    import torch  # noqa: F401  (_C links against it)

    problems = []
    for name in ("_core", "_C"):
        stub, module = ROOT / "hxcomm" / f"{name}.pyi", importlib.import_module(f"hxcomm.{name}")
        assert stub.exists(), f"hxcomm/{name}.pyi:1: is missing"
        stubbed = {
            target
            for node in tree(stub).body
            for target in (
                [node.name]
                if isinstance(node, ast.FunctionDef | ast.ClassDef)
                else [node.target.id]
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
                else []
            )
        }
        there = {word for word in dir(module) if not word.startswith("_")}
        problems += [
            f"hxcomm/{name}.pyi:1: {word} is in the module, not here: add it" for word in sorted(there - stubbed)
        ]
        problems += [
            f"hxcomm/{name}.pyi:1: {word} is not in the module" for word in sorted(stubbed - there) if word[0] != "_"
        ]
    report(problems)


def test_the_python_of_the_tests_is_one_that_the_package_allows() -> None:
    declared = re.search(r'requires-python = ">=3\.(\d+)"', text(ROOT / "pyproject.toml"))
    assert declared is not None
    assert sys.version_info >= (3, int(declared[1]))
