"""Every public name of the reference is here, with its parameters; reference.json holds names and parameters, no code.

Ours may have more names, and more parameters where those have defaults: what calls the reference can call ours.
"""

from __future__ import annotations

import ast
import enum
import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

MODULES: dict[str, Any] = json.loads((Path(__file__).parent / "reference.json").read_text())["modules"]


def entries(kind: str) -> list[tuple[str, str]]:
    return [(module, name) for module, described in MODULES.items() for name in described[kind]]


def ours(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"hxcomm.torchcomms.{module}"), name)


def different(function: Any, wanted: list[str]) -> list[str]:
    """What a call that the reference takes would find different in ours."""
    parameters = [each for each in inspect.signature(function).parameters.values() if each.name != "self"]
    problems = []
    for position, text in enumerate(wanted):
        name, defaulted, default = text.partition("=")
        if position >= len(parameters) or parameters[position].name != name:
            problems.append(f"parameter {position} is not {name}")
            continue
        actual = parameters[position]
        if actual.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            problems.append(f"{name} cannot be given by position and by name")
        if defaulted and actual.default is inspect.Parameter.empty:
            problems.append(f"{name} has no default")
        elif default and actual.default != ast.literal_eval(default):
            problems.append(f"{name} is {actual.default!r} by default, not {default}")
    more = parameters[len(wanted) :]
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [each.name for each in more if each.default is inspect.Parameter.empty and each.kind not in variadic]
    return problems + [f"{name} is needed too" for name in needed]


@pytest.mark.parametrize(("module", "name"), entries("functions"))
def test_a_function_of_the_reference_is_here_with_its_parameters(module: str, name: str) -> None:
    assert different(ours(module, name), MODULES[module]["functions"][name]) == []


@pytest.mark.parametrize(("module", "name"), entries("classes"))
def test_a_class_of_the_reference_is_here_with_its_methods_and_attributes(module: str, name: str) -> None:
    found, wanted = ours(module, name), MODULES[module]["classes"][name]
    problems = {
        method: difference
        for method, parameters in wanted["methods"].items()
        if (difference := different(getattr(found, method), parameters))
    }
    assert problems == {}
    declared = set(dir(found)).union(*(vars(base).get("__annotations__", ()) for base in found.__mro__))
    assert set(wanted["attributes"]) <= declared
    assert {ours(module, base) for base in wanted["bases"]} <= set(found.__mro__)


@pytest.mark.parametrize(("module", "name"), entries("enums"))
def test_an_enum_of_the_reference_is_here_with_its_members(module: str, name: str) -> None:
    found = ours(module, name)
    assert issubclass(found, enum.Enum)
    assert set(MODULES[module]["enums"][name]) <= set(found.__members__)


@pytest.mark.parametrize(("module", "name"), entries("aliases"))
def test_a_name_for_a_type_is_here(module: str, name: str) -> None:
    assert ours(module, name) is not None


@pytest.mark.parametrize("name", sorted(MODULES["_comms"]["classes"] | MODULES["_comms"]["enums"]))
def test_a_program_finds_the_same_object_in_the_package_and_in_its_module(name: str) -> None:
    """`torchcomms.X` and `torchcomms._comms.X` are one, or an isinstance() across the two would be false."""
    if not name.startswith("_"):
        assert getattr(importlib.import_module("hxcomm.torchcomms"), name) is ours("_comms", name)


def test_the_comparison_sees_what_a_caller_would_see() -> None:
    def function(tensor: object, dst: int = 0, *, late: int, other: int = 1) -> None: ...

    assert different(function, ["tensor", "dst=0"]) == ["late is needed too"]
    assert different(function, ["tensor=", "src", "late"]) == [
        "tensor has no default",
        "parameter 1 is not src",
        "late cannot be given by position and by name",
    ]
    assert different(function, ["tensor", "dst=1", "late", "other", "more"]) == [
        "dst is 0 by default, not 1",
        "late cannot be given by position and by name",
        "other cannot be given by position and by name",
        "parameter 4 is not more",
    ]
