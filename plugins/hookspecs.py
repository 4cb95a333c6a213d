"""The pluggy contract: what a plugin may implement.

A plugin is a module or object with some of these hooks, named by an entry point of its
distribution in the group `trilith`:

    [project.entry-points.trilith]
    acme = "acme_layers.plugin"
"""

from __future__ import annotations

from collections.abc import Sequence

import pluggy

from trilith.plugins.op import Op
from trilith.plugins.selection import SelectionKey
from trilith.plugins.spec import Implementation, ModuleSpec, OpSpec, ScoreMod
from trilith.plugins.trace import OpCalled

PROJECT = "trilith"
CONTRACT = (1, 0)

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class HookSpecs:
    """Every hook, with what it returns. A plugin says `TRILITH_CONTRACT = (1, 0)` to be checked.

    A hook takes the parameters that it names, so a hook of today may be given more tomorrow.
    """

    @hookspec
    def trilith_register_ops(self) -> Sequence[OpSpec | Op]:  # type: ignore[empty-body]
        """New ops."""

    @hookspec
    def trilith_register_implementations(self) -> Sequence[Implementation]:  # type: ignore[empty-body]
        """Other forward and backward pairs for ops that exist."""

    @hookspec
    def trilith_register_modules(self) -> Sequence[ModuleSpec]:  # type: ignore[empty-body]
        """Modules that configurations choose by name."""

    @hookspec
    def trilith_register_score_mods(self) -> Sequence[ScoreMod]:  # type: ignore[empty-body]
        """Changes of attention's scores, chosen by name."""

    @hookspec(firstresult=True)
    def trilith_select_implementation(
        self, op: str, key: SelectionKey, candidates: tuple[Implementation, ...]
    ) -> str | None:
        """The provider of one of the candidates, "reference", or None for no opinion.

        Asked once for an op, a device and a dtype, unless an implementation was asked for by name.
        Candidates are those that can run there, the highest priority first.
        """

    @hookspec
    def trilith_op_called(self, event: OpCalled) -> None:
        """An implementation or the reference is about to run; only inside `trilith.trace()`."""
