"""Who computes a workload: Trilith, PyTorch in its ways, and other libraries where installed."""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch._functorch.config

from perf.workloads import Function, Workload

_PACKAGES = {"liger": "liger_kernel", "flash-attn": "flash_attn"}
_HALF_ONLY = ("sdpa-flash", "sdpa-cudnn", "flash-attn")
_ON_CPU = ("trilith", "eager")

_last: dict[tuple[str, str, torch.dtype], Function] = {}


class Unavailable(Exception):
    """Why a provider cannot compute a workload here, in words."""


def providers_of(workload: Workload) -> list[str]:
    """Who may compute it: its own, PyTorch's, and those that the workload knows by name."""
    own = ["trilith", "eager"] + (["compile"] if workload.compiled else [])
    return own + list(workload.peers)


# A backward that is timed runs again and again on what one forward saved.
torch._functorch.config.donated_buffer = False


def function_of(
    provider: str, workload: Workload, device: torch.device, dtype: torch.dtype
) -> Function:
    """The provider's function of the workload.

    Raises:
        Unavailable: not here, with the reason.
    """
    package = _PACKAGES.get(provider)
    if package is not None and find_spec(package) is None:
        raise Unavailable(f"{provider}: {package} is not installed")
    if device.type != "cuda" and provider not in _ON_CPU:
        raise Unavailable(f"{provider}: compared on a GPU only")
    if provider in _HALF_ONLY and dtype not in (torch.float16, torch.bfloat16):
        raise Unavailable(f"{provider}: takes 16-bit dtypes only, not {dtype}")
    key = provider, workload.name, dtype
    if key not in _last:
        # Workloads share code objects, and past a few recompilations of one torch.compile gives up.
        torch._dynamo.reset()
        _last.clear()
        _last[key] = _made(provider, workload)
    return _last[key]


def _made(provider: str, workload: Workload) -> Function:
    if provider == "trilith":
        return workload.trilith
    if provider == "eager":
        return workload.plain
    if provider == "compile":
        return torch.compile(workload.plain, dynamic=False)
    try:
        return workload.peers[provider]()
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"{provider}: {error}") from error
