"""What README says of a step's memory is what is counted."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from examples.lm import memory
from examples.lm.settings import PRESETS

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.skipif(find_spec("triton") is None, reason="counts what kernels would need")
@pytest.mark.parametrize(
    ("preset", "batch", "unit", "said"),
    [
        ("small", 16, 1e6, r"\((\d+) MB with the kernels, (\d+) MB in plain PyTorch"),
        ("gpt2-small", 8, 1e9, r"8 × 1024 tokens, ([\d.]+) and ([\d.]+) GB"),
    ],
    ids=["small", "gpt2-small"],
)
def test_readme_tells_the_memory_of_a_step(preset, batch, unit, said):
    counted = memory.counted_with_kernels(PRESETS[preset].model, batch)
    told = re.search(said, README.read_text())
    for text, found in zip(told.groups(), (counted["fused"], counted["plain"]), strict=True):
        digits = len(text.partition(".")[2])
        assert f"{found / unit:.{digits}f}" == text


@pytest.mark.skipif(find_spec("triton") is None, reason="counts what kernels would need")
def test_a_count_that_fails_is_told_and_ends_nothing(monkeypatch, capsys):
    monkeypatch.setattr(memory, "_ROOT", Path(__file__).parent)  # where there are no examples
    assert memory.counted_with_kernels(PRESETS["small"].model, 1) is None
    told = capsys.readouterr().err
    assert told.startswith("train_lm: memory with kernels was not counted: ")
    assert told.count("\n") == 1 and "examples" in told
