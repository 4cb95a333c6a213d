"""What an OpSpec says of its op's arguments: their schema in torch, and what backward keeps."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trilith.plugins.spec import OpSpec

_NEEDS = "needs_input_grad"
_OURS = re.compile(r"provider|kept|needs|grad_\d+")  # in the schemas beside forward's own


class Parameters:
    """The parameters that a call gives, by position."""

    def __init__(self, spec: OpSpec) -> None:
        resolved = _resolved_signature(spec)
        given = [p for p in resolved.parameters.values() if p.name != _NEEDS]
        _require_schema_of(spec.name, list(resolved.parameters.values()))
        self.signature = resolved.replace(parameters=given)
        self.asks_needs = len(given) < len(resolved.parameters)
        self.types = [_schema_type(spec.name, p) for p in given]
        self.names = [p.name for p in given]
        self.positions = {name: i for i, name in enumerate(self.names)}
        self.tensors = tuple(i for i, p in enumerate(given) if _is_tensor(p.annotation))
        self.constants = tuple(i for i in range(len(given)) if i not in self.tensors)
        self.saved = self._saved_positions(spec)
        self.saved_outputs = self._saved_outputs(spec)
        self._name = spec.name

    def __len__(self) -> int:
        return len(self.names)

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """A call's arguments in order, with the defaults of those left out."""
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self._name}{self.signature}: {error}") from None
        bound.apply_defaults()
        return tuple(bound.arguments.values())

    def require_no_tensor_for_a_number(self, args: Sequence[Any]) -> None:
        """What the reference would differentiate, and a kernel could not."""
        for i in self.constants:
            if isinstance(args[i], Tensor):
                name = self.names[i]
                kind = inspect.formatannotation(self.signature.parameters[name].annotation)
                raise TypeError(
                    f"{self._name}: {name} must be {kind}, got a tensor of shape "
                    f"{list(args[i].shape)}; give its item(), or annotate {name} as a Tensor"
                )

    def lead(self, args: Sequence[Any]) -> Tensor:
        """The first tensor, whose device and dtype decide who runs the call."""
        for i in self.tensors:
            if args[i] is not None:
                return args[i]
        raise TypeError(f"{self._name}: at least one tensor must be given, got none")

    def forward_schema(self) -> list[str]:
        given = [f"{t} {n}" for t, n in zip(self.types, self.names, strict=True)]
        needs = [f"bool[] {_NEEDS}=[]"] if self.asks_needs else []
        return [*given, "str provider", *needs]

    def backward_schema(self, outputs: int) -> list[str]:
        """Gradients, then forward's parameters, of which some tensors may not have been saved."""
        types = ["Tensor?" if t == "Tensor" else t for t in self.types]
        given = [f"{t} {n}" for t, n in zip(types, self.names, strict=True)]
        grads = [f"Tensor? grad_{i}" for i in range(outputs)]
        return [*grads, *given, "Tensor[] kept", "str provider", "bool[] needs"]

    def _saved_positions(self, spec: OpSpec) -> tuple[int, ...]:
        if isinstance(spec.save_inputs, str):
            raise TypeError(
                f"{spec.name}: save_inputs must be a tuple of names, got {spec.save_inputs!r}"
            )
        keep = self.names if spec.save_inputs is None else spec.save_inputs
        unknown = set(keep) - {self.names[i] for i in self.tensors} if spec.save_inputs else ()
        if not self.tensors or unknown:
            problem = f"save_inputs names {sorted(unknown)}" if unknown else "no tensor parameter"
            raise ValueError(f"{spec.name}: forward's tensor parameters don't fit: {problem}")
        return tuple(i for i in self.tensors if self.names[i] in keep)

    def _saved_outputs(self, spec: OpSpec) -> tuple[int, ...]:
        given = spec.save_outputs
        if isinstance(given, bool):
            return tuple(range(spec.outputs)) if given else ()
        is_sequence = isinstance(given, (tuple, list, Mapping))
        if not is_sequence or not set(given) <= set(range(spec.outputs)):
            raise ValueError(
                f"{spec.name}: save_outputs must be True, False, or indices of the "
                f"{spec.outputs} outputs, got {given!r}"
            )
        known = {self.names[i] for i in self.tensors}
        if isinstance(given, Mapping) and not set(given.values()) <= known:
            raise ValueError(
                f"{spec.name}: save_outputs must map to tensors among the inputs "
                f"({', '.join(sorted(known))}), got {given!r}"
            )
        return tuple(given)


def _resolved_signature(spec: OpSpec) -> inspect.Signature:
    hints = typing.get_type_hints(spec.forward)
    signature = inspect.signature(spec.forward)
    missing = [name for name in signature.parameters if name not in hints]
    if missing:
        raise TypeError(
            f"{spec.name}: forward must annotate every parameter, got none for {missing}"
        )
    return signature.replace(
        parameters=[p.replace(annotation=hints[p.name]) for p in signature.parameters.values()],
        return_annotation=inspect.Signature.empty,
    )


def _require_schema_of(name: str, parameters: Sequence[inspect.Parameter]) -> None:
    """That torch has a schema for them, and that they stay apart from what we add to it."""
    for parameter in parameters:
        kind = parameter.kind
        if kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            raise TypeError(
                f"{name}: forward's {parameter.name} must be a parameter that can be given by "
                f"position, got a {kind.description} one"
            )
        if _OURS.fullmatch(parameter.name):
            raise ValueError(
                f"{name}: forward's {parameter.name} must have another name: the op's own "
                f"schemas have a parameter {parameter.name}"
            )
        if parameter.name == _NEEDS and parameter is not parameters[-1]:
            raise ValueError(f"{name}: {_NEEDS} must be the last of forward's parameters")


def _schema_type(name: str, parameter: inspect.Parameter) -> str:
    annotation = parameter.annotation
    try:
        inferred = torch.library.infer_schema(_prototype(annotation), mutates_args=())
    except ValueError:
        inferred = ""
    found = inferred.removeprefix("(").partition(" value)")[0]
    if not found or (found.startswith("Tensor") and not _is_tensor(annotation)):
        lists = "; give each of several tensors a parameter, or stack them" if found else ""
        raise TypeError(
            f"{name}: forward's {parameter.name} must be a Tensor, int, float, bool, str, "
            "torch.dtype or torch.device, or one of these or None, or a Sequence of numbers, got "
            f"{annotation}{lists}"
        )
    return found


def _prototype(annotation: Any) -> Callable[..., None]:
    def prototype(value: Any) -> None: ...

    parameter = inspect.Parameter(
        "value", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation
    )
    prototype.__signature__ = inspect.Signature([parameter], return_annotation=None)  # type: ignore[attr-defined]
    prototype.__annotations__ = {"value": annotation, "return": None}
    return prototype


def _is_tensor(annotation: Any) -> bool:
    return annotation is Tensor or set(typing.get_args(annotation)) == {Tensor, type(None)}
