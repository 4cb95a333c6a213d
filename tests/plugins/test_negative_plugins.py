"""Each wrong plugin of negative.py is caught, by the check or the loader's stage that it names."""

from __future__ import annotations

import pytest
import torch

from tests.plugins.negative import OPS, PLUGINS, SOUND, Bringing
from tests.plugins.negative_further import FURTHER
from trilith.plugins import PluginWarning, Registry
from trilith.plugins.conformance import CHECKS
from trilith.plugins.report import check_op, run_check

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {
    "wrong_in_bfloat16_only": torch.bfloat16,
    "sums_in_its_own_dtype": torch.float16,
    "weight_rounded_to_the_dtype_of_x": torch.bfloat16,
}
BY_NAME = {check.__name__: check for check in CHECKS}


@pytest.mark.parametrize("fault", OPS | FURTHER)
def test_the_kit_catches(manager, fault):
    spec, check = (OPS | FURTHER)[fault]
    assert manager.add(f"bad:{fault}", lambda: Bringing(spec))
    op = manager.registry.op(spec.name)
    with pytest.raises(AssertionError, match=rf"^{spec.name}\(.*: {check}: "):
        run_check(op, "negative", BY_NAME[check], DEVICE, DTYPES.get(fault, torch.float32))


def test_the_kit_passes_the_sound_one(manager):
    manager.add("good:sound", lambda: Bringing(SOUND))
    rows = list(check_op(manager.registry.op(SOUND.name), CPU))
    assert [row.check for row in rows] == [check.__name__ for check in CHECKS]
    assert [row.check for row in rows if row.reason] == []


@pytest.mark.parametrize("fault", PLUGINS)
def test_the_loader_catches(manager, fault):
    load, stage, reason = PLUGINS[fault]
    manager.add("good:sound", lambda: Bringing(SOUND))
    with pytest.warns(PluginWarning, match=f"bad:{fault} is left out"):
        assert not manager.add(f"bad:{fault}", load)
    (failure,) = manager.failures
    assert (failure.plugin, failure.stage) == (f"bad:{fault}", stage)
    assert reason in failure.reason
    assert manager.registry.op_names() == [SOUND.name]
    assert manager.registry.op(SOUND.name)(torch.ones(1, 1), torch.ones(1)).item() == 1.0


def test_a_report_names_the_check_that_failed_and_hints():
    registry = Registry()
    spec, check = OPS["wrong_gradient"]
    op = registry.add_op(spec)
    try:
        rows = {row.check: row for row in check_op(op, CPU)}
    finally:
        op.destroy()
    assert rows[check].reason.startswith("negative::wrong_gradient(")
    assert rows[check].hint
    assert not rows["forward_matches_reference"].reason
