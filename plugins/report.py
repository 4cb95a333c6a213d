"""Runs the conformance checks for each provider of an op, and says what came out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from trilith.plugins import selection
from trilith.plugins.conformance import (
    CHECKS,
    NUMERIC_CHECKS,
    PER_TENSOR,
    Check,
    compare,
    covering,
    dtypes_of_check,
    guard_bands,
    samples_of,
)
from trilith.plugins.conformance.modules import MODULE_CHECKS, ModuleCheck
from trilith.plugins.conformance.support import require_assertions
from trilith.plugins.coverage import Coverage, coverage
from trilith.plugins.manager import Manager
from trilith.plugins.op import Op
from trilith.plugins.registry import Registry, registry
from trilith.plugins.spec import ModuleSpec, Sample, ScoreMod

# How many of an op's samples a check takes: always, and where an interpreter runs the kernels.
_AT_MOST = {"regimes_in_16_bits": 1, "processes_agree": 1}
_AT_MOST_INTERPRETED = _AT_MOST | {
    "shards_agree": 2,
    "opcheck": 1,
    "compiles": 1,
    "compiles_dynamic": 1,
    "compiles_with_inductor": 1,
}

HINTS = {
    "forward_matches_reference": "compute in float32 and round once, at the store",
    "gradients_match_reference": "one gradient per parameter of forward, in its dtype, times grad",
    "every_element_is_written": "mask loads and stores alike; zero what no program owns",
    "mixed_dtypes": "load each tensor in its own dtype, or raise TypeError for what is not taken",
    "regimes": "compute in float32; subtract the maximum or mean first; let NaN and inf through",
    "regimes_of_others": "as regimes, of every tensor: of a large x exp(x) is inf",
    "regimes_in_16_bits": "nothing between load and store in 16 bits: 2 * 4e4 is none of float16's",
    "gradient_subsets": "ask ctx.needs_input_grad; each gradient must stand alone",
    "unused_outputs": "a gradient may be zeros, or None where materialize_grads=False",
    "input_layouts": "pass strides to the kernel, or call .contiguous() in the launcher",
    "upstream_layouts": "grad may be stride-0 (sum().backward()): use its strides",
    "offsets_beyond_32_bits": "cast program ids and indices to tl.int64 before times a stride",
    "guard_bands": "mask every load and store to the tensor's own elements; no fixed multiples",
    "reads_stay_inside": "mask every load to the tensor's own elements, whoever uses the value",
    "writes_are_disjoint": "give each element one program; sum by partials and a second kernel",
    "nothing_is_written_to": "write to no input, gradient or ctx.outputs; nor may the reference",
    "backward_twice": "backward must be linear in grad, and keep no state",
    "runs_are_bit_equal": "no atomics; reduce in a fixed order",
    "calls_are_apart": "keep no workspace from call to call; return as aux what backward needs",
    "processes_agree": "nothing drawn, hashed or counted at import: take it as an argument",
    "empty_tensors": "the reference must accept empty tensors",
    "double_backward": "the reference must be differentiable twice; save all nonlinear inputs",
    "functorch_transforms": "reference: no branching on values; a Function has setup_context",
    "fakes_are_exact": "give `fake=` (`fake_backward=`); of a view, the reference gives a clone",
    "autocast": "autocast='low' casts inputs; 'keep' leaves them",
    "checkpointing": "the same inputs must give the same bits: take seeds as arguments",
    "inference_mode": "nothing in forward may need autograd",
    "opcheck": "schema, fake and strides must agree; nothing given is returned (shared_gradients)",
    "cost_is_sound": "count each input and output once, in bytes of its own dtype",
    "shards_agree": "split what stands alone; what a rank has a summand of is Partial()",
    "compiles": "no data-dependent Python in forward's fake",
    "compiles_dynamic": "sizes may be symbols in the fake: no int(), no branching on sizes",
    "compiles_with_inductor": "fake strides must be those of the real outputs",
}

MODULE_HINTS = {
    "shapes_are_kept": "README's table of slots says what each is called with, and must return",
    "nothing_is_foreseen": "no statistics over time or batch; attend to no later token",
    "gradients_reach_all": "register no parameter that forward leaves out; detach nothing",
    "gradients_are_derivatives": "a backward of your own must be the derivative of its forward",
    "builds_are_apart": "make a new module, with parameters of its own, in each build(config)",
    "copies_agree": "no lambda, handle or lock as an attribute; state in parameters and buffers",
}


@dataclass(frozen=True)
class Row:
    """One check of one provider, or module. `reason` is empty where it passed.

    Of what could not be run, every check or those in a dtype, `not_run` says why.
    """

    op: str
    provider: str
    check: str
    figure: str
    reason: str
    not_run: str = ""

    @property
    def hint(self) -> str:
        return (HINTS | MODULE_HINTS).get(self.check, "") if self.reason else ""


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def named_score_mods(manager: Manager, name: str) -> list[ScoreMod]:
    """The score mod of a name, or those of a vendor, plugin or distribution."""
    return [mod for mod, owner in manager.registry.score_mods() if _means(name, mod.name, owner)]


def named_modules(manager: Manager, name: str) -> list[tuple[ModuleSpec, str]]:
    """The modules of a name, or those of a vendor, plugin or distribution, and whose they are."""
    found = manager.registry.modules()
    return [(spec, owner) for spec, owner in found if _means(name, spec.name, owner)]


def _means(name: str, own: str, owner: str) -> bool:
    """Whether it is a thing's own name, that of its vendor, or of the plugin that brought it."""
    return name in {own, own.partition(".")[0], owner, *owner.split(":")}


