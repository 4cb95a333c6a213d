"""The layouts that an argument may come in, as functions of a tensor."""

from trilith.plugins.conformance.layouts import (
    EXPANDED,
    LAYOUTS,
    contiguous,
    every_other,
    expanded,
    expanded_rows,
    misaligned,
    odd_unit_strides,
    packed,
    padded_rows,
    transposed,
)

__all__ = [
    "EXPANDED",
    "LAYOUTS",
    "contiguous",
    "every_other",
    "expanded",
    "expanded_rows",
    "misaligned",
    "odd_unit_strides",
    "packed",
    "padded_rows",
    "transposed",
]
