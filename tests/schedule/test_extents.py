"""Which elements a chunk is: pieces cover their window once, in multiples of the quantum."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hxcomm.schedule.extents import CACHE_LINE_BYTES, QUANTUM, piece_elements, piece_extent, scratch_stride_bytes

counts = st.integers(0, 5000)


@given(counts, st.integers(1, 20), counts, counts)
def test_pieces_cover_their_window_once_and_in_order(count: int, pieces: int, low: int, length: int) -> None:
    extents = [piece_extent(count, pieces, piece, low, low + length) for piece in range(pieces)]
    covered = [element for first, end in extents for element in range(first, end)]
    assert covered == list(range(min(low, count), min(low + length, count)))
    assert all((end - first) % QUANTUM == 0 or end == min(low + length, count) for first, end in extents)


@given(counts, st.integers(1, 20), st.integers(1, 300))
def test_windows_cover_a_block_once(count: int, pieces: int, window: int) -> None:
    covered = [
        element
        for low in range(0, count, window)
        for piece in range(pieces)
        for element in range(*piece_extent(count, pieces, piece, low, low + window))
    ]
    assert covered == list(range(count))


@given(st.integers(0, 2**40), st.integers(1, 512), st.sampled_from([1, 2, 4, 8]))
def test_every_piece_fits_in_a_scratch_chunk(window: int, pieces: int, itemsize: int) -> None:
    stride = scratch_stride_bytes(window, (pieces, pieces), itemsize)
    assert stride % CACHE_LINE_BYTES == 0
    assert stride >= max((b - a) * itemsize for a, b in (piece_extent(window, pieces, p) for p in range(pieces)))


def test_the_rule_is_that_of_the_executor() -> None:
    assert piece_elements(100, 4) == 32  # 25, rounded up to the quantum
    assert [piece_extent(100, 4, piece) for piece in range(4)] == [(0, 32), (32, 64), (64, 96), (96, 100)]
    assert [piece_extent(17, 4, piece) for piece in range(4)] == [(0, 16), (16, 17), (17, 17), (17, 17)]
    assert scratch_stride_bytes(100, (4, 4), itemsize=2) == 64
    assert scratch_stride_bytes(0, (), itemsize=4) == 0
