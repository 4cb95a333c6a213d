"""Dropout of what is split over ranks: each rank draws its own masks, and all ranks stay in step.

Ranks of a tensor-parallel group start from one generator state (the same `torch.manual_seed`), and
what they hold in common is dropped alike. Where each holds a part of its own (its heads, its hidden
units, its tokens) a module runs `apart`: under a seed of the rank, after which the common one goes
on as on every other rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_STRIDE = 0x9E3779B97F4A7C15  # odd: the seeds of any number of ranks differ
_SEED_BITS = 63


class RankSeeds:
    """Runs a module's forward under a seed of the rank, where the module is in training."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.rank = mesh.get_local_rank()
        self.device = mesh.device_type
        self.common: list[torch.Tensor] = []

    def attach(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if not module.training:
            return
        generator = _generator(self.device)
        base = int(torch.randint(2**_SEED_BITS - 1, (), generator=torch.default_generator))
        self.common.append(generator.get_state())
        generator.manual_seed((base + (self.rank + 1) * _STRIDE) % 2**_SEED_BITS)

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if module.training and self.common:
            _generator(self.device).set_state(self.common.pop())


def _generator(device: str) -> torch.Generator:
    if device == "cpu":
        return torch.default_generator
    runtime = torch.get_device_module(device)
    return runtime.default_generators[runtime.current_device()]
