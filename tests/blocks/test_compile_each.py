"""Every block and drop-in compiles to one graph, for one size and for any, and gives the same."""

import pytest
import torch
from torch import nn

from tests.support.devices import DEVICE
from trilith import blocks
from trilith.blocks import drop_in

D, HEADS, BATCH = 16, 2, 3
NO_GRAPH = {"KVCache", "PagedKVCache"}  # their lengths are kept on the host


def linear(n=D, m=D):
    return nn.Linear(n, m)


def mlp():
    return blocks.MLP(up=linear(D, 2 * D), down=linear(2 * D, D))


def attention(**given):
    return blocks.SelfAttention(qkv=linear(D, 3 * D), out=linear(), n_heads=HEADS, **given)


def residual(**given):
    return blocks.Residual(branch=mlp(), **given)


def rows(length):
    return (torch.randn(BATCH, length, D, device=DEVICE),)


def pair(length):
    return *rows(length), *rows(length)


def heads(length):
    return tuple(torch.randn(BATCH, HEADS, length, 8, device=DEVICE) for _ in "qk")


def tokens(length):
    return (torch.randint(19, (BATCH, length), device=DEVICE),)


def columns(length):
    return (torch.randn(BATCH * length, D, device=DEVICE),)


def classes(length):
    x = torch.randn(BATCH * length, D, device=DEVICE)
    return x, torch.randint(D, (BATCH * length,), device=DEVICE)


def cross(length):
    return *rows(length), *rows(4)


def lm():
    return blocks.build_lm(blocks.LMConfig(vocab_size=19, dim=D, n_layers=1, n_heads=HEADS))


def norm():
    return blocks.RMSNorm(D)


BLOCKS = {
    "Alibi": (lambda: attention(position=blocks.Alibi(HEADS)), rows),
    "CrossAttention": (
        lambda: blocks.CrossAttention(q=linear(), kv=linear(D, 2 * D), out=linear(), n_heads=HEADS),
        cross,
    ),
    "MLP": (mlp, rows),
    "GatedMLP": (lambda: blocks.GatedMLP(gate=linear(), up=linear(), down=linear()), rows),
    "GatedActivation": (lambda: blocks.GatedActivation("tanh"), pair),
    **{name: (getattr(blocks, name), pair) for name in ("GLU", "GeGLU", "ReGLU", "SwiGLU")},
    "ReLU2": (blocks.ReLU2, rows),
    "LayerNorm": (lambda: blocks.LayerNorm(D), rows),
    "RMSNorm": (norm, rows),
    "LearnedPosition": (lambda: blocks.LearnedPosition(9, D), rows),
    "SinusoidalPosition": (lambda: blocks.SinusoidalPosition(9, D), rows),
    "Rotary": (lambda: blocks.Rotary(8, 9), heads),
    "SelfAttention": (attention, rows),
    "StochasticDepth": (lambda: blocks.StochasticDepth(0.5).eval(), rows),
    "Residual": (lambda: residual(pre=norm(), inner=norm(), post=blocks.LayerNorm(D)), rows),
    "TransformerBlock": (lambda: lm().blocks[0], rows),
    "TransformerLM": (lm, tokens),
}
DROP_INS = {
    "BCEWithLogitsLoss": (drop_in.BCEWithLogitsLoss, pair),
    "MSELoss": (drop_in.MSELoss, pair),
    "CrossEntropyLoss": (drop_in.CrossEntropyLoss, classes),
    "BatchNorm1d": (lambda: drop_in.BatchNorm1d(D), columns),
    "Softmax": (lambda: drop_in.Softmax(-1), rows),
    "LogSoftmax": (lambda: drop_in.LogSoftmax(-1), rows),
    "Dropout": (lambda: drop_in.Dropout(0.5).eval(), rows),
    "LayerNorm": (lambda: drop_in.LayerNorm(D), rows),
    "RMSNorm": (lambda: drop_in.RMSNorm(D), rows),
    "MultiheadAttention": (
        lambda: drop_in.MultiheadAttention(D, HEADS, batch_first=True),
        lambda n: rows(n) * 3,
    ),
    "TransformerEncoderLayer": (
        lambda: drop_in.TransformerEncoderLayer(D, HEADS, 2 * D, 0.0, batch_first=True),
        rows,
    ),
    "TransformerDecoderLayer": (
        lambda: drop_in.TransformerDecoderLayer(D, HEADS, 2 * D, 0.0, batch_first=True),
        cross,
    ),
    **{
        name: (getattr(drop_in, name), rows)
        for name in ("ELU", "GELU", "LeakyReLU", "ReLU", "SiLU", "Sigmoid", "Tanh")
    },
}
EACH = [
    *(pytest.param(*case, id=f"blocks-{name}") for name, case in BLOCKS.items()),
    *(pytest.param(*case, id=f"drop_in-{name}") for name, case in DROP_INS.items()),
]


def results(module, function, given):
    """Outputs, and the gradients of parameters and of what is floating among the arguments."""
    leaves = [a.clone().requires_grad_() if a.is_floating_point() else a for a in given]
    out = function(*leaves)
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None]
    wanted = [p for p in (*module.parameters(), *leaves) if p.requires_grad]
    loss = sum(o.square().sum() for o in outs)
    return [*outs, *torch.autograd.grad(loss, wanted, allow_unused=True)]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("make", "arguments"), EACH)
def test_it_is_one_graph_with_the_same_results(make, arguments, dynamic):
    module = make().to(DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (5, 7):
        given = arguments(length)
        found, expected = results(module, compiled, given), results(module, module, given)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def modules_of(package):
    found = ((name, getattr(package, name)) for name in package.__all__)
    return {n for n, item in found if isinstance(item, type) and issubclass(item, nn.Module)}


def test_none_is_left_out():
    assert set(BLOCKS) == modules_of(blocks) - NO_GRAPH
    assert set(DROP_INS) == modules_of(drop_in)
