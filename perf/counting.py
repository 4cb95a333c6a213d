"""The figures that are counted, of ops and of blocks; `perf.counted` shows them and holds them to a
baseline. Kernels run in Triton's interpreter, which whoever imports this has switched on.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

from perf.attention_workloads import (
    attention,
    attention_qkvpacked,
    biased_attention,
    cache_append,
    decode_attention,
    merge_attention,
    varlen_attention,
)
from perf.fused_workloads import (
    add_norm,
    bias_act_linear,
    gated_act_linear,
    layer_norm_linear,
    rms_norm_linear_pair,
)
from perf.meters.arithmetic import Arithmetic, arithmetic
from perf.meters.bands import share_read
from perf.meters.compiled import partitioned, scheduled
from perf.meters.launches import launches
from perf.meters.recompiles import compilations
from perf.meters.saved import saved_bytes
from perf.meters.traffic import Traffic, traffic
from perf.models import block, eager_block
from perf.oracle import gradient_for, leaves, seeded_arguments
from perf.workloads import (
    Workload,
    batch_norm,
    bce_with_logits,
    bias_act,
    bias_dropout_add,
    cross_entropy,
    dropout,
    layer_norm,
    linear_cross_entropy,
    mse,
    rms_norm,
    rotary,
    rotary_qkvpacked,
    soft_cross_entropy,
    softmax,
    swiglu,
)
from trilith.blocks import TransformerBlock
from trilith.plugins.conformance.layouts import padded_rows

CPU, BF16 = torch.device("cpu"), torch.bfloat16

Figures = dict[str, dict[str, float]]

OPS = (
    layer_norm(256, 4096),
    layer_norm(32, 32768),
    rms_norm(256, 4096),
    rms_norm(64, 16384),
    add_norm(256, 4096),
    add_norm(64, 1024, p=0.1),
    add_norm(256, 4096, rms=True),
    add_norm(16, 32768),
    layer_norm_linear(256, 1024, 512),
    layer_norm_linear(256, 1024, 512, added=True),
    rms_norm_linear_pair(256, 1024, 512),
    bias_act_linear(256, 2048, 512),
    gated_act_linear(256, 2048, 512),
    bias_act(256, 2048),
    bias_act(64, 1024, p=0.1),
    swiglu(256, 2048),
    dropout(64, 1024),
    bias_dropout_add(64, 1024),
    bias_dropout_add(256, 2048, p=0.0),
    cross_entropy(32, 8192),
    cross_entropy(4, 131072),
    soft_cross_entropy(32, 8192),
    linear_cross_entropy(64, 256, 8192),
    batch_norm(512, 1024),
    bce_with_logits(256, 2048),
    bce_with_logits(256, 2048, weighted=True),
    mse(256, 2048),
    softmax(256, 2048),
    softmax(4, 131072),
    softmax(4, 131072, log=True),
    rotary(1, 8, 256, 64),
    rotary(1, 8, 256, 64, 48, interleaved=True),
    rotary_qkvpacked(1, 4, 2, 256, 64),
    attention(1, 2, 256, 64),
    attention(1, 1, 256, 128, causal=False),
    attention_qkvpacked(1, 4, 2, 128, 64),
    biased_attention(1, 2, 256, 40),
    varlen_attention((100, 28, 128), 2, 64),
    merge_attention(4, 1, 2, 64, 128),
    decode_attention(2, 8, 2, 512, 64),
    cache_append(2, 2, 64, 512, 64),
)
# Functions of a size that changes from call to call, for the compile counts.
COMPILED: dict[str, Callable[[int], Workload]] = {
    "layer_norm": lambda n: layer_norm(n, 64),
    "rms_norm": lambda n: rms_norm(n, 64),
    "bias_act": lambda n: bias_act(n, 64, p=0.1),
    "gated_act": lambda n: swiglu(n, 64),
    "dropout": lambda n: dropout(n, 64),
    "bias_dropout_add": lambda n: bias_dropout_add(n, 64),
    "cross_entropy": lambda n: cross_entropy(n, 64),
    "rotary": lambda n: rotary(1, 2, n, 16),
    "attention": lambda n: attention(1, 2, n, 16),
}
SIZES = tuple(range(8, 28))
ONE, TWO, ALL = "compiled, one size", "two sizes", f"{len(SIZES)} sizes"
BLOCK_TOKENS, BLOCK_WIDTH, BLOCK_HEADS = 128, 768, 12
BANDS = {"causal": (-1, 0), "causal, window of 512": (511, 0)}
SAVED = "saved bytes per token and width"
GOALS = {"gpt": 10.1, "gated": 11.4}  # elements saved per token and width


def count_op(workload: Workload) -> dict[str, float]:
    """Of forward and, where there is one, backward: bytes over minimal bytes, launches, arithmetic;
    bytes saved between them over forward's minimal ones; launches where no tensor is contiguous.
    """
    args = seeded_arguments(workload, CPU, BF16)
    assert workload.cost is not None
    cost = workload.cost(*args)
    results: list[Any] = []
    with traffic() as forward, arithmetic() as done:
        saved = saved_bytes(lambda: results.append(workload.trilith(*args)))
    (out,) = results
    elements = max(t.numel() for t in tree_leaves(args) if isinstance(t, torch.Tensor))
    figures = _figures_of("forward", forward, cost.forward_bytes)
    figures |= _arithmetic_of("forward", done, cost.forward_flops, elements)
    if leaves(args):
        above = gradient_for(out)
        with traffic() as backward, arithmetic() as done:
            torch.autograd.grad(out, leaves(args), above)
        figures |= _figures_of("backward", backward, cost.backward_bytes)
        figures |= _arithmetic_of("backward", done, cost.backward_flops, elements)
        figures["saved / minimal"] = round(saved / cost.forward_bytes, 6)
    return figures | _strided(workload)


def _strided(workload: Workload) -> dict[str, float]:
    """Launches for tensors whose rows lie apart: a copy shows."""
    args = [_apart(arg) for arg in seeded_arguments(workload, CPU, BF16)]
    with launches() as forward:
        out = workload.trilith(*args)
    figures = {"forward launches, strided": forward.total()}
    if leaves(args):
        above = tree_map(_apart, gradient_for(out))
        with launches() as backward:
            torch.autograd.grad(out, leaves(args), above)
        figures["backward launches, strided"] = backward.total()
    return figures


def _apart(value: Any) -> Any:
    if not (isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1):
        return value
    return padded_rows(value).requires_grad_(value.requires_grad)


def _figures_of(direction: str, moved: Traffic, minimal: int) -> dict[str, float]:
    return {
        f"{direction} bytes / minimal": round(moved.total / minimal, 6),
        f"{direction} requests / minimal": round(moved.requested / minimal, 6),
        f"{direction} launches": len(moved.launches),
    }


def _arithmetic_of(direction: str, done: Arithmetic, flops: int, elements: int) -> dict[str, float]:
    """Products over those that the op declares; others per element of its largest tensor."""
    figures = {
        f"{direction} operations": round(done.elementwise / elements, 4),
        f"{direction} special": round(done.special / elements, 4),
        f"{direction} reduced": round(done.reduced / elements, 4),
    }
    if done.products:
        figures[f"{direction} products / minimal"] = round(2 * done.products / flops, 4)
    return figures


def count_skipped(left: int, right: int) -> dict[str, float]:
    """Rows that attention's kernels go through in a band of 4096 positions, over all of them."""
    return {
        f"{kernel} reads / those of all pairs": round(share_read(kernel, 4096, left, right), 4)
        for kernel in ("fwd", "dkdv", "dq")
    }


