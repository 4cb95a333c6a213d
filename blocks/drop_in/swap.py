"""A module becomes another class's: the same instance, parameters, hooks and buffers.

torch's TransformerEncoderLayer reads, in eval, the weights of its norms, its attention and the kind
of its activation instead of calling them, unless one of its modules has a forward hook. Classes
that it would pass over carry one that does nothing, `called`.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def called(module: nn.Module, args: Any) -> None:
    """A forward pre-hook that does nothing: whoever has it is called."""


def keep_called(module: nn.Module) -> None:
    if called not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(called)


def may_be_passed_over(module: nn.Module) -> None:
    """Take `called` away."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is called:
            del module._forward_pre_hooks[key]


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
    )
