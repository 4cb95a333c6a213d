"""A module becomes another class's: the same instance, parameters, hooks and buffers.

torch's TransformerEncoderLayer reads, in eval, the weights of its norms, its attention and the kind
of its activation instead of calling them, unless one of its modules has a forward hook. Classes
that it would pass over look as if they had one, `MarkedHooks`.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import wraps
from typing import Any

from torch import nn

from trilith.blocks.linear import hooks_of_all_modules

_length = dict.__len__  # super().__len__() takes three times as long


class MarkedHooks(OrderedDict[int, Any]):
    """A module's forward pre-hooks with one more for len(), which is what torch's layer looks at.

    They are true and have items as without it: calling the module is as quick as without hooks.
    """

    marked = True

    def __len__(self) -> int:
        return _length(self) + self.marked

    def __bool__(self) -> bool:
        return _length(self) > 0


def keep_called(module: nn.Module) -> None:
    hooks = module._forward_pre_hooks
    if isinstance(hooks, MarkedHooks):
        hooks.marked = True
    elif hooks:  # their handles know this dictionary
        module.register_forward_pre_hook(called)
    else:
        module._forward_pre_hooks = MarkedHooks()


def called(module: nn.Module, args: Any) -> None:
    """A forward pre-hook that does nothing: whoever has it is called."""


def may_be_passed_over(module: nn.Module) -> None:
    """Undo `keep_called`."""
    hooks = module._forward_pre_hooks
    if isinstance(hooks, MarkedHooks):
        hooks.marked = False
    for key, hook in list(hooks.items()):
        if hook is called:
            del hooks[key]


def constructed_like(base: type[nn.Module]) -> Any:
    """Decorates a constructor that takes what `base`'s takes, and shows its signature."""
    return wraps(base.__init__)


def adopt(module: nn.Module, cls: type[nn.Module]) -> None:
    """Make `module` one of `cls`, which has the same state."""
    module.__class__ = cls
    if getattr(cls, "passed_over_by_torch", False):
        keep_called(module)


def unhooked(module: nn.Module) -> bool:
    """Whether calling `module` is its class's forward and nothing more."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if hook is not called]
    return not (
        hooks
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        or hooks_of_all_modules()
    )
