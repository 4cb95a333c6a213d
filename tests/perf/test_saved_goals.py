"""What the blocks of build_lm keep for backward is within the goals."""

from importlib.util import find_spec

import pytest

from perf import gate
from tests.support.devices import INTERPRETING

pytestmark = pytest.mark.skipif(
    not INTERPRETING or find_spec("triton") is None, reason="counts in Triton's interpreter"
)


@pytest.mark.parametrize("kind", ["gpt", "gated"])
def test_a_block_keeps_no_more_than_its_goal(kind):
    from perf.counted import BASELINE, GOALS, SAVED, count_saved

    elements = count_saved(kind, lambda x, made: made(x)) / 2
    assert elements <= GOALS[kind]
    assert gate.read(BASELINE)["figures"][f"{kind} block"][SAVED] / 2 <= GOALS[kind]
