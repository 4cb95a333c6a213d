"""The machinery that makes an op of an OpSpec, on small ops that need no Triton."""

import inspect
import itertools
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import trilith
from tests.support.devices import DEVICE
from trilith.plugins import Implementation, Op, OpSpec, Registry, Sample

_numbers = itertools.count()
EVERYWHERE = ("cpu", "cuda")


@pytest.fixture
def make():
    """Ops of specs with a fresh name; taken out of torch's dispatcher after the test."""
    ops = []

    def make(spec, **changes):
        op = Op(replace(spec, name=f"test_op::op{next(_numbers)}", **changes))
        ops.append(op)
        return op

    yield make
    for op in ops:
        op.destroy()


calls: list[str] = []


@pytest.fixture(autouse=True)
def forget_calls():
    calls.clear()


def forward(x: Tensor, scale: float = 1.0) -> tuple[Tensor, ...]:
    calls.append("forward")
    return (torch.relu(x).square() * scale,)


def backward(ctx, dy):
    calls.append("backward")
    x, scale = ctx.inputs
    return (2 * torch.relu(x) * scale * dy,)


def reference(x, scale=1.0):
    """relu(x) squared."""
    calls.append("reference")
    return torch.relu(x).square() * scale


def samples(device, dtype):
    yield Sample(torch.randn(7, 33, device=device, dtype=dtype), scale=2.0)


RELU2 = OpSpec(
    name="test_op::relu2",
    forward=forward,
    backward=backward,
    reference=reference,
    samples=samples,
    devices=EVERYWHERE,
)


def randn(*shape, dtype=torch.float32, grad=True):
    return torch.randn(*shape, dtype=dtype, device=DEVICE).requires_grad_(grad)


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


