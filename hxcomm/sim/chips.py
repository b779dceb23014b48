"""What a chip is: memory, compute, links, read from a TOML file in which every value may cite its source.

A key that is not known, or a value that cannot be, is an error that names file, line and what is allowed: a value that
is silently ignored makes a simulation wrong without anybody seeing it. Knows no ranks and no networks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from hxcomm.sim.toml_lines import line_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BUNDLED = Path(__file__).resolve().parent / "chips"
DTYPES = ("float32", "bfloat16", "float16", "float8", "int8", "int4")
_WIDER = {
    "int4": ("int8", "float8", "float16", "bfloat16", "float32"),
    "int8": ("float8", "float16", "bfloat16", "float32"),
    "float8": ("int8", "float16", "bfloat16", "float32"),
    "float16": ("bfloat16", "float32"),
    "bfloat16": ("float16", "float32"),
    "float32": (),
}
TOPOLOGIES = ("ring", "line", "torus", "mesh", "switch", "full")
FORWARDINGS = ("cut_through", "store_and_forward")
PS_PER_NS = 1000
PS_PER_S = 10**12

Topology = Literal["ring", "line", "torus", "mesh", "switch", "full"]
Forwarding = Literal["cut_through", "store_and_forward"]


class ChipError(ValueError):
    """A chip file is wrong, or there is none. The text says where, and what is allowed."""


def exact(value: float) -> Fraction:
    """The number as it is written in the file: 0.1 is a tenth, not the binary number next to it."""
    return Fraction(str(value))


def ns_to_ps(value_ns: float) -> int:
    return int(exact(value_ns) * PS_PER_NS)


# What a value may be: kind, and for numbers whether 0 is one of them.
def _number(*, zero: bool = False, most: float = math.inf, **default: Any) -> Any:
    return field(**default, metadata={"kind": "number", "zero": zero, "most": most})


def _whole(*, most: float = math.inf, **default: Any) -> Any:
    return field(**default, metadata={"kind": "whole", "zero": False, "most": most})


def _yes_or_no(*, default: bool) -> Any:
    return field(default=default, metadata={"kind": "bool"})


@dataclass(frozen=True)
class Memory:
    bandwidth_bytes_per_s: float = _number()
    capacity_bytes: float = _number()
    achieved: float = _number(most=1, default=1)

    @property
    def achieved_bytes_per_s(self) -> Fraction:
        return exact(self.bandwidth_bytes_per_s) * exact(self.achieved)


@dataclass(frozen=True)
class Compute:
    flops_per_s: Mapping[str, float] = field(metadata={"kind": "dtypes"})
    achieved: float = _number(most=1, default=1)
    fixed_ns_per_op: float = _number(zero=True, default=0)

    def peak_flops_per_s(self, dtype: str) -> float:
        """Of a dtype, or where the chip says nothing of it, of the next wider one that it names."""
        if dtype not in _WIDER:
            raise ChipError(f"there is no dtype {dtype!r} in chip files; known are: {', '.join(DTYPES)}")
        for each in (dtype, *_WIDER[dtype]):
            if each in self.flops_per_s:
                return self.flops_per_s[each]
        given = ", ".join(self.flops_per_s)
        raise ChipError(f"the chip gives no compute.flops_per_s of {dtype} or of a wider type; it gives: {given}")


@dataclass(frozen=True)
class Collective:
    launch_ns: float = _number(zero=True, default=0)
    reduce_bytes_per_s: float | None = _number(default=None)


@dataclass(frozen=True)
class Links:
    """One level of the interconnect: every chip has such links."""

    topology: Topology = field(metadata={"kind": "word", "words": TOPOLOGIES})
    forwarding: Forwarding = field(metadata={"kind": "word", "words": FORWARDINGS})
    bandwidth_bytes_per_s: float = _number()
    latency_ns: float = _number(zero=True)
    shape: tuple[int, ...] | None = field(default=None, metadata={"kind": "shape"})
    directions: int = _whole(most=2, default=2)
    achieved: float = _number(most=1, default=1)
    per_message_ns: float = _number(zero=True, default=0)
    tick_ps: int = _whole(default=1)

    @property
    def achieved_bytes_per_s(self) -> Fraction:
        return exact(self.bandwidth_bytes_per_s) * exact(self.achieved)

    @property
    def latency_ps(self) -> int:
        return ns_to_ps(self.latency_ns)

    @property
    def per_message_ps(self) -> int:
        return ns_to_ps(self.per_message_ns)


@dataclass(frozen=True)
class Legal:
    """What the links can execute; left out, everything."""

    neighbours_only: bool = _yes_or_no(default=False)
    push_only: bool = _yes_or_no(default=False)
    max_sources: int | None = _whole(default=None)
    multicast: bool = _yes_or_no(default=True)
    alignment_bytes: int = _whole(default=1)
    credits_per_link: int | None = _whole(default=None)


@dataclass(frozen=True)
class Power:
    watts: float = _number()


@dataclass(frozen=True, eq=False)
class Chip:
    """Equal, and with the same hash, where all that results depend on is equal."""

    name: str
    description: str
    overlap_chunks: int
    memory: Memory
    compute: Compute
    collective: Collective
    links: tuple[Links, ...]
    legal: Legal
    power: Power | None
    sources: Mapping[str, str]

    @cached_property
    def digest(self) -> str:
        table = {key: value for key, value in as_table(self).items() if key not in ("description", "sources")}
        return hashlib.blake2b(json.dumps(_exactly(table), sort_keys=True).encode(), digest_size=16).hexdigest()

    @property
    def reduce_bytes_per_s(self) -> Fraction:
        """At which a chip reduces, bytes loaded and stored counted."""
        if self.collective.reduce_bytes_per_s is not None:
            return exact(self.collective.reduce_bytes_per_s)
        return self.memory.achieved_bytes_per_s

    @property
    def launch_ps(self) -> int:
        return ns_to_ps(self.collective.launch_ns)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Chip) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


_TABLES = {"memory": Memory, "compute": Compute, "collective": Collective, "legal": Legal, "power": Power}
_REQUIRED_TABLES = ("memory", "compute", "links")
_TOP = ("name", "description", "overlap_chunks", *_TABLES, "links", "sources")


def names() -> list[str]:
    """Of the chips that come with hxcomm."""
    return sorted(path.stem for path in BUNDLED.glob("*.toml"))


def load(name_or_path: str | Path) -> Chip:
    """A chip by its bundled name, or from a file: whatever ends in .toml or has a / in it is a path.

    Raises ChipError where there is none, or where the file is wrong: with the line and what is allowed.
    """
    text = str(name_or_path)
    path = Path(text)
    if not (text.endswith(".toml") or "/" in text):
        if text not in names():
            known = ", ".join(names())
            raise ChipError(f"there is no chip {text!r}; known are: {known}. A file of your own is a path: ./mine.toml")
        path = BUNDLED / f"{text}.toml"
    try:
        written = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ChipError(f"{path}: cannot be read: {error}") from None
    return read(written, str(path))


def read(text: str, where: str) -> Chip:
    """A chip from the text of a file; `where` is what errors call it."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ChipError(f"{where}: is not TOML: {error}") from None
    return _Reader(where, text).chip(table)


