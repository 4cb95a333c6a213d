"""The machinery that makes an op of an OpSpec: dispatch, paths, fakes, autocast."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from tests.plugins.small_ops import RELU2, calls, randn
from tests.support.devices import DEVICE


class TestDispatch:
    """Those who watch torch's dispatcher see the ops; where nobody does it is passed by."""

    @pytest.mark.parametrize("grad", [True, False])
    def test_dispatch_mode_sees_the_ops(self, make, grad):
        op = make(RELU2)
        with Seen() as seen:
            out = op(randn(3, 4, grad=grad), 2.0)
            if grad:
                out.sum().backward()
        names = [name for name in seen.names if name.startswith("test_op::")]
        assert names == [f"{op.spec.name}_{end}" for end in (("fwd", "bwd") if grad else ("fwd",))]

    def test_profiler_names_the_ops(self, make):
        op = make(RELU2)
        with torch.profiler.profile() as profile:
            op(randn(3, 4), 2.0).sum().backward()
        names = {event.name for event in profile.events()}
        assert {f"{op.spec.name}_fwd", f"{op.spec.name}_bwd"} <= names

    def test_dispatch_mode_around_backward_alone_sees_it(self, make):
        op = make(RELU2)
        out = op(randn(3, 4), 2.0)
        with Seen() as seen:
            out.sum().backward()
        assert f"{op.spec.name}_bwd" in seen.names

    def test_tensor_subclass_is_dispatched(self, make):
        op = make(RELU2)
        assert isinstance(op(torch.ones(3, device=DEVICE).as_subclass(Wrapped), 2.0), Wrapped)

    @pytest.mark.parametrize("grad", [True, False])
    def test_implementation_gets_what_its_annotations_say(self, make, grad):
        scales = []

        def remembers(x: Tensor, scale: float = 1.0) -> tuple[Tensor, ...]:
            scales.append(scale)
            return (x * scale,)

        make(RELU2, forward=remembers)(randn(3, grad=grad), 2)
        assert [type(scale) for scale in scales] == [float]


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Wrapped(Tensor):
    """Says of every result that it came from one of these."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


class TestPaths:
    def test_without_gradient_only_the_forward_op_runs(self, make):
        y = make(RELU2)(randn(3, 4, grad=False), 2.0)
        assert calls == ["forward"]
        assert y.grad_fn is None

    def test_no_grad_mode_takes_the_forward_op(self, make):
        with torch.no_grad():
            y = make(RELU2)(randn(3, 4), 2.0)
        assert calls == ["forward"]
        assert not y.requires_grad

    def test_gradient_runs_forward_and_backward_once(self, make):
        x = randn(3, 4)
        make(RELU2)(x, 2.0).sum().backward()
        assert calls == ["forward", "backward"]
        torch.testing.assert_close(x.grad, 4 * x.detach().relu())

    def test_float64_takes_the_reference(self, make):
        x = randn(3, 4, dtype=torch.float64)
        make(RELU2)(x, 2.0).sum().backward()
        assert calls == ["reference"]

    def test_device_that_no_implementation_names_takes_the_reference(self, make):
        op = make(RELU2, devices=("meta",))
        x = randn(3, 4)
        op(x, 2.0).sum().backward()
        assert calls == ["reference"]
        assert op.choose(x, 2.0) is None

    def test_empty_tensor_takes_the_reference(self, make):
        op, x = make(RELU2), randn(0, 4)
        op(x).sum().backward()
        assert calls == ["reference"]
        assert x.grad.shape == (0, 4)

    @pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
    def test_functorch_takes_the_reference(self, make, transform):
        op, x = make(RELU2), randn(3, 4, grad=False)
        if transform == "grad":
            value = torch.func.grad(lambda t: op(t, 2.0).sum())(x)
            expected = 4 * x.relu()
        elif transform == "vmap":
            value, expected = torch.vmap(lambda t: op(t, 2.0))(x), 2 * x.relu().square()
        else:
            _, value = torch.func.jvp(lambda t: op(t, 2.0), (x,), (torch.ones_like(x),))
            expected = 4 * x.relu()
        assert set(calls) == {"reference"}
        torch.testing.assert_close(value, expected)

    def test_create_graph_takes_the_reference_gradient(self, make):
        x = randn(3, 4)
        (dx,) = torch.autograd.grad(make(RELU2)(x, 2.0).sum(), x, create_graph=True)
        assert calls == ["forward", "reference"]
        (d2x,) = torch.autograd.grad(dx.sum(), x)
        torch.testing.assert_close(d2x, 4.0 * (x > 0))

    def test_choose_tells_the_path(self, make):
        op = make(RELU2)
        assert op.choose(randn(3, 4), 2.0) == op.spec.provider
        assert op.choose(randn(0, 4), 2.0) is None
        assert op.choose(randn(3, 4, dtype=torch.float64), 2.0) is None

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compiled_in_one_graph(self, make, dynamic):
        op = make(RELU2)
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda x: op(x * 1, 2.0) + 1, fullgraph=True, dynamic=dynamic, backend="aot_eager"
        )
        for rows in (7, 9):
            x = randn(rows, 5)
            compiled(x).sum().backward()
            torch.testing.assert_close(x.grad, 4 * x.detach().relu())
        assert "reference" not in calls


class TestArguments:
    def test_keywords_and_defaults(self, make):
        op, x = make(RELU2), randn(3, 4, grad=False)
        expected = op(x, 1.0)
        assert torch.equal(op(x), expected)
        assert torch.equal(op(scale=1.0, x=x), expected)

    @pytest.mark.parametrize(
        ("args", "kwargs", "message"),
        [
            ((), {}, "missing a required argument: 'x'"),
            ((1,), {"size": 2}, "unexpected keyword argument 'size'"),
            ((1, 2, 3), {}, "too many positional arguments"),
        ],
    )
    def test_what_does_not_bind_names_the_op(self, make, args, kwargs, message):
        op = make(RELU2)
        with pytest.raises(TypeError, match=message) as error:
            op(*args, **kwargs)
        assert op.spec.name in str(error.value)

    def test_no_tensor_at_all(self, make):
        def forward(x: Tensor | None, y: Tensor | None) -> tuple[Tensor, ...]:
            raise NotImplementedError

        with pytest.raises(TypeError, match="at least one tensor must be given"):
            make(RELU2, forward=forward)(None, None)

    def test_constants_of_every_kind_arrive(self, make):
        seen = []

        def forward(
            x: Tensor, flag: bool, mode: str, sizes: list[int], eps: float | None, dt: torch.dtype
        ) -> tuple[Tensor, ...]:
            seen.append((flag, mode, list(sizes), eps, dt))
            return (x.clone(),)

        def backward(ctx, dy):
            seen.append((*ctx.inputs[1:3], list(ctx.inputs[3]), *ctx.inputs[4:]))
            return (dy,)

        op = make(RELU2, forward=forward, backward=backward)
        op(randn(2, 2), True, "sum", [1, 2], None, torch.float16).sum().backward()
        assert seen == [(True, "sum", [1, 2], None, torch.float16)] * 2


class TestFakes:
    def fake(self, op, *args):
        mode = FakeTensorMode()
        args = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
        with mode:
            return op.torch_ops.forward(*args, "test_op")

    def test_default_is_the_forward_on_fake_tensors(self, make):
        y, *_ = self.fake(make(RELU2), randn(5, 3).t(), 1.0)
        assert (y.shape, y.stride()) == ((3, 5), (1, 3))

    def test_given_fake_is_taken(self, make):
        op = make(RELU2, fake=lambda x, scale: (x.new_empty(4, 4),))
        y, *_ = self.fake(op, randn(5, 3), 1.0)
        assert y.shape == (4, 4)
        assert not calls

    def test_default_backward_is_contiguous_on_fake_and_real_tensors(self, make):
        op, x = make(RELU2), randn(5, 3, grad=False).t()
        call = (torch.ones_like(x), x, 1.0, [x], "test_op", [True, False])
        assert op.torch_ops.backward(*call)[0].is_contiguous()
        with FakeTensorMode() as mode:
            fakes = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, call)
            assert op.torch_ops.backward(*fakes)[0].is_contiguous()

    def test_given_fake_backward_is_taken(self, make):
        op = make(
            RELU2,
            backward=lambda ctx, dy: (torch.empty_like(dy),),
            fake_backward=lambda ctx, dy: (torch.empty_like(dy),),
        )
        x = randn(5, 3, grad=False).t()
        call = (torch.ones_like(x), x, 1.0, [x], "test_op", [True, False])
        with FakeTensorMode() as mode:
            fakes = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, call)
            fake = op.torch_ops.backward(*fakes)[0]
        assert fake.stride() == op.torch_ops.backward(*call)[0].stride() == (1, 3)


def product(x: Tensor, scale: float = 1.0) -> tuple[Tensor, ...]:
    return (x @ x.mT * scale,)


class TestAutocast:
    @pytest.mark.parametrize(
        ("policy", "dtype"), [("low", torch.bfloat16), ("keep", torch.float32)]
    )
    def test_policy(self, make, policy, dtype):
        x = randn(3, 4)
        with torch.autocast(DEVICE, torch.bfloat16):
            y = make(RELU2, autocast=policy)(x, 2.0)
        assert y.dtype == dtype
        y.sum().backward()
        assert x.grad.dtype == torch.float32

    def test_low_leaves_integers_and_float64_alone(self, make):
        seen = []

        def forward(x: Tensor, index: Tensor, wide: Tensor | None) -> tuple[Tensor, ...]:
            seen.append((x.dtype, index.dtype, wide.dtype))
            return (x.clone(),)

        x, index = randn(3, grad=False), torch.arange(3, device=DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            make(RELU2, forward=forward, autocast="low")(x, index, x.double())
        assert seen == [(torch.bfloat16, torch.int64, torch.float64)]

    @pytest.mark.parametrize("grad", [False, True])
    def test_a_provider_that_is_run_is_under_none(self, make, grad):
        op = make(RELU2, forward=product, reference=lambda x, scale: x @ x.mT * scale)
        x = randn(5, 7, grad=grad)
        expected = op(x, 2.0)
        with torch.autocast(DEVICE, torch.bfloat16):
            actual = op.run(op.choose(x, 2.0), x, 2.0)
        assert torch.equal(actual, expected)

    def test_backward_is_under_none_as_forward_was(self, make):
        def gradient(ctx, dy):
            x, scale = ctx.inputs
            return ((dy + dy.mT) @ x * scale,)

        op = make(RELU2, forward=product, backward=gradient, reference=lambda x, s: x @ x.mT * s)
        x, dy = randn(5, 7), randn(5, 5, grad=False)
        y = op(x, 2.0)
        (expected,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        with torch.autocast(DEVICE, torch.bfloat16):
            (actual,) = torch.autograd.grad(y, x, dy)
            assert torch.is_autocast_enabled(DEVICE)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_dual_numbers_have_the_references_tangent(make, grad):
    op, x = make(RELU2), randn(5, grad=grad)
    with forward_ad.dual_level():
        y = op(forward_ad.make_dual(x, torch.ones_like(x)), 3.0)
        tangent = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, 6 * torch.relu(x))
    calls.clear()
    op(x, 3.0)
    assert calls == ["forward"]


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_a_trace_has_the_reference_and_its_gradient(make, grad):
    op, x = make(RELU2), randn(5, grad=grad)
    traced = torch.jit.trace(lambda x: op(x, 3.0), x)
    other = randn(5)
    y = traced(other)
    torch.testing.assert_close(y, 3 * torch.relu(other).square())
    (dx,) = torch.autograd.grad(y.sum(), other)
    torch.testing.assert_close(dx, 6 * torch.relu(other))


@pytest.mark.parametrize("grad", [True, False])
def test_tensors_without_memory_run_no_kernel(make, grad):
    """A graph of torch.export, moved to "meta", names the provider that its example had."""
    op = make(RELU2, fake=lambda x, scale: (torch.empty_like(x),))
    x = torch.empty(3, 4, device="meta", requires_grad=grad)
    (out,) = op.torch_ops.forward(x, 2.0, "test_op")
    assert out.device.type == "meta" and out.requires_grad == grad
    if grad:
        (dx,) = torch.autograd.grad(out.sum(), x)
        assert dx.shape == x.shape
    assert calls == []


def test_the_forward_op_casts_as_its_op_does(make):
    """A graph of torch.export calls it, also where it was made without autocast."""

    def product(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return (x @ w,)

    def gradients(ctx, dy):
        x, w = ctx.inputs
        return dy @ w.T, x.T @ dy

    options = {"reference": lambda x, w: x @ w, "autocast": "low"}
    op, x, w = make(RELU2, forward=product, backward=gradients, **options), randn(3, 4), randn(4, 5)
    with torch.autocast(DEVICE, torch.bfloat16):
        (out,) = op.torch_ops.forward(x, w, "test_op")
        expected = op(x, w)
    assert torch.equal(out, expected)
    pairs = (torch.autograd.grad(y.sum(), (x, w)) for y in (out, expected))
    for actual, wanted in zip(*pairs, strict=True):
        assert actual.dtype == torch.float32 and torch.equal(actual, wanted)


def test_a_negative_bit_is_resolved_before_a_kernel_reads_memory(make):
    """Imaginary parts of a conjugate have it; the launcher here reads what lies in memory."""

    def memory(x: Tensor) -> Tensor:
        return torch.empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())

    def read(x: Tensor, scale: float = 1.0) -> tuple[Tensor, ...]:
        return (memory(x) * scale,)

    op = make(
        RELU2,
        forward=read,
        backward=lambda ctx, dy: (memory(dy) * ctx.inputs[1],),
        reference=lambda x, scale: x * scale,
        devices=("cpu",),
    )
    z = torch.randn(4, 3, dtype=torch.complex64).conj()
    assert z.imag.is_neg()
    for grad in (False, True):
        x = z.imag.detach().requires_grad_(grad)
        assert torch.equal(op(x, 2.0), 2 * x)
    x = torch.randn(4, 3, requires_grad=True)
    (dx,) = torch.autograd.grad(op(x, 2.0), x, z.imag)
    assert torch.equal(dx, 2 * z.imag)


@pytest.mark.parametrize("grad", [False, True])
def test_a_tensor_that_outlived_its_transform_is_the_one_within(make, grad):
    kept = []

    def loss(x):
        kept.append(2 * x)
        return x.sum()

    x, op = randn(5), make(RELU2)
    torch.func.grad(loss)(x.detach())
    weight = randn(5, grad=grad)
    y = op(kept[0] + weight, 3.0)
    torch.testing.assert_close(y, 3 * torch.relu(2 * x + weight).square())
    assert (op(kept[0]) == torch.relu(2 * x).square()).all()
    if grad:
        (found,) = torch.autograd.grad(y.sum(), weight)
        torch.testing.assert_close(found, 6 * torch.relu(2 * x + weight))