def plus_square_forward(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return a + b * b, b * 1.0


def plus_square_backward(ctx, dy):
    a, b = ctx.inputs
    assert a is None
    return dy.clone() if ctx.needs_input_grad[0] else None, 2 * b * dy


PLUS_SQUARE = OpSpec(
    name="test_op::plus_square",
    forward=plus_square_forward,
    backward=plus_square_backward,
    reference=lambda a, b: a + b * b,
    samples=lambda device, dtype: [
        Sample(*torch.randn(2, 3, 4, device=device, dtype=dtype).unbind())
    ],
    save_inputs=("b",),
    save_outputs=False,
    devices=EVERYWHERE,
)


class TestBackwardContext:
    def test_saves_what_the_spec_names(self, make):
        seen = []

        def backward(ctx, dy):
            seen.append((ctx.inputs[0], len(ctx.outputs), len(ctx.aux), ctx.needs_input_grad))
            return plus_square_backward(ctx, dy)

        for save_outputs in (False, True):
            op = make(PLUS_SQUARE, backward=backward, save_outputs=save_outputs)
            op(randn(3, 4, grad=False), randn(3, 4)).sum().backward()
        assert seen == [(None, 0, 1, (False, True)), (None, 1, 1, (False, True))]

    def test_unsaved_inputs_are_not_kept_alive(self, make):
        packed = []
        with torch.autograd.graph.saved_tensors_hooks(packed.append, lambda x: x):
            make(PLUS_SQUARE)(randn(3, 4), randn(3, 4))
        assert len(packed) == 2

    def test_double_backward_with_an_unsaved_linear_input(self, make):
        op, a, b = make(PLUS_SQUARE), randn(3, 4), randn(3, 4)
        da, db = torch.autograd.grad(op(a, b).square().sum(), (a, b), create_graph=True)
        found = torch.autograd.grad((da * da + db).sum(), (a, b))
        da, db = torch.autograd.grad((a + b * b).square().sum(), (a, b), create_graph=True)
        expected = torch.autograd.grad((da * da + db).sum(), (a, b))
        torch.testing.assert_close(found, expected)

    def test_gradients_left_out_are_zero(self, make):
        op = make(PLUS_SQUARE, backward=lambda ctx, dy: (dy.clone(),))
        a, b = randn(3, 4), randn(3, 4)
        op(a, b).sum().backward()
        assert (b.grad == 0).all()

    def test_gradients_left_out_of_what_is_not_saved_are_zero(self, make):
        op = make(PLUS_SQUARE, backward=lambda ctx, dy: (None, 2 * ctx.inputs[1] * dy))
        a, b = randn(3, 4), randn(3, 4)
        op(a, b).sum().backward()
        assert (a.grad == 0).all()

    def test_too_many_gradients(self, make):
        op = make(RELU2, backward=lambda ctx, dy: (dy, None, None))
        with pytest.raises(RuntimeError, match="at most 2 gradients, one per parameter.*got 3"):
            op(randn(3, 4)).sum().backward()

    def test_shared_gradient_is_not_asked_for_and_not_copied(self, make):
        needs = []

        def backward(ctx, dy):
            needs.append(ctx.needs_input_grad)
            return (None, 2 * ctx.inputs[1] * dy)

        op = make(PLUS_SQUARE, backward=backward, shared_gradients=lambda a, b: {"a": 0})
        a, b, g = randn(3, 4), randn(3, 4), randn(3, 4, grad=False)
        da, db = torch.autograd.grad(op(a, b), (a, b), g)
        assert needs == [(False, True)]
        assert da.data_ptr() == g.data_ptr()
        torch.testing.assert_close(db, 2 * b.detach() * g)

    def test_gradient_shared_with_another_input(self, make):
        def forward(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            return ((x + y) * 3,)

        op = make(
            PLUS_SQUARE,
            forward=forward,
            backward=lambda ctx, dy: (3 * dy,),
            reference=lambda x, y: (x + y) * 3,
            save_inputs=(),
            shared_gradients=lambda x, y: {"y": "x"},
        )
        for wanted in ((0,), (1,), (0, 1)):
            pair = [randn(2, 3, grad=i in wanted) for i in range(2)]
            found = torch.autograd.grad(op(*pair).sum(), [pair[i] for i in wanted])
            for gradient in found:
                torch.testing.assert_close(gradient, torch.full_like(gradient, 3.0))


def split_forward(x: Tensor) -> tuple[Tensor, ...]:
    return x * 2, x * 3, (x > 0).to(torch.int32)


def split_reference(x):
    return x * 2, x * 3, (x > 0).to(torch.int32)


class Stops(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


class TestSeveralOutputs:
    def split(self, make, seen, **changes):
        def backward(ctx, *grads):
            seen.append([None if g is None else bool((g == 0).all()) for g in grads])
            first, second = (0 if g is None else g for g in grads[:2])
            return (2 * first + 3 * second,)

        return make(
            RELU2,
            forward=split_forward,
            backward=backward,
            reference=split_reference,
            outputs=3,
            **changes,
        )

    def test_unused_output_arrives_as_none(self, make):
        seen, x = [], randn(3, 4)
        self.split(make, seen, materialize_grads=False)(x)[1].sum().backward()
        assert seen == [[None, False, None]]
        assert (x.grad == 3).all()

    def test_unused_output_arrives_as_zeros(self, make):
        seen, x = [], randn(3, 4)
        self.split(make, seen)(x)[0].sum().backward()
        assert seen[0][:2] == [False, True]
        assert (x.grad == 2).all()

    def test_integer_output_is_not_differentiable(self, make):
        *floats, integers = self.split(make, [])(randn(3, 4))
        assert all(o.requires_grad for o in floats)
        assert not integers.requires_grad

    def test_no_gradient_from_above_is_none_below(self, make):
        seen, x = [], randn(3, 4)
        outputs = self.split(make, seen, materialize_grads=False)(x)
        Stops.apply(outputs[0]).sum().backward()
        assert x.grad is None and not seen

    @pytest.mark.parametrize("materialize", [False, True])
    def test_create_graph_with_unused_outputs(self, make, materialize):
        x = randn(3, 4)
        outputs = self.split(make, [], materialize_grads=materialize)(x)
        (dx,) = torch.autograd.grad(outputs[1].square().sum(), x, create_graph=True)
        (d2x,) = torch.autograd.grad(dx.sum(), x)
        torch.testing.assert_close(d2x, torch.full_like(x, 18.0))


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


@pytest.mark.parametrize("grad", [False, True])
def test_too_few_outputs_are_told(make, grad):
    op = make(RELU2, outputs=2)
    with pytest.raises(RuntimeError, match=r"forward must return 2 outputs, and then aux, got 1"):
        op(randn(3, grad=grad))


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


def test_several_backwards_run_as_one(make):
    op, x = make(RELU2), randn(5)
    y, dys = op(x, 3.0), randn(4, 5, grad=False)
    expected = dys * 6 * torch.relu(x.detach())
    (found,) = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(found, expected)
    calls.clear()
    pulled = torch.func.vmap(lambda dy: torch.autograd.grad(y, x, dy, retain_graph=True)[0])(dys)
    torch.testing.assert_close(pulled, expected)
    assert calls == ["reference"]


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_a_trace_has_the_reference_and_its_gradient(make, grad):
    op, x = make(RELU2), randn(5, grad=grad)
    traced = torch.jit.trace(lambda x: op(x, 3.0), x)
    other = randn(5)
    y = traced(other)
    torch.testing.assert_close(y, 3 * torch.relu(other).square())
    (dx,) = torch.autograd.grad(y.sum(), other)
    torch.testing.assert_close(dx, 6 * torch.relu(other))


def test_the_signature_is_forwards(make):
    assert list(inspect.signature(make(RELU2)).parameters) == ["x", "scale"]


def test_explain_takes_an_op_that_no_plugin_brought(make):
    op = make(RELU2)
    assert trilith.explain(op, "cpu").startswith(f"{op.spec.name} on cpu")


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


class TestImplementations:
    def other(self, op, factor=10.0, **changes):
        def forward(x: Tensor, scale: float = 1.0) -> tuple[Tensor, ...]:
            calls.append(f"forward {factor}")
            return (x * factor,)

        def backward(ctx, dy):
            calls.append(f"backward {factor}")
            return (dy * factor,)

        fields = {"provider": "other", "devices": EVERYWHERE, "priority": 1}
        return Implementation(
            op=op.spec.name, forward=forward, backward=backward, **{**fields, **changes}
        )

    def test_higher_priority_runs_and_lower_waits(self, make):
        op, x = make(RELU2), randn(3)
        op.add_implementation(self.other(op, 10.0))
        op.add_implementation(self.other(op, 5.0, provider="last", priority=-1))
        op(x).sum().backward()
        assert calls == ["forward 10.0", "backward 10.0"]
        assert [i.provider for i in op.implementations] == ["other", "test_op", "last"]

    def test_backward_is_of_the_provider_that_ran_forward(self, make):
        op, x = make(RELU2), randn(3)
        y = op(x)
        op.add_implementation(self.other(op))
        y.sum().backward()
        assert calls == ["forward", "backward"]

    def test_supports_refuses_single_calls(self, make):
        op = make(RELU2)
        op.add_implementation(self.other(op, supports=lambda x, scale: x.shape[-1] % 2 == 0))
        op(randn(4, grad=False)), op(randn(5, grad=False))
        assert calls == ["forward 10.0", "forward"]

    def test_dtypes_refuse(self, make):
        op = make(RELU2)
        op.add_implementation(self.other(op, dtypes=(torch.float16,)))
        op(randn(4, grad=False)), op(randn(4, grad=False).half())
        assert calls == ["forward", "forward 10.0"]

    def test_none_that_supports_the_call_takes_the_reference(self, make):
        op = make(RELU2, devices=())
        op.add_implementation(self.other(op, supports=lambda *args: False))
        op(randn(4, grad=False))
        assert calls == ["reference"]

    def test_compiled_call_passes_over_supports(self, make):
        op = make(RELU2)
        op.add_implementation(self.other(op, supports=lambda *args: True))
        torch._dynamo.reset()
        torch.compile(op, fullgraph=True, backend="aot_eager")(randn(4, grad=False), 1.0)
        assert "forward 10.0" not in calls

    def test_removed_implementation_is_not_taken(self, make):
        op = make(RELU2)
        op.add_implementation(self.other(op))
        op(randn(4, grad=False))
        op.remove_implementation("other")
        op(randn(4, grad=False))
        assert calls == ["forward 10.0", "forward"]

    def test_provider_twice(self, make):
        op = make(RELU2)
        op.add_implementation(self.other(op))
        with pytest.raises(ValueError, match="provider 'other' exists already"):
            op.add_implementation(self.other(op))

    @pytest.mark.parametrize("half", ["forward", "backward"])
    def test_forward_and_backward_come_as_a_pair(self, make, half):
        op = make(RELU2)
        with pytest.raises(ValueError, match="must bring forward and backward as a pair"):
            op.add_implementation(replace(self.other(op), **{half: None}))

    def test_explain_says_who_runs_and_why_not_the_others(self, make):
        registry = Registry()
        op = registry.add_op(make(RELU2, devices=("cuda",)))
        registry.add_implementation(self.other(op, dtypes=(torch.float16,)))
        text = registry.explain(op.spec.name, torch.device("cpu"), torch.float32)
        assert "other (priority 1): takes torch.float16, not torch.float32" in text
        assert "test_op (priority 0): runs on cuda, not cpu" in text
        assert "takes: the reference" in text
        text = registry.explain(op.spec.name, torch.device("cpu"), torch.float16)
        assert "other (priority 1): can run [" in text
        assert text.endswith("takes: other")
        picky = replace(self.other(op), provider="picky", priority=2, supports=lambda *_: True)
        registry.add_implementation(picky)
        text = registry.explain(op.spec.name, torch.device("cpu"), torch.float16)
        assert "picky (priority 2): can run where its supports() agrees [" in text


class TestRegistration:
    @pytest.mark.parametrize("name", ["relu2", "acme:relu2", "acme::", "a-b::c", "acme::a b"])
    def test_name(self, name):
        with pytest.raises(ValueError, match="name must be 'namespace::op'"):
            replace(RELU2, name=name)

    def test_autocast(self):
        with pytest.raises(ValueError, match="autocast must be 'keep' or 'low', got 'high'"):
            replace(RELU2, autocast="high")

    def test_annotations(self, make):
        def forward(x: Tensor, scale) -> tuple[Tensor, ...]:
            raise NotImplementedError

        with pytest.raises(TypeError, match=r"annotate every parameter.*\['scale'\]"):
            make(RELU2, forward=forward)

    @pytest.mark.parametrize(
        ("parameters", "message"),
        [
            (
                "x: Tensor, *, scale: float = 2.0",
                "scale must be .* by position, got a keyword-only",
            ),
            ("x: Tensor, *rest: int", "rest must be .* by position, got a variadic positional one"),
            ("x: Tensor, **rest: int", "rest must be .* by position, got a variadic keyword one"),
            ("x: Tensor, how: dict", "how must be a Tensor, int, .*, got <class 'dict'>$"),
            ("x: Tensor, z: complex", "z must be a Tensor, int, .*, got <class 'complex'>$"),
            ("x: Tensor, xs: list[Tensor]", r"xs must be .*, got list\[torch.Tensor\]; give each"),
            ("xs: Sequence[Tensor | None]", "xs must be .*; give each of several tensors"),
            ("x: Tensor, provider: str", "provider must have another name"),
            ("x: Tensor, kept: int", "kept must have another name"),
            ("x: Tensor, grad_0: Tensor", "grad_0 must have another name"),
            ("x: Tensor, needs_input_grad: Sequence[bool], n: int", "must be the last of forward"),
        ],
    )
    def test_parameters_that_no_schema_takes(self, make, parameters, message):
        scope = {}
        exec(f"def forward({parameters}) -> tuple[Tensor, ...]: ...", globals(), scope)
        with pytest.raises((TypeError, ValueError), match=rf"^test_op::op\d+: .*{message}"):
            make(RELU2, forward=scope["forward"])

    @pytest.mark.parametrize("given", ["x", [1.0, 2.0], 3.0])
    def test_what_is_no_tensor_is_named(self, make, given):
        op = make(RELU2)
        said = f"{op.spec.name}: x must be a tensor, got {given!r}"
        with pytest.raises(TypeError, match=re.escape(said)):
            op(given)

    def test_a_gradient_through_an_op_without_backward_is_refused(self, make):
        op = make(RELU2, backward=None)
        for function in (op, torch.compile(op, fullgraph=True, backend="aot_eager")):
            y = function(randn(3))
            with pytest.raises(NotImplementedError, match=f"{op.spec.name}: has no backward"):
                y.sum().backward()

    @pytest.mark.parametrize("part", ["forward", "backward", "fake"])
    def test_what_returns_no_tensors_is_named(self, make, part):
        def returns_nothing(*args):
            return None

        def forward(x: Tensor, scale: float = 1.0) -> tuple[Tensor, ...]:
            return None

        op = make(RELU2, **{part: forward if part == "forward" else returns_nothing})
        said = f"{op.spec.name}: {part} must return a tensor or a tuple of them, got None"
        with pytest.raises(TypeError, match=said):
            if part == "fake":
                with FakeTensorMode():
                    op(torch.empty(3))
            op(randn(3)).sum().backward()

    def test_no_tensor_parameter(self, make):
        def forward(scale: float) -> tuple[Tensor, ...]:
            raise NotImplementedError

        with pytest.raises(ValueError, match="no tensor parameter"):
            make(RELU2, forward=forward)

    @pytest.mark.parametrize("unknown", ["z", "scale"])
    def test_save_inputs(self, make, unknown):
        with pytest.raises(ValueError, match=rf"save_inputs names \['{unknown}'\]"):
            make(RELU2, save_inputs=("x", unknown))

    def test_name_twice(self, make):
        registry = Registry()
        op = registry.add_op(make(RELU2), owner="first")
        with pytest.raises(ValueError, match="already defined by first"):
            registry.add_op(op.spec)

    def test_unknown_name_lists_the_known(self, make):
        registry = Registry()
        op = registry.add_op(make(RELU2))
        with pytest.raises(KeyError, match=op.spec.name):
            registry.op("test_op::nothing")

    def test_destroyed_name_is_free_again(self):
        spec = replace(RELU2, name="test_op::phoenix")
        Op(spec).destroy()
        op = Op(spec)
        assert torch.equal(op(torch.ones(2)), torch.ones(2))
        op.destroy()

    def test_the_op_says_what_it_is(self, make):
        op = make(RELU2)
        assert op.spec.name in repr(op)
        assert "scale: float = 1.0" in repr(op)
        assert op.__doc__ == "relu(x) squared."


def informed_forward(
    x: Tensor, bias: Tensor, scale: float, needs_input_grad: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Makes the gradient of x along with the output, where one will be asked for."""
    calls.append(f"forward {list(needs_input_grad)}")
    slope = x.new_empty((0,))
    if needs_input_grad[0]:
        slope = 2 * torch.relu(x) * scale
    return torch.relu(x).square() * scale + bias, slope


def informed_backward(ctx, dy):
    x, _, scale = ctx.inputs
    (slope,) = ctx.aux
    calls.append("made" if slope.numel() else "missing")
    return (slope if slope.numel() else 2 * torch.relu(x) * scale) * dy, dy


INFORMED = OpSpec(
    name="test_op::informed",
    forward=informed_forward,
    backward=informed_backward,
    reference=lambda x, bias, scale: torch.relu(x).square() * scale + bias,
    samples=samples,
    devices=EVERYWHERE,
    save_outputs=False,
)


class TestForwardThatIsToldWhatBackwardNeeds:
    def test_it_is_not_an_argument_of_the_call(self, make):
        assert list(make(INFORMED).signature.parameters) == ["x", "bias", "scale"]

    @pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
    def test_it_says_which_inputs_want_a_gradient(self, make, wanted):
        x, bias = (randn(3, 5, grad=want) for want in wanted)
        make(INFORMED)(x, bias, 2.0).sum().backward()
        assert calls == [f"forward {[*wanted, False]}", "made" if wanted[0] else "missing"]
        if wanted[0]:
            assert torch.equal(x.grad, 4 * torch.relu(x))

    def test_without_gradients_nothing_is_wanted(self, make):
        with torch.no_grad():
            make(INFORMED)(randn(3, 5), randn(3, 5), 2.0)
        make(INFORMED)(randn(3, 5, grad=False), randn(3, 5, grad=False), 2.0)
        assert calls == ["forward [False, False, False]"] * 2

    def test_backward_runs_after_a_forward_that_was_not_told(self, make):
        op = make(INFORMED)
        x = randn(3, 5, grad=False)
        outputs = op.torch_ops.forward(x, x, 2.0, "test_op")
        grads = op.torch_ops.backward(x, x, x, 2.0, outputs[1:], "test_op", [True, False, False])
        assert torch.equal(grads[0], 4 * torch.relu(x) * x)

    @pytest.mark.parametrize("wanted", [(True, False), (False, True)])
    def test_compiled_code_tells_it_too(self, make, wanted):
        op = make(INFORMED)
        x, bias = (randn(3, 5, grad=want) for want in wanted)
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda x, bias: op(x, bias, 2.0), fullgraph=True, backend="aot_eager"
        )
        compiled(x, bias).sum().backward()
        assert calls[-2:] == [f"forward {[*wanted, False]}", "made" if wanted[0] else "missing"]


def test_a_complex_output_is_refused_where_a_gradient_is_wanted(make):
    def polar(x: Tensor) -> tuple[Tensor, ...]:
        return x.square(), torch.polar(x, x)

    op = make(
        OpSpec(
            name="test_op::polar",
            forward=polar,
            backward=lambda ctx, dy, dz: (2 * ctx.inputs[0] * dy,),
            reference=polar,
            samples=lambda device, dtype: [],
            outputs=2,
            devices=EVERYWHERE,
        )
    )
    x = torch.rand(3, device=DEVICE)
    assert op(x)[1].is_complex()
    with pytest.raises(TypeError, match="forward must return real tensors, got torch.complex64"):
        op(x.requires_grad_())
