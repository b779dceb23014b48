"""The table of measured choices that `hxcomm tune` writes and HXCOMM_TUNING names: its schema, reading and writing.

A row says which algorithm was fastest for an op on one device, up to a number of bytes of one block of the call, on
ranks that lie as the table says. What does not follow the schema is refused, naming the file and the field. Knows
nothing of torch, nor of how the times came about.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hxcomm import algorithms
from hxcomm.schedule import ScheduleError
from hxcomm.schedule.crossing import several

VERSION = 1
DEVICES = ("cpu", "hx")
_MOST_BYTES = 1 << 20  # of a file: a table has some 10 KiB
_SHOWN_NAME = 60  # of a file's name in what ranks tell each other, which is bounded


@dataclass(frozen=True)
class Measured:
    """A choice and its time: the mean of the ranks' medians, without what touching the buffers took."""

    algorithm: str
    segment_bytes: int | None  # of a staging window; None: no window can matter here
    us: float


@dataclass(frozen=True)
class Row:
    """What to run for blocks longer than the row before it says (of the same op and device), up to `up_to_bytes`.

    `measured_bytes`: the block that was measured. `runner_up`: the best of another algorithm, if there is one.
    """

    op: str
    device: str
    up_to_bytes: int
    measured_bytes: int
    algorithm: str
    segment_bytes: int | None
    us: float
    runner_up: Measured | None


@dataclass(frozen=True)
class Table:
    """`hosts`: the number of each rank's host, as in hxcomm.select.Layout. `made`: where, for whoever reads the file.

    `name` and `digest` are of the file; empty for one that was not read from a file.
    """

    world_size: int
    hosts: tuple[int, ...]
    hxcomm: str
    made: dict[str, Any]
    rows: tuple[Row, ...]
    name: str = ""
    digest: str = ""

    @property
    def simulated(self) -> bool:
        """Whether the times are those of a simulated chip, which `made` then names: `hxcomm tune --chip` wrote it."""
        return "simulated" in self.made

    def row(self, op: str, nbytes: int, device: str) -> Row | None:
        """The row for a block of `nbytes`; None beyond what was measured: shorter than half of the smallest, longer
        than the last row says."""
        rows = [row for row in self.rows if (row.op, row.device) == (op, device)]
        if not rows or 2 * nbytes < rows[0].measured_bytes:
            return None
        return next((row for row in rows if nbytes <= row.up_to_bytes), None)

    def identity(self) -> str:
        """What ranks compare: the content, with a name to find it by. The folder may differ from host to host."""
        return f"{self.name[-_SHOWN_NAME:]} (sha256 {self.digest[:16]})"

    def where(self) -> str:
        """The ranks that it is for."""
        return f"{self.world_size} ranks on hosts {','.join(map(str, self.hosts))}"

    def text(self) -> str:
        """As a file: one line a row."""
        head = {"version": VERSION, "hxcomm": self.hxcomm, "world_size": self.world_size, "hosts": list(self.hosts)}
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in {**head, "made": self.made}.items()]
        rows = ",\n  ".join(json.dumps(asdict(row)) for row in self.rows)
        return "{\n" + ",\n".join(lines) + f',\n"rows": [\n  {rows}\n]\n}}\n'


def load(path: str) -> Table:
    """Raises ValueError naming the file, the field and what is allowed."""
    file = Path(path)
    try:
        with file.open("rb") as stream:
            content = stream.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"HXCOMM_TUNING={path}: cannot be read: {error.strerror}") from None
    try:
        if len(content) > _MOST_BYTES:
            raise ValueError(f"has more than {_MOST_BYTES} bytes")
        raw = json.loads(content, object_pairs_hook=_no_key_twice)
        return _table(raw, file.name, hashlib.sha256(content).hexdigest())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"HXCOMM_TUNING={path}: {error}; `hxcomm tune` writes a table") from None


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError(f"an object has a key twice: {', '.join(key for key, _ in pairs)}")
    return found


