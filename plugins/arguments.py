"""An OpSpec's functions take those of the op's parameters that they name, as pluggy's hooks do."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def parameter_names(function: Callable[..., Any]) -> list[str] | None:
    """None for a function that takes some otherwise than by position or name, or any number."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of a builtin
        return None
    either = all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    return [p.name for p in parameters] if either else None


def by_name(function: Callable[..., Any], names: list[str] | None) -> Callable[..., Any]:
    """The function, for a call with all parameters of these names by position.

    As it is where it takes all of them, or one that has another name.
    """
    wanted = parameter_names(function)
    if wanted is None or names is None or wanted == names or not set(wanted) <= set(names):
        return function
    places = [names.index(name) for name in wanted]

    def with_all(*args: Any) -> Any:
        return function(*[args[place] for place in places])

    return with_all
