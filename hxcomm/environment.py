"""Every HXCOMM_* variable: name, type, default, meaning; read here and nowhere else.

A variable is read when its value is asked for, not at import, so a program may set it after `import hxcomm` and before
it makes its process group. The C++ core reads no environment: it is handed these values. Knows nothing of torch or of
what the values are used for.

    >>> from hxcomm import environment
    >>> environment.EXECUTOR.get()
    'native'
"""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

Value_co = TypeVar("Value_co", covariant=True)

PREFIX = "HXCOMM_"
LEAST_SECRET_BYTES = 16
_MOST_CHIPS = 64  # torch numbers devices with 8 bits, and each chip is address space in every peer
_BINARY_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclass(frozen=True)
class Variable(Generic[Value_co]):
    """One variable. `parse` turns the text into the value or raises ValueError saying what is allowed."""

    name: str
    type: str  # as shown to users: "bytes, e.g. 256KiB"
    default: Value_co
    meaning: str
    parse: Callable[[str], Value_co]
    hidden: bool = False  # a secret: what it holds appears in no message and no listing

    def get(self) -> Value_co:
        """The value now. Unset and empty both mean the default.

        Raises ValueError naming the variable, what it holds and what is allowed.
        """
        text = os.environ.get(self.name, "").strip()
        if not text:
            return self.default
        try:
            return self.parse(text)
        except ValueError as error:
            raise ValueError(f"{self.name}={'(not shown)' if self.hidden else repr(text)}: {error}") from None

    def text(self) -> str | None:
        """What the environment holds, unparsed, or that it holds something where it may not be shown; None: unset."""
        text = os.environ.get(self.name)
        return "set, not shown" if text and self.hidden else text

    def default_text(self) -> str:
        """The default as one would write it."""
        if self.default is None and "auto" in self.type:
            return "auto"
        return str(self.default) if self.default else "none"