def named_ops(manager: Manager, name: str, required: bool = True) -> list[Op]:
    """The ops that a name means: an op, or those a namespace, plugin or distribution has a part in.

    Raises:
        KeyError: it means none, and one is required; the message says which plugins were left out.
    """
    registry = manager.registry
    if name in registry.op_names():
        return [registry.op(name)]
    found = []
    for op in registry.ops():
        owners = {op.owner_of(i.provider) for i in op.implementations}
        if name in {op.spec.provider, *owners, *(part for o in owners for part in o.split(":"))}:
            found.append(op)
    if not found and required:
        failed = "".join(f"; {f.plugin} failed at {f.stage}: {f.reason}" for f in manager.failures)
        known = ", ".join(registry.op_names())
        raise KeyError(f"no op or plugin {name!r}; ops are: {known}{failed}")
    return found


def run_check(
    op: Op,
    provider: str,
    check: Check,
    device: torch.device,
    dtype: torch.dtype,
    **given: Any,
) -> int:
    """How many samples were checked, with some arguments `given` in the place of their own.

    AssertionError says what is wrong with one.
    A sample that the implementation's `supports` refuses is passed over.
    """
    samples = [Sample(*s.args, **(s.kwargs | given)) for s in samples_of(op, device, dtype)]
    if not samples:
        raise AssertionError(f"{op.spec.name}: samples() gave none for {dtype}")
    supports = next((i.supports for i in op.implementations if i.provider == provider), None)
    fit = [
        s for s in samples if supports is None or supports(*op.parameters.bind(s.args, s.kwargs))
    ]
    limits = _AT_MOST if device.type == "cuda" else _AT_MOST_INTERPRETED
    chosen = fit[: limits.get(check.__name__)]
    if check in PER_TENSOR:
        chosen = covering(op, chosen)
    if not chosen:
        raise AssertionError(f"{op.spec.name}: {provider} supports none of the samples in {dtype}")
    if supports is not None and check.__name__.startswith("compiles"):
        return 0
    scope = selection.forced if supports is None else selection.preferred
    for sample in chosen:
        with scope(op, provider):
            check(op, sample, device, dtype)
    return len(chosen)


def check_op(op: Op, device: torch.device | None = None) -> Iterator[Row]:
    """Every check of every provider that can run there; no more of one that writes outside of its
    tensors, which may end the process. Of the others, that they are not run, and why."""
    device = default_device() if device is None else device
    for part in coverage(op, device):
        for check in CHECKS if part.dtypes else ():
            row = _row(op, part, check, device)
            yield row
            if row.reason and check is guard_bands:
                break
        yield from _not_run(op, part)


def check_score_mod(
    mod: ScoreMod, device: torch.device | None = None, registry: Registry = registry
) -> Iterator[Row]:
    """Attention's numbers and gradients with this score mod, against its reference in float64."""
    device = default_device() if device is None else device
    op = registry.op("trilith::attention")
    for part in coverage(op, device):
        for check in NUMERIC_CHECKS if part.dtypes else ():
            row = _row(op, part, check, device, score_mod=mod.name)
            yield replace(row, op=mod.name)
        yield from (replace(row, op=mod.name) for row in _not_run(op, part))


def check_module(
    spec: ModuleSpec,
    owner: str,
    device: torch.device | None = None,
    registry: Registry = registry,
) -> Iterator[Row]:
    """Every check of a module that a configuration names."""
    device = default_device() if device is None else device
    for check in MODULE_CHECKS:
        reason, begun = "", time.perf_counter()
        try:
            run_module_check(spec, check, device, registry)
        except AssertionError as error:
            reason = str(error)
        figure = f"{time.perf_counter() - begun:.1f} s"
        yield Row(f"{spec.slot} {spec.name}", owner, check.__name__, figure, reason)


def run_module_check(
    spec: ModuleSpec, check: ModuleCheck, device: torch.device, registry: Registry = registry
) -> None:
    """AssertionError says what is wrong."""
    assert registry.example_config is not None, "no configuration is known; load plugins first"
    check(spec, registry.example_config(spec.slot, spec.name), device)


def percent(share: float) -> str:
    """A share as a table shows it; what is far beyond needs no digits, and NaN is beyond."""
    return f"{share:.0%}" if share <= 9.99 else ">999%"


def _not_run(op: Op, part: Coverage) -> list[Row]:
    return [Row(op.spec.name, part.provider, what, "", "", why) for what, why in part.not_run]


def _row(op: Op, part: Coverage, check: Check, device: torch.device, **given: Any) -> Row:
    require_assertions()
    count, reason, begun = 0, "", time.perf_counter()
    shares: list[float] = []
    compare.observers.append(shares.append)
    try:
        for dtype in dtypes_of_check(check, part.dtypes):
            count += run_check(op, part.provider, check, device, dtype, **given)
    except Exception as error:
        reason = str(error) or type(error).__name__
    finally:
        compare.observers.remove(shares.append)
    seconds = time.perf_counter() - begun
    figure = f"{percent(max(shares))} of bound" if shares else f"{count} samples"
    figure = f"{figure}, {seconds:.1f} s"
    return Row(op.spec.name, part.provider, check.__name__, figure, reason)
