"""Launch plans: a launcher is run twice, then followed from its notes, and gives the same."""

from contextlib import contextmanager

import pytest
import torch

from perf.meters.live import live_bytes
from tests.support.devices import DEVICE, INTERPRETING
from trilith.kernels._runtime.language import tl, triton
from trilith.kernels._runtime.launch import here, launch, observers
from trilith.kernels._runtime.plan import as_one, planned
from trilith.plugins import BackwardContext

pytestmark = pytest.mark.skipif(not (INTERPRETING or DEVICE == "cuda"), reason="needs Triton")


@triton.jit
def _scale_kernel(x_ptr, y_ptr, x_stride, N, factor, BLOCK: tl.constexpr):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols * x_stride, mask=cols < N)
    tl.store(y_ptr + cols, x * factor, mask=cols < N)


def scale(x, factor):
    y = x.new_empty(x.shape)
    grid = (triton.cdiv(x.numel(), 16),)
    launch(_scale_kernel, grid, x, y, x.stride(0), x.numel(), factor, BLOCK=16)
    return y


def counted(body):
    """A planned launcher, and the list of its body's runs."""
    runs = []

    @planned
    def launcher(*args):
        runs.append(args)
        return body(*args)

    return launcher, runs


def vector(n=40, dtype=torch.float32):
    return torch.randn(n, device=DEVICE, dtype=dtype)


def test_it_runs_twice_and_is_followed_from_then_on():
    launcher, runs = counted(lambda x, factor: (scale(x, factor), None))
    kept = []
    for _ in range(5):
        x = vector()
        y, nothing = launcher(x, 3.0)
        assert nothing is None
        kept.append((y, 3 * x))
    for y, expected in kept:  # each call has memory of its own
        torch.testing.assert_close(y, expected)
    assert len(runs) == 2


