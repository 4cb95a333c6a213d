"""Functions of an OpSpec take the parameters that they name."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trilith.plugins import Cost, OpSpec

X, WEIGHT = torch.ones(2, 3), torch.ones(3)


def forward(
    x: Tensor, weight: Tensor | None, scale: float, needs_input_grad: tuple[bool, ...]
) -> Tensor:
    return x


def reference(x, weight, scale):
    return x


SPEC = OpSpec(
    name="test_arguments::op",
    forward=forward,
    backward=None,
    reference=reference,
    samples=lambda device, dtype: [],
)


def cost_of_some(scale, x):
    return Cost(int(scale), x.numel())


def cost_of_one(weight):
    return Cost(weight.numel(), 0)


def cost_of_none():
    return Cost(1, 2)


def cost_of_all(x, weight, scale):
    return Cost(x.numel(), int(scale))


def cost_of_the_rest(x, *rest):
    return Cost(x.numel(), len(rest))


def cost_of_other_names(x, w, factor):
    return Cost(x.numel(), w.numel(), int(factor))


class Priced:
    def __call__(self, weight):
        return Cost(weight.numel(), 0)


@pytest.mark.parametrize(
    ("cost", "expected"),
    [
        (cost_of_some, Cost(7, 6)),
        (cost_of_one, Cost(3, 0)),
        (cost_of_none, Cost(1, 2)),
        (cost_of_all, Cost(6, 7)),
        (cost_of_the_rest, Cost(6, 2)),
        (cost_of_other_names, Cost(6, 3, 7)),
        (Priced(), Cost(3, 0)),
    ],
    ids=["some", "one", "none", "all", "rest", "other names", "object"],
)
def test_a_cost_takes_what_it_names(cost, expected):
    spec = replace(SPEC, cost=cost)
    assert spec.cost(X, WEIGHT, 7.0) == expected
    assert replace(spec, name="test_arguments::copy").cost(X, WEIGHT, 7.0) == expected


def test_the_other_functions_do_too():
    spec = replace(
        SPEC,
        fake=lambda needs_input_grad, x: (x, needs_input_grad),
        sharding=lambda scale: [scale],
        shared_gradients=lambda scale: {"x": scale},
    )
    assert spec.fake(X, WEIGHT, 7.0, (True, False, False)) == (X, (True, False, False))
    assert spec.sharding(X, WEIGHT, 7.0) == [7.0]
    assert spec.shared_gradients(X, WEIGHT, 7.0) == {"x": 7.0}


def test_a_function_whose_signature_cannot_be_read_takes_all():
    spec = replace(SPEC, shared_gradients=dict)  # a builtin
    assert spec.shared_gradients is dict
