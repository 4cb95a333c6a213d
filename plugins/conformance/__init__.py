"""The checks that every op passes, ours and third parties': numbers, gradients, layouts, tracing.

Each check is called with (op, sample, device, dtype), takes those that it names, and raises
AssertionError with the op, the sample and what was wrong; `CHECKS` holds all of them. A check that
does not apply to a sample returns. The reference in float64 on a CPU is the measure; yardsticks for
how much rounding is fair are the same reference in the sample's dtypes, and in float64 for inputs
half a step away.

Example:
    for sample in samples_of(op, device, dtype):
        for check in CHECKS:
            check(op, sample, device, dtype)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trilith.plugins.conformance.declarations import cost_is_sound
from trilith.plugins.conformance.launches import (
    guard_bands,
    reads_stay_inside,
    writes_are_disjoint,
)
from trilith.plugins.conformance.memory import (
    every_element_is_written,
    input_layouts,
    nothing_is_written_to,
    offsets_beyond_32_bits,
    upstream_layouts,
)
from trilith.plugins.conformance.numbers import (
    double_backward,
    empty_tensors,
    forward_matches_reference,
    gradient_subsets,
    gradients_match_reference,
    unused_outputs,
)
from trilith.plugins.conformance.processes import processes_agree
from trilith.plugins.conformance.regimes import (
    mixed_dtypes,
    regimes,
    regimes_in_16_bits,
    regimes_of_others,
)
from trilith.plugins.conformance.repeats import (
    backward_twice,
    calls_are_apart,
    runs_are_bit_equal,
)
from trilith.plugins.conformance.shards import shards_agree
from trilith.plugins.conformance.support import (
    Check,
    backward_arguments,
    covering,
    floating,
    samples_of,
)
from trilith.plugins.conformance.transforms import (
    autocast,
    checkpointing,
    compiles,
    compiles_dynamic,
    compiles_with_inductor,
    fakes_are_exact,
    functorch_transforms,
    inference_mode,
    opcheck,
)

__all__ = [
    "CHECKS",
    "NUMERIC_CHECKS",
    "Check",
    "PER_TENSOR",
    "backward_arguments",
    "covering",
    "dtypes_of_check",
    "floating",
    "guard_bands",
    "samples_of",
]

NUMERIC_CHECKS: tuple[Check, ...] = (
    forward_matches_reference,
    gradients_match_reference,
    every_element_is_written,
)

CHECKS: tuple[Check, ...] = (
    guard_bands,  # what fails it may end the process in any other
    *NUMERIC_CHECKS,
    mixed_dtypes,
    regimes,
    regimes_of_others,
    regimes_in_16_bits,
    gradient_subsets,
    unused_outputs,
    input_layouts,
    upstream_layouts,
    offsets_beyond_32_bits,
    reads_stay_inside,
    writes_are_disjoint,
    nothing_is_written_to,
    backward_twice,
    runs_are_bit_equal,
    calls_are_apart,
    processes_agree,
    empty_tensors,
    double_backward,
    functorch_transforms,
    fakes_are_exact,
    autocast,
    checkpointing,
    inference_mode,
    opcheck,
    cost_is_sound,
    shards_agree,
    compiles,
    compiles_dynamic,
    compiles_with_inductor,
)
# Of one tensor after another: a few samples say as much as all.
PER_TENSOR: frozenset[Check] = frozenset(
    {
        gradient_subsets,
        input_layouts,
        upstream_layouts,
        offsets_beyond_32_bits,
        mixed_dtypes,
        regimes_of_others,
    }
)


def dtypes_of_check(check: Check, dtypes: Sequence[torch.dtype]) -> tuple[torch.dtype, ...]:
    """In which of an op's dtypes a check is run: numbers and fakes in all, others in the first.

    Mixtures are made of the first, and of the last in 16 bits: of bfloat16 beside float32.
    """
    if check in NUMERIC_CHECKS or check is fakes_are_exact:
        return tuple(dtypes)
    narrow = tuple(dtype for dtype in dtypes if dtype.itemsize == 2)
    if check is regimes_in_16_bits:
        return narrow
    if check is mixed_dtypes:
        return tuple(dict.fromkeys((*dtypes[:1], *narrow[-1:])))
    return tuple(dtypes[:1])