def _table(raw: Any, name: str, digest: str) -> Table:
    if type(raw) is dict and raw.get("version") != VERSION:  # first: another version may have other fields
        raise ValueError(f"version is {raw.get('version')!r}; this hxcomm reads version {VERSION}")
    fields = _fields(raw, "the table", ("version", "hxcomm", "world_size", "hosts", "made", "rows"))
    world_size = _count(fields["world_size"], "world_size")
    hosts = _of(list, fields["hosts"], "hosts")
    if not hosts or not all(type(host) is int for host in hosts):
        raise ValueError(f"hosts is {hosts!r}; it must hold the number of each rank's host")
    try:
        several(hosts, world_size)
    except ScheduleError as error:
        raise ValueError(f"hosts: {error}") from None
    rows = [_row(each, f"rows[{i}]") for i, each in enumerate(_of(list, fields["rows"], "rows"))]
    _check_order(rows)
    return Table(
        world_size,
        tuple(hosts),
        _of(str, fields["hxcomm"], "hxcomm"),
        _of(dict, fields["made"], "made"),
        tuple(rows),
        name,
        digest,
    )


def _row(raw: Any, where: str) -> Row:
    fields = _fields(raw, where, tuple(Row.__dataclass_fields__))
    op = _one_of(fields["op"], algorithms.OPS, f"{where}.op")
    runner_up = fields["runner_up"]
    return Row(
        op=op,
        device=_one_of(fields["device"], DEVICES, f"{where}.device"),
        up_to_bytes=_count(fields["up_to_bytes"], f"{where}.up_to_bytes"),
        measured_bytes=_count(fields["measured_bytes"], f"{where}.measured_bytes"),
        **_measured(fields, op, where).__dict__,
        runner_up=None if runner_up is None else _runner_up(runner_up, op, f"{where}.runner_up"),
    )


def _runner_up(raw: Any, op: str, where: str) -> Measured:
    return _measured(_fields(raw, where, tuple(Measured.__dataclass_fields__)), op, where)


def _measured(fields: dict[str, Any], op: str, where: str) -> Measured:
    segment, us = fields["segment_bytes"], fields["us"]
    if type(us) not in (int, float) or not math.isfinite(us) or us < 0:
        raise ValueError(f"{where}.us is {us!r}; it must be a number of microseconds")
    return Measured(
        _one_of(fields["algorithm"], algorithms.names(op), f"{where}.algorithm"),
        None if segment is None else _count(segment, f"{where}.segment_bytes"),
        float(us),
    )


def _check_order(rows: list[Row]) -> None:
    last: dict[tuple[str, str], int] = {}
    for i, row in enumerate(rows):
        before = last.get((row.op, row.device), 0)
        if row.up_to_bytes <= before:
            raise ValueError(
                f"rows[{i}].up_to_bytes is {row.up_to_bytes}, not more than {before} of the row of {row.op} on "
                f"{row.device} before it"
            )
        last[row.op, row.device] = row.up_to_bytes


def _fields(raw: Any, where: str, names: Sequence[str]) -> dict[str, Any]:
    fields: dict[str, Any] = _of(dict, raw, where)
    if wrong := fields.keys() ^ set(names):
        how = "is missing in" if (name := min(wrong)) in names else "is not a field of"
        raise ValueError(f"{name!r} {how} {where}; its fields are: {', '.join(names)}")
    return fields


def _of(kind: Callable[..., Any], raw: Any, where: str) -> Any:
    if type(raw) is not kind:
        raise ValueError(f"{where} is {_short(raw)}; it must be {_JSON_NAMES[kind]}")
    return raw


def _count(raw: Any, where: str) -> int:
    if type(raw) is not int or not 0 < raw < 1 << 63:
        raise ValueError(f"{where} is {_short(raw)}; it must be a whole number, 1 or more")
    return raw


def _one_of(raw: Any, known: Sequence[str], where: str) -> str:
    if type(raw) is not str or raw not in known:
        raise ValueError(f"{where} is {_short(raw)}; it must be one of: {', '.join(known)}")
    return raw


_JSON_NAMES: dict[Callable[..., Any], str] = {dict: "an object", list: "a list", str: "a string"}


def _short(raw: Any) -> str:
    text = repr(raw)
    return text if len(text) <= 60 else text[:60] + "..."
