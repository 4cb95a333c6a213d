"""What is counted, not timed: the same on every machine, so that each change can be held to it.

    python -m perf.counted [--check | --update] [--binaries] [--json FILE]

Kernels run in Triton's interpreter. --check exits with 1 if a figure is worse than in
perf/baselines/counted.json; --update writes the figures there. --binaries adds spills and
narrow loads of every kernel, compiled ahead of time, which takes minutes; its baseline is kept
per Triton version, and is compared only when the flag is given.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from perf import gate
from perf.meters.compiled import partitioned
from perf.meters.dispatch import DIRECTIONS, host_microseconds
from perf.meters.launches import launches
from perf.meters.saved import saved_bytes
from perf.meters.traffic import Traffic, traffic
from perf.models import block, eager_block
from perf.oracle import gradient_for, leaves, seeded_arguments
from perf.workloads import (
    Workload,
    attention,
    bias_act,
    bias_dropout_add,
    cross_entropy,
    dropout,
    layer_norm,
    merge_attention,
    rms_norm,
    rotary,
    swiglu,
)
from tests.support import interpreter
from trilith.blocks import TransformerBlock

BASELINE = Path(__file__).parent / "baselines" / "counted.json"
CPU, BF16 = torch.device("cpu"), torch.bfloat16

Figures = dict[str, dict[str, float]]

OPS = (
    layer_norm(256, 4096),
    layer_norm(32, 32768),
    rms_norm(256, 4096),
    rms_norm(64, 16384),
    bias_act(256, 2048),
    bias_act(64, 1024, p=0.1),
    swiglu(256, 2048),
    dropout(64, 1024),
    bias_dropout_add(64, 1024),
    bias_dropout_add(256, 2048, p=0.0),
    cross_entropy(32, 8192),
    cross_entropy(4, 131072),
    rotary(1, 8, 256, 64),
    attention(1, 2, 256, 64),
    attention(1, 1, 256, 128, causal=False),
    merge_attention(4, 1, 2, 64, 128),
)
BLOCK_TOKENS, BLOCK_WIDTH, BLOCK_HEADS = 128, 768, 12
SAVED = "saved bytes per token and width"
GOALS = {"gpt": 10.1, "gated": 11.4}  # elements saved per token and width


def count_op(workload: Workload) -> dict[str, float]:
    """Bytes over minimal bytes, and launches, of one forward and backward."""
    args = seeded_arguments(workload, CPU, BF16)
    assert workload.cost is not None
    cost = workload.cost(*args)
    with traffic() as forward:
        out = workload.trilith(*args)
    above = gradient_for(out)
    with traffic() as backward:
        torch.autograd.grad(out, leaves(args), above)
    figures: dict[str, float] = {}
    for direction, moved, minimal in (
        ("forward", forward, cost.forward_bytes),
        ("backward", backward, cost.backward_bytes),
    ):
        figures |= {f"{direction} {k}": v for k, v in _figures_of(moved, minimal).items()}
    return figures


def _figures_of(moved: Traffic, minimal: int) -> dict[str, float]:
    return {
        "bytes / minimal": round(moved.total / minimal, 4),
        "requests / minimal": round(moved.requested / minimal, 4),
        "launches": len(moved.launches),
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


def count_all(report: Callable[[str], None]) -> Figures:
    figures: Figures = {}
    for workload in OPS:
        report(workload.name)
        figures[workload.name] = count_op(workload)
    for kind in GOALS:
        report(f"{kind} block")
        figures[f"{kind} block"] = count_block(kind, lambda x, made: made(x))
    return figures


def count_peers() -> Figures:
    """The same blocks in plain PyTorch, eager and as torch.compile splits them."""
    peers: Figures = {}
    for kind in GOALS:
        peers[f"{kind} eager"] = count_block(kind, eager_block)
        torch._dynamo.reset()
        split = partitioned(eager_block)
        peers[f"{kind} compiled"] = {SAVED: count_saved(kind, split)}
    return peers


def count_binaries() -> Figures:
    """Each kernel's variants on sm_90, from a process that compiles for real."""
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reports.json"
        command = [sys.executable, "-m", "tests.support.aot", "--arch", "sm_90"]
        answer = subprocess.run(
            [*command, "--json", str(path)], env=environ, capture_output=True, text=True
        )
        if not path.exists():
            raise RuntimeError(f"ahead-of-time compiling failed:\n{answer.stderr[-2000:]}")
        reports = json.loads(path.read_text())
    by_kernel: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for report in reports:
        compiled = report["kernel"] != "-"
        name = report["kernel"] if compiled else f"{report['op']}, not compiled"
        by_kernel[f"{name} {report['arch']}"].append(report)
    return {name: _figures_of_variants(variants) for name, variants in by_kernel.items()}