def changed(chip: Chip, changes: Iterable[str]) -> Chip:
    """With other values, each written KEY=VALUE as `--set` takes it. Raises ChipError."""
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise ChipError(f"--set {change}: write it as KEY=VALUE, e.g. links.0.latency_ns=100")
        chip = replace(chip, key.strip(), value.strip())
    return chip


def replace(chip: Chip, dotted_key: str, value: object) -> Chip:
    """The chip with one value changed: replace(chip, "links.0.latency_ns", 100). A text is read as TOML writes it.

    Raises ChipError as load() does: an unknown key, a value that cannot be.
    """
    if isinstance(value, str):
        with contextlib.suppress(tomllib.TOMLDecodeError):  # raised for a word, as in forwarding=cut_through
            value = tomllib.loads(f"value = {value}")["value"]
    table = as_table(chip)
    reader = _Reader(f"chip {chip.name} with {dotted_key} = {value}", "")
    *path, last = dotted_key.split(".")
    inside: Any = table
    for word in path:
        if isinstance(inside, list):
            if not word.isdecimal() or int(word) >= len(inside):
                raise reader.wrong(dotted_key, f"the chip has links.0 to links.{len(inside) - 1}, not {word!r}")
            inside = inside[int(word)]
        else:
            inside = inside.setdefault(word, {})
        if not isinstance(inside, dict | list):
            raise reader.wrong(dotted_key, f"{word} has no values of its own")
    if isinstance(inside, list):
        raise reader.wrong(dotted_key, f"which links? links.0 to links.{len(inside) - 1}, as in links.0.latency_ns")
    inside[last] = value
    table["sources"].pop(dotted_key, None)
    return reader.chip(table)


