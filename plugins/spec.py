"""What a layer author writes: an op, its implementations, samples, cost, a module, a score mod."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from trilith.plugins.arguments import by_name, parameter_names

Forward = Callable[..., "Tensor | Sequence[Tensor]"]
Backward = Callable[..., "Tensor | Sequence[Tensor | None]"]

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def _triton_devices() -> tuple[str, ...]:
    if find_spec("triton") is None:
        return ()
    return ("cuda", "cpu") if INTERPRETING else ("cuda",)


TRITON_DEVICES = _triton_devices()
HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
SLOTS = ("norm", "mlp", "attention", "activation", "position")


def compute_capability(device: torch.device) -> int | None:
    """As 90; None where there is none to ask for: off CUDA, on AMD, for the device of a fake tensor
    that this machine doesn't have, without a driver, in a forked process."""
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return None
    try:
        major, minor = torch.cuda.get_device_capability(device)
    except (AssertionError, RuntimeError):  # torch's answers to a wrong index, and to a fork
        return None
    return 10 * major + minor


class Sample:
    """The arguments of one call of an op, as `Sample(x, scale=2.0)`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.kwargs = kwargs

    def __repr__(self) -> str:
        named = [f"{k}={_brief(v)}" for k, v in self.kwargs.items()]
        return ", ".join([_brief(a) for a in self.args] + named)


def _brief(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    shape = "x".join(map(str, value.shape)) or "scalar"
    return f"{str(value.dtype).removeprefix('torch.')}[{shape}]"


@dataclass(frozen=True)
class Cost:
    """Least work of one call: bytes that cross device memory, and floating-point operations."""

    forward_bytes: int
    backward_bytes: int
    forward_flops: int = 0
    backward_flops: int = 0


@dataclass
class BackwardContext:
    """What an op's backward is given besides the gradients of its outputs.

    Each tuple but `aux` follows the order of its namesake: `inputs` and `needs_input_grad` have one
    entry per parameter of forward (a tensor left out of `save_inputs` is None), `outputs` one
    per saved output. `aux` holds the tensors that forward returned after its outputs.
    """

    inputs: tuple[Any, ...]
    outputs: tuple[Tensor, ...]
    aux: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


@dataclass(frozen=True)
class Implementation:
    """A forward and backward pair for one op, on some devices and dtypes, by one provider.

    `arch` bounds the compute capability, as `(80, 89)` or `(90, None)`; None takes every device.
    `supports(*args)` sees each call's arguments and may refuse it; torch.compile passes over
    implementations that have one. Higher `priority` is tried first.
    """

    op: str
    provider: str
    forward: Forward
    backward: Backward | None
    devices: tuple[str, ...] = TRITON_DEVICES
    dtypes: tuple[torch.dtype, ...] | None = HALF_AND_SINGLE
    arch: tuple[int | None, int | None] | None = None
    supports: Callable[..., bool] | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        _require_names("Implementation", op=self.op, provider=self.provider)
        who = f"Implementation of {self.op} by {self.provider!r}"
        pair = {"forward": self.forward, "backward": self.backward}
        _require_functions(who, optional=True, supports=self.supports, **pair)
        _require_places(who, self.devices, self.dtypes)
        bounds = self.arch is None or (
            isinstance(self.arch, tuple)
            and len(self.arch) == 2
            and all(bound is None or type(bound) is int for bound in self.arch)
        )
        if not bounds:
            raise ValueError(f"{who}: arch must be like (80, 89) or (90, None), got {self.arch!r}")
        if type(self.priority) is not int:
            raise TypeError(f"{who}: priority must be an int, got {self.priority!r}")

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this implementation cannot run there, or None if it can."""
        if device.type not in self.devices:
            return f"runs on {' or '.join(self.devices) or 'no device here'}, not {device.type}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"takes {', '.join(map(str, self.dtypes))}, not {dtype}"
        if self.arch is not None and device.type == "cuda":
            have, (low, high) = compute_capability(device), self.arch
            wanted = f"needs compute capability {low or ''}..{high or ''}"
            if have is None:
                return f"{wanted}, and there is no CUDA device here to ask for {device}"
            if (low is not None and have < low) or (high is not None and have > high):
                return f"{wanted}, not {have}"
        return None


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    """One mathematical function, declared once.

    `(*parameters)` are forward's. `fake`, `cost`, `sharding` and `shared_gradients` may take those
    alone that they name, as `cost(x, weight)`. With `*args`, or a name that forward has not, they
    take all by position.

    Required
        name: "namespace::op".
        forward: `(*parameters) -> outputs + aux`. Its annotations make the schema: Tensor,
            `Tensor | None`, float, int, bool, str, `float | None`, Sequence[int], torch.dtype.
            A last parameter `needs_input_grad: Sequence[bool]` is not of the call: it says which
            parameters' gradients a backward will be asked for, so that forward can make them where
            that is cheaper, and return them as aux. All False where no gradient is recorded;
            backward must not rely on it.
        backward: `(ctx: BackwardContext, *grad_outputs) -> gradients`, one per parameter of forward
            in order, None where there is none; trailing Nones may be left out. None where there are
            no gradients: one that is asked for is refused.
        reference: the meaning in plain differentiable PyTorch; same parameters, returns the outputs
            only. Computes in float64 when given float64, and on a CPU too.
        samples: `(device, dtype) -> Iterable[Sample]`, some of them odd.
    Optional
        outputs: how many of forward's results are outputs; the rest is aux.
        save_inputs: names of the tensor inputs that backward reads. None keeps all. An input left
            out must enter the op linearly, or get no gradient.
        save_outputs: whether backward reads the outputs, or which of them: (1,) keeps the second;
            {1: "residual"} too, and then it stands for the input `residual`, not kept, in second
            derivatives.
        shared_gradients: `(*parameters) -> {input name: source}` for inputs whose gradient is a
            tensor that exists anyway: an output's gradient (source is the output's index) or that
            of another input (its name). backward is not asked for them, so nothing is copied.
            Parameters that are not saved are None.
        fake: `(*parameters) -> outputs + aux` without data, with exact strides. The default runs
            forward on fake tensors, which works when its kernels start through `kernels.launch`.
        fake_backward: `(ctx, *grad_outputs) -> gradients` likewise. The default says: contiguous,
            shaped and typed like the inputs (an input that is not saved: like the first gradient).
        materialize_grads: whether the gradient of an unused output arrives as zeros or as None.
        cost: `(*parameters) -> Cost`.
        sharding: `(*parameters) -> [(output placements, input placements), ...]`, the ways in which
            the op takes DTensors on one mesh dimension, each rank by itself. Parameters are those
            of the call, tensors as DTensors. Inputs have one entry per parameter of forward, None
            where it is no tensor or is replicated; trailing Nones may be left out. Where an input
            is split every output is too, or is `Partial`; a split output dimension is as long as
            the input's. All replicated is taken without saying, and is the default. Any other
            placement is refused: nothing is gathered unasked.
        parts: names of the ops whose work it does in one pass, as add_norm does rms_norm's. Blocks
            ask `trilith.plugins.may_fuse` before they call it in their place, so that whoever was
            chosen to run a part runs it.
        autocast: "keep" leaves dtypes alone; "low" casts floating inputs to the autocast dtype.
        rounds_inside: whether it rounds to 16 bits on the way, as matrix products of what it made
            do, so that the conformance checks grant it that. None says so where autocast is "low".
        devices, dtypes: where forward and backward run. Elsewhere the reference does.
    """

    name: str
    forward: Forward
    backward: Backward | None
    reference: Callable[..., Any]
    samples: Callable[[torch.device, torch.dtype], Iterable[Sample]]
    outputs: int = 1
    save_inputs: tuple[str, ...] | None = None
    save_outputs: bool | tuple[int, ...] | Mapping[int, str] = True
    shared_gradients: Callable[..., Mapping[str, int | str]] | None = None
    fake: Forward | None = None
    fake_backward: Backward | None = None
    materialize_grads: bool = True
    cost: Callable[..., Cost] | None = None
    sharding: Callable[..., Iterable[tuple[Sequence[Any], Sequence[Any]]]] | None = None
    parts: tuple[str, ...] = ()
    autocast: str = "keep"
    rounds_inside: bool | None = None
    devices: tuple[str, ...] = TRITON_DEVICES
    dtypes: tuple[torch.dtype, ...] | None = HALF_AND_SINGLE

    def __post_init__(self) -> None:
        _require_names("OpSpec", name=self.name)
        namespace, sep, op = self.name.partition("::")
        if not (sep and namespace.isidentifier() and op.isidentifier()):
            raise ValueError(f"OpSpec: name must be 'namespace::op', got {self.name!r}")
        if self.autocast not in ("keep", "low"):
            raise ValueError(
                f"{self.name}: autocast must be 'keep' or 'low', got {self.autocast!r}"
            )

        _require_functions(
            self.name, forward=self.forward, reference=self.reference, samples=self.samples
        )
        for name in ("backward", "fake", "fake_backward", "cost", "sharding", "shared_gradients"):
            _require_functions(self.name, optional=True, **{name: getattr(self, name)})
        _require_places(self.name, self.devices, self.dtypes)
        if type(self.outputs) is not int or self.outputs < 1:
            raise ValueError(f"{self.name}: outputs must be at least 1, got {self.outputs!r}")
        if isinstance(self.parts, str) or not all(isinstance(part, str) for part in self.parts):
            raise TypeError(f"{self.name}: parts must be a tuple of names, got {self.parts!r}")
        names = parameter_names(self.forward)
        for name in ("fake", "cost", "sharding", "shared_gradients"):
            if (function := getattr(self, name)) is not None:
                object.__setattr__(self, name, by_name(function, names))

    @property
    def provider(self) -> str:
        return self.name.partition("::")[0]


