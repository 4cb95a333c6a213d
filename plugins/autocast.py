"""Autocast, as it applies to a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

# A name of this module is found faster than one of torch's, in what every call does.
is_any_autocast_enabled = torch._C._is_any_autocast_enabled


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device; there is none for "meta"."""
    if not is_any_autocast_enabled() or tensor.is_meta:
        return False
    return torch.is_autocast_enabled(tensor.device.type)
