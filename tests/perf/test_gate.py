"""The gate on counted figures."""

from perf.gate import changes, markdown

BASELINE = {"norm": {"bytes": 1.0, "launches": 2}, "loss": {"bytes": 1.5}}


def test_equal_figures_change_nothing():
    assert (
        changes(BASELINE, {"norm": {"bytes": 1.00004, "launches": 2}, "loss": {"bytes": 1.5}}) == []
    )


def test_a_worse_figure_is_named_with_before_and_after():
    (change,) = changes(BASELINE, {"norm": {"bytes": 1.5, "launches": 2}, "loss": {"bytes": 1.5}})
    assert change.is_worse
    assert str(change) == "WORSE   norm: bytes was 1, is 1.5"


def test_one_launch_more_is_worse_and_better_figures_come_after_it():
    found = changes(BASELINE, {"norm": {"bytes": 0.9, "launches": 3}, "loss": {"bytes": 1.5}})
    assert [(c.figure, c.is_worse) for c in found] == [("launches", True), ("bytes", False)]


def test_a_figure_that_is_no_longer_counted_is_worse():
    (change,) = changes(BASELINE, {"norm": {"bytes": 1.0, "launches": 2}})
    assert change.is_worse and "no longer counted" in str(change)


def test_a_new_figure_is_told_and_not_worse():
    (change,) = changes({}, {"norm": {"bytes": 1.0}})
    assert not change.is_worse and str(change) == "new     norm: bytes is 1"


def test_a_figure_that_was_zero_may_not_grow():
    (change,) = changes({"kernel": {"spilled bytes": 0}}, {"kernel": {"spilled bytes": 8}})
    assert change.is_worse


def test_markdown_columns_are_aligned():
    assert markdown(["op", "a"], [["norm", "1.5"]]).splitlines() == [
        "| op   |   a |",
        "| ---- | --: |",
        "| norm | 1.5 |",
    ]
