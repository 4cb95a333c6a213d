"""The GPUs that kernels are compiled for where there is none, and what is known of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_86": ("cuda", 86, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}
LAUNCHED_AS = {"sm_120": "sm_86"}  # whose launch tables an architecture takes, if not its own
KIB = 1024
SHARED_LIMIT = {
    "sm_80": 163 * KIB,
    "sm_86": 99 * KIB,
    "sm_90": 227 * KIB,
    "sm_100": 227 * KIB,
    "sm_120": 99 * KIB,
    "gfx942": 64 * KIB,
}
MULTIPROCESSORS = {
    "sm_80": 108,
    "sm_86": 84,
    "sm_90": 132,
    "sm_100": 148,
    "sm_120": 170,
    "gfx942": 304,
}
MMA = {
    "sm_80": r"HMMA",
    "sm_86": r"HMMA",
    "sm_90": r"HGMMA",
    "sm_100": r"UTC\w*MMA",
    "sm_120": r"HMMA",
    "gfx942": r"v_mfma\w*",
}


class _Driver:
    """Answers for a GPU that is not there; Triton's per-device caches key on the architecture."""

    def __init__(self, arch: str) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget(*TARGETS[arch])
        self._device = list(TARGETS).index(arch)
        self.utils = SimpleNamespace()

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


def assume_target(arch: str) -> None:
    from triton.runtime.driver import driver

    driver.set_active(_Driver(arch))
