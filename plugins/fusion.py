"""Whether a fused op may do the work of others: not where somebody else was chosen to do it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trilith.plugins import selection
from trilith.plugins.dynamo import assume_constant_result
from trilith.plugins.selection import Selection, SelectionKey

if TYPE_CHECKING:
    from trilith.plugins.op import Op


def may_fuse(fused: Op, lead: Tensor, *parts: Op) -> bool:
    """Whether one call of `fused` may take the place of calls of `parts` on tensors like `lead`.

    That is so while each part would be run by the op's own implementation, or by the provider that
    runs `fused`, or by the reference because nobody can run it there. An implementation of a part
    that was chosen by name, by a plugin or by priority makes it False, and so does `supports`.

    Raises:
        ValueError: the spec of `fused` doesn't name an op among its `parts`.

    Example:
        >>> if may_fuse(ADD_NORM, x, RMS_NORM, BIAS_DROPOUT_ADD):
        ...     normed, x = add_rms_norm(branch, x, weight)
    """
    if torch.compiler.is_dynamo_compiling():
        guards = [part._guard for part in parts]  # Dynamo guards on them, and on the next
        names = [part.spec.name for part in parts]
        return _traced(fused.spec.name, names, lead.device, lead.dtype, [fused._guard, *guards])
    device, dtype = lead.device, lead.dtype
    runs = fused.selection(device, dtype).first
    return all(_leaves_it(fused, runs, part, part.selection(device, dtype)) for part in parts)


def standing_in(fused: Op, part: Op, device: torch.device, dtype: torch.dtype) -> bool:
    """`may_fuse` of one part, for those who have no tensor."""
    runs = fused.selection(device, dtype).first
    return _leaves_it(fused, runs, part, part.selection(device, dtype))


def _leaves_it(fused: Op, runs: str | None, part: Op, found: Selection) -> bool:
    name = part.spec.name
    if name not in fused.spec.parts:
        raise ValueError(f"{fused.spec.name}: parts must name {name}, got {fused.spec.parts}")
    if found.first is None:
        return runs is None or not found.is_choice
    return found.first in (part.spec.provider, runs)


@assume_constant_result
def _traced(
    fused: str, parts: list[str], device: torch.device, dtype: torch.dtype, guards: list[str]
) -> bool:
    from trilith.plugins.op import defined

    ops, key = defined(), SelectionKey(device, dtype)

    def choice(name: str) -> Selection:
        return selection.choose(ops[name], key, ops[name].asked_for())

    runs = choice(fused).first
    return all(_leaves_it(ops[fused], runs, ops[p], choice(p)) for p in parts)
