"""A slice of torch's own operator tests (OpInfo) on hx against CPU; scripts/opinfo.py runs all, docs/opinfo.md has it.

Every tenth operator in all dtypes that CPU has, and every operator of a transformer.
"""

from __future__ import annotations

import warnings

import pytest

pytest.importorskip("expecttest", reason="torch's operator tests import expecttest: pip install expecttest")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import opinfo
    import torch

NUMBERS = [
    number
    for number, op in enumerate(opinfo.op_db)
    if number % 10 == 0
    or op.full_name
    in {"mm", "addmm", "bmm", "softmax", "cat", "index_select", "nn.functional.embedding", "nn.functional.linear"}
    or op.full_name in {"nn.functional.silu", "nn.functional.rms_norm", "nn.functional.scaled_dot_product_attention"}
]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: opinfo.op_db[number].full_name)
def test_an_operator_gives_what_it_gives_on_cpu(number: int) -> None:
    copies = torch.hx.output_copies()
    outcomes = opinfo.check_op(number, ())
    wrong = [f"{o.kind} {o.dtype}: {o.problem}" for o in outcomes if o.problem and not o.reason]
    assert not wrong, "\n".join(wrong)
    assert torch.hx.output_copies() == copies


def test_every_exception_names_an_operator_and_a_reason() -> None:
    names = {op.full_name for op in opinfo.op_db}
    for (name, kind), allowed in opinfo.EXCEPTIONS.items():
        assert name in names and kind in {opinfo.FORWARD, opinfo.GRADIENT, "any"}
        assert len(allowed.reason) > 20
