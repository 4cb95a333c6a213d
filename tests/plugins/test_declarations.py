"""What a spec, a call and a launch say when they are given what they do not take."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trilith.kernels import launch
from trilith.plugins import Implementation, ModuleSpec, Op, OpSpec, Sample, ScoreMod
from trilith.plugins.selection import forced

CPU = torch.device("cpu")


def forward(x: Tensor, decay: float, size: int | None = None) -> tuple[Tensor, ...]:
    return (x * decay,)


SPEC = OpSpec(
    name="acme_declared::decayed",
    forward=forward,
    backward=lambda ctx, dy: (dy * ctx.inputs[1],),
    reference=lambda x, decay, size=None: x * decay,
    samples=lambda device, dtype: [Sample(torch.randn(3, device=device, dtype=dtype), 0.5)],
    devices=("cpu", "cuda"),
)


@pytest.fixture
def op():
    made = Op(SPEC)
    yield made
    made.destroy()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"save_outputs": (1,)}, ValueError, r"indices of the 1 outputs, got \(1,\)"),
        ({"save_outputs": ["x"]}, ValueError, r"indices of the 1 outputs, got \['x'\]"),
        ({"save_outputs": 0}, ValueError, "indices of the 1 outputs, got 0"),
        ({"save_outputs": {0: "y"}}, ValueError, r"tensors among the inputs \(x\), got"),
        ({"save_outputs": {0: "decay"}}, ValueError, r"tensors among the inputs \(x\), got"),
        ({"save_inputs": "x"}, TypeError, "save_inputs must be a tuple of names, got 'x'"),
        ({"parts": "a::b"}, TypeError, "parts must be a tuple of names, got 'a::b'"),
        ({"devices": ("gpu",)}, ValueError, r"as 'cuda', got \['gpu'\]"),
        ({"devices": ("cpu", "cuda:0")}, ValueError, r"as 'cuda', got \['cuda:0'\]"),
    ],
)
def test_a_spec_is_refused_when_it_is_made(given, error, message):
    with pytest.raises(error, match=f"^acme_declared::decayed: .*{message}"):
        Op(replace(SPEC, **given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"devices": ("gpu",)}, "devices must be types that torch.device.. knows"),
        ({"op": SPEC}, "op must be a str, got OpSpec"),
        ({"provider": 3}, "provider must be a str, got 3"),
        ({"dtypes": torch.float32}, "dtypes must be a tuple of dtype, got torch.float32"),
        ({"devices": None}, "devices must be a tuple of str, got None"),
    ],
)
def test_an_implementation_is_refused_when_it_is_made(given, message):
    fields: dict[str, Any] = {"op": SPEC.name, "provider": "other", "forward": forward}
    with pytest.raises((TypeError, ValueError), match=message):
        Implementation(**{**fields, "backward": None, **given})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(SPEC, name=3), "OpSpec: name must be a str, got 3"),
        (lambda: ModuleSpec("norm", 3, build=nn.Identity), "ModuleSpec: name must be a str, got 3"),
        (lambda: ScoreMod(3, forward, forward, forward), "ScoreMod: name must be a str, got 3"),
        (lambda: ScoreMod("a.b", forward, forward, 2), "'a.b': reference must be a function"),
    ],
)
def test_what_would_break_a_list_of_names_is_refused_when_it_is_made(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize("around", [nullcontext, lambda: torch.autocast("cpu")])
@pytest.mark.parametrize("provider", ["acme_declared", "reference"])
@pytest.mark.parametrize("given", [torch.tensor(0.9), nn.Parameter(torch.tensor(0.9))])
def test_a_tensor_given_for_a_number_is_refused(op, provider, given, around):
    x = torch.ones(3, requires_grad=True)
    with (
        forced(op, provider),
        around(),
        pytest.raises(TypeError, match=r"decayed: decay must be float, got a tensor of shape \[\]"),
    ):
        op(x, given)
    with pytest.raises(TypeError, match=r"size must be int \| None, got a tensor of shape \[2\]"):
        op(x, 0.9, torch.ones(2))


def test_numbers_are_taken_as_the_dispatcher_takes_them(op):
    x = torch.ones(3, requires_grad=True)
    for provider in ("acme_declared", "reference"):
        with forced(op, provider):
            assert torch.equal(op(x, 2), torch.full((3,), 2.0))
            assert torch.equal(op(x, decay=2.0, size=None), torch.full((3,), 2.0))


def test_sizes_may_be_tensors_to_a_tracer(op):
    traced = torch.jit.trace(lambda x: op(x, 2.0, x.shape[0]), torch.ones(3))
    assert torch.equal(traced(torch.ones(3)), torch.full((3,), 2.0))


@pytest.mark.parametrize("grid", [lambda meta: (1,), [1], 1])
def test_a_grid_is_a_tuple(grid):
    with pytest.raises(TypeError, match="launch: grid must be a tuple of counts, got "):
        launch(None, grid, torch.ones(3))
