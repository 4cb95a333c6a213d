"""Workloads of whole blocks and of training steps, beside the same mathematics in plain PyTorch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perf.workloads import Draw, Function, Workload, rotated
from trilith.blocks import LMConfig, TransformerBlock, TransformerLM, build_lm
from trilith.plugins import Cost

GPT: dict[str, Any] = {
    "norm": "layer_norm",
    "mlp": "mlp",
    "activation": "gelu",
    "position": "learned",
    "bias": True,
}
GATED: dict[str, Any] = {
    "norm": "rms_norm",
    "mlp": "gated_mlp",
    "activation": "silu",
    "position": "rotary",
}
KINDS = {"gpt": GPT, "gated": GATED}


def config(kind: str, dim: int, n_heads: int, max_len: int, **sizes: Any) -> LMConfig:
    defaults = {"vocab_size": 64, "n_layers": 1}
    return LMConfig(dim=dim, n_heads=n_heads, max_len=max_len, **(defaults | KINDS[kind] | sizes))


def block(kind: str, dim: int, n_heads: int, max_len: int, **others: Any) -> TransformerBlock:
    """The block that `build_lm` makes for this kind of model."""
    made = build_lm(config(kind, dim, n_heads, max_len, **others)).blocks[0]
    assert isinstance(made, TransformerBlock)
    return made


def block_workload(kind: str, b: int, t: int, dim: int, n_heads: int) -> Workload:
    def arguments(draw: Draw) -> tuple[Any, ...]:
        made = block(kind, dim, n_heads, t).to(draw.device, draw.dtype)
        return draw(b, t, dim), made

    return Workload(
        name=f"{kind}_block-B{b}-T{t}-d{dim}",
        arguments=arguments,
        cost=_block_cost,
        trilith=_run_block,
        eager=eager_block,
        peers={"trilith-compile": partial(_compiled, _run_block)},
    )


def _run_block(x: Tensor, made: nn.Module) -> Tensor:
    return made(x)


def _compiled(function: Function, mode: str | None = None) -> Function:
    """Trilith under torch.compile: ops stay what they are, the rest is Inductor's."""
    return torch.compile(function, mode=mode, dynamic=False)


def train_step(
    kind: str, b: int, t: int, dim: int, n_heads: int, n_layers: int, vocab_size: int
) -> Workload:
    sizes = config(kind, dim, n_heads, t, n_layers=n_layers, vocab_size=vocab_size)

    def arguments(draw: Draw) -> tuple[Any, ...]:
        tokens = draw.labels(b * (t + 1), vocab_size).view(b, t + 1)
        model = build_lm(sizes).to(draw.device)
        on_gpu = draw.device.type == "cuda"
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=on_gpu, capturable=on_gpu)
        return tokens[:, :-1], tokens[:, 1:], model, optimizer

    return Workload(
        name=f"train_step-{kind}-B{b}-T{t}-d{dim}-L{n_layers}-V{vocab_size}",
        arguments=arguments,
        cost=None,
        trilith=_run_lm,
        eager=lambda tokens, targets, model, optimizer: eager_lm(tokens, targets, model),
        peers={
            "trilith-compile": partial(_compiled, _run_lm),
            "trilith-graphs": partial(_compiled, _run_lm, "reduce-overhead"),
        },
        steps=True,
        autocast=True,
    )


def _run_lm(tokens: Tensor, targets: Tensor, model: TransformerLM, _: Any) -> Tensor:
    return model(tokens, targets)


def _block_cost(x: Tensor, made: nn.Module) -> Cost:
    """FLOPs of the matrix products; bytes of the block's input, output and parameters."""
    tokens, length = x.shape[0] * x.shape[1], x.shape[1]
    weights = sum(p.numel() for p in made.parameters() if p.dim() == 2)
    flops = 2 * tokens * weights + 2 * tokens * length * x.shape[2]
    parameters = sum(p.numel() * p.element_size() for p in made.parameters())
    data = x.numel() * x.element_size()
    return Cost(2 * data + parameters, 3 * data + 2 * parameters, flops, 2 * flops)


def eager_block(x: Tensor, made: Any) -> Tensor:
    """A pre-norm block on the parameters of ours, in plain PyTorch."""
    x = x + _eager_attention(_eager_norm(x, made.attention.pre), made.attention.branch)
    return x + _eager_mlp(_eager_norm(x, made.mlp.pre), made.mlp.branch)


def eager_lm(tokens: Tensor, targets: Tensor, model: TransformerLM) -> Tensor:
    """The loss of a language model on the parameters of ours, in plain PyTorch."""
    x = F.embedding(tokens, model.embedding.weight)
    if hasattr(model.position, "weight"):
        x = x + model.position.weight[: tokens.shape[1]]
    for made in model.blocks:
        x = eager_block(x, made)
    x = _eager_norm(x, model.norm)
    head = model.embedding.weight if model.head is None else model.head.weight
    logits = F.linear(x, head).flatten(0, -2)
    return F.cross_entropy(
        logits.to(torch.promote_types(x.dtype, torch.float32)), targets.flatten()
    )


def _eager_norm(x: Tensor, norm: Any) -> Tensor:
    if hasattr(norm, "bias"):
        return F.layer_norm(x, (norm.dim,), norm.weight, norm.bias, norm.eps)
    return F.rms_norm(x, (norm.dim,), norm.weight, norm.eps)


def _eager_attention(x: Tensor, branch: Any) -> Tensor:
    packed = branch.qkv(x).unflatten(-1, (sum(branch.heads), -1))
    q, k, v = (part.transpose(1, 2) for part in packed.split(branch.heads, dim=2))
    if branch.position is not None:
        cos, sin = branch.position.cos[: x.shape[1]], branch.position.sin[: x.shape[1]]
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return branch.out(mixed.transpose(1, 2).flatten(2))


def _eager_mlp(x: Tensor, branch: Any) -> Tensor:
    if hasattr(branch, "gate"):
        return branch.down(F.silu(branch.gate(x)) * branch.up(x))
    return branch.down(F.gelu(branch.up(x)))
