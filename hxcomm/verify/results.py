"""What a run found: one Result for each case and world size, and the Report that is printed, saved and drawn."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hxcomm.verify.rank import Answer

OUTCOMES = ("pass", "fail", "hang", "crash", "unsupported")
FAILED = ("fail", "hang", "crash")
NO_GROUP = "no process group could be made"


@dataclass(frozen=True)
class Result:
    """How one case ended at one world size."""

    case: str
    category: str
    check: str
    says: str
    ranks: int
    outcome: str
    message: str = ""
    notes: dict[str, str] = field(default_factory=dict)
    duration_s: float = 0.0
    reproducer: str = ""


def outcome(answers: Sequence[Answer], optional: bool) -> tuple[str, str]:
    """The verdict on a case and its reason, one line a rank.

    A death outweighs a wrong result, and that a rank that waits: ranks wait because another died or gave up. A refusal
    counts as "unsupported" only where every rank refuses, and either the standard leaves the matter open or the backend
    has not implemented the function at all.
    """
    taking_part = {answer.kind for answer in answers if answer.kind != "idle"}
    if taking_part == {"lacking"} or (optional and taking_part and taking_part <= {"lacking", "refused"}):
        return "unsupported", next(answer.message for answer in answers if answer.message)
    for kinds, verdict in (
        (("died",), "crash"),
        (("wrong", "raised", "refused", "lacking"), "fail"),
        (("hung",), "hang"),
    ):
        if any(answer.kind in kinds for answer in answers):
            return verdict, _by_rank(answers)
    return "pass", ""


def _by_rank(answers: Sequence[Answer]) -> str:
    by_message: dict[str, list[int]] = {}
    for rank, answer in enumerate(answers):
        if answer.message:
            by_message.setdefault(answer.message, []).append(rank)
    return "\n".join(
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: {message}"
        for message, ranks in by_message.items()
    )


@dataclass
class Report:
    """One run: what was asked, and every result."""

    backend: str
    device: str
    torch: str
    timeout_s: float
    modules: tuple[str, ...]
    api: str = "c10d"
    results: list[Result] = field(default_factory=list)

    def reproducer(self, case: str, ranks: int) -> str:
        """The command that runs this one case again."""
        more = "".join(f" --import {shlex.quote(module)}" for module in self.modules)
        api = "" if self.api == "c10d" else f" --api {self.api}"
        return f"hxcomm verify{api} --backend {self.backend} --device {self.device} --ranks {ranks}{more} --only {case}"

    def counts(self, category: str | None = None) -> Counter[str]:
        return Counter(each.outcome for each in self.results if category in (None, each.category))

    def failed(self) -> list[Result]:
        return [each for each in self.results if each.outcome in FAILED]

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON takes it. `version` changes when a field changes its meaning or goes."""
        return {"version": 1, "counts": dict(self.counts()), **asdict(self)}
