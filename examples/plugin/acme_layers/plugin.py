"""What Trilith is told; named by the entry point in pyproject.toml."""

from __future__ import annotations

from acme_layers import mlp
from acme_layers.relu2_gate import RELU2_GATE
from acme_layers.rms_norm import RMS_NORM
from trilith.plugins import Implementation, ModuleSpec, Op, hookimpl

TRILITH_CONTRACT = (1, 0)


@hookimpl
def trilith_register_ops() -> list[Op]:
    return [RELU2_GATE]


@hookimpl
def trilith_register_implementations() -> list[Implementation]:
    return [RMS_NORM]


@hookimpl
def trilith_register_modules() -> list[ModuleSpec]:
    return [ModuleSpec(slot="mlp", name="acme.relu2_mlp", build=mlp.build)]
