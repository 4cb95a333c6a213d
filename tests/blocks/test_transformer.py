"""TransformerLM as a module: init, tying, meta device, copies, checkpointing, compilation."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from perf.meters.aten import operators
from tests.blocks.test_linear import Lora
from tests.support.devices import DEVICE
from trilith.blocks import LMConfig, TransformerBlock, build_lm
from trilith.blocks.config import build_block
from trilith.kernels import _linear_cross_entropy_chunks as chunks

TINY = LMConfig(vocab_size=30, dim=16, n_layers=2, n_heads=2, mlp_hidden=24, max_len=12)
KINDS = {
    "tied": {},
    "untied": {"tied": False},
    "learned": {"position": "learned"},
    "sinusoidal": {"position": "sinusoidal"},
    "sandwich": {"residual": "sandwich"},
    "gpt": {"norm": "layer_norm", "mlp": "mlp", "activation": "gelu", "bias": True},
}


def config(**changes) -> LMConfig:
    sizes = {"vocab_size": 30, "dim": 16, "n_layers": 2, "n_heads": 2, "max_len": 12}
    return LMConfig(**{**sizes, "mlp_hidden": 24, **changes})


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 30, shape, device=DEVICE)


def test_loss_is_the_cross_entropy_of_the_logits():
    model = build_lm(TINY).to(DEVICE)
    x, y = tokens(2, 7), tokens(2, 7)
    y[0, :3] = -100
    logits = model(x)
    assert logits.shape == (2, 7, 30)
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    torch.testing.assert_close(model(x, y), expected)


def as_large_as_the_logits(run) -> int:
    """How many operators give something with a number for each of 14 tokens and 30 classes."""
    seen = []

    def observe(name, args, kwargs, result):
        seen.extend(t for t in torch.utils._pytree.tree_leaves(result) if t.numel() == 14 * 30)

    with operators(observe):
        run()
    return len(seen)


@pytest.mark.parametrize("tied", [True, False])
def test_training_never_has_all_logits(tied, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", 7)
    model = build_lm(config(tied=tied)).to(DEVICE)
    x, y = tokens(2, 7), tokens(2, 7)
    assert as_large_as_the_logits(lambda: model(x, y).backward()) == 0
    assert as_large_as_the_logits(lambda: model(x, y, logits=True)[0].backward()) > 0


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_loss_and_logits_together_are_those_apart(kind):
    model = build_lm(config(**KINDS[kind])).to(DEVICE)
    x, y = tokens(2, 7), tokens(2, 7)
    loss, logits = model(x, y, logits=True)
    assert torch.equal(logits, model(x)) and torch.equal(logits, model(x, logits=True))
    torch.testing.assert_close(loss, model(x, y))
    parts = [torch.autograd.grad(out, list(model.parameters())) for out in (loss, model(x, y))]
    for a, b in zip(*parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("logits", [False, True])
def test_the_mean_may_divide_by_the_items_of_a_larger_batch(logits):
    model = build_lm(TINY).to(DEVICE)
    x, y = tokens(2, 7), tokens(2, 7)
    loss = model(x, y, logits=logits, num_items=56)
    loss = loss[0] if logits else loss
    torch.testing.assert_close(loss, model(x, y) / 4)


def test_a_head_that_does_more_when_called_is_called():
    model = build_lm(config(tied=False)).to(DEVICE)
    x, y = tokens(2, 7), tokens(2, 7)
    plain = model(x, y)
    model.head = Lora(model.head).to(DEVICE)
    loss = model(x, y)
    loss.backward()
    assert not torch.equal(loss, plain)
    assert model.head.a.weight.grad.abs().sum() > 0 and model.head.base.weight.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind):
    model = build_lm(config(**KINDS[kind])).to(DEVICE)
    model(tokens(2, 12), tokens(2, 12)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_loss_is_near_that_of_a_uniform_guess(kind):
    sizes = {"vocab_size": 256, "dim": 128, "n_layers": 2, "n_heads": 4, "max_len": 32}
    model = build_lm(config(**{**sizes, **KINDS[kind]})).eval()
    x = torch.randint(0, 256, (2, 32))
    for targets in (torch.randint(0, 256, (2, 32)), x):
        loss = model.to(DEVICE)(x.to(DEVICE), targets.to(DEVICE)).item()
        assert abs(loss - math.log(256)) < 0.6


@pytest.mark.parametrize("n_layers", [2, 8])
def test_init_scales(n_layers):
    sizes = {"dim": 256, "n_layers": n_layers, "n_heads": 4, "mlp_hidden": 384, "bias": True}
    model = build_lm(config(**sizes, vocab_size=500, tied=False))
    gain = 1 / math.sqrt(2 * n_layers)
    scales = {
        "attention.branch.qkv": 1 / math.sqrt(256),
        "attention.branch.out": gain / math.sqrt(256),
        "mlp.branch.gate": 1 / math.sqrt(256),
        "mlp.branch.up": 1 / math.sqrt(256),
        "mlp.branch.down": gain / math.sqrt(384),
    }
    for block in model.blocks:
        for name, scale in scales.items():
            linear = block.get_submodule(name)
            assert linear.weight.std().item() == pytest.approx(scale, rel=0.03), name
            assert linear.bias.abs().max() == 0
        assert torch.equal(block.attention.pre.weight, torch.ones(256))
    assert model.head.weight.std().item() == pytest.approx(0.5 / 16, rel=0.03)
    assert model.embedding.weight.std().item() == pytest.approx(1.0, rel=0.03)


def test_residual_stream_keeps_its_scale_with_depth():
    sizes = {"vocab_size": 256, "dim": 64, "n_heads": 2, "mlp_hidden": 128, "tied": False}
    model = build_lm(config(**sizes, n_layers=12, max_len=16)).to(DEVICE).eval()
    x = model.embedding(torch.randint(0, 256, (1, 16), device=DEVICE))
    start = x.square().mean()
    with torch.no_grad():
        for block in model.blocks:
            x = block(x)
    assert 1.0 < x.square().mean() / start < 3.0


def test_tied_model_has_one_table():
    model = build_lm(TINY)
    assert "head.weight" not in model.state_dict()
    assert build_lm(config(tied=False)).head.weight is not None
    model.to(DEVICE)(tokens(1, 5)).sum().backward()
    assert (model.embedding.weight.grad.abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_meta_device_then_to_empty_then_reset(kind):
    with torch.device("meta"):
        model = build_lm(config(**KINDS[kind]))
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.nan)
    model.reset_parameters()
    assert all(p.isfinite().all() for p in model.parameters())
    assert same_logits(model, loaded(build_lm(config(**KINDS[kind])), model))


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_copies_and_pickle_keep_the_function(kind):
    model = build_lm(config(**KINDS[kind]))
    fresh = loaded(build_lm(config(**KINDS[kind])), model)
    for other in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_logits(model, other)
        assert not {p.data_ptr() for p in model.parameters()} & {
            p.data_ptr() for p in other.parameters()
        }


def loaded(model: nn.Module, source: nn.Module) -> nn.Module:
    model.load_state_dict(source.state_dict())
    return model


def same_logits(a: nn.Module, b: nn.Module) -> bool:
    x = tokens(1, 6)
    return torch.equal(a.to(DEVICE).eval()(x), b.to(DEVICE).eval()(x))


def test_checkpointed_activations_change_neither_loss_nor_gradients():
    """To the bit on a CPU. On a GPU the norm after a block whose activations are kept is fused with
    the residual sum, and another kernel's multiply-adds round otherwise."""
    exact = {"rtol": 0, "atol": 0} if DEVICE == "cpu" else {}
    plain = build_lm(config(dropout=0.2)).to(DEVICE)
    checkpointed = loaded(
        build_lm(config(dropout=0.2, checkpoint_activations=True)).to(DEVICE), plain
    )
    x, y = tokens(2, 6), tokens(2, 6)
    losses = []
    for model in (plain, checkpointed):
        torch.manual_seed(3)
        losses.append(model(x, y))
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], **exact)
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, **exact)


def test_bfloat16_model_runs():
    model = build_lm(TINY).to(DEVICE, torch.bfloat16)
    loss = model(tokens(1, 5), tokens(1, 5))
    loss.backward()
    assert loss.isfinite() and loss.dtype == torch.bfloat16


def test_autocast_keeps_the_loss_in_float32():
    model = build_lm(TINY).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = model(tokens(1, 5), tokens(1, 5))
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("kind", ["tied", "gpt"])
def test_block_compiles_as_one_graph(kind):
    block: TransformerBlock = build_block(config(**KINDS[kind])).to(DEVICE)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, 16, device=DEVICE, requires_grad=True)
    parameters = [x, *block.parameters()]
    outputs = [run(x) for run in (block, compiled)]
    eager, traced = (torch.autograd.grad(y.square().sum(), parameters) for y in outputs)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    for a, b in zip(eager, traced, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
