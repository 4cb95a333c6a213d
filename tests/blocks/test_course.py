"""Cross-attention, ALiBi and stochastic depth: each is the formula it says."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.support.devices import DEVICE
from trilith.blocks import (
    MLP,
    Alibi,
    CrossAttention,
    LayerNorm,
    Residual,
    SelfAttention,
    StochasticDepth,
)


@pytest.mark.parametrize("alibi", [False, True])
def test_cross_attention_formula(alibi):
    position = Alibi(2) if alibi else None
    linears = {"q": nn.Linear(8, 8), "kv": nn.Linear(6, 8), "out": nn.Linear(8, 8)}
    block = CrossAttention(**linears, n_heads=2, n_kv_heads=1, position=position).to(DEVICE)
    x, memory = torch.randn(2, 5, 8, device=DEVICE), torch.randn(2, 7, 6, device=DEVICE)
    q = block.q(x).view(2, 5, 2, 4).transpose(1, 2)
    k, v = block.kv(memory)[:, None].chunk(2, dim=-1)
    scores = q @ k.transpose(-1, -2) / 2
    if alibi:  # queries stand at the end of the keys
        far = (torch.arange(5)[:, None] + 2 - torch.arange(7)).abs().to(DEVICE)
        scores = scores - torch.tensor([2**-4, 2**-8], device=DEVICE)[:, None, None] * far
    expected = block.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(block(x, memory), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_with_alibi(causal):
    linears = {"qkv": nn.Linear(8, 24), "out": nn.Linear(8, 8)}
    block = SelfAttention(**linears, n_heads=2, position=Alibi(2), causal=causal).to(DEVICE)
    x = torch.randn(2, 5, 8, device=DEVICE)
    q, k, v = block.qkv(x).unflatten(-1, (6, 4)).transpose(1, 2).chunk(3, dim=1)
    place = torch.arange(5, device=DEVICE)
    far = (place[:, None] - place).abs()
    slopes = torch.tensor([2**-4, 2**-8], device=DEVICE)[:, None, None]
    scores = q @ k.transpose(-1, -2) / 2 - slopes * far
    if causal:
        scores = scores.masked_fill(place[:, None] < place, -math.inf)
    expected = block.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


def test_alibi_slopes():
    assert Alibi(1)().tolist() == [2.0**-8]
    assert Alibi(8)().tolist() == [2.0**-h for h in range(1, 9)]
    expected = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    assert Alibi(6).bfloat16()().tolist() == expected


def test_stochastic_depth_drops_samples_and_scales_the_rest():
    x = torch.randn(4000, 3, 2, device=DEVICE, requires_grad=True)
    layer = StochasticDepth(0.25)
    y = layer(x)
    kept = (y != 0).flatten(1).any(1)
    assert abs(kept.double().mean().item() - 0.75) < 5 * math.sqrt(0.25 * 0.75 / 4000)
    torch.testing.assert_close(y[kept], x[kept] / 0.75)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, (kept / 0.75)[:, None, None].expand_as(dx).to(dx.dtype))
    assert layer.eval()(x) is x
    y = StochasticDepth(1.0)(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert not y.any() and (dx == 0).all()


def test_stochastic_depth_under_checkpoint_draws_the_same():
    block = Residual(branch=nn.Linear(4, 4), inner=StochasticDepth(0.5)).to(DEVICE)
    x = torch.randn(16, 4, device=DEVICE, requires_grad=True)
    torch.manual_seed(3)
    (plain,) = torch.autograd.grad(block(x).square().sum(), x)
    torch.manual_seed(3)
    y = checkpoint(block, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], plain)


@pytest.mark.parametrize("by", ["norm", "value"])
def test_gradients_are_clipped(by):
    model = nn.Sequential(LayerNorm(6), MLP(up=nn.Linear(6, 9), down=nn.Linear(9, 6))).to(DEVICE)
    (100 * model(torch.randn(4, 6, device=DEVICE)).square().sum()).backward()
    before = torch.cat([p.grad.flatten() for p in model.parameters()])
    if by == "norm":
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        expected = before / before.norm()
    else:
        nn.utils.clip_grad_value_(model.parameters(), 0.5)
        expected = before.clamp(-0.5, 0.5)
    after = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-6)


def test_links_of_the_course_resolve():
    folder = Path(__file__).parents[2] / "blocks"
    links = re.findall(r"\]\(([^)#]+)\)", (folder / "README.md").read_text())
    assert len(links) > 25
    assert not [link for link in links if not (folder / link).is_file()]