def _require_names(who: str, **given: Any) -> None:
    """Names are sorted and joined with those of all other plugins."""
    for field, name in given.items():
        if not isinstance(name, str):
            raise TypeError(f"{who}: {field} must be a str, got {name!r}")


def _require_functions(who: str, *, optional: bool = False, **given: Any) -> None:
    for name, function in given.items():
        if not (callable(function) or (optional and function is None)):
            raise TypeError(f"{who}: {name} must be a function, got {function!r}")


def _require_places(who: str, devices: Any, dtypes: Any) -> None:
    for name, given, kind in (("devices", devices, str), ("dtypes", dtypes, torch.dtype)):
        is_sequence = isinstance(given, (tuple, list)) and all(isinstance(g, kind) for g in given)
        if not (is_sequence or (name == "dtypes" and given is None)):
            raise TypeError(f"{who}: {name} must be a tuple of {kind.__name__}, got {given!r}")
    unknown = [device for device in devices if not _is_device_type(device)]
    if unknown:
        raise ValueError(
            f"{who}: devices must be types that torch.device() knows, as 'cuda', got {unknown}"
        )


def _is_device_type(name: str) -> bool:
    try:
        return torch.device(name).type == name
    except RuntimeError:
        return False


@dataclass(frozen=True)
class ScoreMod:
    """What `attention(..., score_mod=name)` does to the scaled scores, before all else.

    Each function takes `(score, b, h, q, k)`: the scores, the batch entry (or the packed sequence)
    and query head, and the positions of queries and keys, from 0. It is elementwise, for the
    arguments have whatever shapes broadcast.

    name: "vendor.name".
    forward: `@triton.jit`, the new scores; in float32.
    derivative: `@triton.jit`, d forward / d score.
    reference: forward in plain differentiable PyTorch, in the dtype of `score`; the CPU's path, and
        the measure of the other two.
    """

    name: str
    forward: Any
    derivative: Any
    reference: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

    def __post_init__(self) -> None:
        _require_names("ScoreMod", name=self.name)
        if not re.fullmatch(r"\w+(\.\w+)+", self.name):
            raise ValueError(f"ScoreMod: name must be 'vendor.name', got {self.name!r}")
        _require_functions(f"ScoreMod {self.name!r}", reference=self.reference)


@dataclass(frozen=True)
class ModuleSpec:
    """A module that configurations choose by name: `build(config) -> nn.Module` for one slot."""

    slot: str
    name: str
    build: Callable[[Any], nn.Module]

    def __post_init__(self) -> None:
        _require_names("ModuleSpec", name=self.name)
        if self.slot not in SLOTS:
            raise ValueError(
                f"ModuleSpec {self.name!r}: slot must be one of {SLOTS}, got {self.slot!r}"
            )
        _require_functions(f"ModuleSpec {self.name!r}", build=self.build)
        self._require_one_argument()

    def _require_one_argument(self) -> None:
        try:
            signature = inspect.signature(self.build)
        except (TypeError, ValueError):  # of a builtin
            return
        try:
            signature.bind(None)
        except TypeError:
            raise TypeError(
                f"{self.slot} {self.name!r}: build must take one argument, the LMConfig, "
                f"got {signature}"
            ) from None
