"""What opinfo.py does not expect to agree between hx and CPU, as data with a reason."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Allowed:
    """Why an operator differs; dtypes empty: all of them."""

    reason: str
    dtypes: tuple[str, ...] = ()


# Results whose contents are what memory held before: compared in shape, dtype and strides only.
UNINITIALIZED = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}

# Operators whose tensor arguments, but for the first, must be on CPU on every device.
ARGUMENTS_ON_CPU = {"tensor_split"}

# (operator, forward | gradient | any)
EXCEPTIONS: dict[tuple[str, str], Allowed] = {
    **{
        (f"nn.functional.linear_cross_entropy{variant}", "any"): Allowed(
            "torch chooses how this loss accumulates by a table with rows for device types, and hx has no row; the "
            "results differ in the last bits of 16-bit floats",
            ("float16", "bfloat16"),
        )
        for variant in (".chunked", ".chunked_none")
    },
    ("nn.functional.mish", "gradient"): Allowed(
        "torch computes mish's gradient from other operators on devices without a kernel of their own, and rounds "
        "each step to 16 bits",
        ("float16",),
    ),
}
