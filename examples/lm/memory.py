"""The most memory that a piece of code has in use at once, beside what was in use before.

    TRITON_INTERPRET=1 python -m examples.lm.memory CONFIG BATCH

counts a training step of a model with the kernels, and of the same model in plain PyTorch, on
tensors without data: nothing is computed, and a machine without a GPU can tell what one needs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from perf.meters.live import live_bytes
from perf.models import eager_lm
from trilith.blocks import LMConfig, build_lm
from trilith.plugins import manager

_ROOT = Path(__file__).resolve().parents[2]


def peak_bytes(run: Callable[[], None], device: torch.device) -> int | None:
    """Bytes: on a GPU by its allocator, elsewhere by counting tensors' storages.

    None if the memory is not enough.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if device.type != "cuda":
            with live_bytes() as live:
                run()
            return live.peak
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        try:
            run()
        except torch.OutOfMemoryError:
            return None
        return torch.cuda.max_memory_allocated(device) - before


def counted_with_kernels(model: LMConfig, batch: int) -> dict[str, int] | None:
    """Peak bytes of a step in bfloat16 autocast, "fused" and "plain"; None where Triton is missing.

    In another process, because kernels take a CPU's tensors only where they are interpreted. None
    too where that fails, and a line that says so: what was trained is worth more than a number.
    """
    if find_spec("triton") is None:
        return None
    config = json.dumps(dataclasses.asdict(model))
    command = [sys.executable, "-m", "examples.lm.memory", config, str(batch)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True)
    if run.returncode:
        why = run.stderr.strip().rpartition("\n")[2] or f"status {run.returncode}"
        print(f"train_lm: memory with kernels was not counted: {why}", file=sys.stderr)
        return None
    peaks: dict[str, int] = json.loads(run.stdout.splitlines()[-1])
    return peaks


def count(config: LMConfig, batch: int) -> dict[str, int]:
    manager.load()  # before tensors lose their data
    peaks = {}
    with FakeTensorMode():
        model = build_lm(config)
        tokens = torch.zeros(batch, config.max_len + 1, dtype=torch.int64)
        given = tokens[:, :-1], tokens[:, 1:]
        for name, loss in (
            ("fused", lambda: model(*given)),
            ("plain", lambda: eager_lm(*given, model)),
        ):
            with live_bytes() as live:
                with torch.autocast("cpu", torch.bfloat16):
                    made = loss()
                made.backward()
            model.zero_grad(set_to_none=True)
            peaks[name] = live.peak
    return peaks


if __name__ == "__main__":
    print(json.dumps(count(LMConfig(**json.loads(sys.argv[1])), int(sys.argv[2]))))
