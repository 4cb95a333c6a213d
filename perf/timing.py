"""How long a region takes: on a GPU by its own events, on a CPU by the wall clock.

pytest-benchmark asks a timer before and after each call. `CLOCK` is that timer: a virtual clock
that stands still but for what a stopwatch measured, so that its statistics are of device times.

On a GPU a sample flushes the L2 cache by writing a buffer larger than it, records an event, runs
the region, and records another. The flush keeps the device busy while the host gets ahead. A region
below 50 us, or one that the host may issue more slowly than the device works, is replayed from a
CUDA graph, so that the host cannot show. What the host needs to issue the region, and the time from
call to completion, are measured apart.
"""

from __future__ import annotations

import math
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from typing import Any

import torch

Region = Callable[[], Any]

GRAPH_BELOW = 50e-6
_HOST_SHOWS_BELOW = 1.5  # times what the host needs
_FLUSH_BYTES = 1 << 30
_SECONDS_PER_CASE = 0.15
_MIN_ROUNDS, _MAX_ROUNDS = 10, 100
_PROBES = 5


class VirtualClock:
    """A timer in seconds that moves only when it is told to."""

    __name__ = "virtual"

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds


CLOCK = VirtualClock()


@dataclass(frozen=True)
class Prepared:
    """A warm region: one sample of its time, and what else was found out about it."""

    sample: Callable[[], float]
    rounds: int
    facts: dict[str, Any]


def prepare(region: Region, device: torch.device) -> Prepared:
    """Warm the region up; decide how it is timed, and how often."""
    return _prepare_gpu(region, device) if device.type == "cuda" else _prepare_cpu(region)


@contextmanager
def timing_stream(device: torch.device) -> Iterator[None]:
    """Build and time regions inside: a CUDA graph cannot capture the default stream."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    with torch.cuda.stream(_stream(device)):
        yield
    torch.cuda.synchronize(device)


def sample_cpu(region: Region) -> float:
    start = time.perf_counter()
    region()
    return time.perf_counter() - start


def sample_gpu(region: Region, device: torch.device) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush(device)
    start.record()
    region()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def _prepare_cpu(region: Region) -> Prepared:
    region()
    typical = statistics.median(sample_cpu(region) for _ in range(_PROBES))
    return Prepared(lambda: sample_cpu(region), _rounds(typical), {})


def _prepare_gpu(region: Region, device: torch.device) -> Prepared:
    for _ in range(3):
        region()
    torch.cuda.synchronize(device)
    facts: dict[str, Any] = {"peak_memory_bytes": _peak_memory(region, device)}
    facts["host_us"], facts["end_to_end_us"] = _host_times(region, device)
    typical = statistics.median(sample_gpu(region, device) for _ in range(_PROBES))
    timed = region
    if typical < max(GRAPH_BELOW, _HOST_SHOWS_BELOW * 1e-6 * facts["host_us"]):
        timed, facts["graph"] = _graphed(region, device)
    flushed = typical + _FLUSH_BYTES / 3e12
    return Prepared(lambda: sample_gpu(timed, device), _rounds(flushed), facts)


def _rounds(seconds: float) -> int:
    return min(_MAX_ROUNDS, max(_MIN_ROUNDS, math.ceil(_SECONDS_PER_CASE / seconds)))


def _graphed(region: Region, device: torch.device) -> tuple[Region, str]:
    """A replay of the region, and "yes"; or the region, and why it could not be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=_stream(device)):
            region()
    except RuntimeError as error:
        torch.cuda.synchronize(device)
        return region, f"no: {str(error).splitlines()[0]}"
    graph.replay()
    return graph.replay, "yes"


def _peak_memory(region: Region, device: torch.device) -> int:
    """Bytes that the region allocates above what stood before."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    region()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _host_times(region: Region, device: torch.device) -> tuple[float, float]:
    """Microseconds until the call returns, and until the device is done; least of several."""
    issued, done = [], []
    for _ in range(_PROBES):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        region()
        issued.append(time.perf_counter() - start)
        torch.cuda.synchronize(device)
        done.append(time.perf_counter() - start)
    return 1e6 * min(issued), 1e6 * min(done)


@lru_cache(maxsize=8)
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@lru_cache(maxsize=8)
def _flush_buffer(device: torch.device) -> torch.Tensor:
    l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    return torch.empty(max(_FLUSH_BYTES, 4 * l2), dtype=torch.int8, device=device)


def _flush(device: torch.device) -> None:
    _flush_buffer(device).zero_()


@dataclass(frozen=True)
class Limits:
    """What this device reached in this run: bytes/s of a copy, FLOP/s of a bf16 matmul."""

    copy: float
    matmul: float


@lru_cache(maxsize=8)
def limits(device: torch.device) -> Limits | None:
    """Measured once per run; None on a CPU."""
    if device.type != "cuda":
        return None
    source = torch.empty(1 << 30, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device=device).unbind()
    c = torch.empty_like(a)

    def median(region: Region) -> float:
        for _ in range(3):
            region()
        return statistics.median(sample_gpu(region, device) for _ in range(15))

    with timing_stream(device):
        copied = 2 * source.nbytes / median(lambda: target.copy_(source))
        multiplied = 2 * 8192**3 / median(lambda: torch.mm(a, b, out=c))
    return Limits(copied, multiplied)


@lru_cache(maxsize=64)
def copy_seconds(n_bytes: int, device: torch.device) -> float:
    """What a copy that reads and writes so many bytes in all takes, timed as a case is.

    Below some 100 MB a copy too is far from its bandwidth: starting and draining take their part.
    """
    source = torch.empty(max(1, n_bytes // 2), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    with timing_stream(device):
        prepared = _prepare_gpu(lambda: target.copy_(source), device)
        return statistics.median(prepared.sample() for _ in range(15))


@lru_cache(maxsize=8)
def environment(device: torch.device) -> dict[str, str]:
    """What two results must share to be compared, and what explains them."""
    facts = {
        "device": device.type,
        "gpu": "none",
        "driver": "none",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "processor": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["driver"] = _nvidia_smi(device, "driver_version")
    return facts


def clocks(device: torch.device) -> str:
    """SM and memory clocks now, where they can be read."""
    return _nvidia_smi(device, "clocks.sm,clocks.mem") if device.type == "cuda" else "unknown"


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "none"


def _nvidia_smi(device: torch.device, query: str) -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    chosen = ["-i", f"GPU-{uuid}"] if uuid is not None else []
    command = ["nvidia-smi", *chosen, f"--query-gpu={query}", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True)
    return answer.stdout.strip().partition("\n")[0] if answer.returncode == 0 else "unknown"