def _one_of(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() in allowed:
            return text.lower()
        raise ValueError(f"not one of {', '.join(allowed)}{_nearest(text.lower(), allowed)}")

    return parse


def _set_of(*allowed: str) -> Callable[[str], frozenset[str]]:
    one = _one_of(*allowed)

    def parse(text: str) -> frozenset[str]:
        return frozenset(one(word.strip()) for word in text.split(",") if word.strip())

    return parse


def parse_pairs(text: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for item in text.split(","):
        op, colon, algorithm = (part.strip() for part in item.partition(":"))
        if not (op and colon and algorithm):
            raise ValueError(
                f"{item.strip()!r} is not op:algorithm; write for example all_reduce:ring,broadcast:direct "
                "(`hxcomm info` lists the ops and their algorithms)"
            )
        if op in pairs:
            raise ValueError(f"{op} is given twice, as {pairs[op]} and as {algorithm}")
        pairs[op] = algorithm
    return pairs


def parse_nbytes(text: str) -> int:
    """Bytes from a positive number with an optional binary unit: "65536", "64KiB", "1.5 MiB". Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = _BINARY_UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ValueError("not a size; write a number of bytes, or one with KiB, MiB or GiB (256KiB)")
    nbytes = float(match[1]) * unit
    if nbytes < 1 or nbytes != int(nbytes):
        raise ValueError("not a whole, positive number of bytes")
    return int(nbytes)


def _nbytes_or_auto(text: str) -> int | None:
    return None if text.lower() == "auto" else parse_nbytes(text)


def _folder(text: str) -> str:
    if not (os.path.isdir(text) and os.access(text, os.W_OK)):  # noqa: PTH112 (pathlib would be its only use here)
        raise ValueError("not a folder that this process can write to; create it first")
    return text


def _interfaces(text: str) -> str:
    if not text.lstrip("^=").strip(" ,"):
        raise ValueError("names no interface; write for example eth, =eth0, ^docker,lo or ^=eth1")
    return text


def _switch(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("not 0 or 1")
    return text == "1"


def _secret(text: str) -> bytes:
    secret = os.fsencode(text)
    if len(secret) < LEAST_SECRET_BYTES:
        raise ValueError(
            f"a secret of {len(secret)} bytes; at least {LEAST_SECRET_BYTES} are needed: `openssl rand -hex 32` "
            "prints a good one"
        )
    return secret


def _microseconds_or_auto(text: str) -> int | None:
    if text.lower() == "auto":
        return None
    if not text.isdecimal():
        raise ValueError("not a whole number of microseconds, 0 or more, or auto")
    return int(text)


def _chips(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MOST_CHIPS:
        raise ValueError(f"not a whole number from 1 to {_MOST_CHIPS}")
    return int(text)


def _memory_of_a_chip(text: str) -> int:
    nbytes = parse_nbytes(text)
    if nbytes % (2 << 20) or nbytes >= 1 << 40:
        raise ValueError("not a multiple of 2 MiB below 1 TiB")
    return nbytes


ALGO: Variable[dict[str, str]] = Variable(
    "HXCOMM_ALGO",
    "op:algorithm, comma-separated",
    {},
    "Runs these ops with these algorithms instead of the selector's choice, e.g. all_reduce:ring,broadcast:direct.",
    parse_pairs,
)
DEBUG: Variable[frozenset[str]] = Variable(
    "HXCOMM_DEBUG",
    "words, comma-separated; known: algo",
    frozenset(),
    "algo: prints op, bytes, algorithm and why it was chosen, once for each new choice.",
    _set_of("algo"),
)
EXECUTOR: Variable[str] = Variable(
    "HXCOMM_EXECUTOR",
    "native or python",
    "native",
    "Who runs a plan's transfers: the C++ loop, or the Python interpreter (slow; the specification it is tested by).",
    _one_of("native", "python"),
)
ISA: Variable[str] = Variable(
    "HXCOMM_ISA",
    "auto, avx2 or scalar",
    "auto",
    "Instruction set of the reduce kernels; auto takes the best the processor has. All give the same bits.",
    _one_of("auto", "avx2", "scalar"),
)
CHIPS: Variable[int] = Variable(
    "HXCOMM_CHIPS",
    "a number from 1 to 64",
    8,
    "How many chips this process sees as hx:0, hx:1 ...; read when the device or the first group is made.",
    _chips,
)
DEVICE: Variable[str] = Variable(
    "HXCOMM_DEVICE",
    "auto, 0 or 1",
    "auto",
    "auto: `import torch` registers the device hx where there is no other accelerator and no other plug-in for one; "
    "0: never; 1: also beside these.",
    _one_of("auto", "0", "1"),
)
FALLBACK: Variable[str] = Variable(
    "HXCOMM_FALLBACK",
    "run, warn or raise",
    "run",
    "What an operator without a fast path does on hx: runs by the general one, which costs about 1 us more; warns once "
    "for each operator; or raises NotImplementedError.",
    _one_of("run", "warn", "raise"),
)
HBM: Variable[int] = Variable(
    "HXCOMM_HBM",
    "bytes, e.g. 16GiB",
    16 << 30,
    "The memory of each chip. Only what tensors have been written to takes memory of this machine.",
    _memory_of_a_chip,
)
CPU: Variable[bool] = Variable(
    "HXCOMM_CPU",
    "0 or 1",
    False,
    "1: engines (transformers, vLLM, SGLang) that compute on CPU communicate through hxcomm, and fail where they "
    "cannot; the device hx stays away unless HXCOMM_DEVICE=1.",
    _switch,
)
CHECK: Variable[str] = Variable(
    "HXCOMM_CHECK",
    "none or shape",
    "none",
    "shape: ranks that pass tensors of equal count but different shape to one op raise MismatchError.",
    _one_of("none", "shape"),
)
DETERMINISM: Variable[str] = Variable(
    "HXCOMM_DETERMINISM",
    "none or layout",
    "none",
    "layout: a reduction has the same bits wherever the ranks run: only algorithms that reduce in rank order are used, "
    "not those that reduce within each host first.",
    _one_of("none", "layout"),
)
DUMP: Variable[str | None] = Variable(
    "HXCOMM_DUMP",
    "a folder",
    None,
    "When a group ends by an error, each rank writes its last 64 operations there, one JSON file a rank and group.",
    _folder,
)
FAILPOINT: Variable[str | None] = Variable(
    "HXCOMM_FAILPOINT",
    "point[@nth]=action",
    None,
    "For tests of this package: makes the process fail at a point of the core, e.g. judged@2=kill; read once.",
    str,
)
FENCE: Variable[str] = Variable(
    "HXCOMM_FENCE",
    "raise or kill",
    "raise",
    "What reconfigure does about a process of this host that it leaves out and that does not confirm within 5 s that "
    "it writes to nobody's memory any more (it is stopped, say): raises InitError naming it, or sends it SIGKILL.",
    _one_of("raise", "kill"),
)
HOST_ID: Variable[str | None] = Variable(
    "HXCOMM_HOST_ID",
    "any text",
    None,
    "Ranks with different values count as on different hosts; unset: ranks share a host when they can share memory.",
    str,
)
IFNAME: Variable[str | None] = Variable(
    "HXCOMM_IFNAME",
    "interfaces, as NCCL_SOCKET_IFNAME has them: eth,ib or =eth0 or ^docker,lo or ^=eth1",
    None,
    "The network interface that other hosts reach this rank by; unset: the one that leads to MASTER_ADDR.",
    _interfaces,
)
INSECURE: Variable[bool] = Variable(
    "HXCOMM_INSECURE",
    "0 or 1",
    False,
    "1: without a secret, ranks on several hosts talk unauthenticated and unencrypted: whoever reaches the port can "
    "take part.",
    _switch,
)
SECRET: Variable[bytes | None] = Variable(
    "HXCOMM_SECRET",
    f"text of at least {LEAST_SECRET_BYTES} bytes, the same on every rank",
    None,
    "The secret of the job where HXCOMM_SECRET_FILE is not set.",
    _secret,
    hidden=True,
)
SECRET_FILE: Variable[str | None] = Variable(
    "HXCOMM_SECRET_FILE",
    "a file that only its owner can read, with the same content on every host",
    None,
    "Holds the secret of the job: what ranks on different hosts know each other by.",
    str,
)
SECURITY: Variable[str] = Variable(
    "HXCOMM_SECURITY",
    "curve or mac",
    "curve",
    "What the secret does for traffic between hosts: curve encrypts and authenticates it, mac authenticates it only "
    "and is faster for large tensors.",
    _one_of("curve", "mac"),
)
SEGMENT: Variable[int | None] = Variable(
    "HXCOMM_SEGMENT",
    "bytes, e.g. 256KiB, or auto",
    None,
    "Staging segment: an op on CPU tensors larger than this runs as a pipeline of pieces of this size.",
    _nbytes_or_auto,
)
SIM: Variable[str | None] = Variable(
    "HXCOMM_SIM",
    "the name of a chip (`hxcomm chips` lists them) or a chip file",
    None,
    "Tells virtual time: ops of device hx and their collectives take as long as on that chip, which also decides which "
    "algorithms run. Results stay what they are.",
    str,
)
SIM_COSTS: Variable[str | None] = Variable(
    "HXCOMM_SIM_COSTS",
    "table:FILE.csv or python:MODULE.FUNCTION",
    None,
    "With HXCOMM_SIM: the time of ops, where the table or the function knows it, instead of the chip's rates.",
    str,
)
SIM_OUT: Variable[str | None] = Variable(
    "HXCOMM_SIM_OUT",
    "a folder",
    None,
    "With HXCOMM_SIM: a trace of virtual and real time and pictures are written there when the last rank ends.",
    _folder,
)
SPIN_US: Variable[int | None] = Variable(
    "HXCOMM_SPIN_US",
    "microseconds, or auto",
    None,
    "How long a waiting rank spins before it sleeps; auto spins little where there are more ranks than cores.",
    _microseconds_or_auto,
)
STATS: Variable[str | None] = Variable(
    "HXCOMM_STATS",
    "a folder",
    None,
    "Each process keeps a JSON file there of what its collectives have done, for `hxcomm stats`: calls, bytes, time "
    "waiting and moving.",
    _folder,
)
TRACE: Variable[frozenset[str]] = Variable(
    "HXCOMM_TRACE",
    "words, comma-separated; known: callsite",
    frozenset(),
    "callsite: `hxcomm top` and HXCOMM_DUMP show where in the program each call stands; costs about 1 us a call.",
    _set_of("callsite"),
)
TUNING: Variable[str | None] = Variable(
    "HXCOMM_TUNING",
    "a file that `hxcomm tune` wrote, with the same content on every rank",
    None,
    "Algorithms and segments by what was measured, for groups whose ranks lie on hosts as in the table; HXCOMM_ALGO, "
    "HXCOMM_SEGMENT, Options and registered selectors win over it.",
    str,
)

VARIABLES: Mapping[str, Variable[object]] = {
    variable.name: variable
    for variable in (
        *(ALGO, DEBUG, EXECUTOR, ISA, CHECK, DETERMINISM, DUMP, FAILPOINT, HOST_ID, SEGMENT, SPIN_US, TRACE, TUNING),
        *(DEVICE, CHIPS, HBM, FALLBACK, FENCE, CPU, STATS, SIM, SIM_COSTS, SIM_OUT),
        *(IFNAME, SECRET_FILE, SECRET, SECURITY, INSECURE),
    )
}

_warned_of: set[str] = set()


def launched_on_one_host() -> bool:
    """Whether torchrun, or who sets its variables, says that all ranks are on this host; False where nobody says."""
    everyone = os.environ.get("WORLD_SIZE")
    return everyone is not None and everyone == os.environ.get("LOCAL_WORLD_SIZE")


def master_address() -> str | None:
    """Where the launcher says that the store is: a name or an address, the same on every rank; None: nobody says."""
    return os.environ.get("MASTER_ADDR", "").strip() or None


def run_id() -> str:
    """The name that torchrun gives to a run, the same on every rank; empty without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


def pickles_objects() -> bool:
    """TORCHCOMMS_SERIALIZATION=pickle, a variable of torchcomms: object collectives send pickles."""
    return os.environ.get("TORCHCOMMS_SERIALIZATION", "").strip() == "pickle"


def gives_eager_calls_gradients() -> bool:
    """TORCHCOMMS_PATCH_FOR_COMPILE=1, a variable of torchcomms: its collectives have gradients outside of graphs."""
    return os.environ.get("TORCHCOMMS_PATCH_FOR_COMPILE", "").strip().lower() in ("1", "true")


def warn_about_unknown() -> None:
    """Warns, once a process and name, of each HXCOMM_* variable that is set but does not exist: a typo does nothing."""
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in VARIABLES and name not in _warned_of:
            _warned_of.add(name)
            warnings.warn(
                f"the environment variable {name} is set, but hxcomm has none of that name, so it does nothing"
                f"{_nearest(name, tuple(VARIABLES)) or '; `hxcomm info` lists them'}",
                RuntimeWarning,
                stacklevel=2,
            )


def _nearest(word: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
