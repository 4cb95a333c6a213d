"""Attention in plain PyTorch with a rounding where the kernels have one: the tests' yardstick."""

import torch

from trilith.kernels._runtime.random import reference_keep_mask
from trilith.kernels.attention.reference import add_terms


def rounded(x, dtype, precision="ieee"):
    """fp32 values as a factor of a product has them: in 16 bits, or in tf32's 10 of mantissa.

    A GPU's tensor cores leave out the bits after the tenth; the interpreter rounds to the nearest.
    """
    if dtype != torch.float32 or precision == "ieee":
        return x.to(dtype).float()
    mantissa, power = torch.frexp(x)
    to_integer = torch.trunc if x.is_cuda else torch.round
    return torch.ldexp(to_integer(mantissa * 2**11), power - 11)


class _Rounded(torch.autograd.Function):
    """Rounds forward, or what comes back in backward."""

    @staticmethod
    def forward(ctx, x, backward, *to):
        ctx.to = to if backward else None
        return x.view_as(x) if backward else rounded(x, *to)

    @staticmethod
    def backward(ctx, grad):
        return (grad if ctx.to is None else rounded(grad, *ctx.to)), None, None, None


def eager(args, dout, dlse, precision="ieee"):
    """[out, lse, gradients...] of the dense op's arguments."""
    out, lse, grads = _attend(args, dout, dlse, None, precision)
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
    return [out, lse, *(g.to(leaf.dtype) for g, leaf in zip(grads, leaves, strict=True))]


def _attend(args, dout, dlse, kept, precision):
    """(out, lse, gradients in fp32); `kept` is the dropout mask where the seed does not say."""
    q, k, v, bias, key_mask, slopes, sinks, seed, scale, softcap, p, *band = args
    to, groups = (q.dtype, precision), q.shape[1] // k.shape[1]
    named = {"q": q, "k": k, "v": v, "bias": bias, "slopes": slopes, "sinks": sinks}
    wide = {n: t for n, t in named.items() if t is not None and t.is_floating_point()}
    wide = {n: t.detach().float().requires_grad_() for n, t in wide.items()}
    queries, keys, values = (_Rounded.apply(wide[n], False, *to) for n in "qkv")
    keys, values = (t.repeat_interleave(groups, 1) for t in (keys, values.detach()))
    scores = _Rounded.apply(queries @ keys.mT * scale, True, *to)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = add_terms(scores, wide.get("bias", bias), key_mask, wide.get("slopes"), *band)
    sink = scores.new_full((*scores.shape[:3], 1), -torch.inf)
    if sinks is not None:
        sink = wide["sinks"].detach()[:, None, None].expand_as(sink)
    logits = torch.cat([scores.detach(), sink], -1)
    lse = torch.logsumexp(logits, -1, keepdim=True)
    top = logits.amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0, top)
    chances = torch.ones_like(scores)
    if p > 0:
        kept = reference_keep_mask(seed, scores.shape, p) if kept is None else kept
        chances = kept * (0 if p == 1 else 1 / (1 - p))
    raised = (scores.detach() - top).exp() * (chances != 0)
    out = rounded(raised, *to) @ values * (0 if p == 1 else 1 / (1 - p))
    out = torch.where(lse == -torch.inf, 0, out * (top - lse).exp()).to(q.dtype)
    weights = torch.where(lse == -torch.inf, 0, (scores.detach() - lse).exp())
    pull = rounded(dout.float(), *to)
    dvalues = rounded(weights * chances, *to).mT @ pull
    delta = (out.float() * dout.float()).sum(-1, keepdim=True) - dlse.float()[..., None]
    dscores = weights * (pull @ values.mT * chances - delta)
    parts = {"v": dvalues.unflatten(1, (-1, groups)).sum(2)}
    if sinks is not None:
        share = torch.where(lse == -torch.inf, 0, (sink - lse).exp())
        parts["sinks"] = -(share * delta).sum((0, 2, 3))
    rest = [n for n in wide if n not in parts]
    found = torch.autograd.grad(scores, [wide[n] for n in rest], dscores)
    parts |= dict(zip(rest, found, strict=True))
    return out, lse.squeeze(-1), [parts[n] for n in wide]


def eager_packed(args, dout, dlse, precision="ieee"):
    """The same of `varlen_attention`'s arguments, sequence by sequence."""
    q, k, v, cu_q, cu_k, bias, slopes, sinks, seed, scale, softcap, p, *band = args
    tensors = {"q": q, "k": k, "v": v, "bias": bias, "slopes": slopes, "sinks": sinks}
    leaves = {n: t for n, t in tensors.items() if t is not None and t.is_floating_point()}
    sums = {n: torch.zeros(t.shape, device=t.device) for n, t in leaves.items()}
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, device=q.device)
    kept = None
    if p > 0:
        kept = reference_keep_mask(seed, (q.shape[1], q.shape[0], k.shape[0]), p)
    for n, (rows, cols) in enumerate(sequences(cu_q.tolist(), cu_k.tolist())):
        given = {
            name: None if t is None else _part(name, t, n, rows, cols)
            for name, t in tensors.items()
        }
        dense = [*(given[x] for x in ("q", "k", "v", "bias")), None, given["slopes"]]
        dense += [given["sinks"], None, scale, softcap, p, *band]
        mask = None if kept is None else kept[None, :, rows, : cols.stop - cols.start]
        above = (_part("q", dout, n, rows, cols), dlse[None, :, rows])
        own_out, own_lse, grads = _attend(dense, *above, mask, precision)
        out[rows], lse[:, rows] = own_out[0].transpose(0, 1), own_lse[0]
        for name, grad in zip(leaves, grads, strict=True):
            _part(name, sums[name], n, rows, cols).add_(grad)
    return [out, lse, *(sums[n].to(t.dtype) for n, t in leaves.items())]


def _part(name, tensor, n, rows, cols):
    """What sequence n reads of a tensor, as a dense call of one batch entry takes it."""
    if name == "sinks":
        return tensor
    if name == "slopes":
        return tensor[n % len(tensor)][None]
    if name == "bias":
        size = (rows.stop - rows.start, cols.stop - cols.start)
        return tensor[n % len(tensor)][None, :, : size[0], : size[1]]
    return tensor[rows if name == "q" else cols].transpose(0, 1)[None]


def sequences(begins, ends):
    """(rows, columns) of each sequence, as slices."""
    for i, j, a, b in zip(begins, begins[1:], ends, ends[1:], strict=False):
        yield slice(i, j), slice(a, b)