def as_table(chip: Chip) -> dict[str, Any]:
    """As its file would be read; what is left out there is left out here, unless it has a default."""
    table: dict[str, Any] = {"name": chip.name, "description": chip.description, "overlap_chunks": chip.overlap_chunks}
    for key in _TABLES:
        part = getattr(chip, key)
        if part is not None:
            table[key] = _part_table(part)
    return table | {"links": [_part_table(each) for each in chip.links], "sources": dict(chip.sources)}


def _part_table(part: Any) -> dict[str, Any]:
    values = {each.name: getattr(part, each.name) for each in fields(part)}
    plain = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in plain.items() if value is not None
    }


def _exactly(value: Any) -> Any:
    """500 and 500.0 are one value."""
    if isinstance(value, dict):
        return {key: _exactly(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_exactly(each) for each in value]
    return str(exact(value)) if isinstance(value, int | float) and not isinstance(value, bool) else value


_Part = TypeVar("_Part")


class _Reader:
    """Makes a chip of a table, and knows where in the file each value stands."""

    def __init__(self, where: str, text: str) -> None:
        self.where = where
        self.text = text

    def wrong(self, key: str, what: str) -> ChipError:
        line = line_of(self.text, key) if self.text else 0
        return ChipError(f"{self.where}{f':{line}' if line else ''}: {key}: {what}")

    def chip(self, table: dict[str, Any]) -> Chip:
        self._known(table, "", _TOP)
        for key in ("name", *_REQUIRED_TABLES):
            if key not in table:
                raise self.wrong(key, "is missing; a chip needs name, [memory], [compute] and [[links]]")
        for key in ("name", "description"):
            if not isinstance(table.get(key, ""), str) or (key == "name" and not table[key]):
                raise self.wrong(key, f"is {table[key]!r}; it must be a text")
        overlap = table.get("overlap_chunks", 1)
        if not isinstance(overlap, int) or isinstance(overlap, bool) or overlap < 1:
            raise self.wrong("overlap_chunks", f"is {overlap!r}; it must be a whole number, 1 or more")
        levels = table["links"]
        if not isinstance(levels, list) or not levels or not all(isinstance(each, dict) for each in levels):
            raise self.wrong("links", "must be one [[links]] or several, inner first")
        parts: dict[str, Any] = {
            key: self._part(kind, key, table.get(key, {})) for key, kind in _TABLES.items() if key != "power"
        }
        links = tuple(self._part(Links, f"links.{i}", level) for i, level in enumerate(levels))
        for i, level in enumerate(links[:-1]):
            if level.shape is None:
                raise self.wrong(f"links.{i}", "needs a shape, as another level of links follows it")
        return Chip(
            name=table["name"],
            description=table.get("description", ""),
            overlap_chunks=overlap,
            links=links,
            power=self._part(Power, "power", table["power"]) if "power" in table else None,
            sources=self._sources(table),
            **parts,
        )

    def _known(self, table: Any, prefix: str, known: Sequence[str]) -> None:
        if not isinstance(table, dict):
            raise self.wrong(prefix.rstrip("."), f"is {table!r}; it must be a table, [{prefix.rstrip('.')}]")
        for key in table:
            if key not in known:
                raise self.wrong(prefix + key, f"there is no such key; known are: {', '.join(known)}")

    def _part(self, kind: type[_Part], prefix: str, table: Any) -> _Part:
        known = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
        self._known(table, prefix + ".", list(known))
        values = {}
        for key, each in known.items():
            if key in table:
                values[key] = self._value(f"{prefix}.{key}", table[key], each.metadata)
            elif each.default is MISSING:
                raise self.wrong(f"{prefix}.{key}", "is missing")
        part = kind(**values)
        if isinstance(part, Links):
            self._links(prefix, part)
        return part

    def _links(self, prefix: str, links: Links) -> None:
        dimensions = (2, 3) if links.topology in ("torus", "mesh") else (1,)
        if links.shape is not None and len(links.shape) not in dimensions:
            allowed = " or ".join(map(str, dimensions))
            raise self.wrong(f"{prefix}.shape", f"is {list(links.shape)}; a {links.topology} has {allowed} numbers")
        if links.directions == 1 and links.topology != "ring":
            raise self.wrong(f"{prefix}.directions", f"is 1 for a {links.topology}; only a ring can have one direction")

    def _value(self, key: str, value: Any, rule: Mapping[str, Any]) -> Any:
        kind = rule["kind"]
        if kind == "bool":
            if not isinstance(value, bool):
                raise self.wrong(key, f"is {value!r}; it must be true or false")
            return value
        if kind == "word":
            if value not in rule["words"]:
                raise self.wrong(key, f"is {value!r}; it must be one of: {', '.join(rule['words'])}")
            return value
        if kind == "shape":
            if not isinstance(value, list) or not value or not all(_is_whole(each) and each >= 1 for each in value):
                raise self.wrong(key, f"is {value!r}; it must be a list of whole numbers, 1 or more, as [8] or [4, 4]")
            return tuple(value)
        if kind == "dtypes":
            self._known(value, key + ".", DTYPES)
            if not value:
                raise self.wrong(key, f"is empty; it must give at least one of: {', '.join(DTYPES)}")
            return {dtype: self._number(f"{key}.{dtype}", rate, {}) for dtype, rate in value.items()}
        if kind == "whole" and not _is_whole(value):
            raise self.wrong(key, f"is {value!r}; it must be a whole number")
        return self._number(key, value, rule)

    def _number(self, key: str, value: Any, rule: Mapping[str, Any]) -> float:
        zero, most = rule.get("zero", False), rule.get("most", math.inf)
        fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not fine or value < 0 or (value == 0 and not zero) or value > most:
            least = "0 or more" if zero else "more than 0"
            raise self.wrong(
                key, f"is {value!r}; it must be a number, {least}{f', at most {most}' * (most < math.inf)}"
            )
        return value  # type: ignore[no-any-return]

    def _sources(self, table: dict[str, Any]) -> dict[str, str]:
        sources = table.get("sources", {})
        if not isinstance(sources, dict):
            raise self.wrong("sources", "must be a table, [sources]")
        for key, source in sources.items():
            inside: Any = table
            for word in key.split("."):
                if isinstance(inside, list):
                    inside = inside[int(word)] if word.isdecimal() and int(word) < len(inside) else None
                else:
                    inside = inside.get(word) if isinstance(inside, dict) else None
            if inside is None:
                raise self.wrong(f"sources.{key}", "cites a key that the file does not have")
            if not isinstance(source, str) or not source:
                raise self.wrong(f"sources.{key}", f"is {source!r}; it must be a text: a citation, or 'assumed: why'")
        return dict(sources)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
