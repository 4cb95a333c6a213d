"""The gate on figures of binaries: what is no longer launched does not pass unseen."""

import pytest

from perf.binaries import NARROW, SPILLED, changes

ALIGNED, UNALIGNED = "drop sm_90 [bf16 ALIGN=16]", "drop sm_90 [bf16 ALIGN=1]"
OTHER = "norm sm_90 [bf16 BLOCK_N=1024]"
WIDE, NARROWED = {NARROW: 0.0, SPILLED: 0}, {NARROW: 1.0, SPILLED: 0}


def worse(*arguments):
    return [str(change) for change in changes(*arguments) if change.is_worse]


def test_a_variant_in_both_is_compared():
    assert worse({OTHER: WIDE}, {OTHER: WIDE}, {OTHER}) == []
    (line,) = worse({OTHER: WIDE}, {OTHER: NARROWED}, {OTHER})
    assert line == f"WORSE   {OTHER}: {NARROW} was 0, is 1"


@pytest.mark.parametrize("after", [{UNALIGNED: NARROWED}, {}], ids=["sampled", "not sampled"])
def test_a_launch_option_that_changed_is_seen(after):
    before = {ALIGNED: WIDE, OTHER: WIDE}
    found = worse(before, after | {OTHER: WIDE}, {UNALIGNED, OTHER})
    assert found and all(line.startswith(f"WORSE   {ALIGNED}: ") for line in found)


def test_what_has_taken_its_place_is_told_beside_it():
    told = [str(c) for c in changes({ALIGNED: WIDE}, {UNALIGNED: NARROWED}, {UNALIGNED})]
    assert f"new     {UNALIGNED}: {NARROW} is 1" in told


def test_a_variant_that_another_sample_has_not_is_no_change():
    """A call more in `shapes_*.py` makes another sample, of the same launches."""
    assert changes({ALIGNED: WIDE}, {UNALIGNED: NARROWED}, {ALIGNED, UNALIGNED}) == []


def test_an_architecture_that_was_not_surveyed_is_no_change():
    before = {ALIGNED: WIDE, "drop gfx942 [bf16 ALIGN=16]": WIDE}
    assert changes(before, {ALIGNED: WIDE}, {ALIGNED}) == []
