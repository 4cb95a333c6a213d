"""What the blocks of build_lm keep for backward is within the goals."""

from importlib.util import find_spec

import pytest
import torch

from perf import gate
from tests.support.devices import INTERPRETING

pytestmark = pytest.mark.skipif(
    not INTERPRETING or find_spec("triton") is None, reason="counts in Triton's interpreter"
)


@pytest.mark.parametrize("kind", ["gpt", "gated"])
def test_a_block_keeps_no_more_than_its_goal(kind):
    from perf.counted import BASELINE
    from perf.counting import GOALS, SAVED, count_saved

    elements = count_saved(kind, lambda x, made: made(x)) / 2
    assert elements <= GOALS[kind]
    assert gate.read(BASELINE)["figures"][f"{kind} block"][SAVED] / 2 <= GOALS[kind]


@pytest.mark.parametrize("kind", ["gpt", "gated"])
def test_dropout_adds_seeds_and_nothing_else(kind):
    from perf.meters.saved import saved_bytes
    from perf.models import block

    def saved(dropout):
        made = block(kind, 64, 2, 32, dropout=dropout).to(torch.bfloat16)
        x = torch.randn(1, 32, 64, dtype=torch.bfloat16, requires_grad=True)
        return saved_bytes(lambda: made(x), [*made.parameters(), *made.buffers()])

    seeds = {"attention weights", "attention's branch", "mlp's branch"}
    assert saved(0.1) - saved(0.0) == 8 * len(seeds)
