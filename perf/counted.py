"""What is counted, not timed: the same on every machine, so that each change can be held to it.

    python -m perf.counted [--check | --update] [--binaries] [--json FILE]

Kernels run in Triton's interpreter. --check exits with 1 if a figure is worse than in
perf/baselines/counted.json; --update writes the figures there. --binaries adds spills
and narrow loads of a sample of every kernel, compiled ahead of time for each architecture; its
baseline is kept per Triton version. On CI tests/test_aot.py holds the same binaries to it.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from perf import binaries, gate
from perf.fused_workloads import (
    add_norm,
    bias_act_linear,
    gated_act_linear,
    layer_norm_linear,
    rms_norm_linear_pair,
)
from perf.meters.bands import share_read
from perf.meters.compiled import partitioned, scheduled
from perf.meters.dispatch import DIRECTIONS, host_microseconds
from perf.meters.launches import launches
from perf.meters.recompiles import compilations
from perf.meters.saved import saved_bytes
from perf.meters.traffic import Traffic, traffic
from perf.models import block, eager_block
from perf.oracle import gradient_for, leaves, seeded_arguments
from perf.workloads import (
    Workload,
    attention,
    batch_norm,
    bce_with_logits,
    bias_act,
    bias_dropout_add,
    cross_entropy,
    decode_attention,
    dropout,
    layer_norm,
    linear_cross_entropy,
    merge_attention,
    mse,
    rms_norm,
    rotary,
    soft_cross_entropy,
    softmax,
    swiglu,
    varlen_attention,
)
from tests.support import known
from trilith.blocks import TransformerBlock

BASELINE = Path(__file__).parent / "baselines" / "counted.json"
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
    mse(256, 2048),
    softmax(256, 2048),
    softmax(4, 131072, log=True),
    rotary(1, 8, 256, 64),
    attention(1, 2, 256, 64),
    attention(1, 1, 256, 128, causal=False),
    varlen_attention((100, 28, 128), 2, 64),
    merge_attention(4, 1, 2, 64, 128),
    decode_attention(2, 8, 2, 512, 64),
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
    """Bytes over minimal bytes, and launches, of one forward and, where there is one, backward."""
    args = seeded_arguments(workload, CPU, BF16)
    assert workload.cost is not None
    cost = workload.cost(*args)
    with traffic() as forward:
        out = workload.trilith(*args)
    figures = _figures_of("forward", forward, cost.forward_bytes)
    if leaves(args):
        above = gradient_for(out)
        with traffic() as backward:
            torch.autograd.grad(out, leaves(args), above)
        figures |= _figures_of("backward", backward, cost.backward_bytes)
    return figures


def _figures_of(direction: str, moved: Traffic, minimal: int) -> dict[str, float]:
    return {
        f"{direction} bytes / minimal": round(moved.total / minimal, 4),
        f"{direction} requests / minimal": round(moved.requested / minimal, 4),
        f"{direction} launches": len(moved.launches),
    }


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


def subjects() -> dict[str, Callable[[], dict[str, float]]]:
    """What is counted, by name."""
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
    return found


def count_all(report: Callable[[str], None], jobs: int = 1) -> tuple[Figures, dict[str, float]]:
    """The figures, and the seconds that counting each subject took; in so many processes."""
    names = list(subjects())
    # Blocks take longest, and nobody waits for them at the end if they come first.
    order = sorted(names, key=lambda name: "block" not in name)
    found: dict[str, tuple[dict[str, float], float]] = {}
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for name, own, seconds in pool.imap_unordered(_count, order):
            report(name)
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


def op_table(figures: Figures) -> str:
    kinds = ("bytes / minimal", "requests / minimal", "launches")
    columns = [f"{direction} {kind}" for kind in kinds for direction in ("forward", "backward")]
    rows = []
    for name in (w.name for w in OPS):
        found = [figures[name].get(column) for column in columns]
        rows.append([name, *("—" if figure is None else f"{figure:g}" for figure in found)])
    return gate.markdown(["op, bf16", *columns], rows)


def block_table(figures: Figures, peers: Figures) -> str:
    head = ["block, bf16", SAVED, "in elements", "eager's", "torch.compile's", "goal"]
    for direction in ("forward", "backward"):
        head += [f"{direction} launches", "eager's", "torch.compile's"]
    rows = []
    for kind, goal in GOALS.items():
        ours, eager = figures[f"{kind} block"], peers[f"{kind} eager"]
        compiled = peers[f"{kind} compiled"]
        elements = [f"{p[SAVED] / 2:.2f}" for p in (ours, eager, compiled)]
        row = [kind, f"{ours[SAVED]:g}", *elements, f"{goal}"]
        for key in ("forward launches", "backward launches"):
            row += [f"{p[key]:g}" for p in (ours, eager, compiled)]
        rows.append(row)
    return gate.markdown(head, rows)


def compile_table(figures: Figures) -> str:
    """Compilations by the end of one, two, and all sizes."""
    rows = [
        [name.removesuffix(" under torch.compile"), *(f"{own[k]:g}" for k in (ONE, TWO, ALL))]
        for name, own in figures.items()
        if ONE in own
    ]
    return gate.markdown(["under torch.compile", ONE, TWO, ALL], rows)


def host_table(host: Figures) -> str:
    head = ["host us a call", "op", "autograd.Function", "ratio"]
    rows = [[d, *(f"{host[d][k]:.1f}" for k in ("op", "plain", "ratio"))] for d in DIRECTIONS]
    return gate.markdown(head, rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.counted", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--binaries", action="store_true", help="also compile ahead of time")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="fail on a figure worse than before")
    action.add_argument("--update", action="store_true", help="make the figures the baseline")
    options = parser.parse_args()

    start = time.perf_counter()
    torch.set_num_threads(1)
    figures, seconds = count_all(lambda name: print(name, file=sys.stderr), os.cpu_count() or 1)
    host: Figures = {}
    for direction in DIRECTIONS:
        cost: dict[str, float] = host_microseconds(direction)
        host[direction] = cost | {"ratio": cost["op"] / cost["plain"]}
    reports = binaries.survey() if options.binaries else []
    compiled = binaries.figures(reports)
    peers = count_peers()
    results: dict[str, Any] = {"figures": figures, "peers": peers, "host": host}
    results |= {"torch": torch.__version__, "seconds": seconds}
    results |= {"binaries": {version("triton"): compiled} if compiled else {}}
    parts = [op_table(figures), block_table(figures, peers)]
    parts += [compile_table(figures), host_table(host)]
    parts += [binaries.table(compiled)] if compiled else []
    print("\n\n".join(parts))
    print(f"\ncounted in {time.perf_counter() - start:.0f} s")
    if options.json:
        gate.write(options.json, results)
    if options.update and reports:
        known.write(known.FILE, reports)
    return _judge(results, options.check, options.update)


def _judge(results: dict[str, Any], check: bool, update: bool) -> int:
    if not (check or update):
        return 0
    baseline = gate.read(BASELINE)
    compiled = baseline.get("binaries", {})
    found = gate.changes(baseline.get("figures", {}), results["figures"])
    for triton, own in results["binaries"].items():
        found += binaries.changes(compiled.get(triton, {}), own)
    print("\n".join(map(str, found)) or "every figure is as it was")
    if update:
        kept = {k: results[k] for k in ("figures", "torch")}
        gate.write(BASELINE, kept | {"binaries": compiled | results["binaries"]})
        return 0
    return int(any(change.is_worse for change in found))


if __name__ == "__main__":
    sys.exit(main())
