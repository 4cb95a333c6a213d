"""The most memory that a piece of code has in use at once, beside what was in use before."""

from __future__ import annotations

from collections.abc import Callable

import torch

from perf.meters.live import live_bytes


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
