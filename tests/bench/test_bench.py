"""The micro-benchmark: its definitions, what it reports when a backend is wrong, and runs on real ranks."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from hxcomm.bench import arguments, table
from hxcomm.bench.arguments import ITEM_BYTES, OPS, REDUCE_OPS, UsageError, parse
from hxcomm.bench.operations import OPERATIONS, case_of
from hxcomm.bench.results import Floor, Report, Row, bandwidths

Pool = Callable[[int], Any]


def bench(rank: int, world_size: int, *words: str) -> tuple[int, str, str]:
    """Runs the benchmark as `python -m hxcomm.bench` would: (exit status, stdout, stderr)."""
    from hxcomm.bench.session import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(words)
    return status, out.getvalue(), err.getvalue()


def row(backend: str, op: str = "all_reduce", nbytes: int = 16384, p50_us: float = 10.0, n_wrong: int = 0) -> Row:
    return Row(backend, op, nbytes, nbytes // 4, "float32", "sum", True, 20, p50_us, p50_us, p50_us, 1.0, 1.0, n_wrong)


def report(**kwargs: Any) -> Report:
    return Report(
        world_size=2, backend="hxcomm", compare="gloo", device="cpu", cores=2, torch="2.13.0", command="", **kwargs
    )


# nccl-tests, doc/PERFORMANCE.md: what busbw is of algbw.
NCCL_TESTS_FACTORS: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "broadcast": lambda n: 1.0,
    "barrier": lambda n: 0.0,
}


@pytest.mark.parametrize("op", OPS)
def test_bus_bandwidth_is_defined_as_in_nccl_tests(op: str) -> None:
    for world_size in range(1, 9):
        factor = OPERATIONS[op].bus_factor(world_size)
        assert factor == NCCL_TESTS_FACTORS[op](world_size)
        assert bandwidths(8_000_000, 1e-3, factor) == (8.0, 8.0 * factor)


@pytest.mark.parametrize(
    ("op", "world_size", "nbytes", "count"),
    [
        ("all_reduce", 4, 4096, 1024),
        ("broadcast", 4, 4096, 1024),
        ("all_gather", 4, 4096, 256),
        ("reduce_scatter", 4, 4096, 256),
        ("barrier", 4, 0, 0),
        # Per rank, counts are rounded down to 16 bytes, as in nccl-tests.
        ("all_gather", 3, 4080, 340),
        ("reduce_scatter", 3, 4080, 340),
    ],
)
def test_size_and_count_mean_what_they_mean_in_nccl_tests(op: str, world_size: int, nbytes: int, count: int) -> None:
    case = case_of(op, 4096, "float32", "sum", 0, world_size)
    assert (case.nbytes, case.count) == (nbytes, count)


def test_every_rank_gets_an_element_however_small_the_size() -> None:
    assert case_of("all_gather", 4, "float32", "sum", 0, 16).count == 1


def test_the_table_has_the_columns_of_nccl_tests_in_their_order() -> None:
    words = table.heading(report(), floor=True).splitlines()[-2].split()
    assert words[:8] == ["size", "count", "type", "redop", "time", "algbw", "busbw", "#wrong"]
    assert words[8:10] == ["p50", "p99"]
    assert "ratio" in words
    assert "floor" in words


def test_heading_and_lines_are_of_equal_width_with_all_columns() -> None:
    for floor in (False, True):
        one = report(rows=[row("hxcomm"), row("gloo"), row("nothing")], floors=[Floor(16384, 2.0, 10.0)])
        columns, units = table.heading(one, floor=floor).splitlines()[-2:]
        assert len(columns) == len(units) == len(table.line(one, one.rows[0], floor=floor))


def test_the_ratio_says_how_many_times_faster_by_medians() -> None:
    assert report(rows=[row("hxcomm", p50_us=10.0), row("gloo", p50_us=500.0)]).ratio("all_reduce", 16384) == 50.0
    assert report(rows=[row("hxcomm")]).ratio("all_reduce", 16384) is None


def test_the_ratio_to_the_floor_leaves_out_what_c10d_costs() -> None:
    one = report(rows=[row("hxcomm", p50_us=9.0), row("nothing", p50_us=5.0)], floors=[Floor(16384, 2.0, 10.0)])
    assert one.floor_ratio("all_reduce", 16384) == 2.0
    assert "= 2.00 by medians (target 1.5)" in table.summary(one)
    assert one.floor_ratio("all_gather", 16384) is None


def test_wrong_elements_of_the_peer_count_but_not_those_of_the_probe_that_does_nothing() -> None:
    assert report(rows=[row("hxcomm"), row("gloo", n_wrong=3)]).n_wrong() == 3
    assert report(rows=[row("hxcomm"), row("nothing", n_wrong=3)]).n_wrong() == 0


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("--sizes 4KB", "write a number of bytes, or one with KiB, MiB or GiB"),
        ("--sizes 4KiB,,8", "not a size"),
        ("--min-bytes 0", "not a whole, positive number of bytes"),
        ("--sizes 3", "less than one float32 (4 bytes)"),
        ("--min-bytes 8KiB --max-bytes 4KiB", "--max-bytes 4096 is less than --min-bytes 8192"),
        ("--factor 1", "must be at least 2"),
        ("--ops all_redcue", "there is no op 'all_redcue'; known are all_reduce"),
        ("--iters 0", "1 or more, or auto"),
        ("--dtype float8", "float32"),
        ("--backend gloo --compare gloo", "is what --backend measures already"),
        ("--json no/such/folder/x.json", "there is no folder no/such/folder"),
        ("--size 4", "unrecognized arguments: --size 4"),
    ],
)
def test_a_wrong_argument_is_refused_with_what_to_write(words: str, advice: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse(words.split())
    assert advice in str(raised.value)


def test_sizes_grow_by_the_factor_up_to_the_largest() -> None:
    assert parse(["--min-bytes", "64", "--max-bytes", "5KiB", "--factor", "4"]).sizes == (64, 256, 1024, 4096)
    assert parse(["--sizes", "1MiB,64,64"]).sizes == (64, 1 << 20)


def test_buffers_are_touched_up_to_one_mebibyte_unless_asked_otherwise() -> None:
    assert [parse([]).touched(nbytes) for nbytes in (64, 1 << 20, (1 << 20) + 4)] == [True, True, False]
    assert parse(["--touch", "on"]).touched(1 << 26)
    assert not parse(["--touch", "off"]).touched(64)


def test_without_torchrun_it_says_how_to_start_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hxcomm.bench.session import main

    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert main([]) == 2
    assert "torchrun --nproc-per-node 2 -m hxcomm.bench" in capsys.readouterr().err


@pytest.mark.parametrize(("world_size", "device"), [(2, "cpu"), (3, "cpu"), (2, "hx")])
def test_all_ops_run_on_hxcomm_and_gloo_and_are_right(
    world_size: int, device: str, rank_pool: Pool, tmp_path: Path
) -> None:
    file = tmp_path / "result.json"
    words = f"--compare gloo --device {device} --sizes 64,4KiB,1.5MiB --iters 4 --json {file}"
    answers = rank_pool(world_size).run(bench, *words.split(), backend=None)
    assert [status for status, _, _ in answers] == [0] * world_size, answers
    assert "all results are right" in answers[0][1]
    assert [out for _, out, _ in answers[1:]] == [""] * (world_size - 1)
    result = json.loads(file.read_text())
    assert (result["world_size"], result["device"]) == (world_size, device)
    for op in OPS:
        for backend in ("hxcomm", "gloo"):
            rows = [each for each in result["rows"] if (each["op"], each["backend"]) == (op, backend)]
            assert len(rows) == (1 if op == "barrier" else 3)
            for each in rows:
                assert each.keys() == {field.name for field in fields(Row)}
                assert each["n_wrong"] == 0
                assert each["iterations"] >= 4
                assert each["touched"] == (0 < each["nbytes"] <= arguments.TOUCHED_BYTES)
                factor = OPERATIONS[op].bus_factor(world_size)
                assert each["busbw_gbps"] == pytest.approx(each["algbw_gbps"] * factor)


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_inputs_of_every_dtype_and_redop_are_exact(dtype: str, rank_pool: Pool) -> None:
    for reduce_op in REDUCE_OPS:
        words = f"--ops all_reduce,reduce_scatter --dtype {dtype} --redop {reduce_op} --sizes 64KiB --iters 1"
        status, out, err = rank_pool(3).run(bench, *words.split(), backend=None)[0]
        # What cannot be averaged is refused by the backend, and said.
        assert status == 0 or "skipped: hxcomm does not run" in out, out + err


def test_a_backend_that_does_nothing_is_reported_as_wrong(rank_pool: Pool, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    words = f"--backend nothing --sizes 4KiB --iters 4 --json {file}"
    answers = rank_pool(2).run(bench, *words.split(), backend=None)
    assert [status for status, _, _ in answers] == [1, 1]
    assert "WRONG RESULTS" in answers[0][1]
    for each in json.loads(file.read_text())["rows"]:
        assert each["n_wrong"] > 0, each


def test_what_a_backend_refuses_is_left_out_and_said(rank_pool: Pool) -> None:
    words = "--backend gloo --ops all_reduce,broadcast --dtype int32 --redop avg --sizes 64 --iters 2"
    for status, out, _ in rank_pool(2).run(bench, *words.split(), backend=None)[:1]:
        assert status == 0
        assert "skipped: gloo does not run all_reduce of 64 bytes of int32 with avg: " in out


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("--sizes x", "'x': not a size"),
        ("--backend gllo", "torch.distributed has no backend 'gllo' here; it has gloo, hxcomm, torchcomm, nothing"),
    ],
)
def test_a_wrong_command_line_is_said_once_by_rank_0(words: str, advice: str, rank_pool: Pool) -> None:
    answers = rank_pool(2).run(bench, *words.split(), backend=None)
    assert [status for status, _, _ in answers] == [2, 2]
    assert advice in answers[0][2]
    assert answers[1][2] == ""


def test_the_floor_is_probed_and_printed_beside_the_results(rank_pool: Pool, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    words = f"--floor --ops all_reduce --sizes 16KiB,2MiB --iters 8 --json {file}"
    answers = rank_pool(2).run(bench, *words.split(), backend=None)
    assert [status for status, _, _ in answers] == [0, 0], answers
    result = json.loads(file.read_text())
    assert [floor["nbytes"] for floor in result["floors"]] == [16 << 10, 2 << 20]
    assert all(floor["copy_gbps"] > 0 for floor in result["floors"])
    assert result["hand_over_ns"] > 0
    assert [probe["nbytes"] for probe in result["zmq"]] == [8, 16 << 10, 1 << 20, 16 << 20]
    assert "(time - a do-nothing backend's time) / floor" in answers[0][1]
    assert "through Python (pyzmq)" in answers[0][1]


def use_the_group_between_probes(rank: int, world_size: int) -> list[int]:
    """Floors of several sizes, hand-overs and ordinary operations in turn on one group; its sequence at the end."""
    import numpy as np
    import torch.distributed as dist

    from hxcomm import _core
    from hxcomm.bench.probes import Probes

    probes = Probes(rank, world_size)
    group = probes.group
    for nbytes in (64, 16 << 10, 3 << 20, 4):
        seconds = group.floor_all_reduce(nbytes=nbytes, dtype="float32", iterations=9, touched=nbytes < 1 << 20)
        assert seconds >= 0
        group.floor_hand_over(iterations=7)
        for count in (5, 4096, 300_000):
            data = np.arange(count, dtype=np.float64) + rank
            block = [(data.ctypes.data, count)]
            group.run(_core.Call(op="all_reduce", dtype="float64", input=block, output=block, count=count))
            assert (data == world_size * np.arange(count) + sum(range(world_size))).all()
    dist.barrier()
    sequence = group.next_sequence
    group.leave()
    return [sequence]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_group_works_as_before_after_its_floor_was_measured(world_size: int, rank_pool: Pool) -> None:
    sequences = rank_pool(world_size).run(use_the_group_between_probes, backend="gloo")
    assert len({tuple(each) for each in sequences}) == 1


def measure_a_floor_with_something_pending(rank: int, world_size: int) -> str:
    import numpy as np
    import torch.distributed as dist

    from hxcomm import _core
    from hxcomm.bench.probes import Probes

    group = Probes(rank, world_size).group
    data = np.zeros(4, dtype=np.float32)
    block = [(data.ctypes.data, 4)]
    message = ""
    if rank == 0:
        op = group.post(_core.Call(op="all_reduce", dtype="float32", input=block, output=block, count=4))
        try:
            group.floor_hand_over(iterations=1)
        except ValueError as error:
            message = str(error)
        dist.barrier()  # only now do the others come
        group.wait(op)
    else:
        dist.barrier()
        group.run(_core.Call(op="all_reduce", dtype="float32", input=block, output=block, count=4))
    group.leave()
    return message


def test_a_floor_is_refused_while_an_operation_is_pending(rank_pool: Pool) -> None:
    assert "nothing pending" in rank_pool(2).run(measure_a_floor_with_something_pending, backend="gloo")[0]


def test_the_plot_needs_matplotlib_and_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from hxcomm.bench import plot

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'hxcomm\[bench\]'"):
        plot.require()


def test_the_plot_is_drawn_with_and_without_floors(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs the extra: pip install 'hxcomm[bench]'")
    from hxcomm.bench import plot

    rows = [row(name, nbytes=nbytes) for name in ("hxcomm", "gloo", "nothing") for nbytes in (64, 4096)]
    for floors in ([], [Floor(64, 0.5, 5.0), Floor(4096, 1.0, 9.0)]):
        file = tmp_path / f"{len(floors)}.png"
        plot.draw(report(rows=rows, floors=floors), file)
        assert file.read_bytes().startswith(b"\x89PNG")
