"""The checks that every op passes, ours and third parties': numbers, gradients, layouts, tracing.

Each check is a function of (op, sample, device, dtype) that raises AssertionError with the op, the
sample and what was wrong; `CHECKS` holds all of them. A check that does not apply to a sample
returns. The reference in float64 is the measure; the same reference in the sample's dtypes is the
yardstick for how much rounding is fair.

Example:
    for sample in samples_of(op, device, dtype):
        for check in CHECKS:
            check(op, sample, device, dtype)
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from trilith.plugins._compare import assert_bits, assert_near, assert_same, poisoned
from trilith.plugins._layouts import EXPANDED, LAYOUTS, contiguous, far_apart
from trilith.plugins.op import Op
from trilith.plugins.spec import Sample

Check = Callable[[Op, Sample, torch.device, torch.dtype], None]

_COMBINED_AT_MOST = 4


def samples_of(op: Op, device: torch.device, dtype: torch.dtype) -> list[Sample]:
    """The op's samples, the same ones each time."""
    torch.manual_seed(0)
    return list(op.spec.samples(device, dtype))


def backward_arguments(
    op: Op, args: Sequence[Any], provider: str, results: Sequence[Tensor], grads: Sequence[Any]
) -> tuple[Any, ...]:
    """What `op.backward_op` is called with after a forward that gave `results`."""
    spec = op.spec
    inputs = [None if i in op._tensors and i not in op._saved else a for i, a in enumerate(args)]
    kept = list(results if spec.save_outputs else results[spec.outputs :])
    needs = [i in floating(args) for i in range(len(args))]
    sources = {} if spec.shared_gradients is None else spec.shared_gradients(*inputs)
    return (*grads, *inputs, kept, provider, op._asked(needs, sources))


def floating(args: Sequence[Any]) -> list[int]:
    """Positions of the floating-point tensors."""
    return [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]


