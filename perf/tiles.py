"""Times attention's kernels, each by itself, with candidates for its launch table.

    python -m perf.tiles KERNEL HEAD_DIM TILES... [--shape B H T] [--json FILE]
    python -m perf.tiles dkdv 128 64,128,16,8,3 32,128,16,8,2

KERNEL is fwd, dkdv, dk, dv or dq; TILES an entry of `kernels/attention/tables.py`. Compiles in
several processes, then times one after another: causal, bfloat16, as many keys as queries. An entry
that spills is marked, for the tables take none.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from perf.gate import markdown
from perf.timing import sample_gpu
from trilith.kernels.attention import backward, backward_queries, forward, tables
from trilith.kernels.attention.launchers import AttentionCall, Upstream, attention_out

KERNELS = {
    "fwd": forward.attention_fwd_kernel,
    "dkdv": backward.attention_bwd_dkdv_kernel,
    "dk": backward.attention_bwd_dkdv_kernel,
    "dv": backward.attention_bwd_dkdv_kernel,
    "dq": backward_queries.attention_bwd_dq_kernel,
}
PRODUCTS = {"fwd": 2, "dkdv": 4, "dk": 3, "dv": 2, "dq": 3}  # of queries by keys by head dim
_WARM, _SAMPLES = 3, 15
_PROCESSES = 12


class Candidate(NamedTuple):
    kernel: str
    head_dim: int
    tiles: tuple[int, ...]
    shape: tuple[int, int, int]  # batch, heads, length


def prepared(candidate: Candidate) -> Callable[[], Any]:
    """A call of the one kernel, which takes the candidate's tiles from then on."""
    kernel, head_dim, tiles, (b, h, t) = candidate
    for table in tables.TABLES.values():
        table["half"][kernel, max(64, head_dim)] = (tiles, tiles)
    torch.manual_seed(0)
    q, k, v, dout = torch.randn(4, b, h, t, head_dim, device="cuda", dtype=torch.bfloat16).unbind()
    rest = (head_dim**-0.5, 0.0, 0.0, "top_left", -1, 0)
    call = AttentionCall(q, k, v, None, None, None, None, *rest)
    out, lse, lse2 = attention_out(q, v)
    call.forward(None, out, lse, lse2) if kernel != "fwd" else None
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    upstream = Upstream(dout, lse2, torch.zeros_like(lse))
    return {
        "fwd": lambda: call.forward(None, out, lse, lse2),
        "dkdv": lambda: call.key_sums("dkdv", upstream, dk, dv),
        "dk": lambda: call.key_sums("dk", upstream, dk, None),
        "dv": lambda: call.key_sums("dv", upstream, None, dv),
        "dq": lambda: call.query_gradients(upstream, None),
    }[kernel]


def compiled(candidate: Candidate) -> str | None:
    """Fill Triton's cache; what went wrong, or None."""
    try:
        prepared(candidate)()
        torch.cuda.synchronize()
    except Exception as error:
        return str(error).splitlines()[0]
    return None


def timed(candidate: Candidate) -> dict[str, Any]:
    """Milliseconds, TFLOP/s, registers and bytes spilled."""
    kernel = KERNELS[candidate.kernel]
    kernel.device_caches.clear()
    run, device = prepared(candidate), torch.device("cuda")
    for _ in range(_WARM):
        run()
    seconds = median(sample_gpu(run, device) for _ in range(_SAMPLES))
    (binary,) = [b for cache in kernel.device_caches.values() for b in cache[0].values()]
    b, h, t = candidate.shape
    flops = PRODUCTS[candidate.kernel] * b * h * t * t * candidate.head_dim
    return {
        "ms": 1e3 * seconds,
        "tflops": flops / seconds / 1e12,
        "registers": binary.n_regs,
        "spilled": binary.n_spills,
    }


def survey(candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """A row for each candidate, the quickest first; those that do not run last."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(_PROCESSES, mp_context=context) as pool:
        problems = list(tqdm(pool.map(compiled, candidates), "compile", len(candidates)))
    rows = []
    for candidate, problem in zip(candidates, problems, strict=True):
        found = {"problem": problem} if problem else timed(candidate)
        rows.append({**candidate._asdict(), **found})
    return sorted(rows, key=lambda row: row.get("ms", float("inf")))


def table(rows: Sequence[dict[str, Any]]) -> str:
    head = ["tiles", "ms", "TFLOP/s", "registers", "spilled bytes"]
    lines = []
    for row in rows:
        tiles = ",".join(map(str, row["tiles"]))
        if row.get("problem"):
            lines.append([tiles, row["problem"], "", "", ""])
        else:
            figures = f"{row['ms']:.4f}", f"{row['tflops']:.0f}", str(row["registers"])
            lines.append([tiles, *figures, str(row["spilled"]) if row["spilled"] else ""])
    return markdown(head, lines)


def entry(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(n) for n in text.split(","))
    except ValueError:
        found = ()
    if len(found) not in (5, 6):
        raise argparse.ArgumentTypeError(
            f"must be queries,keys,masked side,warps,stages[,chunk], got {text!r}"
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kernel", choices=KERNELS)
    parser.add_argument("head_dim", type=int)
    parser.add_argument("tiles", type=entry, nargs="+")
    parser.add_argument(
        "--shape", type=int, nargs=3, default=(4, 16, 4096), metavar=("B", "H", "T")
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("perf.tiles needs a GPU; tests.support.aot tells spills without one", file=sys.stderr)
        return 2
    shape = tuple(options.shape)
    rows = survey([Candidate(options.kernel, options.head_dim, t, shape) for t in options.tiles])
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
