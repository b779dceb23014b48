"""Notes that processes leave each other in their segments, read as what another process may have written there."""

from __future__ import annotations

import pytest

from hxcomm import _core
from hxcomm.errors import InitError


def test_a_note_is_read_by_a_neighbour_and_stays_until_it_is_written_anew() -> None:
    writer, reader = _core.Runtime(1 << 24), _core.Runtime(1 << 24)
    offset = writer.allocate_notes()
    neighbour = reader.neighbour(writer.address, writer.nonce, 5000)
    assert neighbour is not None and neighbour.death == ""
    assert [neighbour.read_note(offset, index) for index in range(4)] == [(0, b"")] * 4
    writer.write_note(offset, 1, 77, "hello")
    writer.write_note(offset, 3, 78, "x" * 4080)
    assert neighbour.read_note(offset, 1) == (77, b"hello")
    assert neighbour.read_note(offset, 3) == (78, b"x" * 4080)
    writer.write_note(offset, 1, 79, "")
    assert neighbour.read_note(offset, 1) == (79, b"")
    with pytest.raises(InitError, match="a note of 4081 bytes; at most 4080 fit"):
        writer.write_note(offset, 1, 80, "x" * 4081)


def test_a_place_that_is_none_is_refused_by_reader_and_writer() -> None:
    writer, reader = _core.Runtime(1 << 24), _core.Runtime(1 << 24)
    neighbour = reader.neighbour(writer.address, writer.nonce, 5000)
    assert neighbour is not None
    for offset, index in [(4096 + 64, 0), (1 << 24, 0), ((1 << 24) - 4096, 0), (1 << 63, 0), (4096, 4)]:
        with pytest.raises(InitError, match=f"no note {index} at byte {offset} of a segment"):
            neighbour.read_note(offset, index)
        with pytest.raises(InitError, match=f"no note {index} at byte {offset} of a segment"):
            writer.write_note(offset, index, 1, "x")


def test_nobody_at_the_address_is_no_neighbour_and_another_nonce_is_refused() -> None:
    writer, reader = _core.Runtime(1 << 24), _core.Runtime(1 << 24)
    assert reader.neighbour("hxcomm-" + "0" * 32, writer.nonce, 5000) is None
    with pytest.raises(InitError, match="refused the nonce"):
        reader.neighbour(writer.address, bytes(16), 5000)
