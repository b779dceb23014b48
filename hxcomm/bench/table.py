"""The table as nccl-tests prints it, line by line while the run goes on, and the summary at its end."""

from __future__ import annotations

from hxcomm.bench.results import Report, Row


def heading(report: Report, *, floor: bool) -> str:
    """What stands above the rows: what the columns mean."""
    lines = [
        f"hxcomm.bench: {report.backend} on {report.device}, {report.world_size} ranks on {report.cores} cores, "
        f"torch {report.torch}",
        "size: bytes of the largest buffer (all_gather: of all outputs together; reduce_scatter: of the whole input),",
        "count: elements a rank passes (reduce_scatter: gets); time: mean; GB/s: 1e9 bytes/s; all as in nccl-tests.",
        "touch on: each iteration writes the input and reads the output, and the time of that alone is subtracted.",
    ]
    columns = f"{'size':>10} {'count':>10} {'type':>8} {'redop':>7} {'time':>9} {'algbw':>7} {'busbw':>7} {'#wrong':>7}"
    units = f"{'(B)':>10} {'':>10} {'':>8} {'':>7} {'(us)':>9} {'(GB/s)':>7} {'(GB/s)':>7} {'':>7}"
    columns += f" {'p50':>9} {'p99':>9} {'touch':>5}"
    units += f" {'(us)':>9} {'(us)':>9} {'':>5}"
    if report.compare:
        columns += f" | {report.compare + ' p50':>10} {'#wrong':>7} {'ratio':>7}"
        units += f" | {'(us)':>10} {'':>7} {'':>7}"
    if floor:
        columns += f" | {'nothing':>8} {'floor':>9} {'above':>6} {'memcpy':>7}"
        units += f" | {'(us)':>8} {'(us)':>9} {'floor':>6} {'(GB/s)':>7}"
    return "\n".join([*lines, "", columns, units])


def line(report: Report, row: Row, *, floor: bool) -> str:
    text = f"{row.nbytes:>10} {row.count:>10} {row.dtype:>8} {row.reduce_op or 'none':>7} {_short(row.time_us):>9}"
    text += f" {row.algbw_gbps:>7.2f} {row.busbw_gbps:>7.2f} {row.n_wrong:>7}"
    text += f" {_short(row.p50_us):>9} {_short(row.p99_us):>9} {'on' if row.touched else 'off':>5}"
    if report.compare:
        other, ratio = report.row(report.compare, row.op, row.nbytes), report.ratio(row.op, row.nbytes)
        text += (
            f" | {_short(other.p50_us if other else None):>10} {other.n_wrong if other else '-':>7} {_times(ratio):>7}"
        )
    if floor:
        nothing, probe = report.row("nothing", row.op, row.nbytes), report.floor(row.nbytes)
        probe = probe if row.op == "all_reduce" else None
        text += (
            f" | {_short(nothing.p50_us if nothing else None):>8} {_short(probe.transfers_us if probe else None):>9}"
        )
        text += f" {_times(report.floor_ratio(row.op, row.nbytes)):>6} {_short(probe.copy_gbps if probe else None):>7}"
    return text


def summary(report: Report) -> str:
    """What stands below: refusals, the probes that have no size column, and whether all was right."""
    lines = [f"skipped: {text}" for text in report.skipped]
    if report.hand_over_ns is not None:
        lines.append(f"flag hand-over between two ranks, there and back: {report.hand_over_ns:.0f} ns")
    if report.zmq:
        lines.append("ZeroMQ over loopback TCP, one way, through Python (pyzmq), which costs several us a message:")
        lines += [
            f"{probe.nbytes:>10} B {_short(probe.one_way_us):>9} us {probe.gbps:>7.2f} GB/s" for probe in report.zmq
        ]
    ratio = report.floor_ratio("all_reduce", 16 << 10)
    if ratio is not None:
        time = "(time - a do-nothing backend's time)" if report.by_c10d else "time"
        lines.append(f"all_reduce of 16 KiB: {time} / floor = {ratio:.2f} by medians (target 1.5)")
    n_wrong = report.n_wrong()
    verdict = "all results are right" if report.rows else "nothing was measured"
    lines.append(f"WRONG RESULTS: {n_wrong} elements" if n_wrong else verdict)
    return "\n".join(lines)


def _short(value: float | None) -> str:
    """Three significant digits, without exponents."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{_short(ratio)}x"
