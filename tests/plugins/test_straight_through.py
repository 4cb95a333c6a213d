"""A backward that is not the derivative, declared as README says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.plugins.test_readme import README
from trilith.plugins import Op, OpSpec, Sample
from trilith.plugins.conformance import CHECKS
from trilith.plugins.report import run_check

CHECKED = (
    "forward_matches_reference",
    "gradients_match_reference",
    "regimes",
    "double_backward",
    "functorch_transforms",
    "compiles",
)


def forward(x: Tensor) -> tuple[Tensor, ...]:
    return (torch.where(x >= 0, 1.0, -1.0).to(x.dtype).contiguous(),)


@pytest.fixture
def op():
    told = README.read_text()
    at = told.index("class Sign(")
    names = {"torch": torch}
    exec(told[at : told.index("```", at)], names)
    made = Op(
        OpSpec(
            name="acme_through::sign",
            forward=forward,
            backward=lambda ctx, dy: (dy.clone(),),
            reference=names["straight_through"],
            samples=lambda device, dtype: [Sample(torch.randn(8, 16, device=device, dtype=dtype))],
            save_inputs=(),
            save_outputs=False,
            devices=("cpu",),
        )
    )
    yield made
    made.destroy()


@pytest.mark.parametrize("name", CHECKED)
def test_the_reference_of_the_readme_passes(op, name):
    (check,) = [check for check in CHECKS if check.__name__ == name]
    run_check(op, "acme_through", check, torch.device("cpu"), torch.float32)
