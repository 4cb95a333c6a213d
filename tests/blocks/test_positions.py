"""Positions: what they add or rotate, their tables' precision, and their limits."""

import copy
import math

import pytest
import torch

from tests.support.devices import DEVICE
from trilith.blocks import LearnedPosition, Rotary, SinusoidalPosition


def test_rotary_scores_depend_on_the_distance_only():
    rotary = Rotary(8, 16).to(DEVICE)
    q, k = torch.randn(2, 8, device=DEVICE)
    rotated_q, rotated_k = rotary(*(t.expand(1, 1, 16, 8) for t in (q, k)))
    scores = (rotated_q @ rotated_k.transpose(-1, -2))[0, 0]
    for distance in (0, 1, 7):
        along = scores.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores[0, 0], q @ k, rtol=1e-5, atol=1e-5)


def test_rotary_angles():
    rotary = Rotary(6, 5, base=100.0)
    for position in range(5):
        for pair in range(3):
            angle = position * 100.0 ** (-2 * pair / 6)
            assert rotary.cos[position, pair].item() == pytest.approx(math.cos(angle), abs=1e-6)
            assert rotary.sin[position, pair].item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_rotary_tables_stay_float32():
    rotary = Rotary(8, 2048)
    exact = rotary.cos.clone()
    assert torch.equal(rotary.to(torch.bfloat16).cos, exact)
    assert torch.equal(copy.deepcopy(rotary).half().cos, exact)
    assert rotary.state_dict() == {}


@pytest.mark.parametrize("make", [lambda: Rotary(8, 32), lambda: SinusoidalPosition(32, 8)])
def test_tables_are_whole_after_to_empty(make):
    with torch.device("meta"):
        module = make()
    module.to_empty(device="cpu")
    for name, table in make().named_buffers():
        torch.testing.assert_close(module.get_buffer(name), table, rtol=0, atol=0)


def test_learned_position_adds_its_rows():
    position = LearnedPosition(7, 4, scale=0.5).to(DEVICE)
    x = torch.randn(2, 5, 4, device=DEVICE)
    torch.testing.assert_close(position(x), x + position.weight[:5])
    position(x).sum().backward()
    assert torch.equal(position.weight.grad[:, 0].cpu(), torch.tensor([2.0] * 5 + [0.0] * 2))


def test_learned_position_scale():
    assert LearnedPosition(200, 100, scale=0.3).weight.std().item() == pytest.approx(0.3, rel=0.03)


def test_sinusoidal_position():
    table = SinusoidalPosition(40, 6).table
    for pos in (0, 3, 39):
        for pair in range(3):
            angle = pos / 10000 ** (2 * pair / 6)
            assert table[pos, 2 * pair].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[pos, 2 * pair + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)
    position = SinusoidalPosition(40, 6, scale=0.1)
    torch.testing.assert_close(position.table, 0.1 * table)
    table = position.table
    x = torch.randn(2, 4, 6)
    torch.testing.assert_close(position(x), x + table[:4])


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (LearnedPosition(4, 6), torch.zeros(1, 5, 6)),
        (SinusoidalPosition(4, 6), torch.zeros(1, 5, 6)),
    ],
)
def test_too_long_a_sequence_is_refused(module, x):
    with pytest.raises(ValueError, match="at most max_len=4 tokens, got 5"):
        module(x)


def test_too_long_for_rotary_is_refused():
    with pytest.raises(ValueError, match="Rotary: a sequence must have at most max_len=4"):
        Rotary(6, 4)(torch.zeros(1, 1, 5, 6), torch.zeros(1, 1, 5, 6))


def test_odd_sizes_are_refused():
    with pytest.raises(ValueError, match="base must be positive, got -1.0"):
        Rotary(4, 4, base=-1.0)
    with pytest.raises(ValueError, match="head_dim must be even, got 5"):
        Rotary(5, 4)
    with pytest.raises(ValueError, match="dim must be even, got 5"):
        SinusoidalPosition(4, 5)