KINDS = {
    "size": lambda: (vector(41), 3.0),
    "stride": lambda: (vector(80)[::2], 3.0),
    "dtype": lambda: (vector(dtype=torch.float16), 3.0),
    "alignment": lambda: (vector(41)[1:], 3.0),
    "number": lambda: (vector(), 2.0),
    "integer": lambda: (vector(), 3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_of_another_kind_have_a_plan_of_their_own(kind):
    launcher, runs = counted(lambda x, factor: (scale(x, factor),))
    for _ in range(3):
        launcher(vector(), 3.0)
    for n in range(3):
        x, factor = KINDS[kind]()
        (y,) = launcher(x, factor)
        torch.testing.assert_close(y, x * factor)
        assert len(runs) == 2 + min(2, n + 1)


def test_a_plan_is_of_one_device_and_is_followed_there(monkeypatch):
    entered, index = [], 0

    @contextmanager
    def guard(device):
        entered.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: index)
    launcher, runs = counted(lambda x: (scale(x, 2.0),))
    for index in (0, 1):
        for _ in range(4):
            x = vector()
            torch.testing.assert_close(launcher(x), (2 * x,))
        assert len(runs) == 2 * (index + 1)
        assert entered == [1, 1] * index


def test_operators_views_and_writes_in_place_are_done_again():
    def body(x, y):
        both = x.new_empty((2, 40))
        first, second = both.unbind()
        first.copy_(scale(x, 2.0))
        second.copy_(y)
        both.add_(1)
        return first, both.sum(0), torch.mm(both, both.t())

    launcher, runs = counted(body)
    for _ in range(4):
        x, y = vector(), vector()
        both = torch.stack([2 * x, y]) + 1
        expected = (both[0], both.sum(0), both @ both.t())
        torch.testing.assert_close(launcher(x, y), expected)
    assert len(runs) == 2


def test_a_context_and_tuples_are_looked_into():
    def body(ctx, dy):
        (x,) = ctx.inputs
        return (scale(x, 2.0) * dy if ctx.needs_input_grad[0] else None,)

    launcher, runs = counted(body)
    for needs in (True, False, True, False, True, False):
        x, dy = vector(), vector()
        (dx,) = launcher(BackwardContext((x,), (), (), (needs,)), dy)
        torch.testing.assert_close(dx, 2 * x * dy if needs else None)
    assert len(runs) == 4


def test_equal_arguments_are_not_taken_for_one():
    launcher, runs = counted(lambda x, y: (scale(x, 2.0) + scale(y, 3.0),))
    x, y = vector(), vector()
    for _ in range(4):
        torch.testing.assert_close(launcher(x, x), (5 * x,))
    assert len(runs) == 4
    for _ in range(4):
        torch.testing.assert_close(launcher(x, y), (2 * x + 3 * y,))
        torch.testing.assert_close(launcher(x, x), (5 * x,))


def test_an_empty_tensor_is_an_argument_as_any_other():
    """As the gradient of an output without elements, which compiled code hands on."""
    launcher, runs = counted(lambda x, y: (scale(x, 2.0), y))
    for _ in range(4):
        x, nothing = vector(), vector(0)
        doubled, same = launcher(x, nothing)
        torch.testing.assert_close(doubled, 2 * x)
        assert same is nothing
    assert len(runs) == 2


UNPLANNABLE = {
    "reads_a_number": lambda x: (scale(x, x.abs().max().item()),),
    "joins_a_list": lambda x: (torch.cat([scale(x, 1.0), x]),),
    "one_tensor": lambda x: scale(x, 2.0),
    "from_elsewhere": lambda x: (scale(x, 2.0) + ELSEWHERE,),
}
ELSEWHERE = torch.ones(40, device=DEVICE)


@pytest.mark.parametrize("name", UNPLANNABLE)
def test_what_a_plan_cannot_tell_is_run_each_time(name):
    launcher, runs = counted(UNPLANNABLE[name])
    for _ in range(4):
        x = vector()
        torch.testing.assert_close(launcher(x), UNPLANNABLE[name](x))
    assert len(runs) == 4


def test_who_observes_sees_every_launch():
    launcher, _ = counted(lambda x: (scale(x, 2.0),))
    for _ in range(3):
        launcher(vector())
    seen = []
    observers.append(lambda *told: seen.append(told))
    try:
        launcher(vector())
    finally:
        observers.pop()
    assert len(seen) == 1


def test_autocast_is_neither_noted_nor_passed_over():
    launcher, runs = counted(lambda x, w: (scale((x @ w).view(-1), 1.0), None))
    x, w = torch.randn(2, 40, device=DEVICE), torch.randn(40, 20, device=DEVICE)

    def lowered():
        with torch.autocast(DEVICE, torch.float16):
            return launcher(x, w)[0].dtype

    assert [lowered() for _ in range(3)] == [torch.float16] * 3
    for _ in range(3):  # noted now
        torch.testing.assert_close(launcher(x, w)[0], (x @ w).view(-1))
    assert len(runs) == 5
    assert lowered() == torch.float16


def test_an_error_leaves_nothing_behind():
    calls = []

    def body(x):
        calls.append(x)
        if len(calls) == 2:
            raise RuntimeError("once")
        return (scale(x, 2.0),)

    launcher = planned(body)
    launcher(vector())
    with pytest.raises(RuntimeError, match="once"):
        launcher(vector())
    assert here.recorder is None
    for _ in range(3):
        x = vector()
        torch.testing.assert_close(launcher(x), (2 * x,))


def test_memory_is_free_after_its_last_use():
    def body(x):
        for _ in range(20):
            x = x.new_empty(x.shape).copy_(x).mul_(1.5)
        return (x,)

    launcher, runs = counted(body)
    for _ in range(4):
        x = torch.randn(1000, device=DEVICE)
        with live_bytes() as live:
            (y,) = launcher(x)
        torch.testing.assert_close(y, 1.5**20 * x)
    assert len(runs) == 2
    assert live.peak == 2 * x.nbytes  # of 20


def test_many_kinds_do_not_pile_up(monkeypatch):
    from trilith.kernels._runtime import plan

    monkeypatch.setattr(plan, "_MOST", 3)
    launcher, _ = counted(lambda x: (scale(x, 2.0),))
    (plans,) = (c.cell_contents for c in launcher.__closure__ if type(c.cell_contents) is dict)
    for n in range(1, 20):
        x = vector(n)
        torch.testing.assert_close(launcher(x), (2 * x,))
        assert len(plans) <= 3


def test_what_is_noted_as_one_is_called_with_the_tensors_of_each_call():
    """Its operators are no steps; what it returns, one tensor or several, goes into later ones."""
    called = []

    @as_one
    def halves(x):
        called.append(x)
        return x.view(2, -1).t().contiguous().unbind(1)

    @as_one
    def total(a, b):
        return (a + 2 * b).clone()

    launcher, runs = counted(lambda x: (scale(total(*halves(x)), 3.0),))
    for n in range(5):
        x = vector()
        (y,) = launcher(x)
        torch.testing.assert_close(y, 3 * (x[:20] + 2 * x[20:]))
        assert called[-1] is x and len(called) == n + 1
    assert len(runs) == 2


def test_an_error_in_what_is_noted_as_one_is_the_calls_own():
    fails = [True]

    @as_one
    def doubled(x):
        if fails[0]:
            raise ValueError("not now")
        return x * 2

    launcher, runs = counted(lambda x: (scale(doubled(x), 3.0),))
    for _ in range(3):
        with pytest.raises(ValueError, match="not now"):
            launcher(vector())
    fails.clear()
    fails.append(False)
    for _ in range(3):
        x = vector()
        torch.testing.assert_close(launcher(x)[0], 6 * x)
    assert here.recorder is None
