"""In which dtypes each provider of an op can be checked here, and what of it can not, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trilith.plugins.op import Op
from trilith.plugins.selection import REFERENCE
from trilith.plugins.spec import HALF_AND_SINGLE, Implementation

EVERYTHING = "every_check"
_FLOATS = (*HALF_AND_SINGLE, torch.float64)


@dataclass(frozen=True)
class Coverage:
    """Of one provider: the dtypes that its samples are made in, float32 first; what is not run.

    `not_run` says why by what it is: every check, or a dtype.
    """

    provider: str
    dtypes: tuple[torch.dtype, ...]
    not_run: tuple[tuple[str, str], ...] = ()


def coverage(op: Op, device: torch.device) -> list[Coverage]:
    """Of each provider on a device, and of the reference where no other can run."""
    lead = _fixed_lead(op)
    found = [_of(implementation, device, lead) for implementation in op.implementations]
    if not any(part.dtypes for part in found):
        found.append(Coverage(REFERENCE, HALF_AND_SINGLE))
    return found


def _of(choice: Implementation, device: torch.device, lead: torch.dtype | None) -> Coverage:
    named = tuple(d for d in _FLOATS if lead is None and d in (choice.dtypes or ()))
    asked = named or HALF_AND_SINGLE
    why = {dtype: choice.refusal(device, lead or dtype) for dtype in asked}
    run = tuple(dtype for dtype in asked if why[dtype] is None)
    if not run:
        of = "" if lead is None else " (the first tensor of the samples is)"
        return Coverage(choice.provider, (), ((EVERYTHING, f"{why[asked[0]]}{of}"),))
    leads = run if lead is None else (lead,)
    rest = [dtype for dtype in choice.dtypes or () if dtype not in leads]
    said = "no sample has a first tensor of it"
    names = [str(dtype).removeprefix("torch.") for dtype in rest]
    return Coverage(choice.provider, run, tuple((name, said) for name in names))


def _fixed_lead(op: Op) -> torch.dtype | None:
    """The dtype of the samples' first tensor, which decides who runs them, where it is not the
    dtype that they are asked for: an index's, a mask's."""
    try:
        sample = next(iter(op.spec.samples(torch.device("cpu"), torch.float32)))
        lead = op.parameters.lead(op.parameters.bind(sample.args, sample.kwargs)).dtype
    except Exception:  # the checks say what is wrong with samples
        return None
    return None if lead.is_floating_point and lead.itemsize > 1 else lead
