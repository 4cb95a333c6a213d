"""`trilith.explain`: of an op who runs it, of a model what is fused, and why."""

from __future__ import annotations

import torch
from torch import nn

from trilith.plugins import Op
from trilith.plugins.manager import explain as explain_op


def explain(
    subject: str | Op | nn.Module,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> str:
    """Which implementation a call of an op takes, or what `fuse` did and would do to a model.

    Nothing is run or changed.

    Args:
        subject: "namespace::op", an op, or a model.
        device: where the op is called; the GPU by default, the CPU where there is none.
        dtype: of the op's first tensor.

    Returns:
        Lines to print. Of an op: its implementations, which can run there, and which one does. Of
        a model: a table of layers, what each became or would become, and why or why not.

    Example:
        >>> print(explain("trilith::rms_norm", "cpu", torch.float32))
        >>> print(explain(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))))
    """
    if isinstance(subject, nn.Module):
        from trilith.blocks.fuse import preview

        return str(preview(subject))
    return explain_op(subject, device, dtype)