def block_arguments(kind: str) -> tuple[torch.Tensor, TransformerBlock]:
    torch.manual_seed(0)
    made = block(kind, BLOCK_WIDTH, BLOCK_HEADS, BLOCK_TOKENS).to(BF16)
    return torch.randn(1, BLOCK_TOKENS, BLOCK_WIDTH, dtype=BF16, requires_grad=True), made


def count_saved(kind: str, forward: Callable[..., torch.Tensor]) -> float:
    """Bytes per token and width that a block saves for backward, its own input included."""
    x, made = block_arguments(kind)
    ignored = [*made.parameters(), *made.buffers()]
    saved = saved_bytes(lambda: forward(x, made), ignored)
    return round(saved / (BLOCK_TOKENS * BLOCK_WIDTH), 4)


def count_block(kind: str, forward: Callable[..., torch.Tensor]) -> dict[str, float]:
    """Launches of a block, and what it saves."""
    x, made = block_arguments(kind)
    with launches() as forwards:
        out = forward(x, made)
    above = gradient_for(out)
    with launches() as backwards:
        torch.autograd.grad(out, leaves((x, made)), above)
    return {
        SAVED: count_saved(kind, forward),
        "forward launches": forwards.total(),
        "backward launches": backwards.total(),
    }


def count_compilations(at: Callable[[int], Workload]) -> dict[str, float]:
    """How often torch.compile compiles: once, once more for any size, and then never again."""
    workloads = [at(size) for size in SIZES]
    calls = (seeded_arguments(workload, CPU, torch.float32) for workload in workloads)
    return _stages(compilations(workloads[0].trilith, calls))


