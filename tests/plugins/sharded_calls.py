"""Calls with DTensors, each of which is checked on every rank of a gloo group.

python -m tests.plugins.sharded_calls SIZE... FOLDER [CALL...] makes a mesh of these sizes, runs the
calls on it, all if none is named, and writes RANK.json there: by name, what went wrong, or null.
"""

from __future__ import annotations

import math
import os
import re
import sys
from functools import cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.placement_types import _StridedShard

if __name__ == "__main__" and "TRILITH_MUTANT" in os.environ:
    from tests.support import mutants

    mutants.install(os.environ["TRILITH_MUTANT"])

from tests.support import ranks
from trilith import kernels
from trilith.plugins import TRITON_DEVICES, Op, OpSpec

R = Replicate()
# Torch 2.11 refuses weight[target] for a target that is split over two dimensions of a mesh.
INDEXED_DIMENSIONS = 1 if torch.__version__.startswith("2.11.") else 2
NAMES = {1: ("data",), 2: ("data", "tensor")}


def draw(*shape):
    return torch.randn(shape).requires_grad_()


def labels(n, *shape):
    return torch.randint(0, n, shape)


def product(name, **fields):
    """x * y, or 2 x without y."""

    def forward(x: torch.Tensor, y: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        return (2 * x if y is None else x * y,)

    def backward(ctx, dz):
        x, y = ctx.inputs
        return (2 * dz,) if y is None else (dz * y, dz * x)

    return Op(
        OpSpec(
            name=f"sharded::{name}",
            forward=forward,
            backward=backward,
            reference=lambda x, y: 2 * x if y is None else x * y,
            samples=lambda device, dtype: [],
            devices=("cpu",) if "cpu" in TRITON_DEVICES else ("cuda",),
            **fields,
        )
    )


PRODUCT = product("product")
LINEAR = product("linear", sharding=lambda x, y: [([Partial()], [Partial()]), ([Shard(-1)],) * 2])
GARBLED = product("garbled", sharding=lambda x, y: "rows")
LYING = product("lying", sharding=lambda x, y: [([R], [Shard(0)])])


def placed(tensor, mesh, placements):
    """The tensor as a DTensor, on every rank the same before; Partial is split into summands."""
    whole = [R if p.is_partial() else p for p in placements]
    result = distribute_tensor(tensor.detach(), mesh, whole)
    if whole != list(placements):
        share = result.to_local() / mesh.size()
        result = DTensor.from_local(share, mesh, placements)
    return result.requires_grad_(tensor.requires_grad)


def agree(function, tensors, placements, expected_placements, mesh):
    """Values and gradients are those of the same call with plain tensors."""
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    plain = function(*tensors)
    given = [
        None if t is None else placed(t, mesh, [p] * mesh.ndim if not isinstance(p, list) else p)
        for t, p in zip(tensors, placements, strict=True)
    ]
    ours = function(*given)
    plain, ours = ((r,) if isinstance(r, torch.Tensor) else r for r in (plain, ours))
    wanted = expected_placements
    for out, expected in zip(ours, plain, strict=True):
        assert isinstance(out, DTensor)
        assert wanted is None or list(out.placements) in (wanted, [wanted] * mesh.ndim), out
        assert out.shape == expected.shape
        assert out.stride() == expected.stride()
        torch.testing.assert_close(out.full_tensor(), expected)
    upstream = [torch.randn_like(t) for t in plain]
    grads = torch.autograd.grad(plain, leaves, upstream)
    shards = [t for t in given if t is not None and t.requires_grad]
    above = [distribute_tensor(u, mesh, [R] * mesh.ndim) for u in upstream]
    for grad, expected in zip(torch.autograd.grad(ours, shards, above), grads, strict=True):
        assert grad.shape == expected.shape
        torch.testing.assert_close(grad.full_tensor(), expected)
    with torch.no_grad():
        again = function(*given)
    again = (again,) if isinstance(again, torch.Tensor) else again
    for out, expected in zip(again, plain, strict=True):
        assert not out.requires_grad
        torch.testing.assert_close(out.full_tensor(), expected.detach())


def refused(error, message, call):
    try:
        call()
    except error as caught:
        assert re.search(message, str(caught)), caught
    else:
        raise AssertionError(f"no {error.__name__}")


def layer_norm(x, weight, bias):
    return kernels.layer_norm(x, (x.shape[-1],), weight, bias)


def rms_norm(x, weight):
    return kernels.rms_norm(x, (x.shape[-1],), weight)


def norms(mesh):
    for x, dim in ((draw(5, 12), 0), (draw(2, 6, 8), 1), (draw(1, 8), 0), (draw(3, 8), None)):
        place = R if dim is None else Shard(dim)
        weight, bias = draw(x.shape[-1]), draw(x.shape[-1])
        agree(layer_norm, [x, weight, bias], [place, R, R], place, mesh)
        agree(layer_norm, [x, None, bias], [place, None, R], place, mesh)
        agree(rms_norm, [x, weight], [place, R], place, mesh)
    two = draw(4, 2, 8)
    function = partial(kernels.rms_norm, normalized_shape=(2, 8))
    agree(function, [two], [Shard(0)], Shard(0), mesh)


def activations(mesh):
    rows, columns = (Shard(0), R), (Shard(1), Shard(0))
    for place, beside in (rows, columns, (R, R)):
        x, bias = draw(6, 9), draw(9)
        agree(kernels.bias_act, [x, bias], [place, beside], place, mesh)
        agree(kernels.bias_act, [x, None], [place, None], place, mesh)
        agree(kernels.gated_act, [x, draw(6, 9)], [place, place], place, mesh)
        add = [x, draw(6, 9), bias]
        agree(kernels.bias_dropout_add, add, [place, place, beside], place, mesh)
        agree(kernels.bias_dropout_add, [*add[:2], None], [place, place, None], place, mesh)

    def up_projection(x, weight, bias):
        return kernels.bias_act(torch.nn.functional.linear(x, weight), bias)

    parameters = [draw(8, 3), draw(8)]
    agree(up_projection, [draw(4, 3), *parameters], [R, Shard(0), Shard(0)], Shard(1), mesh)


def products(mesh):
    """After an activation: rows, or the product's inner dimension, of which ranks have summands."""
    inner, beside = [Shard(1), Shard(1)], [Shard(0), Shard(1)]
    x, weight, bias, out_bias = draw(3, 6), draw(4, 6), draw(6), draw(4)
    agree(kernels.bias_act_linear, [x, bias, weight], [inner[0], *beside], Partial(), mesh)
    given = [x, bias, weight, out_bias]
    agree(kernels.bias_act_linear, given, [Shard(0), R, R, R], Shard(0), mesh)
    refused(
        NotImplementedError,
        r"out_bias is Replicate|x is Shard\(dim=1\)",
        lambda: agree(kernels.bias_act_linear, given, [inner[0], *beside, R], None, mesh),
    )
    gates = [x, draw(3, 6), weight]
    agree(kernels.gated_act_linear, gates, [*inner, Shard(1)], Partial(), mesh)
    agree(kernels.gated_act_linear, [*gates, out_bias], [Shard(0)] * 2 + [R, R], Shard(0), mesh)


def after_norms(mesh):
    """Linear layers of a norm: rows, or shares of their outputs."""
    x, residual, norm = draw(4, 6), draw(4, 6), draw(6)
    one, two, bias = draw(8, 6), draw(8, 6), draw(8)
    rows, columns = Shard(0), Shard(1)

    def pair(x, norm, one, two, bias):
        return kernels.rms_norm_linear(x, norm, (one, two), (bias, None))

    def added(x, norm, one, residual):
        return kernels.rms_norm_linear(x, norm, one, residual=residual)

    single = [x, norm, None, one, bias]
    agree(kernels.layer_norm_linear, single, [rows, R, None, R, R], rows, mesh)
    agree(kernels.layer_norm_linear, single, [R, R, None, rows, rows], columns, mesh)
    double = [x, norm, one, two, bias]
    agree(pair, double, [rows, R, R, R, R], rows, mesh)
    agree(pair, double, [R, R, rows, rows, rows], columns, mesh)
    agree(added, [x, norm, one, residual], [rows, R, R, rows], rows, mesh)
    unlike = [x, norm, one, draw(6, 6), bias]
    refused(
        NotImplementedError,
        r"trilith::norm_linear: weight is Shard\(dim=0\)",
        lambda: agree(pair, unlike, [R, R, rows, rows, rows], None, mesh),
    )
    wrong = "trilith::add_norm_linear: weight is Shard"
    given = placed(x, mesh, [R] * mesh.ndim), placed(norm, mesh, [R] * mesh.ndim)
    share = placed(one, mesh, [rows] * mesh.ndim)
    refused(NotImplementedError, wrong, lambda: added(*given, share, given[0]))


def batch_norms(mesh):
    x, weight, bias = draw(4, 8, 3), draw(8), draw(8)
    mean, var = torch.randn(8), torch.rand(8) + 0.5
    channels, batch = Shard(1), Shard(0)

    def trained(x, weight, bias):
        return kernels.batch_norm(x, None, None, weight, bias, training=True)

    agree(trained, [x, weight, bias], [channels, batch, batch], channels, mesh)
    given = [x, mean, var, weight, bias]
    agree(kernels.batch_norm, given, [channels, *[batch] * 4], channels, mesh)
    agree(kernels.batch_norm, given, [batch, R, R, R, R], batch, mesh)
    split = [placed(t, mesh, [p] * mesh.ndim) for t, p in ((x, batch), (weight, R), (bias, R))]
    refused(NotImplementedError, "batch_norm: x is Shard", lambda: trained(*split))


def elementwise_losses(mesh):
    x, target = draw(5, 6), torch.rand(5, 6)
    weight = torch.rand(5, 6) + 0.5
    for reduction, out in (("none", Shard(1)), ("sum", Partial()), ("mean", None)):
        for function in (kernels.mse_loss, kernels.binary_cross_entropy_with_logits):

            def loss(x, target, weight, function=function, reduction=reduction):
                return function(x, target, reduction=reduction, weight=weight)

            agree(loss, [x, target, None], [Shard(1), Shard(1), None], out, mesh)
        weighted = None if reduction == "mean" else out
        agree(loss, [x, target, weight], [Shard(1)] * 3, weighted, mesh)


def cached_attention(mesh):
    """No gradient: values only."""
    n = mesh.size()
    q, lengths = torch.randn(n, n, 1, 8), torch.arange(1, n + 1)
    k, v = torch.randn(n, n, 6, 8), torch.randn(n, n, 6, 8)
    expected = kernels.decode_attention(q, k, v, lengths)
    for dim, of_lengths in ((0, Shard(0)), (1, R)):
        split = [placed(t, mesh, [Shard(dim)] * mesh.ndim) for t in (q, k, v)]
        counts = placed(lengths, mesh, [of_lengths] * mesh.ndim)
        out = kernels.decode_attention(*split, counts)
        assert list(out.placements) == [Shard(dim)] * mesh.ndim
        torch.testing.assert_close(out.full_tensor(), expected)


def packed_attention(mesh):
    n = mesh.size()
    q, k, v = draw(7, 2 * n, 4), draw(7, n, 4), draw(7, n, 4)
    starts = torch.tensor([0, 3, 7], dtype=torch.int32)

    def varlen(q, k, v, starts):
        return kernels.varlen_attention(q, k, v, starts, starts, causal=True)

    agree(varlen, [q, k, v, starts], [Shard(1)] * 3 + [R], Shard(1), mesh)
    split = [placed(t, mesh, [Shard(0)] * mesh.ndim) for t in (q, k, v)]
    whole = placed(starts, mesh, [R] * mesh.ndim)
    refused(
        NotImplementedError, r"varlen_attention: q is Shard\(dim=0\)", lambda: varlen(*split, whole)
    )


def softmaxes(mesh):
    for function in (kernels.softmax, kernels.log_softmax):
        agree(partial(function, dim=0), [draw(4, 5)], [Shard(1)], Shard(1), mesh)
        agree(partial(function, dim=-1), [draw(5, 4)], [Shard(0)], Shard(0), mesh)


def added_norms(mesh):
    tensors = [draw(5, 8), draw(5, 8), draw(8), draw(8)]
    agree(kernels.add_layer_norm, tensors, [Shard(0)] * 2 + [R, R], Shard(0), mesh)
    agree(kernels.add_rms_norm, tensors[:3], [Shard(0)] * 2 + [R], Shard(0), mesh)


def losses(mesh):
    x, target = draw(7, 10), labels(10, 7)
    target[3] = -100
    weight = torch.rand(10) + 0.5
    for reduction, out in (("none", Shard(0)), ("sum", None), ("mean", None)):
        for given in (None, weight):
            if given is not None and reduction == "mean" and mesh.ndim > INDEXED_DIMENSIONS:
                continue
            loss = partial(kernels.cross_entropy, reduction=reduction, label_smoothing=0.1)
            places = [Shard(0), Shard(0), None if given is None else R]
            agree(loss, [x, target, given], places, out, mesh)


def linear_losses(mesh):
    x, head, target = draw(7, 8), draw(10, 8), labels(10, 7)
    target[3] = -100
    for reduction, out in (("none", Shard(0)), ("sum", Partial()), ("mean", None)):
        loss = partial(kernels.linear_cross_entropy, reduction=reduction)
        agree(loss, [x, head, target], [Shard(0), R, Shard(0)], out, mesh)


def rotary(mesh):
    x, angles = draw(4, 4, 6, 8), torch.rand(4, 6, 4)
    for tables, batch, time in ((angles[0], R, Shard(0)), (angles, Shard(0), Shard(1))):
        for dim, place in ((0, batch), (1, R), (2, time)):
            tensors = [x, tables.cos(), tables.sin()]
            agree(kernels.rotary, tensors, [Shard(dim), place, place], Shard(dim), mesh)


def attention(q, k, v, bias=None, slopes=None, sinks=None, keys=None):
    terms = {"bias": bias, "alibi_slopes": slopes, "sinks": sinks, "key_padding_mask": keys}
    return kernels.attention(q, k, v, causal=True, return_lse=True, **terms)


def attentions(mesh):
    groups = mesh.size()
    batch, heads = Shard(0), Shard(1)

    def qkv(kv_heads, batch=2):
        return [draw(batch, 2 * groups, 3, 4), *(draw(batch, kv_heads, 3, 4) for _ in range(2))]

    keys = torch.rand(2, 3) > 0.2
    terms = [draw(1, 2 * groups, 3, 3), draw(2 * groups), draw(2 * groups), keys]
    agree(attention, [*qkv(groups), *terms], [heads] * 4 + [batch, batch, R], heads, mesh)
    agree(attention, [*qkv(groups), *terms], [batch] * 3 + [R, R, R, batch], batch, mesh)
    agree(attention, qkv(1, batch=1), [heads, R, R], heads, mesh)
    like_torch = partial(kernels.scaled_dot_product_attention, is_causal=True)
    agree(like_torch, qkv(2 * groups, batch=3), [batch] * 3, batch, mesh)
    misfit = [draw(1, 6, 2, 4), draw(1, 3, 2, 4), draw(1, 3, 2, 4)]
    shards = [placed(t, mesh, [heads] * mesh.ndim) for t in misfit]
    refused(NotImplementedError, "attention: q is Shard", lambda: attention(*shards))


def merged(mesh):
    outs, lses = draw(3, 4, 2, 5, 6), draw(3, 4, 2, 5)
    for dim in (1, 2, 3):
        place = Shard(dim)
        agree(kernels.merge_attention, [outs, lses], [place] * 2, Shard(dim - 1), mesh)


def dropped(mesh):
    """Replicated tensors keep the same elements on every rank, whatever the ranks' generators."""
    if "cpu" not in TRITON_DEVICES:
        torch.manual_seed(5)  # torch's own generator draws the mask
    else:
        torch.manual_seed(dist.get_rank())
    ones, bias = torch.ones(8, 16), torch.zeros(16)
    x, b = (placed(t, mesh, [R] * mesh.ndim) for t in (ones, bias))
    for out in (
        kernels.dropout(x, 0.5),
        kernels.bias_act(x, b, "identity", p=0.5),
        kernels.bias_dropout_add(x, x, b, p=0.5),
    ):
        everyone = [torch.empty(8, 16) for _ in range(mesh.size())]
        dist.all_gather(everyone, out.to_local().contiguous())
        assert all(torch.equal(other, everyone[0]) for other in everyone)
        assert 0 < (everyone[0] == everyone[0].min()).sum() < 128
    torch.manual_seed(7)
    rows = placed(ones, mesh, [Shard(0)] * mesh.ndim)
    assert kernels.dropout(rows, 0.5, training=False) is rows
    place = r"x is Shard\(dim=0\) on mesh dimension 0 \(data\)"
    for call in (
        lambda: kernels.dropout(rows, 0.5),
        lambda: kernels.bias_act(rows, b, p=0.5),
        lambda: kernels.bias_dropout_add(rows, rows, b, p=0.5),
    ):
        refused(NotImplementedError, place, call)


def refusals(mesh):
    n = mesh.ndim
    x, weight = draw(4, 8), draw(8)
    rows, columns = (placed(x, mesh, [Shard(d)] * n) for d in (0, 1))
    summed = placed(x, mesh, [Partial()] * n)
    w = placed(weight, mesh, [R] * n)
    split = placed(weight, mesh, [Shard(0)] * n)
    accepted = r"\(x, weight\) may be \(R, R\) or \(S\(0\), R\) there; call x.redistribute first"
    wrong = rf"trilith::rms_norm: x is Shard\(dim=1\) on mesh dimension 0 \(data\); .*{accepted}"
    refused(NotImplementedError, wrong, lambda: rms_norm(columns, w))
    wrong = r"rms_norm: x is Partial\(sum\)"
    refused(NotImplementedError, wrong, lambda: rms_norm(summed, w))
    wrong = r"rms_norm: weight is Shard\(dim=0\) on mesh dimension 0"
    refused(NotImplementedError, wrong, lambda: rms_norm(rows, split))
    wrong = r"bias_act: bias is Replicate\(\) on mesh dimension 0"
    refused(NotImplementedError, wrong, lambda: kernels.bias_act(columns, w))
    strided = DTensor.from_local(
        rows.to_local(), mesh, [_StridedShard(0, split_factor=2), *[R] * (n - 1)]
    )
    refused(NotImplementedError, "x is _StridedShard", lambda: rms_norm(strided, w))
    if n == 2:
        half = placed(x, mesh, [Shard(0), Shard(1)])
        wrong = r"x is Shard\(dim=1\) on mesh dimension 1 \(tensor\)"
        refused(NotImplementedError, wrong, lambda: rms_norm(half, w))
    refused(TypeError, "weight must be a DTensor, as x is", lambda: rms_norm(rows, weight))
    refused(TypeError, "x must be a DTensor, as weight is", lambda: rms_norm(x, w))
    refused(TypeError, "up must be a DTensor", lambda: kernels.gated_act(rows, x))
    line = init_device_mesh("cpu", (dist.get_world_size(), 1))
    other = placed(weight, line, [R, R])
    refused(ValueError, "weight must be on x's mesh", lambda: rms_norm(rows, other))


def third_party(mesh):
    """The default takes what is replicated, and a rule is taken at its word."""
    n = mesh.ndim
    x, y = draw(6, 5), draw(6, 5)
    agree(PRODUCT, [x, y], [R, R], R, mesh)
    rows = placed(x, mesh, [Shard(0)] * n)
    wrong = r"sharded::product: x is Shard\(dim=0\) .* \(x\) may be \(R\) there"
    refused(NotImplementedError, wrong, lambda: PRODUCT(rows, None))
    agree(lambda x: LINEAR(x, None), [x], [Partial()], Partial(), mesh)
    agree(lambda x: LINEAR(x, None), [x], [Shard(1)], Shard(1), mesh)
    agree(lambda x: LINEAR(x, None), [x], [R], R, mesh)
    wrong = "sharding must split or sum each of 1 outputs"
    refused(ValueError, wrong, lambda: LYING(rows, None))
    wrong = "sharded::garbled: sharding must return .*, got 'rows'"
    refused(TypeError, wrong, lambda: GARBLED(rows, None))


def second_derivatives(mesh):
    x, weight = draw(4, 6), draw(6)
    shards = placed(x, mesh, [Shard(0)] * mesh.ndim), placed(weight, mesh, [R] * mesh.ndim)

    def second(x, weight):
        (dx,) = torch.autograd.grad(rms_norm(x, weight).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, weight])

    for ours, expected in zip(second(*shards), second(x, weight), strict=True):
        torch.testing.assert_close(ours.full_tensor(), expected)


