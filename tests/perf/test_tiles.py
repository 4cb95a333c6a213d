"""The survey of attention's tiles: what it takes, and what it prints."""

import argparse

import pytest
import torch

from perf import tiles
from trilith.kernels._runtime.language import triton

pytestmark = pytest.mark.skipif(not hasattr(triton, "__version__"), reason="needs Triton")


def test_an_entry_is_that_of_a_launch_table():
    assert tiles.entry("64,128,16,8,3") == (64, 128, 16, 8, 3)
    assert tiles.entry("64,32,32,8,1,128") == (64, 32, 32, 8, 1, 128)
    for text in ("64,128", "64,128,x,8,3", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="queries,keys,masked side"):
            tiles.entry(text)


def test_the_table_tells_spills_and_problems():
    good = {"tiles": (64, 64, 32, 4, 3), "ms": 0.1814, "tflops": 284.2, "registers": 227}
    rows = [
        {**good, "spilled": 0},
        {**good, "spilled": 26},
        {"tiles": (256, 128, 64, 16, 2), "problem": "out of resource: shared memory"},
    ]
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in tiles.table(rows).splitlines()]
    assert lines[2] == ["64,64,32,4,3", "0.1814", "284", "227", ""]
    assert lines[3][-1] == "26"
    assert lines[4][:2] == ["256,128,64,16,2", "out of resource: shared memory"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to time")
def test_without_a_gpu_it_says_what_to_do(capsys):
    assert tiles.main(["fwd", "128", "128,128,64,8,3"]) == 2
    assert "tests.support.aot tells spills" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="times a GPU's kernels")
@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_a_candidate_is_timed(kernel, monkeypatch):
    for table in tiles.tables.TABLES.values():  # to be as they were afterwards
        monkeypatch.setitem(table, "half", dict(table["half"]))
    row = tiles.timed(tiles.Candidate(kernel, 64, (64, 64, 32, 4, 2), (1, 2, 256)))
    assert row["ms"] > 0 and row["registers"] > 0
