"""torch.compile and torch.export of whole models: one graph, few compilations, any length."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import trilith
from tests.support.devices import DEVICE
from trilith.blocks import LMConfig, build_lm, drop_in

KERNELS = Path(__file__).parents[2] / "kernels"
LENGTHS = (5, 6, 9)
LM = {"vocab_size": 19, "dim": 16, "n_layers": 1, "n_heads": 2, "mlp_hidden": 24, "max_len": 16}
LAYER = {"dim_feedforward": 24, "dropout": 0.0, "batch_first": True}
ON_CPU = {"host_lengths", "require_labels"}
WAITS = {"item", "tolist", "cpu", "nonzero", "synchronize", "numpy"}


class Stack(nn.Module):
    """What `fuse` finds in a model of torch.nn layers."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(19, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 2, **LAYER, norm_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 19))

    def forward(self, tokens):
        return self.mlp(self.encoder(self.embedding(tokens)))


def lm(**options):
    return build_lm(LMConfig(**LM, **options)).to(DEVICE)


def fused():
    model = Stack().to(DEVICE)
    trilith.fuse(model)
    return model


def decoder():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(19, 16)
            self.layer = drop_in.TransformerDecoderLayer(16, 2, **LAYER)

        def forward(self, tokens):
            x = self.embedding(tokens)
            return self.layer(x, x)

    return Decoder().to(DEVICE)


MODELS = {
    "llama": lm,
    "gpt": lambda: lm(norm="layer_norm", mlp="mlp", activation="gelu", position="learned"),
    "fused": fused,
    "decoder": decoder,
}
models = pytest.mark.parametrize("name", MODELS)


def tokens(length):
    return torch.randint(19, (2, length), device=DEVICE)


def gradients(model, out):
    return torch.autograd.grad(out.square().mean(), list(model.parameters()))


@pytest.mark.parametrize("name", ["llama", "fused"])
def test_lengths_beyond_the_second_compile_nothing_and_results_are_the_same(name):
    model, counter, counts = MODELS[name](), CompileCounterWithBackend("aot_eager"), []
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in LENGTHS:
        x = tokens(length)
        out, expected = compiled(x), model(x)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        actual, wanted = gradients(model, out), gradients(model, expected)
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    assert counts[1:] == [2, 2]


@models
def test_an_exported_model_runs_at_any_length(name):
    model = MODELS[name]().eval()
    length = torch.export.Dim("length", min=2, max=16)
    with torch.no_grad():
        program = torch.export.export(model, (tokens(5),), dynamic_shapes=({1: length},))
        for n in (3, 16):
            x = tokens(n)
            expected = model(x)
            torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-5)


@models
def test_an_exported_model_trains(name):
    """The graph calls torch ops without the autograd.Function that was around them."""
    model, x = MODELS[name](), tokens(5)
    exported = torch.export.export(model, (x,)).module()
    out, expected = exported(x), model(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    actual, wanted = gradients(exported, out), gradients(model, expected)
    by_name = dict(zip(dict(exported.named_parameters()), actual, strict=True))
    named = dict(zip(dict(model.named_parameters()), wanted, strict=True))
    torch.testing.assert_close(by_name, named, rtol=1e-4, atol=1e-5)


def test_an_exported_loss_without_logits_trains():
    model, x = MODELS["llama"](), tokens(5)
    targets = x.roll(-1, 1)
    exported = torch.export.export(model, (x, targets)).module()
    exported(x, targets).backward()
    model(x, targets).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(exported.get_parameter(name).grad, parameter.grad)


@models
def test_a_traced_model_computes_the_same(name):
    model, x, other = MODELS[name]().eval(), tokens(5), tokens(5)
    traced = torch.jit.trace(model, x, check_trace=False)
    torch.testing.assert_close(traced(other), model(other), rtol=1e-4, atol=1e-5)


def outside_of_references(path):
    """The calls and imports of a file, but not those of references and of what only CPUs run."""
    for top in ast.parse(path.read_text()).body:
        name = getattr(top, "name", "")
        if "reference" not in name and name not in ON_CPU:
            yield from ast.walk(top)


def test_no_launcher_waits_for_the_device_or_draws_on_the_host():
    """What a CUDA graph could not replay."""
    for path in sorted(KERNELS.rglob("*.py")):
        for node in outside_of_references(path):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr not in WAITS, f"{path.name}:{node.lineno}"
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            assert "random" not in names, f"{path.name}:{node.lineno}"


@pytest.mark.skipif(DEVICE == "cpu", reason="graphs are a GPU's")
def test_a_graph_of_a_training_step_replays():
    model, x = MODELS["llama"]().train(), tokens(8)

    def step():
        model.zero_grad(set_to_none=False)  # recorded too: what is there is overwritten
        model(x, targets=x).backward()

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    expected = [p.grad.clone() for p in model.parameters()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for parameter in model.parameters():
        parameter.grad.fill_(torch.nan)
    graph.replay()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)
