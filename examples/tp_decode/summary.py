"""The screen after the text: how fast it was, and what the ranks told each other for it. At most 80 x 24 characters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from communication import Communication

if TYPE_CHECKING:
    from generate import Timing

WIDTH = 78


def summary(backend: str, device: str, communication: Communication, timing: Timing, new_tokens: int) -> str:
    """The whole screen. Where the backend is hxcomm it tells what the library counted, else what this program did."""
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
    records: Sequence[Mapping[str, Any]]
    if backend == "hxcomm":
        import hxcomm  # the only place that needs it by name: the program itself is plain torch.distributed

        records = hxcomm.statistics()
        hops = [sum(hop) for hop in zip(*(record["hop_bytes"] for record in records), strict=True)]
        last = ring(hops or [0] * world_size)
    else:
        records = [
            {"op": op, "algorithm": "?", "calls": tally.calls, "nbytes": tally.nbytes, "time_ns": tally.time_ns}
            for op, tally in communication.tallies.items()
        ]
        last = [f"({backend} does not tell its algorithms, nor what crossed which hop; hxcomm does.)"]
    return "\n".join([*lines, "", *table(records), "", *last])


def table(records: Sequence[Mapping[str, Any]], title: str = "op, from the prompt on") -> list[str]:
    """One line per op and algorithm, over all groups, roots and dtypes; the eight called most."""
    sums: dict[tuple[str, str], list[int]] = {}
    for record in records:
        total = sums.setdefault((record["op"], record["algorithm"]), [0, 0, 0])
        total[:] = (a + record[key] for a, key in zip(total, ("calls", "nbytes", "time_ns"), strict=True))
    lines = [f"{title:<24}{'algorithm':<16}{'calls':>8}{'payload':>14}{'mean time':>14}"]
    for (op, algorithm), (calls, nbytes, time_ns) in sorted(sums.items(), key=lambda item: -item[1][0])[:8]:
        mean_us = time_ns / max(1, calls) / 1e3
        lines.append(f"{op:<24}{algorithm:<16}{calls:>8}{binary(nbytes):>14}{mean_us:>11.1f} us")
    return lines


def ring(hops: Sequence[int]) -> list[str]:
    """The ring and the bytes that crossed each hop, both ways: hops[i] lies between rank i and rank i + 1."""
    if len(hops) == 1:
        return ["ring  (0)  one rank: nothing crossed a hop"]
    cells = [f"({rank})──{binary(nbytes)}──" for rank, nbytes in enumerate(hops[:-1])] + [f"({len(hops) - 1})"]
    rows = ["".join(cells[start : start + 4]) for start in range(0, len(cells), 4)]
    last = len(rows[-1]) - 2  # column of the last rank's number; rank 0's is column 1
    lines = [f"{'      ' if index else 'ring  '}{row}" for index, row in enumerate(rows)]
    if len(rows) > 1:
        return [*lines, f"      and {binary(hops[-1])} between ({len(hops) - 1}) and (0)"]
    back = f" {binary(hops[-1])} "
    return [*lines, f"       │{'':{last - 2}}│", f"       └{back:─^{last - 2}}┘"]


def binary(nbytes: int) -> str:
    """Bytes with binary units, e.g. `1.5 MiB`."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