def count_block_compilations(kind: str) -> dict[str, float]:
    made = block(kind, 32, 2, max(SIZES))
    calls = ((torch.randn(1, size, 32, requires_grad=True), made) for size in SIZES)
    return _stages(compilations(lambda x, made: made(x), calls))


def _stages(counts: list[int]) -> dict[str, float]:
    return {ONE: counts[0], TWO: counts[1], ALL: counts[-1]}


def subjects(chosen: Sequence[str] = ()) -> dict[str, Callable[[], dict[str, float]]]:
    """What is counted, by name: all, or those with one of these parts in their names."""
    found: dict[str, Callable[[], dict[str, float]]] = {}
    for workload in OPS:
        found[workload.name] = partial(count_op, workload)
    for name, band in BANDS.items():
        found[f"attention at T4096, {name}"] = partial(count_skipped, *band)
    for kind in GOALS:
        found[f"{kind} block"] = partial(count_block, kind, lambda x, made: made(x))
    for name, at in COMPILED.items():
        found[f"{name} under torch.compile"] = partial(count_compilations, at)
    for kind in GOALS:
        found[f"{kind} block under torch.compile"] = partial(count_block_compilations, kind)
    return {n: f for n, f in found.items() if not chosen or any(part in n for part in chosen)}


def count_all(names: Sequence[str], jobs: int = 1) -> tuple[Figures, dict[str, float]]:
    """The figures, and the seconds that counting each subject took; in so many processes."""
    # Blocks take longest, and nobody waits for them at the end if they come first.
    order = sorted(names, key=lambda name: "block" not in name)
    found: dict[str, tuple[dict[str, float], float]] = {}
    tqdm.monitor_interval = 0  # its thread would not be in the forks
    ignored = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process, which ends the others
    with multiprocessing.get_context("fork").Pool(jobs, signal.signal, ignored) as pool:
        counted = pool.imap_unordered(_count, order)
        for name, own, seconds in tqdm(counted, total=len(order), desc="counted"):
            found[name] = (own, seconds)
    return {name: found[name][0] for name in names}, {name: found[name][1] for name in names}


def _count(name: str) -> tuple[str, dict[str, float], float]:
    start = time.perf_counter()
    return name, subjects()[name](), time.perf_counter() - start


def count_scheduled(kind: str) -> dict[str, float]:
    """Kernels that torch.compile would launch for the block in plain PyTorch."""
    kernels: list[int] = []
    x, made = block_arguments(kind)
    torch._dynamo.reset()
    out = scheduled(eager_block, kernels)(x, made)
    torch.autograd.grad(out, leaves((x, made)), gradient_for(out))
    forward, backward = kernels
    return {"forward launches": forward, "backward launches": backward}


def count_peers() -> Figures:
    """The same blocks in plain PyTorch, eager and as torch.compile splits and schedules them."""
    peers: Figures = {}
    for kind in GOALS:
        peers[f"{kind} eager"] = count_block(kind, eager_block)
        torch._dynamo.reset()
        split = partitioned(eager_block)
        saved = {SAVED: count_saved(kind, split)}
        peers[f"{kind} compiled"] = saved | count_scheduled(kind)
    return peers
