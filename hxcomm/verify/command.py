"""What `hxcomm verify` does with its command line: checks it, runs, prints, writes the files."""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

from hxcomm import c10d
from hxcomm.verify import page, registry
from hxcomm.verify.driver import Driver
from hxcomm.verify.registry import CATEGORIES, Case
from hxcomm.verify.results import FAILED, NO_GROUP, OUTCOMES, Report, Result


class UsageError(Exception):
    """The command line asks for what there is not. The text says what there is."""


def run(options: argparse.Namespace) -> int:
    """Returns 0 where every case passed or is unsupported, 1 where one failed. Raises UsageError."""
    modules = tuple(options.modules)
    if str(Path.cwd()) not in sys.path:  # as `python -m` has it, so --import finds a module that lies here
        sys.path.insert(0, str(Path.cwd()))
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UsageError(f"--import {module}: {error}; is its folder in PYTHONPATH?") from error
    registry.load(modules)
    cases = registry.matching(options.only, options.api)
    if not cases:
        raise UsageError(f"no check matches {' '.join(options.only)}; `hxcomm verify --list` shows what there is")
    if options.list:
        _list(cases)
        return 0
    if not any(ranks >= case.check.min_ranks for case in cases for ranks in options.ranks):
        raise UsageError(f"the checks asked for need more ranks than --ranks {','.join(map(str, options.ranks))}")
    if options.api == "c10d":
        _require_backend(options.backend)
    else:
        _require_torchcomms_backend(options.backend)
    _require_device(options.device)
    for option in (options.json, options.html):
        if option is not None and not option.parent.is_dir():
            raise UsageError(f"cannot write {option}: there is no folder {option.parent}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing stays behind
    began = time.monotonic()
    progress = Progress(cases, options.ranks)
    with Driver(options.backend, options.device, options.timeout, modules, options.api) as driver:
        report = driver.run(cases, options.ranks, progress)
    _print_summary(report, time.monotonic() - began)
    if options.json is not None:
        options.json.write_text(json.dumps(report.as_json(), indent=1) + "\n")
    if options.html is not None:
        options.html.write_text(page.html(report))
    return 1 if report.failed() else 0


def _list(cases: list[Case]) -> None:
    said = ""
    for case in cases:
        if said != case.check.says:
            said = case.check.says
            print(f"\n# {said}")
        print(case.id)


def _require_backend(name: str) -> None:
    c10d.register_backend()
    known = [each for each in dist.Backend.backend_list if each != "undefined"]
    if name not in known:
        raise UsageError(
            f"torch knows no backend {name!r}; it knows {', '.join(known)}. For another: --import its MODULE"
        )
    if not dist.is_backend_available(name):
        raise UsageError(f"this torch was built without {name}")


def _require_torchcomms_backend(name: str) -> None:
    from hxcomm import torchcomms

    if not torchcomms.is_backend_built(name):
        known = ", ".join(torchcomms.built_backends())
        raise UsageError(f"new_comm knows no backend {name!r}; it knows {known}. For another: --import its MODULE")


def _require_device(name: str) -> None:
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from error


class Progress:
    """One line per world size and category, and each failure as it comes; that no group can be made is said once."""

    def __init__(self, cases: list[Case], world_sizes: list[int]) -> None:
        self._left = Counter(
            (ranks, case.check.category) for ranks in world_sizes for case in cases if ranks >= case.check.min_ranks
        )
        self._seen: Counter[tuple[int, str, str]] = Counter()
        self._last = ""

    def __call__(self, result: Result) -> None:
        key = (result.ranks, result.category)
        self._seen[(*key, result.outcome)] += 1
        self._left[key] -= 1
        said_already = result.message == self._last and result.message.startswith(NO_GROUP)
        self._last = result.message
        if result.outcome in FAILED and not said_already:
            print(f"{result.outcome.upper()} {result.case} at {result.ranks} ranks")
            print("".join(f"    {line}\n" for line in result.message.splitlines()), end="")
            print(f"    {result.reproducer}", flush=True)
        if self._left[key] == 0:
            counted = ", ".join(f"{n} {each}" for each in OUTCOMES if (n := self._seen[(*key, each)]))
            print(f"{result.ranks} ranks  {result.category}: {counted}", flush=True)


def _print_summary(report: Report, took_s: float) -> None:
    names = [name for name in CATEGORIES if report.counts(name)]
    width = max(map(len, [*names, "category"]))
    api = "" if report.api == "c10d" else f" by the API of {report.api}"
    print(f"\n{report.backend}{api} on {report.device}, torch {report.torch}, {took_s:.0f} s")
    print(f"{'category':<{width}}" + "".join(f"{each:>13}" for each in OUTCOMES))
    for name in names:
        print(f"{name:<{width}}" + "".join(f"{report.counts(name)[each]:>13}" for each in OUTCOMES))
    print(f"{'all':<{width}}" + "".join(f"{report.counts()[each]:>13}" for each in OUTCOMES))
