"""Backends that somebody else wrote: how they are found, what is checked for them, what reaches them."""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchcomms_stand_in

import hxcomm
import hxcomm.torchcomms as torchcomms
from hxcomm.torchcomms import backend as backends
from hxcomm.torchcomms import hooks
from hxcomm.torchcomms.backend import PlugIn, TorchCommBackend
from hxcomm.torchcomms.hook_args import OpName
from hxcomm.torchcomms.hooks import NanFoundError
from hxcomm.torchcomms.options import AllReduceOptions, CommOptions

CPU = torch.device("cpu")


class Recording(TorchCommBackend):
    """Rank 1 of 3, which notes what reaches it and moves nothing."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def init(self, device: torch.device, name: str, options: CommOptions) -> None:
        self.calls.append(("init", device, name, options))

    def get_rank(self) -> int:
        return 1

    def get_size(self) -> int:
        return 3

    def get_backend_name(self) -> str:
        return "recording"

    def send(self, *operands: Any) -> None:
        self.calls.append(("send", *operands))

    def all_reduce(self, tensor: torch.Tensor, op: object, async_op: bool, options: AllReduceOptions) -> None:
        self.calls.append(("all_reduce", tensor, op, async_op, options))

    def batch_op_issue(self, ops: list[Any], async_op: bool) -> None:
        self.calls.append(("batch_op_issue", ops, async_op))

    def split(self, ranks: list[int], name: str, options: CommOptions) -> TorchCommBackend | None:
        return type(self)() if 1 in ranks else None


def quiet(name: str) -> Any:
    def method(self: Recording, *operands: Any) -> None:
        self.calls.append((name, *operands))

    return method


for _op in set(OpName) - {OpName.send, OpName.all_reduce, OpName.split, OpName.new_window, OpName.finalize}:
    setattr(Recording, _op.name, quiet(_op.name))


@pytest.fixture(autouse=True)
def registry_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_registered", dict(backends._registered))


@pytest.fixture
def plugged() -> PlugIn:
    backends.register_backend("recording", Recording)
    return PlugIn.create("recording", comm_name="world", device=CPU, options=CommOptions())


def call(plugged: PlugIn, op: OpName, *operands: Any, **options: Any) -> Any:
    return plugged.call(op, operands, False, options.get("hints"), options.get("timeout"))


def t(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


# What is right on rank 1 of 3.
RIGHT: dict[OpName, tuple[Any, ...]] = {
    OpName.send: (t(2), 0),
    OpName.recv: (t(2), 2),
    OpName.broadcast: (t(2), 1),
    OpName.all_reduce: (t(2), "SUM"),
    OpName.reduce: (t(2), 0, "SUM"),
    OpName.all_gather: ([t(2), t(2), t(2)], t(2)),
    OpName.all_gather_v: ([t(5), t(2), t(0)], t(2)),
    OpName.all_gather_single: (t(6), t(2)),
    OpName.reduce_scatter: (t(2), [t(2), t(2), t(2)], "SUM"),
    OpName.reduce_scatter_v: (t(2), [t(5), t(2), t(0)], "SUM"),
    OpName.reduce_scatter_single: (t(2), t(6), "SUM"),
    OpName.all_to_all_single: (t(6), t(6)),
    OpName.all_to_all_v_single: (t(4, 2), t(6, 2), [0, 3, 1], [1, 2, 3]),
    OpName.all_to_all: ([t(1), t(2), t(3)], [t(4), t(2), t(0)]),
    OpName.barrier: (),
    OpName.scatter: (t(2), [t(2), t(2), t(2)], 1),
    OpName.gather: ([], t(2), 0),
    OpName.gather_single: (t(6), t(2), 1),
}


@pytest.mark.parametrize("op", RIGHT, ids=lambda op: op.name)
def test_a_right_call_reaches_the_backend_as_it_is(plugged: PlugIn, op: OpName) -> None:
    assert call(plugged, op, *RIGHT[op]) is None
    (_, reached) = plugged.backend.calls  # type: ignore[attr-defined]
    assert reached[0] == op.name and len(reached) == len(RIGHT[op]) + 2 + (op is OpName.all_reduce)
    assert all(mine is theirs for mine, theirs in zip(RIGHT[op], reached[1:], strict=False))


WRONG: list[tuple[OpName, tuple[Any, ...], str]] = [
    (OpName.send, (t(2), 1), "peer is this rank itself, and nothing would match it"),
    (OpName.recv, (t(2), 3), "peer is 3, it must be in 0..2"),
    (OpName.broadcast, (t(2), -1), "root is -1, it must be in 0..2"),
    (OpName.all_reduce, (t(2, device="meta"), "SUM"), "tensor is on meta, the communicator on cpu"),
    (
        OpName.all_reduce,
        (t(2, 3).T, "SUM"),
        "tensor must be dense and contiguous, got torch.strided with strides (1, 3)",
    ),
    (OpName.all_reduce, (t(2).to_sparse(), "SUM"), "tensor must be dense and contiguous, got torch.sparse_coo"),
    (OpName.reduce, (t(2), 7, "SUM"), "root is 7, it must be in 0..2"),
    (OpName.all_gather, ([t(2), t(2)], t(2)), "tensor_list has 2 tensors, it must have one for each of the 3 ranks"),
    (OpName.all_gather, ([t(2), t(2), t(3)], t(2)), "tensor_list[2] has 3 elements, it must have 2"),
    (
        OpName.all_gather,
        ([t(2), t(2, dtype=torch.int64), t(2)], t(2)),
        "tensor_list[1] is torch.int64, but the call's other tensors are torch.float32",
    ),
    (OpName.all_gather_v, ([t(5), t(1), t(0)], t(2)), "tensor_list[1] has 1 elements, it must have 2"),
    (OpName.all_gather_single, (t(5), t(2)), "output has 5 elements, it must have 6: 3 times the input's 2"),
    (OpName.reduce_scatter, (t(2), [t(2), t(1), t(2)], "SUM"), "input_list[1] has 1 elements, it must have 2"),
    (OpName.reduce_scatter_v, (t(2), [t(2), t(1), t(2)], "SUM"), "output has 2 elements, it must have 1"),
    (OpName.reduce_scatter_single, (t(2), t(2), "SUM"), "input has 2 elements, it must have 6"),
    (OpName.all_to_all_single, (t(4), t(6)), "output has 4 elements, it must have 6"),
    (OpName.all_to_all_single, (t(4), t(4)), "input has 4 elements, which 3 ranks cannot share equally"),
    (OpName.all_to_all_v_single, (t(4), t(6), [0, 3, 2], [1, 2, 3]), "output_split_sizes is [0, 3, 2]"),
    (OpName.all_to_all_v_single, (t(4), t(6), [0, 3, 1], [1, 2]), "input_split_sizes is [1, 2]"),
    (OpName.all_to_all_v_single, (t(4), t(6), [0, 5, -1], [1, 2, 3]), "output_split_sizes is [0, 5, -1]"),
    (OpName.all_to_all, ([t(1)] * 3, [t(1), t(2), t(1)]), "output_tensor_list[1] has 1 elements, it must have 2"),
    (OpName.scatter, (t(2), [t(2)], 1), "input_tensor_list has 1 tensors"),
    (OpName.scatter, (t(2), [], 9), "root is 9"),
    (OpName.gather, ([t(2), t(2), t(9)], t(2), 1), "output_tensor_list[2] has 9 elements, it must have 2"),
    (OpName.gather_single, (t(5), t(2), 1), "output has 5 elements, it must have 6"),
]


@pytest.mark.parametrize(("op", "operands", "said"), WRONG, ids=[f"{op.name}-{said[:24]}" for op, _, said in WRONG])
def test_a_wrong_call_is_refused_with_its_values_and_nothing_reaches_the_backend(
    plugged: PlugIn, op: OpName, operands: tuple[Any, ...], said: str
) -> None:
    with pytest.raises(ValueError, match=f"^{op.name} on rank 1 of 3: {re.escape(said)}"):
        call(plugged, op, *operands)
    assert [each[0] for each in plugged.backend.calls] == ["init"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("op", "operands", "said"),
    [
        (OpName.all_reduce, ([1.0], "SUM"), "tensor must be a tensor, got [1.0]"),
        (OpName.broadcast, (t(2), "0"), "root must be a rank, got '0'"),
        (OpName.send, (t(2), True), "peer must be a rank, got True"),
        (OpName.all_gather, (t(6), t(2)), "tensor_list must be a list, got tensor("),
    ],
    ids=lambda value: value.name if isinstance(value, OpName) else None,
)
def test_what_is_no_tensor_no_list_or_no_rank_is_a_type_error(
    plugged: PlugIn, op: OpName, operands: tuple[Any, ...], said: str
) -> None:
    with pytest.raises(TypeError, match=re.escape(said)):
        call(plugged, op, *operands)


def test_a_list_that_only_the_root_needs_is_not_looked_at_elsewhere(plugged: PlugIn) -> None:
    call(plugged, OpName.scatter, t(2), [], 0)
    call(plugged, OpName.gather, [], t(2), 2)
    call(plugged, OpName.gather_single, t(0), t(2), 2)


def test_options_reach_a_method_that_takes_them_and_are_an_error_where_it_takes_none(plugged: PlugIn) -> None:
    timeout = timedelta(seconds=3)
    call(plugged, OpName.all_reduce, t(2), "SUM", hints={"chunk": "1KiB"}, timeout=timeout)
    assert plugged.backend.calls[-1][-1] == AllReduceOptions(timeout, {"chunk": "1KiB"})  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=re.escape("'recording' takes no options for send, so timeout=0:00:03 cannot")):
        call(plugged, OpName.send, t(2), 0, timeout=timeout)
    with pytest.raises(ValueError, match=re.escape("so hints={'chunk': '1KiB'} cannot be passed on")):
        call(plugged, OpName.barrier, hints={"chunk": "1KiB"})


def test_a_batch_reaches_the_backend_as_one_list_once_its_messages_to_itself_fit(plugged: PlugIn) -> None:
    plugged.batch([True, False, True], [t(2), t(2), t(3)], [1, 1, 0], True, None, None)
    _, ops, async_op = plugged.backend.calls[-1]  # type: ignore[attr-defined]
    assert [(op.type.name, op.tensor.numel(), op.peer) for op in ops] == [
        ("SEND", 2, 1),
        ("RECV", 2, 1),
        ("SEND", 3, 0),
    ]
    assert async_op is True
    with pytest.raises(
        ValueError, match=re.escape("sends itself messages of [2] elements, but receives [] from itself")
    ):
        plugged.batch([True], [t(2)], [1], False, None, None)
    with pytest.raises(ValueError, match=re.escape("ops[0].peer is 5")):
        plugged.batch([True], [t(2)], [5], False, None, None)


@pytest.mark.parametrize(
    ("ranks", "said"),
    [([1, 2, 1], "ranks [1, 2, 1] names [1] more than once"), ([0, 1, 3], "ranks[2] is 3, it must be in 0..2")],
)
def test_a_split_with_duplicates_or_strangers_is_refused(plugged: PlugIn, ranks: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        plugged.split(ranks, "child", CommOptions())


def test_a_split_gives_members_a_backend_and_others_none(plugged: PlugIn) -> None:
    child = plugged.split([1, 2], "child", CommOptions())
    assert child is not None and child.backend is not plugged.backend and child.backend.get_device() == CPU
    assert plugged.split([0, 2], "other", CommOptions()) is None


def test_what_a_backend_lacks_names_the_backend_and_the_operation() -> None:
    class Bare(TorchCommBackend):
        def get_backend_name(self) -> str:
            return "bare"

    for operation in ("all_reduce", "batch_op_issue", "gather_single", "barrier"):
        with pytest.raises(NotImplementedError, match=f"^backend 'bare' does not implement {operation}: .*Bare must"):
            getattr(Bare(), operation)(1, 2, async_op=False, options=None)
    for operation in ("get_rank", "finalize", "abort", "new_window", "get_mem_allocator", "get_comm_name"):
        with pytest.raises(NotImplementedError, match=f"^backend 'bare' does not implement {operation}"):
            getattr(Bare(), operation)()
    backends.register_backend("bare", Bare)
    with pytest.raises(NotImplementedError, match="'bare' does not implement init"):
        PlugIn.create("bare", comm_name="world", device=CPU, options=CommOptions())
    with pytest.raises(NotImplementedError, match="'bare' does not implement get_mem_allocator"):
        backends.get_mem_allocator("bare")


def test_a_registered_backend_is_listed_after_ours() -> None:
    assert not backends._is_backend_registered("recording")
    backends.register_backend("recording", Recording)
    backends.register_backend("recording", Recording)  # a module imported twice
    assert backends._is_backend_registered("recording") and backends.is_backend_built("recording")
    assert backends.built_backends()[:2] == ["hxcomm", "recording"] and backends.is_backend_built("hxcomm")


def test_a_name_is_taken_once_and_by_a_backend_only() -> None:
    class Other(TorchCommBackend):
        pass

    backends.register_backend("recording", Recording)
    with pytest.raises(ValueError, match="'recording' is already registered by Recording"):
        backends.register_backend("recording", Other)
    with pytest.raises(ValueError, match="'hxcomm' is already registered by hxcomm itself"):
        backends.register_backend("hxcomm", Recording)
    with pytest.raises(TypeError, match="takes a class derived from TorchCommBackend, got <class 'int'>"):
        backends.register_backend("number", int)  # type: ignore[arg-type]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which three packages with entry points are installed."""
    information = tmp_path / "strange_backends-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: strange-backends\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(
        "[torchcomms.backends]\n"
        "registers = strange_registers\n"
        "is_class = strange_class:Strange\n"
        "breaks = strange_breaks\n"
        "forgets = strange_forgets\n"
    )
    head = "from hxcomm.torchcomms.backend import *\nclass Strange(TorchCommBackend): pass\n"
    (tmp_path / "strange_registers.py").write_text(head + "register_backend('registers', Strange)\n")
    (tmp_path / "strange_class.py").write_text(head)
    (tmp_path / "strange_breaks.py").write_text("import a_package_that_is_not_here\n")
    (tmp_path / "strange_forgets.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("strange_")]:
        del sys.modules[name]


def test_installed_backends_are_listed_without_being_loaded_and_loaded_when_asked_for(installed: Path) -> None:
    assert {"registers", "is_class", "breaks", "forgets"} <= set(backends.built_backends())
    assert backends.is_backend_built("registers") and not backends._is_backend_registered("registers")
    assert not any(name.startswith("strange_") for name in sys.modules)
    for name in ("registers", "is_class"):
        assert backends.backend_class(name).__name__ == "Strange"
        assert backends._is_backend_registered(name)


def test_a_backend_that_cannot_be_loaded_says_why(installed: Path) -> None:
    with pytest.raises(
        ImportError, match="'breaks': its entry point 'strange_breaks' cannot be loaded: ModuleNotFound"
    ):
        backends.backend_class("breaks")
    with pytest.raises(TypeError, match="'forgets': its entry point 'strange_forgets' registered nothing"):
        backends.backend_class("forgets")


def test_an_unknown_backend_lists_the_known_ones() -> None:
    backends.register_backend("recording", Recording)
    with pytest.raises(ModuleNotFoundError, match="no backend 'recordin': known are hxcomm, recording"):
        backends.backend_class("recordin")


EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "toy_backend.py"


def test_the_example_backend_is_short_and_runs(run_ranks: Callable[..., list[Any]]) -> None:
    source = EXAMPLE.read_text().split("class StoreBackend")[1].split("register_backend")[0]
    assert len(source.splitlines()) <= 60
    outputs = run_ranks(EXAMPLE, 2, backend=None)
    assert [output.splitlines()[-1] for output in outputs] == [
        f"rank {rank} of 2: the sum is 3, recorded: 1 call" for rank in range(2)
    ]


def toy_gets_everything_for_free(rank: int, n: int) -> None:
    runpy.run_path(str(EXAMPLE))
    comm = torchcomms.new_comm("store", "cpu", "toy")
    recorder, told = hooks.FlightRecorderHook(isolated=True), []
    recorder.register_with_comm(comm)
    hooks.NanCheckHook().register_with_comm(comm)
    comm.register_pre_hook(lambda op, op_id, args: told.append((op.name, op_id)))
    assert (comm.get_rank(), comm.get_size(), comm.get_backend()) == (rank, n, "store")
    tensor = torch.full((2,), float(rank + 1))
    with pytest.raises(ValueError, match=f"all_gather on rank {rank} of {n}: tensor_list has 1 tensors"):
        comm.all_gather([tensor], tensor, async_op=False)
    with pytest.raises(NanFoundError, match=f"input of all_reduce #\\d on rank {rank} of communicator 'toy'"):
        comm.all_reduce(torch.tensor([float("nan")]), torchcomms.ReduceOp.SUM, async_op=False)
    with pytest.raises(NotImplementedError, match="backend 'store' does not implement reduce_scatter_single"):
        comm.reduce_scatter_single(torch.ones(1), torch.ones(n), torchcomms.ReduceOp.SUM, async_op=False)
    with pytest.raises(NotImplementedError, match="backend 'store' does not implement batch_op_issue"):
        batch = comm.batch_op_create()
        batch.send(tensor, (rank + 1) % n)
        batch.issue(async_op=False)
    gathered = [torch.empty(2) for _ in range(n)]
    work = comm.all_gather(gathered, tensor, async_op=True)
    assert work.is_completed() and [each.tolist() for each in gathered] == [[1, 1], [2, 2], [3, 3]]
    comm.all_reduce(tensor, torchcomms.ReduceOp.MAX, async_op=False)
    assert tensor.tolist() == [3, 3]
    pair = comm.split([2, 0], "pair")
    assert (pair is None) == (rank == 1)
    if pair is not None:
        assert (pair.get_rank(), pair.get_size(), pair.get_name()) == ([2, 0].index(rank), 2, "pair")
        pair.broadcast(tensor := torch.tensor([rank]), 0, async_op=False)
        assert tensor.item() == 2
        pair.finalize()
    comm.finalize()
    with pytest.raises(ValueError, match="'toy' cannot be used: it was finalized"):
        comm.barrier(async_op=False)
    entries = json.loads(recorder.dump_json())["entries"]
    done = [(e["backend"], e["operation"]) for e in entries if e["state"] == "completed"]
    ours = [("store", "split"), ("store", "broadcast")] if rank != 1 else []
    assert done == [("store", "all_gather"), ("store", "all_reduce"), *ours]
    assert ("finalize", told[-1][1]) == told[-1]


def test_a_toy_backend_gets_checks_hooks_and_recording_for_free(rank_pool: Callable[[int], Any]) -> None:
    rank_pool(3).run(toy_gets_everything_for_free, backend=None)


def hxcomm_under_torchcomms(rank: int, n: int) -> None:
    theirs = torchcomms_stand_in.install()
    before = set(sys.modules)
    comm = theirs.new_comm("hxcomm", torch.device("cpu"), "world", abort_process_on_timeout_or_error=False)
    assert "hxcomm.torchcomms.plugin" in set(sys.modules) - before
    assert "hxcomm" in dist.Backend.backend_list  # what torch's use_torchcomms asks for
    assert (comm.get_rank(), comm.get_size(), comm.get_backend_name()) == (rank, n, "hxcomm")
    assert (comm.get_comm_name(), comm.get_backend_version()) == ("world", hxcomm.__version__)
    reduce_op, t = theirs.ReduceOp, torch.tensor([float(rank + 1)] * 2)
    for kind, result in (("SUM", 6), ("PRODUCT", 6), ("MIN", 1), ("MAX", 3), ("AVG", 2)):
        value = t.clone()
        comm.all_reduce(value, getattr(reduce_op, kind), async_op=True).wait()
        assert value.tolist() == [result, result]
    bits = torch.tensor([1 << rank])
    comm.all_reduce(bits, reduce_op.BOR, async_op=False)
    assert bits.item() == 7
    with pytest.raises(NotImplementedError, match="PREMUL_SUM on backend 'hxcomm' of torchcomms: this version"):
        comm.all_reduce(t.clone(), reduce_op.PREMUL_SUM(0.5), async_op=False)
    out = [torch.zeros(2) for _ in range(n)]
    comm.all_gather(out, t, async_op=False)
    comm.reduce_scatter(value, [t] * n, reduce_op.SUM, async_op=False)
    comm.reduce(root := t.clone(), 0, reduce_op.SUM, async_op=False)
    assert [each.tolist() for each in out] == [[1, 1], [2, 2], [3, 3]] and value.tolist() == [6, 6]
    assert root.tolist() == ([6, 6] if rank == 0 else [rank + 1] * 2)
    comm.all_to_all_v_single(got := torch.zeros(n), torch.full((n,), float(rank)), [1] * n, [1] * n, async_op=False)
    assert got.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="root"):
        comm.broadcast(t, 7, async_op=False)
    pair = comm.split([2, 0], "pair")
    assert (pair is None) == (rank == 1)
    if pair is not None:
        assert pair.backend.device_and_options[0] == torch.device("cpu")
        (pair.send if rank == 2 else pair.recv)(t, 1 - pair.get_rank(), async_op=False)
        assert t.tolist() == [3, 3]
        pair.finalize()
    comm.set_timeout(timedelta(seconds=5))
    comm.barrier(async_op=False)
    comm.finalize()