def _check(function: Check) -> Check:
    """Names the op, the sample and the check in whatever goes wrong."""

    @functools.wraps(function)
    def checked(op: Op, sample: Sample, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(1)
        try:
            function(op, sample, device, dtype)
        except Exception as error:
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            raise AssertionError(
                f"{op.spec.name}({sample}): {function.__name__}: {kind}{error}"
            ) from error

    return checked


def _bound(op: Op, sample: Sample) -> list[Any]:
    return list(op._bind(sample.args, sample.kwargs))


def _tuple(outputs: Any) -> tuple[Any, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _leaves(args: Sequence[Any], wanted: Sequence[int]) -> list[Any]:
    """The arguments, those wanted as leaves that require grad, all in their own layouts."""
    return [a.detach().requires_grad_() if i in wanted else a for i, a in enumerate(args)]


def _differentiable(outputs: Sequence[Tensor]) -> list[int]:
    return [i for i, o in enumerate(outputs) if o.is_floating_point() and o.requires_grad]


def _upstream(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.randn_like(o) if o.is_floating_point() else o for o in outputs]


def _gradients(
    function: Callable[..., Any],
    args: Sequence[Any],
    upstream: Sequence[Tensor] | None = None,
    wanted: Sequence[int] | None = None,
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Outputs, and one gradient per wanted input (zeros where there is none)."""
    wanted = floating(args) if wanted is None else wanted
    leaves = _leaves(args, wanted)
    outputs = _tuple(function(*leaves))
    used = _differentiable(outputs)
    if upstream is None:
        upstream = _upstream(outputs)
    if not used or not wanted:
        return outputs, [torch.zeros_like(args[i]) for i in wanted]
    found = torch.autograd.grad(
        [outputs[i] for i in used],
        [leaves[i] for i in wanted],
        [upstream[i].to(outputs[i].dtype) for i in used],
        allow_unused=True,
    )
    zeros = (torch.zeros_like(args[i]) for i in wanted)
    gradients = [z if g is None else g for g, z in zip(found, zeros, strict=True)]
    return tuple(o.detach() for o in outputs), gradients


def _double(args: Sequence[Any]) -> list[Any]:
    chosen = floating(args)
    return [a.detach().double() if i in chosen else a for i, a in enumerate(args)]


def _fixed_upstream(op: Op, args: Sequence[Any]) -> list[Tensor]:
    """Gradients of the outputs: the same for the op and its reference."""
    with torch.no_grad():
        return _upstream(_tuple(op(*args)))


def _assert_all_same(what: str, op: Op, wanted: Sequence[int], actual: Any, expected: Any) -> None:
    """Compares (outputs, gradients) with (outputs, gradients)."""
    for i, (a, e) in enumerate(zip(actual[0], expected[0], strict=True)):
        assert_same(f"{what}: output {i}", a, e)
    for i, a, e in zip(wanted, actual[1], expected[1], strict=True):
        assert_same(f"{what}: gradient of {_name(op, i)}", a, e)


def _name(op: Op, position: int) -> str:
    return list(op.signature.parameters)[position]


def _provider(op: Op, args: Sequence[Any]) -> str | None:
    return op._provider(op._lead(tuple(args)), tuple(args))


def _has_gradient(op: Op, args: Sequence[Any]) -> bool:
    return op.spec.backward is not None and bool(floating(args))


@_check
def forward_matches_reference(
    op: Op, sample: Sample, device: torch.device, dtype: torch.dtype
) -> None:
    args = _bound(op, sample)
    expected = _tuple(op.spec.reference(*_double(args)))
    eager = _tuple(op.spec.reference(*args))
    actual = _tuple(op(*args))
    assert len(actual) == len(expected), f"{len(actual)} outputs, the reference has {len(expected)}"
    for i, (a, e, p) in enumerate(zip(actual, expected, eager, strict=True)):
        assert a.dtype == p.dtype, f"output {i}: dtype {a.dtype}, the reference gives {p.dtype}"
        assert a.device == p.device, f"output {i}: on {a.device}, the reference on {p.device}"
        assert_near(f"output {i}", a, e, p)


@_check
def gradients_match_reference(
    op: Op, sample: Sample, device: torch.device, dtype: torch.dtype
) -> None:
    args = _bound(op, sample)
    if not _has_gradient(op, args):
        return
    upstream = _fixed_upstream(op, args)
    _, expected = _gradients(op.spec.reference, _double(args), upstream)
    _, eager = _gradients(op.spec.reference, args, upstream)
    _, actual = _gradients(op, args, upstream)
    for i, a, e, p in zip(floating(args), actual, expected, eager, strict=True):
        what = f"gradient of {_name(op, i)}"
        assert a.dtype == args[i].dtype, f"{what}: dtype {a.dtype}, the input has {args[i].dtype}"
        assert_near(what, a, e, p)


@_check
def gradient_subsets(op: Op, sample: Sample, device: torch.device, dtype: torch.dtype) -> None:
    args = _bound(op, sample)
    if not _has_gradient(op, args):
        return
    inputs = floating(args)
    upstream = _fixed_upstream(op, args)
    outputs, full = _gradients(op, args, upstream)
    gradient = dict(zip(inputs, full, strict=True))
    sizes = range(len(inputs)) if len(inputs) <= _COMBINED_AT_MOST else (0, 1, len(inputs) - 1)
    for size in sizes:
        for wanted in itertools.combinations(inputs, size):
            actual = _gradients(op, args, upstream, wanted)
            names = ", ".join(_name(op, i) for i in wanted) or "nothing"
            expected = outputs, [gradient[i] for i in wanted]
            _assert_all_same(f"only {names} requires grad", op, wanted, actual, expected)


@_check
def unused_outputs(op: Op, sample: Sample, device: torch.device, dtype: torch.dtype) -> None:
    """Where only some of the outputs reach the loss, the others count as zero."""
    args = _bound(op, sample)
    if not _has_gradient(op, args) or op.spec.outputs == 1:
        return
    inputs = floating(args)
    upstream = _fixed_upstream(op, args)
    for used in range(op.spec.outputs):
        leaves = _leaves(args, inputs)
        output = _tuple(op(*leaves))[used]
        if not output.requires_grad:
            continue
        wanted = [leaves[i] for i in inputs]
        actual = torch.autograd.grad(output, wanted, upstream[used], allow_unused=True)
        silent = [g if i == used else torch.zeros_like(g) for i, g in enumerate(upstream)]
        _, expected = _gradients(op.spec.reference, args, silent)
        for i, a, e in zip(inputs, actual, expected, strict=True):
            a = torch.zeros_like(e) if a is None else a
            assert_same(f"only output {used} is used: gradient of {_name(op, i)}", a, e)


@_check
def input_layouts(op: Op, sample: Sample, device: torch.device, dtype: torch.dtype) -> None:
    """Every floating-point input in every layout, several inputs in different ones at a time."""
    args = _bound(op, sample)
    inputs = floating(args)
    upstream = _fixed_upstream(op, args)
    names = [_name(op, i) for i in range(len(args))]
    for what, moved, plain in _arrangements(args, inputs, names):
        if plain is not None:
            expected = _both(op, plain, upstream)
        _assert_all_same(what, op, inputs, _both(op, moved, upstream), expected)


def _arrangements(
    tensors: Sequence[Any], chosen: Sequence[int], names: Sequence[str]
) -> Iterator[tuple[str, list[Any], list[Any] | None]]:
    """A description, the tensors in other layouts, and contiguous ones when values are new."""
    dense = [contiguous(t) if i in chosen else t for i, t in enumerate(tensors)]
    plain: list[Any] | None = dense
    layouts = LAYOUTS[1:]
    for turn in range(len(layouts)):
        picked = {i: layouts[(turn + k) % len(layouts)] for k, i in enumerate(chosen)}
        moved = [picked[i](t) if i in picked else t for i, t in enumerate(dense)]
        yield ", ".join(f"{names[i]} {f.__name__}" for i, f in picked.items()), moved, plain
        plain = None
    for spread in EXPANDED:
        moved = [spread(t) if i in chosen else t for i, t in enumerate(dense)]
        plain = [contiguous(t) if i in chosen else t for i, t in enumerate(moved)]
        yield f"{', '.join(names[i] for i in chosen)} {spread.__name__}", moved, plain


def _both(op: Op, args: Sequence[Any], upstream: Sequence[Tensor]) -> Any:
    if _has_gradient(op, args):
        return _gradients(op, args, upstream)
    return _tuple(op(*args)), [torch.zeros_like(args[i]) for i in floating(args)]


@_check
def upstream_layouts(op: Op, sample: Sample, device: torch.device, dtype: torch.dtype) -> None:
    """The same for the gradients of the outputs."""
    args = _bound(op, sample)
    if not _has_gradient(op, args):
        return
    inputs = floating(args)
    upstream = _fixed_upstream(op, args)
    chosen = floating(upstream)
    names = [f"gradient of output {i}" for i in range(len(upstream))]
    for what, moved, plain in _arrangements(upstream, chosen, names):
        if plain is not None:
            expected = _gradients(op, args, plain)
        _assert_all_same(what, op, inputs, _gradients(op, args, moved), expected)


@_check
def offsets_beyond_32_bits(
    op: Op, sample: Sample, device: torch.device, dtype: torch.dtype
) -> None:
    """Every input and gradient with 2**31 elements between its ends, one dimension at a time."""
    try:
        _check_far_apart(op, _bound(op, sample))
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _check_far_apart(op: Op, args: list[Any]) -> None:
    inputs = floating(args)
    dense = [contiguous(a) if i in inputs else a for i, a in enumerate(args)]
    upstream = [contiguous(g) for g in _fixed_upstream(op, args)]
    expected = _both(op, dense, upstream)
    for i, dim, moved in _far_apart(dense):
        what = f"dimension {dim} of {_name(op, i)} over 2**31 elements"
        _assert_all_same(what, op, inputs, _both(op, moved, upstream), expected)
    if not _has_gradient(op, args):
        return
    for i, dim, moved in _far_apart(upstream):
        what = f"dimension {dim} of the gradient of output {i} over 2**31 elements"
        _assert_all_same(what, op, inputs, _gradients(op, dense, moved), expected)


def _far_apart(tensors: Sequence[Any]) -> Iterator[tuple[int, int, list[Any]]]:
    for i in floating(tensors):
        for dim, size in enumerate(tensors[i].shape):
            far = far_apart(tensors[i], dim) if size > 1 else None
            if far is not None:
                yield i, dim, [far if j == i else t for j, t in enumerate(tensors)]


@_check
def nothing_is_written_to(op: Op, sample: Sample, device: torch.device, dtype: torch.dtype) -> None:
    """Inputs, gradients of outputs, outputs and saved tensors keep their values."""
    args = _bound(op, sample)
    inputs = [(f"input {_name(op, i)}", a) for i, a in enumerate(args) if isinstance(a, Tensor)]
    before = [(what, t, t.clone()) for what, t in inputs]
    upstream = _fixed_upstream(op, args)
    before += [(f"gradient of output {i}", g, g.clone()) for i, g in enumerate(upstream)]

    def pack(tensor: Tensor) -> Tensor:
        before.append(("a saved tensor", tensor, tensor.detach().clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        leaves = _leaves(args, floating(args) if _has_gradient(op, args) else [])
        outputs = _tuple(op(*leaves))
    before += [(f"output {i}", o, o.detach().clone()) for i, o in enumerate(outputs)]
    used = _differentiable(outputs)
    if used:
        torch.autograd.backward([outputs[i] for i in used], [upstream[i] for i in used])
    for what, tensor, copy in before:
        assert_bits(what, tensor, copy)


@_check
def backward_twice(op: Op, sample: Sample, device: torch.device, dtype: torch.dtype) -> None:
    """With retain_graph: the same again is bit-equal, and twice the upstream gives twice."""
    args = _bound(op, sample)
    if not _has_gradient(op, args):
        return
    inputs = floating(args)
    leaves = _leaves(args, inputs)
    outputs = _tuple(op(*leaves))
    used = _differentiable(outputs)
    if not used:
        return
    upstream = [torch.randn_like(outputs[i]) for i in used]

    def pull(scale: float) -> list[Tensor]:
        found = torch.autograd.grad(
            [outputs[i] for i in used],
            [leaves[i] for i in inputs],
            [scale * g for g in upstream],
            retain_graph=True,
            allow_unused=True,
        )
        zeros = [torch.zeros_like(args[i]) for i in inputs]
        return [z if g is None else g.clone() for g, z in zip(found, zeros, strict=True)]

    first, half, again = pull(1.0), pull(0.5), pull(1.0)
    for i, f, h, a in zip(inputs, first, half, again, strict=True):
        assert_bits(f"gradient of {_name(op, i)} in a second backward", a, f)
        assert_same(f"gradient of {_name(op, i)} at half the upstream", 2 * h, f)


@_check
def every_element_is_written(
    op: Op, sample: Sample, device: torch.device, dtype: torch.dtype
) -> None:
    args = _bound(op, sample)
    upstream = _fixed_upstream(op, args)
    expected = _both_of(op.spec.reference, op, args, upstream)
    with poisoned():
        actual = _both_of(op, op, args, upstream)
    names = [f"output {i}" for i in range(op.spec.outputs)]
    names += [f"gradient of {_name(op, i)}" for i in floating(args)]
    for what, a, e in zip(
        names, [*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True
    ):
        unwritten = a.isnan() & ~e.isnan()
        assert not unwritten.any(), (
            f"{what}: {int(unwritten.sum())} of {a.numel()} elements come from memory that "
            "nothing wrote"
        )


def _both_of(
    function: Callable[..., Any], op: Op, args: Sequence[Any], upstream: Sequence[Tensor]
) -> Any:
    if _has_gradient(op, args):
        return _gradients(function, args, upstream)
    return _tuple(function(*args)), [torch.zeros_like(args[i]) for i in floating(args)]


@_check
def runs_are_bit_equal(op: Op, sample: Sample, device: torch.device, dtype: torch.dtype) -> None:
    args = _bound(op, sample)
    upstream = _fixed_upstream(op, args)
    first = _both(op, args, upstream)
    for _ in range(50 if device.type == "cuda" else 2):
        again = _both(op, args, upstream)
        for i, (a, f) in enumerate(zip(again[0], first[0], strict=True)):
            assert_bits(f"output {i}, from run to run,", a, f)
        for i, a, f in zip(floating(args), again[1], first[1], strict=True):
            assert_bits(f"gradient of {_name(op, i)}, from run to run,", a, f)


@_check
def empty_tensors(op: Op, sample: Sample, device: torch.device, dtype: torch.dtype) -> None:
    """With a leading dimension of 0: the reference's outputs, and gradients exactly 0."""
    args = _bound(op, sample)
    lead = op._lead(tuple(args))
    if lead.ndim < 2 or lead.shape[0] < 2:
        return
    inputs = floating(args)
    emptied = [
        a[:0] if isinstance(a, Tensor) and a.ndim and a.shape[0] == lead.shape[0] else a
        for a in args
    ]
    try:
        expected = _tuple(op.spec.reference(*emptied))
    except (RuntimeError, ValueError, IndexError):
        return
    outputs, gradients = _both(op, emptied, [torch.ones_like(o) for o in expected])
    for i, (o, e) in enumerate(zip(outputs, expected, strict=True)):
        assert_same(f"output {i} of empty tensors", o, e)
    for i, g in zip(inputs, gradients, strict=True):
        what = f"gradient of {_name(op, i)} of empty tensors"
        assert g.shape == emptied[i].shape, f"{what}: shape {g.shape}, not {emptied[i].shape}"
        assert (g == 0).all(), f"{what} must be 0, got {g.flatten()[:4].tolist()}"


@_check
def double_backward(op: Op, sample: Sample, device: torch.device, dtype: torch.dtype) -> None:
    """Second derivatives: those of the reference in float64."""
    args = _bound(op, sample)
    if not _has_gradient(op, args):
        return
    upstream = _fixed_upstream(op, args)
    weights = [torch.randn_like(args[i]) for i in floating(args)]
    expected = _second(op.spec.reference, _double(args), upstream, weights)
    eager = _second(op.spec.reference, args, upstream, weights)
    actual = _second(op, args, upstream, weights)
    names = [_name(op, i) for i in floating(args)]
    names += [f"grad_output {i}" for i in range(len(actual) - len(names))]
    for name, a, e, p in zip(names, actual, expected, eager, strict=True):
        assert_near(f"second derivative by {name}", a, e, p)


def _second(
    function: Callable[..., Any],
    args: Sequence[Any],
    upstream: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> list[Tensor]:
    """Gradients of sum(weights * first gradients), by the inputs and by the upstream."""
    inputs = floating(args)
    leaves = _leaves(args, inputs)
    outputs = _tuple(function(*leaves))
    used = _differentiable(outputs)
    pulled = [upstream[i].to(outputs[i].dtype).detach().requires_grad_() for i in used]
    wanted = [leaves[i] for i in inputs]
    first = torch.autograd.grad(
        [outputs[i] for i in used], wanted, pulled, create_graph=True, allow_unused=True
    )
    terms = [
        (g * w).sum() for g, w in zip(first, weights, strict=True) if g is not None and g.grad_fn
    ]
    by = [*wanted, *pulled]
    if not terms:
        return [torch.zeros_like(t) for t in by]
    found = torch.autograd.grad(functools.reduce(torch.add, terms), by, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, by, strict=True)]


@_check
def functorch_transforms(op: Op, sample: Sample, device: torch.device, dtype: torch.dtype) -> None:
    """torch.func.grad and vmap give what plain calls give."""
    args = _bound(op, sample)
    inputs = floating(args)
    if not inputs:
        return

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        return _tuple(op(*_with(args, inputs, tensors)))

    own = tuple(args[i] for i in inputs)
    others = tuple(t.flip(0) if t.ndim else 2 * t for t in own)
    stacked = tuple(torch.stack(pair) for pair in zip(own, others, strict=True))
    for i, (batched, *plain) in enumerate(
        zip(torch.vmap(call)(*stacked), call(*own), call(*others), strict=True)
    ):
        assert_same(f"output {i} under vmap", batched, torch.stack(plain))
    if not _has_gradient(op, args):
        return
    upstream = _fixed_upstream(op, args)
    outputs, plain = _gradients(op, args, upstream)
    used = [i for i, o in enumerate(outputs) if o.is_floating_point()]

    def scalar(*tensors: Tensor) -> Tensor:
        results = call(*tensors)
        products = [(results[i].float() * upstream[i].float()).sum() for i in used]
        return functools.reduce(torch.add, products)

    found = torch.func.grad(scalar, argnums=tuple(range(len(own))))(*own)
    for i, f, p in zip(inputs, found, plain, strict=True):
        assert_same(f"gradient of {_name(op, i)} under torch.func.grad", f, p)


def _with(args: Sequence[Any], positions: Sequence[int], values: Sequence[Any]) -> list[Any]:
    merged = list(args)
    for i, value in zip(positions, values, strict=True):
        merged[i] = value
    return merged


@_check
def fakes_are_exact(op: Op, sample: Sample, device: torch.device, dtype: torch.dtype) -> None:
    """Shapes, dtypes and strides of what the ops return, and of what their fakes say."""
    args = _bound(op, sample)
    provider = _provider(op, args)
    if provider is None:
        return
    results = op.forward_op(*args, provider)
    _compare_with_fake("forward result", op.forward_op, (*args, provider), results)
    if not _has_gradient(op, args):
        return
    outputs = results[: op.spec.outputs]
    grads = [torch.randn_like(o) if o.is_floating_point() else None for o in outputs]
    call = backward_arguments(op, args, provider, results, grads)
    gradients = op.backward_op(*call)
    _compare_with_fake("gradient", op.backward_op, call, gradients)
    asked = [i for i, ask in enumerate(call[-1]) if ask]
    for i, gradient in zip(asked, gradients, strict=True):
        what, like = f"gradient of {_name(op, i)}", args[i]
        assert gradient.dtype == like.dtype, f"{what}: dtype {gradient.dtype}, not {like.dtype}"
        assert gradient.shape == like.shape, f"{what}: shape {gradient.shape}, not {like.shape}"


def _compare_with_fake(
    what: str, function: Any, args: Sequence[Any], real: Sequence[Tensor]
) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = function(*torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, tuple(args)))
    assert len(fake) == len(real), f"{what}s: {len(real)}, the fake says {len(fake)}"
    for i, (f, r) in enumerate(zip(fake, real, strict=True)):
        for aspect in ("shape", "dtype", "device"):
            said, is_ = getattr(f, aspect), getattr(r, aspect)
            assert said == is_, f"{what} {i}: {aspect} {is_}, the fake says {said}"
        assert f.stride() == r.stride(), (
            f"{what} {i} of shape {tuple(r.shape)}: strides {r.stride()}, the fake says "
            f"{f.stride()}"
        )


@_check
def opcheck(op: Op, sample: Sample, device: torch.device, dtype: torch.dtype) -> None:
    """torch.library.opcheck on the forward and the backward op."""
    args = [a.detach() if isinstance(a, Tensor) else a for a in _bound(op, sample)]
    provider = _provider(op, args)
    if provider is None:
        return
    torch.library.opcheck(op.forward_op, (*args, provider))
    if not _has_gradient(op, args):
        return
    results = op.forward_op(*args, provider)
    grads = [torch.randn_like(o) if o.is_floating_point() else None for o in results]
    call = backward_arguments(op, args, provider, results, grads[: op.spec.outputs])
    torch.library.opcheck(op.backward_op, call)


def _compiled_equals_eager(op: Op, sample: Sample, **options: Any) -> None:
    args = _bound(op, sample)
    inputs = floating(args)
    upstream = _fixed_upstream(op, args)

    def call(*tensors: Any) -> tuple[Tensor, ...]:
        return _tuple(op(*_with(args, inputs, tensors)))

    def eager(*every: Any) -> tuple[Tensor, ...]:
        return call(*[every[i] for i in inputs])

    torch._dynamo.reset()
    compiled_call = torch.compile(call, fullgraph=True, **options)

    def compiled(*every: Any) -> tuple[Tensor, ...]:
        return compiled_call(*[every[i] for i in inputs])

    with torch.no_grad():
        expected, actual = eager(*args), compiled(*args)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_same(f"compiled output {i} without gradients", a, e)
    if _has_gradient(op, args):
        pairs = [_gradients(f, args, upstream) for f in (compiled, eager)]
        _assert_all_same("compiled", op, inputs, *pairs)
    torch._dynamo.reset()


@_check
def compiles(op: Op, sample: Sample, device: torch.device, dtype: torch.dtype) -> None:
    """torch.compile(fullgraph=True) up to the backend's input, static shapes."""
    _compiled_equals_eager(op, sample, dynamic=False, backend="aot_eager")


@_check
def compiles_dynamic(op: Op, sample: Sample, device: torch.device, dtype: torch.dtype) -> None:
    """The same with every size a symbol."""
    _compiled_equals_eager(op, sample, dynamic=True, backend="aot_eager")


@_check
def compiles_with_inductor(
    op: Op, sample: Sample, device: torch.device, dtype: torch.dtype
) -> None:
    """Without Inductor's caches on disk: their keys do not see that a fake has changed."""
    import torch._inductor.config as inductor

    with inductor.patch(force_disable_caches=True):
        _compiled_equals_eager(op, sample, dynamic=False, backend="inductor")


@_check
def autocast(op: Op, sample: Sample, device: torch.device, dtype: torch.dtype) -> None:
    """Under autocast to bfloat16 the op does what its spec says, inputs' gradients included."""
    args = _bound(op, sample)
    inputs = floating(args)
    lowered = args
    if op.spec.autocast == "low":
        low = [i for i in inputs if args[i].dtype != torch.float64]
        lowered = _with(args, low, [args[i].to(torch.bfloat16) for i in low])
    upstream = _fixed_upstream(op, lowered)

    def cast(*every: Any) -> Any:
        with torch.autocast(device.type, torch.bfloat16):
            return op(*every)

    actual = _both_of(cast, op, args, upstream)
    outputs, gradients = _both(op, lowered, upstream)
    gradients = [g.to(args[i].dtype) for i, g in zip(inputs, gradients, strict=True)]
    _assert_all_same("under autocast", op, inputs, actual, (outputs, gradients))


@_check
def checkpointing(op: Op, sample: Sample, device: torch.device, dtype: torch.dtype) -> None:
    """Recomputing the forward in backward gives the same bits."""
    from torch.utils.checkpoint import checkpoint

    args = _bound(op, sample)
    if not _has_gradient(op, args):
        return
    upstream = _fixed_upstream(op, args)
    _, expected = _gradients(op, args, upstream)
    _, actual = _gradients(lambda *a: checkpoint(op, *a, use_reentrant=False), args, upstream)
    for i, a, e in zip(floating(args), actual, expected, strict=True):
        assert_bits(f"gradient of {_name(op, i)} by recomputation", a, e)


@_check
def inference_mode(op: Op, sample: Sample, device: torch.device, dtype: torch.dtype) -> None:
    args = _bound(op, sample)
    expected = _tuple(op(*args))
    with torch.inference_mode():
        actual = _tuple(op(*args))
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_same(f"output {i} in inference mode", a, e)


NUMERIC_CHECKS: tuple[Check, ...] = (
    forward_matches_reference,
    gradients_match_reference,
    every_element_is_written,
)
CHECKS: tuple[Check, ...] = (
    *NUMERIC_CHECKS,
    gradient_subsets,
    unused_outputs,
    input_layouts,
    upstream_layouts,
    offsets_beyond_32_bits,
    nothing_is_written_to,
    backward_twice,
    runs_are_bit_equal,
    empty_tensors,
    double_backward,
    functorch_transforms,
    fakes_are_exact,
    autocast,
    checkpointing,
    inference_mode,
    opcheck,
    compiles,
    compiles_dynamic,
    compiles_with_inductor,
)