def _figures_of_variants(variants: list[dict[str, Any]]) -> dict[str, float]:
    return {
        "spilled bytes": max(v["spilled"] for v in variants),
        "spill instructions": max(v["spill_instructions"] for v in variants),
        "narrow loads": round(statistics.mean(1 - v["wide"] for v in variants), 4),
        "variants with problems": sum(bool(v["problems"]) for v in variants),
    }


def op_table(figures: Figures) -> str:
    kinds = ("bytes / minimal", "requests / minimal", "launches")
    columns = [f"{direction} {kind}" for kind in kinds for direction in ("forward", "backward")]
    rows = [[w.name, *(f"{figures[w.name][column]:g}" for column in columns)] for w in OPS]
    return gate.markdown(["op, bf16", *columns], rows)


def block_table(figures: Figures, peers: Figures) -> str:
    head = ["block, bf16", SAVED, "in elements", "eager's", "torch.compile's", "goal"]
    head += ["forward launches", "eager's", "backward launches", "eager's"]
    rows = []
    for kind, goal in GOALS.items():
        ours, eager = figures[f"{kind} block"], peers[f"{kind} eager"]
        elements = [f"{p[SAVED] / 2:.2f}" for p in (ours, eager, peers[f"{kind} compiled"])]
        row = [kind, f"{ours[SAVED]:g}", *elements, f"{goal}"]
        for key in ("forward launches", "backward launches"):
            row += [f"{ours[key]:g}", f"{eager[key]:g}"]
        rows.append(row)
    return gate.markdown(head, rows)


def host_table(host: Figures) -> str:
    head = ["host us a call", "op", "autograd.Function", "ratio"]
    rows = [[d, *(f"{host[d][k]:.1f}" for k in ("op", "plain", "ratio"))] for d in DIRECTIONS]
    return gate.markdown(head, rows)


def binary_table(binaries: Figures) -> str:
    head = ["kernel", *next(iter(binaries.values()))]
    rows = [[k, *(f"{f[column]:g}" for column in head[1:])] for k, f in sorted(binaries.items())]
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
    interpreter.apply()
    figures = count_all(lambda name: print(name, file=sys.stderr))
    host: Figures = {}
    for direction in DIRECTIONS:
        cost: dict[str, float] = host_microseconds(direction)
        host[direction] = cost | {"ratio": cost["op"] / cost["plain"]}
    binaries = count_binaries() if options.binaries else {}
    peers = count_peers()
    results: dict[str, Any] = {"figures": figures, "peers": peers, "host": host}
    results |= {"torch": torch.__version__}
    results |= {"binaries": {version("triton"): binaries} if binaries else {}}
    parts = [op_table(figures), block_table(figures, peers), host_table(host)]
    parts += [binary_table(binaries)] if binaries else []
    print("\n\n".join(parts))
    print(f"\ncounted in {time.perf_counter() - start:.0f} s")
    if options.json:
        gate.write(options.json, results)
    return _judge(results, options.check, options.update)


def _judge(results: dict[str, Any], check: bool, update: bool) -> int:
    if not (check or update):
        return 0
    baseline = gate.read(BASELINE)
    compiled = baseline.get("binaries", {})
    found = gate.changes(baseline.get("figures", {}), results["figures"])
    for triton, binaries in results["binaries"].items():
        found += gate.changes(compiled.get(triton, {}), binaries)
    print("\n".join(map(str, found)) or "every figure is as it was")
    if update:
        kept = {k: results[k] for k in ("figures", "torch")}
        gate.write(BASELINE, kept | {"binaries": compiled | results["binaries"]})
        return 0
    return int(any(change.is_worse for change in found))


if __name__ == "__main__":
    sys.exit(main())
