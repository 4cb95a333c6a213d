"""Functions that an op goes through beyond those of a plain autograd.Function, counted."""

import pytest
import torch

from perf.meters import dispatch
from perf.meters.calls import calls
from trilith.kernels._runtime.plan import planned
from trilith.plugins import OpSpec, Sample
from trilith.plugins.op import Op


def body(x):
    return (x.new_empty(x.shape),)


@planned
def forward(x: torch.Tensor) -> tuple[torch.Tensor]:
    return body(x)


@planned
def backward(ctx, dy):
    return body(dy)


@pytest.fixture(scope="module")
def subjects():
    spec = OpSpec(
        name="test_calls::planned",
        forward=forward,
        backward=backward,
        reference=lambda x: x + 0,
        samples=lambda device, dtype: [Sample(torch.randn(4, device=device, dtype=dtype))],
        save_outputs=False,
        devices=("cpu", "cuda"),
    )
    op = Op(spec)
    yield {**dispatch.subjects(), "planned": op}
    op.destroy()


# (subject, direction) -> functions, of Python and of C, that a call goes through. With a gradient
# autograd's `apply` in C is one; the plain Function's is called by torch, which is not counted.
MOST = {
    ("op", "without gradient"): 23,
    ("op", "forward"): 25,
    ("op", "forward+backward"): 50,
    ("planned", "without gradient"): 33,
    ("planned", "forward"): 35,
    ("planned", "forward+backward"): 86,
}


@pytest.mark.parametrize(("subject", "direction"), MOST)
def test_a_call_goes_through_no_more_functions(subjects, subject, direction):
    own, plain = (steady(subjects[name], direction) for name in (subject, "plain"))
    assert (own - plain).total() <= MOST[subject, direction], own - plain


def steady(subject, direction):
    if direction == "without gradient":
        x = torch.randn(4)

        def call():
            return subject(x)

    else:
        call = dispatch.call(subject, direction)
    for _ in range(3):  # the third follows a plan
        call()
    return calls(call)


def test_what_a_function_calls_is_counted():
    def inner():
        return len([])

    def outer():
        return inner(), inner()

    assert calls(outer) == {"outer": 1, "inner": 2, "len": 2, "setprofile": 0}
