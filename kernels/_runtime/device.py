"""What launchers ask about the device they tile for."""

from __future__ import annotations

from functools import lru_cache

import torch

_INTERPRETED_MULTIPROCESSORS = 4
_ASSUMED_SHARED_BYTES = {"sm_86": 99 << 10, "gfx942": 64 << 10}
_assumed_architecture: list[str] = []


def architecture(device: torch.device) -> str:
    """The class that launch tables are keyed by: sm_80, sm_86, sm_90, sm_100 or gfx942.

    sm_86 stands for all that have its 99 KiB of shared memory and its matrix instructions, as of
    GeForce, RTX, L and A10 cards: 8.6, 8.9 and 12.x.
    """
    if _assumed_architecture:
        return _assumed_architecture[-1]
    return "sm_90" if device.type != "cuda" else _architecture_of(device.index or 0)


@lru_cache(maxsize=64)
def _architecture_of(index: int) -> str:
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(index)
    if major == 12 or (major, minor) in ((8, 6), (8, 9)):
        return "sm_86"
    return {8: "sm_80", 9: "sm_90"}.get(major, "sm_100" if major >= 10 else "sm_80")


def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side; a small number where Triton's interpreter runs."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return _INTERPRETED_MULTIPROCESSORS
    return _multiprocessors_of(device.index or 0)


@lru_cache(maxsize=64)
def _multiprocessors_of(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def shared_bytes(device: torch.device) -> int:
    """The most shared memory that a program may take; without a device, as assumed."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return _ASSUMED_SHARED_BYTES.get(architecture(device), 163 << 10)
    return _shared_bytes_of(device.index or 0)


@lru_cache(maxsize=64)
def _shared_bytes_of(index: int) -> int:
    properties = torch.cuda.get_device_properties(index)
    return getattr(properties, "shared_memory_per_block_optin", 64 * 1024)


class assume_architecture:
    """`with assume_architecture("sm_80"):` tiles as for that architecture; for offline compiles."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        _assumed_architecture.append(self.name)

    def __exit__(self, *_: object) -> None:
        _assumed_architecture.pop()
