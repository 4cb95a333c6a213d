"""Ops that write into their arguments, as torch ops that torch.compile knows how to order.

Such an op returns nothing and has no gradient; what it means is its reference, which writes in
place too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trilith.plugins.spec import HALF_AND_SINGLE, TRITON_DEVICES


class MutatingOp:
    """`namespace::op`, made of a launcher and a reference of the same annotated parameters.

    Args:
        name: "namespace::op".
        launcher: writes with kernels; runs where Triton does, for the dtypes that kernels take.
        reference: writes with plain PyTorch; runs elsewhere.
        mutates: the names of the tensors written to.
    """

    def __init__(
        self,
        name: str,
        *,
        launcher: Callable[..., None],
        reference: Callable[..., None],
        mutates: tuple[str, ...],
    ) -> None:
        self.name, self.launcher, self.reference = name, launcher, reference
        namespace, _, op = name.partition("::")
        schema = torch.library.infer_schema(launcher, mutates_args=mutates)
        self._library = torch.library.Library(namespace, "FRAGMENT")
        self._library.define(op + schema, tags=(torch.Tag.pt2_compliant_tag,))
        self._library.impl(op, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(name, lambda *_: None, lib=self._library)
        self.op = getattr(getattr(torch.ops, namespace), op).default

    def __call__(self, *args: Any) -> None:
        self.op(*args)

    def _run(self, *args: Any) -> None:
        lead = next(a for a in args if isinstance(a, Tensor))
        kernels_run = lead.device.type in TRITON_DEVICES and lead.dtype in HALF_AND_SINGLE
        (self.launcher if kernels_run and lead.numel() else self.reference)(*args)
