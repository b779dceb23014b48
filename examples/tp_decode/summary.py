"""The screen after the text: how fast it was, and what the ranks told each other for it. At most 80 x 24 characters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from communication import Communication

if TYPE_CHECKING:
    from generate import Timing

WIDTH = 78


def summary(backend: str, device: str, communication: Communication, timing: Timing, new_tokens: int) -> str:
    world_size = communication.world_size
    ranks = "one process, no process group" if communication.alone else f"{world_size} ranks, backend {backend}"
    lines = [
        f"{f' {new_tokens} tokens, {ranks}, device {device} ':─^{WIDTH}}",
        f"decode               {timing.tokens_per_s(new_tokens):10.1f} tokens/s (all tokens but the first)",
        f"time to first token  {(timing.first_token_ns - timing.begin_ns) / 1e6:10.1f} ms",
        f"in collectives       {timing.communication_share:10.1%} of the decode time of rank 0",
    ]
    if communication.alone:
        return "\n".join(lines)
    records = statistics() if backend == "hxcomm" else None
    if records is None:
        records = [
            {"op": op, "algorithm": "?", "calls": tally.calls, "nbytes": tally.nbytes, "time_ns": tally.time_ns}
            for op, tally in communication.tallies.items()
        ]
        note = f"({backend} does not tell its algorithms, nor what crossed which hop; hxcomm does.)"
        return "\n".join([*lines, "", *table(records), "", note])
    hops = [sum(hop) for hop in zip(*(record["hop_bytes"] for record in records), strict=True)]
    return "\n".join([*lines, "", *table(records), "", *ring(hops or [0] * world_size)])


def statistics() -> list[dict[str, Any]] | None:
    """hxcomm's own account of every op so far; None where its build cannot give one."""
    import hxcomm

    return hxcomm.statistics() if hasattr(hxcomm, "statistics") else None


def table(records: list[dict[str, Any]]) -> list[str]:
    """One line per op and algorithm, prompt included; the eight that took longest."""
    lines = [f"{'op, from the prompt on':<24}{'algorithm':<16}{'calls':>8}{'payload':>14}{'mean time':>14}"]
    for record in sorted(records, key=lambda record: -record["time_ns"])[:8]:
        mean_us = record["time_ns"] / max(1, record["calls"]) / 1e3
        payload = binary(record["nbytes"])
        lines.append(f"{record['op']:<24}{record['algorithm']:<16}{record['calls']:>8}{payload:>14}{mean_us:>11.1f} us")
    return lines


def ring(hops: list[int]) -> list[str]:
    """The ring and the bytes that crossed each hop: hops[i] is rank i -> rank i + 1, the last one back to rank 0."""
    if len(hops) == 1:
        return ["ring  (0)  one rank: nothing crossed a hop"]
    cells = [f"({rank}) ─{binary(nbytes)}→ " for rank, nbytes in enumerate(hops[:-1])] + [f"({len(hops) - 1})"]
    rows = ["".join(cells[start : start + 4]) for start in range(0, len(cells), 4)]
    back = f" {binary(hops[-1])} "
    width = max(len(row) for row in rows) - 3
    return [f"{'ring  ' if not index else '':<6}{row}" for index, row in enumerate(rows)] + [
        "       ↑" + " " * (width - 1) + "│",
        "       └" + f"{back:─^{width - 1}}" + "┘",
    ]


def binary(nbytes: int) -> str:
    """Bytes with binary units, e.g. `1.5 MiB`."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