def test_torchcomms_finds_hxcomm_by_its_entry_point_and_runs_on_it(run_ranks: Callable[..., list[Any]]) -> None:
    run_ranks(hxcomm_under_torchcomms, 3, backend=None)


@pytest.fixture
def installed_torchcomms(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The stand-in under torchcomms' name, with no backend registered, and no plug-in loaded yet."""
    monkeypatch.setattr(torchcomms_stand_in, "_registered", {})
    monkeypatch.setitem(sys.modules, "torchcomms._comms", torchcomms_stand_in)
    sys.modules.pop("hxcomm.torchcomms.plugin", None)
    yield torchcomms_stand_in
    sys.modules.pop("hxcomm.torchcomms.plugin", None)


def test_the_plug_in_in_cpp_is_taken_where_it_was_built(
    installed_torchcomms: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "hxcomm._torchcomms", ModuleType("hxcomm._torchcomms"))  # would register itself
    importlib.import_module("hxcomm.torchcomms.plugin")
    assert installed_torchcomms._registered == {}


def test_the_plug_in_in_python_is_taken_where_that_in_cpp_was_not_built_or_does_not_fit(
    installed_torchcomms: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = importlib.import_module("hxcomm.torchcomms.plugin")
    assert installed_torchcomms._registered["hxcomm"].__name__ == "HxcommBackend"
    installed_torchcomms._registered.clear()

    def import_module(name: str) -> ModuleType:
        if name == "hxcomm._torchcomms":
            raise ImportError("undefined symbol: TorchCommBackend")
        return importlib.import_module(name)

    monkeypatch.setattr(plugin, "import_module", import_module)
    with pytest.warns(UserWarning, match=r"another version of torchcomms .* \(undefined symbol: TorchCommBackend\)"):
        plugin.register()
    assert "hxcomm" in installed_torchcomms._registered


def test_the_plug_in_does_nothing_where_torchcomms_is_this_package(
    installed_torchcomms: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchcomms._comms", torchcomms)
    before = torchcomms.built_backends()
    importlib.import_module("hxcomm.torchcomms.plugin")
    assert installed_torchcomms._registered == {} and torchcomms.built_backends() == before


@pytest.mark.parametrize("headers", [True, False])
def test_the_plug_in_in_cpp_is_built_where_torchcomms_has_its_headers(tmp_path: Path, headers: bool) -> None:
    package = tmp_path / "torchcomms"
    folder = package / "include/comms/torchcomms"
    folder.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('building must not import it')")
    if headers:
        (folder / "TorchCommBackend.hpp").touch()
    program = "import setup; print([(each.name, each.optional) for each in setup.extension_modules()][2:])"
    root = EXAMPLE.parent.parent
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=root,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.stdout.strip() == ("[('hxcomm._torchcomms', True)]" if headers else "[]"), run.stderr
