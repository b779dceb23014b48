"""Which elements a chunk is. The executor in csrc/core/plan.h follows the same rule.

A block of `count` elements is worked on in windows [low, high), cut into `pieces` of a multiple of QUANTUM elements:
pieces then share no vectors and (from 4-byte types up) no cache lines, and the last ones may be short or empty.
"""

from __future__ import annotations

QUANTUM = 16
CACHE_LINE_BYTES = 64


def piece_elements(window: int, pieces: int, quantum: int = QUANTUM) -> int:
    """Elements of each full piece of a window of `window` elements."""
    return -(-window // (pieces * quantum)) * quantum


def piece_extent(
    count: int, pieces: int, piece: int, low: int = 0, high: int | None = None, quantum: int = QUANTUM
) -> tuple[int, int]:
    """(first, end) of a piece inside its block of `count` elements, for the window [low, high) of the block.

    With one piece the piece is the window, otherwise the quantum decides. `quantum` is for tests of short buffers.
    """
    begin = min(low, count)
    window = (count if high is None else min(high, count)) - begin
    each = piece_elements(window, pieces, quantum)
    return begin + min(piece * each, window), begin + min((piece + 1) * each, window)


def scratch_stride_bytes(window: int, pieces: tuple[int, ...], itemsize: int) -> int:
    """Bytes from one scratch chunk to the next: the largest chunk of the window, rounded up to cache lines.

    pieces: of input and of output, where they have blocks. itemsize: of the accumulation type where partials lie there.
    """
    elements = max((piece_elements(window, each) for each in pieces), default=0)
    return -(-elements * itemsize // CACHE_LINE_BYTES) * CACHE_LINE_BYTES
