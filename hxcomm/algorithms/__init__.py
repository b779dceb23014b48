"""The algorithms: one file each, one function, named alike (`all_reduce_ring.py`: `all_reduce_ring`), discovered here.

`op_algorithm(world_size)`, of a rooted op `op_algorithm(world_size, root)`, returns a Schedule. One that depends on
where the ranks are has a last parameter `hosts`, a tuple with the number of each rank's host. A user adds one with
`register`. Knows no memory, dtypes or sizes; files are imported when their algorithm is asked for.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

from hxcomm.schedule import Schedule, ScheduleError
from hxcomm.schedule import ops as _ops
from hxcomm.schedule.crossing import several

OPS: tuple[str, ...] = tuple(_ops.OPS)
"""Op names in the order of their numbers in plans."""

ROOTED: frozenset[str] = frozenset(name for name, op in _ops.OPS.items() if op.rooted)

Algorithm = Callable[..., Schedule]

_registered: dict[tuple[str, str], Algorithm] = {}
_proved: dict[tuple[str, str, int, int | None, tuple[int, ...] | None], Schedule] = {}


@cache
def _discovered() -> dict[tuple[str, str], str]:
    found = {}
    for module in pkgutil.iter_modules(__path__):
        # reduce_scatter_ring belongs to reduce_scatter, not to reduce.
        op = max((op for op in OPS if module.name.startswith(op + "_")), key=len, default=None)
        if op is None:
            raise ScheduleError(f"hxcomm/algorithms/{module.name}.py: the name must begin with an op: {', '.join(OPS)}")
        found[op, module.name.removeprefix(op + "_")] = module.name
    return found


def names(op: str) -> list[str]:
    """The algorithms of an op, sorted. Raises ScheduleError for an op that does not exist."""
    _check_op(op)
    return sorted(name for each, name in (*_discovered(), *_registered) if each == op)


def build(
    op: str, algorithm: str, world_size: int, root: int | None = None, hosts: Sequence[int] | None = None
) -> Schedule:
    """The Schedule of an algorithm, as written. `root` is for rooted ops, and only for them.

    hosts: the number of each rank's host, 0, 1 ... in the order of their first ranks; None: all are on one.
    Raises ScheduleError for an unknown op or algorithm, or a wrong world size, root or hosts. An algorithm that a user
    registered is proved first, once for each world size, root and hosts: ProofError where it is wrong.
    """
    _check_op(op)
    if (op, algorithm) not in _registered and (op, algorithm) not in _discovered():
        raise ScheduleError(f"{op} has no algorithm {algorithm!r}; it has: {', '.join(names(op))}")
    if world_size < 1:
        raise ScheduleError(f"the world size is {world_size}; it must be 1 or more")
    if op in ROOTED and (root is None or not 0 <= root < world_size):
        raise ScheduleError(f"the root of {op} is {root}; it must be a rank, 0 to {world_size - 1}")
    if op not in ROOTED and root is not None:
        raise ScheduleError(f"{op} has no root, but {root} was given: leave it out")
    apart = several(hosts, world_size)
    if (op, algorithm) in _registered:
        return _build_registered(op, algorithm, world_size, root, apart)
    module = _discovered()[op, algorithm]
    return _call(getattr(importlib.import_module(f"{__name__}.{module}"), module), world_size, root, apart)


def _call(function: Algorithm, world_size: int, root: int | None, apart: tuple[int, ...] | None) -> Schedule:
    arguments = (world_size,) if root is None else (world_size, root)
    if "hosts" in inspect.signature(function).parameters:
        return function(*arguments, hosts=apart or (0,) * world_size)
    return function(*arguments)


def register(op: str, name: str, function: Algorithm) -> Algorithm:
    """Adds a user's algorithm: `hxcomm.register_algorithm("all_reduce", "mine", function)`, on every rank alike.

    `function(world_size)`, or `function(world_size, root)` for a rooted op, returns a Schedule. Where it has a
    parameter `hosts`, it is given a tuple with the number of each rank's host: (0, 0, 1, 1) for two hosts of two ranks,
    all 0 for ranks on one. It need not have it: any Schedule runs across hosts. It must be the same on every rank (the
    plan hash tells) and is proved before it first runs. Raises ScheduleError for an unknown op, a name that is taken or
    not a word, or what is not a function. Returns the function.
    """
    _check_op(op)
    if not isinstance(name, str) or not name.isidentifier():
        raise ScheduleError(f"an algorithm's name is a word of letters, digits and _, not {name!r}")
    if name in names(op):
        raise ScheduleError(f"{op} has an algorithm {name!r} already: choose another name")
    if not callable(function):
        raise ScheduleError(f"algorithm {name!r} of {op}: {function!r} is not a function that returns a Schedule")
    _registered[op, name] = function
    return function


def _check_op(op: str) -> None:
    if op not in OPS:
        raise ScheduleError(f"there is no op {op!r}; the ops are: {', '.join(OPS)}")


def _build_registered(
    op: str, algorithm: str, world_size: int, root: int | None, apart: tuple[int, ...] | None
) -> Schedule:
    from hxcomm.schedule import prove

    key = (op, algorithm, world_size, root, apart)
    if key not in _proved:
        schedule = _call(_registered[op, algorithm], world_size, root, apart)
        if not isinstance(schedule, Schedule):
            raise ScheduleError(f"algorithm {algorithm!r} of {op} returned {type(schedule).__name__}, not a Schedule")
        if (schedule.op, schedule.world_size, schedule.root) != (op, world_size, root):
            raise ScheduleError(
                f"algorithm {algorithm!r} was asked for {op}, world size {world_size}, root {root}, and returned a "
                f"Schedule of {schedule.op}, world size {schedule.world_size}, root {schedule.root}"
            )
        schedule = replace(schedule, algorithm=algorithm)
        prove(schedule, apart)
        _proved[key] = schedule
    return _proved[key]
