"""Residual sum and norm in one pass; norms and activations with the linear layer after them."""

from typing import Any

import pytest

from perf.fused_workloads import (
    add_norm,
    bias_act_linear,
    gated_act_linear,
    layer_norm_linear,
    rms_norm_linear_pair,
)
from perf.suite import Case, cases, measure
from perf.timing import CLOCK

GPU = [add_norm(8192, 4096), add_norm(8192, 4096, rms=True)]
GPU += [layer_norm_linear(8192, 1024, 4096, added=added) for added in (False, True)]
GPU += [rms_norm_linear_pair(8192, 1024, 2816)]
GPU += [bias_act_linear(8192, 4096, 1024), gated_act_linear(8192, 2816, 1024)]
CPU = [add_norm(256, 768), add_norm(256, 768, rms=True)]
CPU += [layer_norm_linear(64, 256, 128, added=added) for added in (False, True)]
CPU += [rms_norm_linear_pair(64, 256, 128)]
CPU += [bias_act_linear(64, 256, 128), gated_act_linear(64, 256, 128)]


@pytest.mark.benchmark(timer=CLOCK)
@cases(GPU, CPU)
def test_fused_linear(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
