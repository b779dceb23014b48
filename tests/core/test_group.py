"""The communicator without torch: ranks as threads over shared memory, every op against an exact reference."""

from __future__ import annotations

import gc
from typing import Any

import exact
import numpy as np
import pytest
from exact import Array
from thread_ranks import TIMEOUT_S, HxMemory, Page, ThreadRanks, call

from hxcomm import _core, algorithms, interpreted
from hxcomm.errors import AbortedError, InitError, MismatchError
from hxcomm.schedule.ops import OPS

EVERY_ALGORITHM = [(op, name) for op in algorithms.OPS for name in algorithms.names(op)]
# The last is longer than a window of 4096 bytes in every dtype, and ends in the middle of one.
COUNTS = (0, 1, 7, 31, 33, 1021, 9001)
FEW = (33, 9001)


def arrays(
    op: str, dtype: str, reduce_op: str, rank: int, world_size: int, root: int, count: int
) -> tuple[list[Array], list[Array]]:
    """(input, output) blocks of a rank for one call. Outputs hold what no result holds."""
    given = exact.inputs(op, dtype, reduce_op, rank, world_size, root, count)
    if OPS[op].in_place:
        return given, given
    blocks = {"none": 0, "one": 1, "each": world_size}[OPS[op].output]
    if OPS[op].output_at_root_only and rank != root:
        blocks = 0
    return given, [np.full(count, 99, exact.STORED[dtype]) for _ in range(blocks)]


def check_one(
    op: str,
    dtype: str,
    reduce_op: str,
    rank: int,
    group: _core.Group,
    root: int,
    count: int,
    timeout_s: float = TIMEOUT_S,
    memory: HxMemory | None = None,
) -> None:
    """One call, on CPU arrays or on arrays in `memory`. Asserts the exact result, and that inputs are as they were
    wherever the op does not write them."""
    n = group.world_size
    given, taken = arrays(op, dtype, reduce_op, rank, n, root, count)
    if memory is not None:
        memory.clear()
        in_place = taken is given
        given = [memory.place(array) for array in given]
        taken = given if in_place else [memory.place(array) for array in taken]
    before = [array.copy() for array in given]
    factor = exact.factor(reduce_op, rank)
    kind = {"reduce_op": reduce_op, "factor": factor, "root": root, "count": count, "timeout_s": timeout_s}
    kind["device"] = "cpu" if memory is None else "hx"
    group.run(call(op, dtype, given, taken, **kind))
    expected = exact.outputs(op, dtype, reduce_op, rank, n, root, count)
    what = f"{op} {dtype} {reduce_op}, {count} elements, root {root}, rank {rank} of {n}"
    for block, array in enumerate(expected or []):
        np.testing.assert_array_equal(taken[block], array, err_msg=f"{what}: output block {block}", strict=True)
    if not OPS[op].in_place or expected is None:
        for block, array in enumerate(before):
            np.testing.assert_array_equal(given[block], array, err_msg=f"{what}: input block {block} changed")


def calls_of(op: str, world_size: int) -> list[tuple[str, str, int, int]]:
    """(dtype, reduce op, root, count) of the calls that sweep an op."""
    roots = range(world_size) if OPS[op].rooted else (-1,)
    reduce_ops = exact.REDUCE_OPS if OPS[op].reduces else ("sum",)
    return [
        (dtype, reduce_op, root, count)
        for dtype in exact.DTYPES
        for reduce_op in reduce_ops
        if exact.supported(dtype, reduce_op)
        for root in roots
        # All counts at the outer roots and for the sums; one odd count elsewhere, and one of several windows.
        for count in (COUNTS if root in (-1, 0, world_size - 1) and reduce_op in ("sum", "avg", "premul_sum") else FEW)
        if OPS[op].input != "none" or count == 0
    ]


