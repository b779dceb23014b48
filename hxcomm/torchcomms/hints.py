"""Hints: what a caller asks of the choice of an algorithm, as TorchComms passes it: words to words."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from hxcomm import algorithms, environment
from hxcomm.select import Hints, hint_number

KNOWN = {
    "algorithm": "an algorithm's name, e.g. ring; or of several ops, e.g. all_reduce:ring,broadcast:direct",
    "chunk": "bytes of a staging window, e.g. 256KiB",
    "determinism": "layout (the same bits wherever the ranks run) or none",
    "persistent_store": "anything: torch.distributed passes it to new_comm, where a given store is kept in any case",
}


def number_of(hints: Mapping[str, str] | None) -> int:
    """What the communicator knows these hints by. ValueError where one is unknown or wrong."""
    if not hints:
        return 0
    if not isinstance(hints, Mapping):
        raise TypeError(f"hints are a dict of text to text, not {hints!r}")
    for name, value in hints.items():
        if name not in KNOWN:
            known = "; ".join(f"{each}: {meaning}" for each, meaning in KNOWN.items())
            raise ValueError(f"there is no hint {name!r}; the hints are {known}")
        if not isinstance(value, str):
            raise ValueError(f"hint {name} is {value!r}; hints are text: {KNOWN[name]}")
    return _number(frozenset(hints.items()))


@functools.lru_cache(maxsize=1024)
def _number(hints: frozenset[tuple[str, str]]) -> int:
    given = dict(hints)
    asked: dict[str, Any] = {}
    for name, value in given.items():
        try:
            asked.update(_PARSERS[name](value))
        except ValueError as error:
            raise ValueError(f"hint {name} is {value!r}: {error}; it is {KNOWN[name]}") from None
    return hint_number(Hints(**asked))


def _algorithm(text: str) -> dict[str, Any]:
    if ":" not in text:
        return {"algorithm": text}  # whether an op has it is seen when one is called
    pairs = environment.parse_pairs(text)
    for op, name in pairs.items():
        if op not in algorithms.OPS:
            raise ValueError(f"there is no op {op!r}; the ops are: {', '.join(algorithms.OPS)}")
        if name not in algorithms.names(op):
            raise ValueError(f"{op} has no algorithm {name!r}; it has: {', '.join(algorithms.names(op))}")
    return {"algorithms": tuple(sorted(pairs.items()))}


def _determinism(text: str) -> dict[str, Any]:
    if text not in ("layout", "none"):
        raise ValueError("no such determinism")
    return {"rank_order": text == "layout"}


_PARSERS: dict[str, Callable[[str], dict[str, Any]]] = {
    "algorithm": _algorithm,
    "chunk": lambda text: {"segment_bytes": environment.parse_nbytes(text)},
    "determinism": _determinism,
    "persistent_store": lambda text: {},
}
