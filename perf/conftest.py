"""The benchmarks time what users run: real kernels on a GPU, the reference path on a CPU."""

import os

import pytest


def pytest_configure() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError("perf: unset TRITON_INTERPRET; Triton's interpreter is not timed")