def autocast(mesh):
    q, k, v = draw(2, 4, 3, 8), draw(2, 4, 3, 8), draw(2, 4, 3, 8)
    with torch.autocast("cpu", torch.float16):
        agree(attention, [q, k, v], [Shard(0)] * 3, Shard(0), mesh)


def compiled(mesh):
    x, weight = draw(4, 6), draw(6)
    shards = placed(x, mesh, [Shard(0)] * mesh.ndim), placed(weight, mesh, [R] * mesh.ndim)
    function = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(function(*shards).full_tensor().square().sum(), shards)
    expected = torch.autograd.grad(rms_norm(x, weight).square().sum(), [x, weight])
    for grad, e in zip(ours, expected, strict=True):
        torch.testing.assert_close(grad.full_tensor(), e)


def crossed(mesh):
    """One dimension of the mesh splits rows, the other columns or heads."""
    x, bias = draw(5, 7), draw(7)
    both = [Shard(0), Shard(1)]
    agree(kernels.bias_act, [x, bias], [both, [R, Shard(0)]], both, mesh)
    agree(layer_norm, [draw(2, 3, 8), draw(8), None], [both, R, None], both, mesh)
    q, k, v = draw(2, 4, 3, 8), draw(2, 2, 3, 8), draw(2, 2, 3, 8)
    agree(attention, [q, k, v], [both] * 3, both, mesh)
    agree(layer_norm, [draw(6, 8), draw(8), None], [[R, Shard(0)], R, None], [R, Shard(0)], mesh)


CALLS = {
    f.__name__: f
    for f in (
        *(
            norms,
            added_norms,
            activations,
            products,
            softmaxes,
            losses,
            linear_losses,
            rotary,
            attentions,
            cached_attention,
            packed_attention,
            after_norms,
            batch_norms,
            elementwise_losses,
            merged,
            dropped,
        ),
        *(refusals, third_party, second_derivatives, autocast),
    )
}
BY_DIMENSIONS = {1: {"compiled": compiled}, 2: {"crossed": crossed}}


@cache
def mesh_of(sizes):
    return init_device_mesh("cpu", sizes, mesh_dim_names=NAMES[len(sizes)])


def main(*arguments):
    sizes = tuple(int(a) for a in arguments if a.isdigit())
    folder, *names = arguments[len(sizes) :]
    calls = CALLS | BY_DIMENSIONS[len(sizes)]
    checks = {name: lambda call=calls[name]: call(mesh_of(sizes)) for name in names or calls}
    ranks.run_all(checks, math.prod(sizes), Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