@pytest.mark.parametrize("device", ["cpu", "hx"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("op", "algorithm"), EVERY_ALGORITHM)
def test_every_algorithm_gives_the_exact_result(op: str, algorithm: str, world_size: int, device: str) -> None:
    def sweep(rank: int, group: _core.Group) -> None:
        memory = HxMemory(ranks.runtimes[rank]) if device == "hx" else None
        for dtype, reduce_op, root, count in calls_of(op, world_size):
            check_one(op, dtype, reduce_op, rank, group, root, count, memory=memory)

    with ThreadRanks(world_size, algorithms={op: algorithm}) as ranks:
        ranks.each(sweep)
        used = {(row["op"], row["algorithm"]) for row in ranks.groups[0].statistics()}
    assert used == {(op, algorithm)}


# As many rounds as ranks, with a transfer of each, or nearly.
MANY_TRANSFERS = {"ring", "ring_bidirectional", "line", "torus", "two_shot", "hierarchical"}


def many_ranks() -> list[tuple[str, str, int]]:
    """Every rank compiles its plan under this one process's GIL: at 130 ranks 0.1 to 1.2 s each, a ring's even more."""
    cases = [(op, name) for op, name in EVERY_ALGORITHM if op in ("all_reduce", "broadcast", "all_gather")]
    return [
        *[(op, name, 33) for op, name in cases],
        *[(op, name, 65) for op, name in cases if name not in MANY_TRANSFERS],
        *[(op, name, 130) for op, name in cases if (op == "broadcast" and name != "ring") or name == "one_shot"],
    ]


@pytest.mark.parametrize(("op", "algorithm", "world_size"), many_ranks())
def test_many_ranks_give_the_exact_result(op: str, algorithm: str, world_size: int) -> None:
    root = world_size // 2 if OPS[op].rooted else -1

    def sweep(rank: int, group: _core.Group) -> None:
        for dtype, count in (("float32", 1021), ("uint8", 7), ("bfloat16", 1)):
            check_one(op, dtype, "sum", rank, group, root, count, timeout_s=160.0)  # the plans take most of it

    with ThreadRanks(world_size, algorithms={op: algorithm}, runtimes=8, window_bytes=1 << 16) as ranks:
        ranks.each(sweep)


def random_bits(dtype: str, rank: int, count: int) -> Array:
    """Numbers whose sums round, with infinities and NaN among them."""
    rng = np.random.default_rng([rank, count])
    if dtype in exact.COMPLEX:
        part = "float32" if dtype == "complex64" else "float64"
        return random_bits(part, rank, 2 * count).view(dtype)
    if dtype in exact.FLOATS:
        numbers = rng.standard_normal(count) * 10.0 ** rng.integers(-2, 3, count)
        numbers[::97] = np.inf
        if dtype != "bfloat16":  # its NaN would need care in exact.store; the kernels' own test has them
            numbers[5::89] = np.nan
        return exact.store(numbers, dtype)
    return rng.integers(0, 2 if dtype == "bool" else 256, count).astype(exact.STORED[dtype])


@pytest.mark.parametrize(("op", "algorithm"), [each for each in EVERY_ALGORITHM if OPS[each[0]].reduces])
def test_the_executor_gives_the_bits_of_the_numpy_interpreter(op: str, algorithm: str) -> None:
    n, count = 3, 2 * 1021

    def run(rank: int, group: _core.Group) -> list[bytes]:
        results = []
        for dtype in exact.DTYPES:
            for reduce_op in exact.REDUCE_OPS:
                if not exact.supported(dtype, reduce_op):
                    continue
                _, taken = arrays(op, dtype, reduce_op, rank, n, 1, count)
                given = [random_bits(dtype, rank + block, count) for block in range(n if op == "reduce_scatter" else 1)]
                if OPS[op].in_place:
                    taken = given
                # No power of two, so that products round.
                factor = (0.1, -3.7, 1.3)[rank]
                group.run(call(op, dtype, given, taken, reduce_op=reduce_op, factor=factor, root=1, count=count))
                results += [array.tobytes() for array in taken]
        return results

    with ThreadRanks(n, algorithms={op: algorithm}) as ranks:
        native = ranks.each(run)
    with ThreadRanks(n, algorithms={op: algorithm}, transfer=interpreted.transfer) as ranks:
        python = ranks.each(run)
    for rank in range(n):
        differing = [i for i, (a, b) in enumerate(zip(native[rank], python[rank], strict=True)) if a != b]
        assert not differing, f"rank {rank}, calls {differing}"
    if op == "all_reduce":
        assert native[0] == native[1] == native[2], "ranks got different bits"


IN_RANK_ORDER = [
    ("all_reduce", "one_shot"),
    ("all_reduce", "two_shot"),
    ("reduce", "direct"),
    ("reduce_scatter", "direct"),
]


@pytest.mark.parametrize(("op", "algorithm"), IN_RANK_ORDER)
def test_the_bits_are_the_same_in_windows_of_any_size(op: str, algorithm: str) -> None:
    n, count = 3, 3001

    def run(rank: int, group: _core.Group) -> list[bytes]:
        results = []
        for dtype in ("float32", "float64", "bfloat16", "float16", "complex64"):
            given = [random_bits(dtype, rank + block, count) for block in range(n if op == "reduce_scatter" else 1)]
            taken = given if OPS[op].in_place else [np.zeros_like(given[0])]
            group.run(call(op, dtype, given, taken, root=1, count=count))
            results.append(taken[0].tobytes())
        return results

    by_window = []
    for window_bytes in (512, 4096, 1 << 20):
        with ThreadRanks(n, algorithms={op: algorithm}, window_bytes=window_bytes) as ranks:
            by_window.append(ranks.each(run))
    assert by_window[0] == by_window[1] == by_window[2]


def test_sequence_numbers_cross_32_bits() -> None:
    with ThreadRanks(3, first_sequence=2**32 - 5) as ranks:
        for _ in range(12):
            assert ranks.all_reduce_works()
        assert [group.next_sequence for group in ranks.groups] == [2**32 + 7] * 3


def test_a_long_call_takes_a_sequence_number_for_each_window() -> None:
    count = 10 * 1024 + 1  # 11 windows of 4096 bytes

    with ThreadRanks(2) as ranks:
        ranks.each(lambda rank, group: check_one("all_reduce", "float32", "sum", rank, group, -1, count))
        assert [group.next_sequence for group in ranks.groups] == [12, 12]


def test_groups_may_be_posted_in_any_order() -> None:
    """Rank 0 posts to A, B, C and waits in that order; the others rotate both orders."""
    n = 3
    first = ThreadRanks(n)
    every = [first, *(ThreadRanks(n, runtimes=first.runtimes) for _ in range(2))]
    counts = (33, 3000, 7)

    def run(rank: int, _: _core.Group) -> None:
        for turn in range(20):
            order = [(rank + turn + i) % 3 for i in range(3)]
            buffers = [np.full(counts[g], rank + g + 1, np.int64) for g in range(3)]
            posted = {
                g: every[g].groups[rank].post(call("all_reduce", "int64", [buffers[g]], [buffers[g]])) for g in order
            }
            for g in reversed(order):
                every[g].groups[rank].wait(posted[g])
                assert (buffers[g] == sum(r + g + 1 for r in range(n))).all()

    first.each(run)
    for ranks in every:
        ranks.__exit__(None, None, None)


def test_posted_calls_finish_though_nobody_waits() -> None:
    """The background thread drives them: a rank that only polls sees them end."""

    def run(rank: int, group: _core.Group) -> bool:
        buffers = [np.full(100, rank + i, np.int32) for i in range(50)]
        posted = [group.post(call("all_reduce", "int32", [b], [b])) for b in buffers]
        group.run(call("barrier", "uint8", [], []))  # in order, so all before it have ended
        assert all(op.is_finished() for op in posted)
        return all((b == 2 * i + 1).all() for i, b in enumerate(buffers))

    with ThreadRanks(2) as ranks:
        assert ranks.each(run) == [True, True]


@pytest.mark.parametrize("spin_ns", [0, 1_000_000])
def test_sleeping_and_spinning_ranks_give_the_same(spin_ns: int) -> None:
    def run(rank: int, group: _core.Group) -> None:
        for count in (1, 500, 5000):
            for _ in range(20):
                check_one("all_reduce", "float16", "sum", rank, group, -1, count)

    with ThreadRanks(3, spin_ns=spin_ns) as ranks:
        ranks.each(run)


def test_memory_is_given_back_when_all_have_left() -> None:
    first = ThreadRanks(3)
    baseline = 0
    for turn in range(4):
        ranks = ThreadRanks(3, runtimes=first.runtimes, window_bytes=1 << 20)
        ranks.each(lambda rank, group: check_one("all_gather", "float64", "sum", rank, group, -1, 20_000))
        ranks.__exit__(None, None, None)
        del ranks
        gc.collect()
        probe = ThreadRanks(3, runtimes=first.runtimes)  # making a group looks for memory that nobody uses any more
        allocated = [runtime.allocated_bytes for runtime in first.runtimes]
        probe.__exit__(None, None, None)
        del probe
        gc.collect()
        if turn == 0:
            baseline = sum(allocated)
        assert sum(allocated) == baseline


def test_memory_stays_while_a_peer_has_not_left() -> None:
    ranks = ThreadRanks(2)
    assert ranks.all_reduce_works()
    runtime, peer = ranks.runtimes[0], ranks.groups[1]
    held = runtime.allocated_bytes

    def other_group() -> _core.Group:
        return _core.Group(runtime, name="other", rank=0, world_size=1, label="rank 0", nonce=1)

    ranks.groups[0].leave()
    ranks.groups.clear()
    gc.collect()
    probe = other_group()  # making a group looks for memory that nobody uses any more
    assert runtime.allocated_bytes > held, "rank 1 is still a member and may read rank 0's scratch"
    del probe
    peer.leave()
    gc.collect()
    probe = other_group()
    assert runtime.allocated_bytes < held
    del probe


def test_a_full_segment_is_an_error_that_names_sizes() -> None:
    runtime = _core.Runtime(16384)

    def group() -> _core.Group:
        return _core.Group(runtime, name="g", rank=0, world_size=1, label="rank 0", nonce=1)

    kept = group()
    with pytest.raises(InitError, match=r"segment of 16384 bytes is full.*8192 are allocated"):
        group()
    del kept


# --- mismatches and refusals ---


def test_every_rank_raises_the_same_table_and_the_group_goes_on() -> None:
    def run(rank: int, group: _core.Group) -> Any:
        array = np.zeros(33 if rank != 2 else 34, np.float32)
        group.run(call("all_reduce", "float32", [array], [array]))

    with ThreadRanks(3) as ranks:
        errors = ranks.outcomes(run)
        assert [type(error) for error in errors] == [MismatchError] * 3
        assert len({str(error) for error in errors}) == 1
        assert all(f"rank {r} " in str(errors[0]) for r in range(3)) and "34" in str(errors[0])
        assert ranks.all_reduce_works()


def test_refused_calls_consume_their_sequence() -> None:
    def refuse_or_run(rank: int, group: _core.Group) -> None:
        array = np.ones(8, np.float32)
        mine = call("all_reduce", "float32", [array], [array])
        if rank == 1:
            group.refuse(mine, "it has the wrong colour")
        else:
            group.run(mine)

    with ThreadRanks(3) as ranks:
        for turn in range(1, 6):
            errors = ranks.outcomes(refuse_or_run)
            assert [type(error) for error in errors] == [MismatchError, type(None), MismatchError]
            assert "refused: it has the wrong colour" in str(errors[0])
            if turn % 2 == 0:  # two refusals in a row, then one followed at once by a good call
                assert ranks.all_reduce_works()
        assert ranks.all_reduce_works()
        assert len({group.next_sequence for group in ranks.groups}) == 1


def test_refusals_on_all_ranks_in_turn_never_pair_up_calls_wrongly() -> None:
    """Each rank refuses its own share of a stream of alike calls; every result that comes is the right one."""
    n, calls = 3, 60

    def run(rank: int, group: _core.Group) -> int:
        good = 0
        for index in range(calls):
            array = np.full(40, index, np.int32)
            mine = call("all_reduce", "int32", [array], [array])
            if index % 7 == rank:
                group.refuse(mine, f"call {index}")
                continue
            try:
                group.run(mine)
            except MismatchError as error:
                assert index % 7 < n and f"refused: call {index}" in str(error)
            else:
                assert index % 7 >= n and (array == n * index).all()
                good += 1
        return good

    with ThreadRanks(n) as ranks:
        assert len(set(ranks.each(run))) == 1
        assert ranks.all_reduce_works()


def split(world_size: int, rank: int, other: int) -> int:
    """Elements that `rank` sends to `other`; none between some pairs, several windows between others."""
    return (rank * 7 + other * 13) % 5 * 700


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_unequal_all_to_all_moves_each_pair_its_own_count(world_size: int) -> None:
    def run(rank: int, group: _core.Group) -> None:
        for dtype in exact.DTYPES:
            sent = [
                exact.store(exact.numbers(dtype, "sum", rank, o, split(world_size, rank, o)), dtype)
                for o in range(world_size)
            ]
            got = [np.full(split(world_size, o, rank), 9, exact.STORED[dtype]) for o in range(world_size)]
            group.run(call("all_to_all", dtype, sent, got, uneven=True))
            for other in range(world_size):
                expected = exact.numbers(dtype, "sum", other, rank, split(world_size, other, rank))
                np.testing.assert_array_equal(got[other], exact.store(expected, dtype))

    with ThreadRanks(world_size) as ranks:
        ranks.each(run)


def test_split_sizes_that_do_not_fit_raise_on_every_rank_naming_the_pair() -> None:
    def run(rank: int, group: _core.Group) -> None:
        sent = [np.zeros(3 + (rank == 1 and other == 2), np.float32) for other in range(3)]
        got = [np.zeros(3, np.float32) for _ in range(3)]
        group.run(call("all_to_all", "float32", sent, got, uneven=True))

    with ThreadRanks(3) as ranks:
        errors = ranks.outcomes(run)
        assert [type(error) for error in errors] == [MismatchError] * 3
        assert "rank 1 sends 4 elements to rank 2, which expects 3" in str(errors[0])
        assert ranks.all_reduce_works()


# --- hostile memory ---


PROGRESS, FINGERPRINT, SCRATCH = 0, 1, 3  # words of core/line.h's Line


@pytest.mark.parametrize("offset", [(1 << 64) - 4096, 1 << 40, 64 << 20, (64 << 20) - 8])
def test_a_scratch_offset_outside_the_segment_raises_instead_of_crashing(offset: int) -> None:
    with ThreadRanks(2) as ranks:
        array = np.ones(512, np.float32)
        posted = ranks.groups[0].post(call("all_reduce", "float32", [array], [array]))
        victim = Page(ranks.runtimes[0], ranks.groups[0].control_offset)
        hostile = Page(ranks.runtimes[1], ranks.groups[1].control_offset)
        hostile.put(FINGERPRINT + 1, victim.get(FINGERPRINT + 1))  # sequence 1: odd parity
        hostile.put(SCRATCH + 1, offset)
        hostile.put(PROGRESS, (1 << 16) + 1)
        with pytest.raises(AbortedError, match=r"rank 1 published a scratch offset of \d+, outside its segment"):
            ranks.groups[0].wait(posted)
        assert not ranks.groups[0].is_alive()


# Words of csrc/communicator/descriptor.h's second Descriptor behind a Control, in a group of two.
DESCRIPTOR = (4864 + 512) // 8
BLOCK_COUNTS, INPUTS, OUTPUTS = DESCRIPTOR + 3, DESCRIPTOR + 50, DESCRIPTOR + 54


@pytest.mark.parametrize(
    ("blocks", "offset", "count", "text"),
    [
        (0, 4096, 512, "rank 1 published 0 tensors where its peers touch 1"),
        (1, 1 << 40, 512, "rank 1 published a tensor of 512 elements at byte 1099511627776 of its segment"),
        (1, (64 << 20) - 8, 512, "rank 1 published a tensor of 512 elements"),
        (1, (1 << 64) - 1024, 512, "rank 1 published a tensor of 512 elements"),
        (1, 4096, 513, "rank 1 published a tensor of 513 elements"),
        (1, 4096, 1 << 62, "rank 1 published a tensor of 4611686018427387904 elements"),
    ],
)
@pytest.mark.parametrize("of", [INPUTS, OUTPUTS])
def test_a_tensor_outside_the_segment_raises_instead_of_crashing(
    of: int, blocks: int, offset: int, count: int, text: str
) -> None:
    with ThreadRanks(2, algorithms={"all_reduce": "two_shot"}) as ranks:
        array = HxMemory(ranks.runtimes[0]).place(np.ones(512, np.float32))
        posted = ranks.groups[0].post(call("all_reduce", "float32", [array], [array], device="hx"))
        victim = Page(ranks.runtimes[0], ranks.groups[0].control_offset)
        hostile = Page(ranks.runtimes[1], ranks.groups[1].control_offset)
        hostile.put(FINGERPRINT + 1, victim.get(FINGERPRINT + 1))
        n_inputs, n_outputs = (blocks, 1) if of == INPUTS else (1, blocks)
        hostile.put(BLOCK_COUNTS, n_inputs << 32 | n_outputs << 48)
        for extent in (INPUTS, OUTPUTS):
            hostile.put(extent, offset if extent == of else 4096)
            hostile.put(extent + 1, count if extent == of else 512)
        hostile.put(PROGRESS, (1 << 16) + 1)
        with pytest.raises(AbortedError, match=text):
            ranks.groups[0].wait(posted)
        assert not ranks.groups[0].is_alive()


@pytest.mark.parametrize("offset", [1, 4097, 64 << 20, (1 << 64) - 4096])
def test_a_control_page_outside_the_segment_is_refused(offset: int) -> None:
    ours, theirs = _core.Runtime(1 << 20), _core.Runtime(1 << 20)
    group = _core.Group(ours, name="g", rank=0, world_size=2, label="rank 0", nonce=1)
    with pytest.raises(InitError, match="rank 1 says its control page lies at byte"):
        group.connect(
            rank=1, address=theirs.address, nonce=theirs.nonce, control_offset=offset, label="rank 1", timeout_ms=5000
        )
    group.leave()
