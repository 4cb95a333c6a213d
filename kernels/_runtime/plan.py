"""Launch plans: what a launcher does with arguments of one kind is noted once, then done again.

A launcher derives tiles, strides and sizes from its arguments, allocates, and starts kernels, whose
arguments Triton binds and specialises. For a small op all that takes the host longer than the
device needs. A `@planned` launcher does it the first two times that arguments of some kind come;
from the third time on the same operators of PyTorch are called and the same binaries started.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from trilith.kernels._runtime.launch import here, observers
from trilith.plugins import BackwardContext
from trilith.plugins.autocast import is_any_autocast_enabled

Launcher = TypeVar("Launcher", bound=Callable[..., tuple[Any, ...]])
Function = TypeVar("Function", bound=Callable[..., Any])

_ALIGNED = 16  # bytes: what Triton looks at in a pointer
_MOST = 4096  # kinds of arguments; sizes that never come again must not fill the memory
_VALUES = frozenset({int, bool, str, torch.dtype, type(None)})
_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_UNSEEN, _SEEN, _UNPLANNABLE = "unseen", "seen", "unplannable"


class Step(NamedTuple):
    """A call whose arguments at some positions are tensors from slots, as (position, slot).

    `made`: the number of tensors it returns, -1 for one by itself; each takes the next free slot.
    `last`: the slots that nothing reads after this step.
    """

    start: Callable[..., Any]
    args: list[Any]
    places: tuple[tuple[int, int], ...]
    made: int
    last: tuple[int, ...]


class Plan(NamedTuple):
    """Steps, and the slots of the results. The first slots hold the arguments."""

    steps: tuple[Step, ...]
    results: tuple[int | None, ...]


def planned(launcher: Launcher) -> Launcher:
    """A launcher that follows a plan of its own where there is one.

    It takes tensors, numbers, strings, tuples of them and a BackwardContext by position, returns a
    tuple of tensors, starts kernels by `launch` alone, and depends on its arguments' shapes,
    strides, dtypes and alignment and on nothing else. Where it does what a plan cannot tell, as
    reading a number from the device, it is run each time, and so it is under autocast.

    Example:
        >>> @planned
        ... def forward(x: Tensor, scale: float) -> tuple[Tensor]:
        ...     y = x.new_empty(x.shape)
        ...     launch(kernel, (triton.cdiv(x.numel(), 1024),), x, y, x.numel(), scale, BLOCK=1024)
        ...     return (y,)
    """
    plans: dict[tuple[Any, ...], Plan | str] = {}

    @wraps(launcher)
    def follow(*args: Any) -> tuple[Any, ...]:
        kind: list[Any] = []
        tensors: list[Tensor] = []
        watched = bool(observers) or here.recorder is not None or is_any_autocast_enabled()
        if watched or not _describe(args, kind, tensors) or not tensors:
            return launcher(*args)
        index = tensors[0].get_device()
        key = (index, *kind)
        plan = plans.get(key, _UNSEEN)
        if type(plan) is Plan:
            if index < 0 or index == torch.cuda.current_device():
                return _run(plan, tensors)
            with torch.cuda.device(index):
                return _run(plan, tensors)
        if plan is _UNSEEN:
            if len(plans) >= _MOST:
                plans.clear()
            plans[key] = _SEEN
        if plan is not _SEEN or len(set(map(id, tensors))) < len(tensors):
            return launcher(*args)  # of equal arguments nobody could tell which was meant
        tape = _Tape(tensors)
        results = tape.record(launcher, args)
        plans[key] = tape.plan(results) or _UNPLANNABLE
        return results

    return follow  # type: ignore[return-value]


def as_one(function: Function) -> Function:
    """A function of tensors and numbers that a plan calls as it is: one step, where torch's
    dispatcher would show every operator in it. It starts no kernels of ours.

    Example:
        >>> linear = as_one(torch.nn.functional.linear)
    """

    @wraps(function)
    def call(*args: Any) -> Any:
        recorder = here.recorder
        if recorder is None or recorder.busy:
            return function(*args)
        recorder.busy = True
        made = function(*args)
        recorder.busy = False
        recorder.note(function, args, made)
        return made

    return call  # type: ignore[return-value]


def _describe(args: Sequence[Any], kind: list[Any], tensors: list[Tensor]) -> bool:
    """Collect the tensors, and what decides how they are worked on; False if that is not known."""
    for arg in args:
        of = type(arg)
        if of in _VALUES:
            kind.append(arg)
        elif of is Tensor or of is Parameter:
            address = arg.data_ptr()
            if not address and arg.numel():  # without memory
                return False
            kind += (arg.shape, arg.stride(), arg.dtype, address % _ALIGNED == 0)
            tensors.append(arg)
        elif of is float:
            kind += (of, arg)
        elif of is tuple or of is list:
            kind.append(len(arg))
            if not _describe(arg, kind, tensors):
                return False
        elif of is BackwardContext:
            fields = (arg.inputs, arg.outputs, arg.aux, arg.needs_input_grad)
            if not _describe(fields, kind, tensors):
                return False
        else:
            return False
    return True


def _run(plan: Plan, tensors: list[Tensor]) -> tuple[Any, ...]:
    slots: list[Any] = tensors
    for start, args, places, made, last in plan.steps:
        if places:
            args = args.copy()
            for place, slot in places:
                args[place] = slots[slot]
        results = start(*args)
        if made < 0:
            slots.append(results)
        elif made:
            slots.extend(results)
        if last:
            args = results = []  # which hold the same tensors
            for slot in last:
                slots[slot] = None
    return tuple([None if slot is None else slots[slot] for slot in plan.results])


class _Tape(TorchDispatchMode):
    """Notes the operators and launches of one run."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.busy = False  # in a launch, whose own work is not noted
        self.steps: list[Step] = []
        self.is_whole = True
        self._alive = list(tensors)  # in slots; alive, so that no other tensor gets an id again
        self._slots = {id(t): slot for slot, t in enumerate(tensors)}
        self._given = len(tensors)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch would import Dynamo to skip what Dynamo never sees."""
        return False

    def record(self, launcher: Callable[..., tuple[Any, ...]], args: tuple[Any, ...]) -> Any:
        here.recorder = self
        try:
            with self:
                return launcher(*args)
        finally:
            here.recorder = None

    def note(self, start: Callable[..., Any], args: tuple[Any, ...], made: Any = None) -> None:
        self._add(start, args, made)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if self.busy:
            return made
        if func._schema.name.removeprefix("aten::") in _ALLOCATIONS:
            like = {"dtype": made.dtype, "device": made.device}
            self._add(partial(torch.empty_strided, made.shape, made.stride(), **like), (), made)
        else:
            self.is_whole &= not any(isinstance(v, Tensor) for v in kwargs.values())
            self._add(partial(func, **kwargs) if kwargs else func, args, made)
        return made

    def _add(self, start: Callable[..., Any], args: Sequence[Any], made: Any) -> None:
        places = []
        for place, arg in enumerate(args):
            if isinstance(arg, Tensor):
                self.is_whole &= id(arg) in self._slots
                places.append((place, self._slots.get(id(arg), 0)))
            elif isinstance(arg, list | tuple):
                self.is_whole &= not any(isinstance(a, Tensor) for a in arg)
        constants = [None if isinstance(a, Tensor) else a for a in args]
        results = made if isinstance(made, list | tuple) else [] if made is None else [made]
        self.is_whole &= all(isinstance(r, Tensor) for r in results)
        own = tuple(range(len(self._alive), len(self._alive) + len(results)))
        self._slots.update(zip(map(id, results), own, strict=True))
        self._alive += results
        count = -1 if isinstance(made, Tensor) else len(results)
        self.steps.append(Step(start, constants, tuple(places), count, own))

    def plan(self, results: Any) -> Plan | None:
        """None if there was something that cannot be noted."""
        if type(results) is not tuple or not self.is_whole:
            return None
        if any(r is not None and id(r) not in self._slots for r in results):
            return None
        returned = tuple(None if r is None else self._slots[id(r)] for r in results)
        return Plan(self._with_last_uses(set(returned)), returned)

    def _with_last_uses(self, returned: set[int | None]) -> tuple[Step, ...]:
        """The steps, each with the slots that it is the last to use: their memory is free then."""
        read = returned | set(range(self._given))
        steps = []
        for step in reversed(self.steps):
            last = {*step.last, *(slot for _, slot in step.places)} - read
            read |= last
            steps.append(step._replace(last=tuple(last)))
        return tuple(reversed(steps))
