"""How ops and their implementations are declared, and what is refused."""

import inspect
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import trilith
from tests.plugins.small_ops import EVERYWHERE, RELU2, calls, randn
from trilith.plugins import Implementation, Op, Registry


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
        scope = {"Tensor": Tensor, "Sequence": Sequence}
        exec(f"def forward({parameters}) -> tuple[Tensor, ...]: ...", scope)
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


@pytest.mark.parametrize("grad", [False, True])
def test_too_few_outputs_are_told(make, grad):
    op = make(RELU2, outputs=2)
    with pytest.raises(RuntimeError, match=r"forward must return 2 outputs, and then aux, got 1"):
        op(randn(3, grad=grad))


def test_the_signature_is_forwards(make):
    assert list(inspect.signature(make(RELU2)).parameters) == ["x", "scale"]


def test_explain_takes_an_op_that_no_plugin_brought(make):
    op = make(RELU2)
    assert trilith.explain(op, "cpu").startswith(f"{op.spec.name} on cpu")


def test_explain_takes_no_dtype_for_another():
    with pytest.raises(TypeError, match="explain: dtype must be a torch.dtype, got 'float32'"):
        trilith.explain("trilith::rms_norm", "cuda", "float32")


def test_what_is_neither_an_op_nor_a_name_is_told():
    for call in (
        trilith.op,
        trilith.explain,
        lambda op: trilith.use_implementation(op, "reference"),
    ):
        with pytest.raises(TypeError, match=r"op must be a name like .*, or an Op, got <function"):
            call(trilith.kernels.rms_norm)
