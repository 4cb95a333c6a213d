"""The benchmarks time what users run: real kernels on a GPU, the reference path on a CPU."""

import os

import pytest
import torch


def pytest_configure() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError("perf: unset TRITON_INTERPRET; Triton's interpreter is not timed")
    # Threads that wait for each other turn times of small calls on a busy machine into noise.
    torch.set_num_threads(1)
