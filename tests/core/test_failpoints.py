"""HXCOMM_FAILPOINT: what it accepts. What armed points do is tested in tests/faults/test_chaos.py."""

from __future__ import annotations

import pytest

from hxcomm import _core


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("kill", "there is no '='"),
        ("nonesuch=kill", "there is no point 'nonesuch'"),
        ("none=kill", "there is no point 'none'"),
        ("judged=melt", "there is no action 'melt'"),
        ("judged@0=kill", "after '@' stands no number from 1 on"),
        ("judged@x=kill", "after '@' stands no number from 1 on"),
        ("judged@=kill", "after '@' stands no number from 1 on"),
        ("judged=pause", "pause has no number of milliseconds"),
        ("judged=pause:", "after 'pause:' stands no number of milliseconds"),
        ("judged=pause:-1", "after 'pause:' stands no number of milliseconds"),
        ("leave=throw", "nothing can be thrown at 'leave'"),
        ("abort=throw", "nothing can be thrown at 'abort'"),
    ],
)
def test_a_wrong_failpoint_is_refused_with_what_there_is(text: str, advice: str) -> None:
    with pytest.raises(ValueError) as raised:
        _core.arm_failpoint(text)
    message = str(raised.value)
    assert message.startswith(f"HXCOMM_FAILPOINT='{text}': {advice}"), message
    assert "post, staged, arrived, judged, transfer, published, ended, abort, leave" in message
    assert "kill, exit, stop, stop300, pause, throw" in message
