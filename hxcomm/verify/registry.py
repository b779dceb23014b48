"""The checks there are: what each is called, what it holds a backend to, and with which arguments it runs.

A module that defines checks is imported by the driver and by every rank, so an id means the same everywhere. Knows
neither processes nor backends.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

CATEGORIES = ("results", "semantics", "determinism", "point_to_point", "parallel", "misuse", "failure")

APIS = ("c10d", "torchcomms")  # torch.distributed; the communicator of torchcomms

Body = Callable[..., object]


@dataclass(frozen=True)
class Check:
    """One promise. `function(context, *arguments)` returns, or raises what is wrong."""

    api: str
    category: str
    name: str
    says: str
    """The promise in one sentence, and who makes it."""
    function: Body
    cases: tuple[tuple[Any, ...], ...]
    min_ranks: int
    optional: Callable[..., bool]
    """Of the arguments: whether the standard lets a backend refuse this."""
    spoils: bool
    """Leaves the ranks unusable for the next check even where it passes."""
    afterwards: Body | None
    """Run after a pass with a short limit of its own; how it ends is reported beside the verdict."""


@dataclass(frozen=True)
class Case:
    """A check with its arguments; runs at one world size at a time."""

    check: Check
    arguments: tuple[Any, ...]

    @property
    def id(self) -> str:
        """As `--only` takes it: misuse/dtype_mismatch[float32-int32]."""
        given = f"[{'-'.join(map(str, self.arguments))}]" if self.arguments else ""
        return f"{self.check.category}/{self.check.name}{given}"

    @property
    def optional(self) -> bool:
        return self.check.optional(*self.arguments)


_checks: dict[tuple[str, str], Check] = {}  # by API, and category/name


def check(
    category: str,
    *,
    says: str,
    name: str | None = None,
    cases: Iterable[Any] = ((),),
    min_ranks: int = 1,
    optional: bool | Callable[..., bool] = False,
    spoils: bool = False,
    afterwards: Body | None = None,
    api: str = "c10d",
) -> Callable[[Body], Body]:
    """Registers the function below it. Raises ValueError for an unknown category or a name that is taken.

    cases: the arguments of each case: tuples, or single values. They are part of the case's id, so they are words and
    numbers. The rest is as in Check.
    """

    def register(function: Body) -> Body:
        called = name or function.__name__
        if category not in CATEGORIES:
            raise ValueError(f"check {called}: there is no category {category!r}; there are {', '.join(CATEGORIES)}")
        key = (api, f"{category}/{called}")
        if key in _checks:
            raise ValueError(f"check {key[1]} of {api} exists already: choose another name")
        tuples = tuple(case if isinstance(case, tuple) else (case,) for case in cases)
        may_refuse = optional if callable(optional) else lambda *_: bool(optional)
        _checks[key] = Check(api, category, called, says, function, tuples, min_ranks, may_refuse, spoils, afterwards)
        return function

    return register


def load(modules: Sequence[str] = ()) -> None:
    """Imports the checks of hxcomm/verify/checks/, then `modules`, which may register backends and further checks."""
    from hxcomm.verify import checks

    for module in pkgutil.iter_modules(checks.__path__):
        importlib.import_module(f"{checks.__name__}.{module.name}")
    for each in modules:
        importlib.import_module(each)


def cases(api: str = "c10d") -> list[Case]:
    """Every case, by category."""
    of_api = [each for each in _checks.values() if each.api == api]
    ordered = sorted(of_api, key=lambda each: CATEGORIES.index(each.category))
    return [Case(each, arguments) for each in ordered for arguments in each.cases]


def matching(patterns: Sequence[str], api: str = "c10d") -> list[Case]:
    """The cases whose id matches one of the patterns, in which * and ? stand for anything; all without a pattern.

    Brackets stand for themselves, so an id is a pattern; a check's id without its arguments matches all its cases.
    """
    everything = cases(api)
    if not patterns:
        return everything
    expressions = [
        re.compile("".join({"*": ".*", "?": "."}.get(letter, re.escape(letter)) for letter in pattern) + r"(\[.*\])?")
        for pattern in patterns
    ]
    return [case for case in everything if any(each.fullmatch(case.id) for each in expressions)]


def find(identity: str, api: str) -> Case:
    """The case of this id. Raises KeyError."""
    for case in cases(api):
        if case.id == identity:
            return case
    raise KeyError(identity)
