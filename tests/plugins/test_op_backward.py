"""What an op's backward is given, and what is made of what it returns."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.plugins.small_ops import EVERYWHERE, RELU2, calls, randn, samples
from tests.support.devices import DEVICE
from trilith.plugins import OpSpec, Sample


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

    def test_nodes_have_the_ops_name_which_anomaly_mode_tells(self, make):
        op = make(PLUS_SQUARE, backward=lambda ctx, dy: (None, torch.nan * dy))
        name = op.spec.name.replace("::", "_") + "Backward"
        assert op(randn(3, 4), randn(3, 4)).grad_fn.name() == name
        with (
            pytest.warns(UserWarning, match="Anomaly"),
            torch.autograd.detect_anomaly(),
            pytest.raises(RuntimeError, match=f"'{name}' returned nan values"),
        ):
            op(randn(3, 4, grad=False), randn(3, 4)).sum().backward()

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
