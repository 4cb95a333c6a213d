"""A run's state in one safetensors file, written so that an interrupted write loses nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from examples.lm import BadInput
from examples.lm.data import Batches
from examples.lm.ranks import Ranks, placed_like, whole
from examples.lm.settings import Settings

_FORMAT = "trilith-train-lm-1"


@dataclass
class State:
    """Everything that changes while a run trains."""

    model: nn.Module
    trained: nn.Module  # what training calls: the model, or what averages its gradients
    ranks: Ranks
    optimizer: torch.optim.Optimizer
    batches: Batches
    losses: Tensor  # (steps,), NaN where not yet trained
    step: int = 0
    evals: list[tuple[int, float]] = field(default_factory=list)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a temporary file beside `path`, then rename it: old or new, but whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise BadInput(f"cannot write {path}: {error}; what was there is unchanged") from None
    _sync_directory(path.parent)


def save(path: Path, state: State, settings: Settings) -> None:
    """Write the whole state; refused once the loss is not finite, to keep the last good one."""
    if state.step and not state.losses[state.step - 1].isfinite():
        raise BadInput(
            f"the loss is not finite at step {state.step}; lower --lr. {path} is not overwritten"
        )
    tensors = {f"model.{name}": value for name, value in state.model.state_dict().items()}
    for index, values in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
    tensors["losses"] = state.losses
    tensors["rng.batches"] = state.batches.state
    tensors |= _random_states(state)
    about = {"step": state.step, "evals": state.evals, "settings": settings.describe()}
    metadata = {"format": _FORMAT, "run": json.dumps(about)}
    found = {name: whole(value).contiguous() for name, value in tensors.items()}
    if state.ranks.first:
        replace_file(path, lambda temporary: save_file(found, temporary, metadata))


def _random_states(state: State) -> dict[str, Tensor]:
    """Of every rank, the first one's without a number."""
    found = {"rng.cpu": torch.get_rng_state()}
    if state.losses.is_cuda:
        found["rng.cuda"] = torch.cuda.get_rng_state(state.losses.device)
    return {
        _of_rank(name, rank): one
        for name, own in found.items()
        for rank, one in enumerate(state.ranks.all_of(own))
    }


def _of_rank(name: str, rank: int) -> str:
    return f"{name}.{rank}" if rank else name


def restore(path: Path, state: State, settings: Settings) -> None:
    """Bring `state` to where the checkpoint was written. Changes nothing if it does not fit."""
    if not path.is_file():
        raise BadInput(f"no checkpoint at {path}; start without --resume")
    try:
        with safe_open(path, framework="pt", device=str(state.losses.device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BadInput(f"cannot read checkpoint {path}: {error}") from None
    if metadata.get("format") != _FORMAT:
        raise BadInput(f"{path} is not a checkpoint of train_lm")
    about = json.loads(metadata["run"])
    _require_same(path, about["settings"], settings.describe())
    _require_shapes(path, tensors, state)

    fresh = state.model.state_dict()
    model = _under("model.", tensors)
    state.model.load_state_dict({n: placed_like(v, fresh[n]) for n, v in model.items()})
    restored = state.optimizer.state_dict()
    restored["state"] = {}
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    for name, value in _under("optimizer.", tensors).items():
        index, _, key = name.partition(".")
        if value.shape == parameters[int(index)].shape:
            value = placed_like(value, parameters[int(index)])
        restored["state"].setdefault(int(index), {})[key] = value
    state.optimizer.load_state_dict(restored)
    state.losses.copy_(tensors["losses"])
    state.batches.state = tensors["rng.batches"].cpu()
    cpu, cuda = (_of_rank(name, state.ranks.rank) for name in ("rng.cpu", "rng.cuda"))
    if cpu in tensors:  # else there are more ranks than there were
        torch.set_rng_state(tensors[cpu].cpu())
    if cuda in tensors and state.losses.is_cuda:
        torch.cuda.set_rng_state(tensors[cuda].cpu(), state.losses.device)
    state.step = about["step"]
    state.evals = [(int(step), float(loss)) for step, loss in about["evals"]]


def _require_same(path: Path, theirs: dict[str, object], ours: dict[str, object]) -> None:
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    if names:
        had, has = (", ".join(f"{n}={s.get(n)}" for n in names) for s in (theirs, ours))
        raise BadInput(
            f"checkpoint {path} was made with {had}, and this run has {has}; give the same "
            "options, or start without --resume"
        )


def _require_shapes(path: Path, tensors: dict[str, Tensor], state: State) -> None:
    needed = {f"model.{name}": value for name, value in state.model.state_dict().items()}
    needed["losses"] = state.losses
    for name, value in needed.items():
        found = tuple(tensors[name].shape) if name in tensors else "nothing"
        if found != tuple(value.shape):
            raise BadInput(
                f"checkpoint {path} does not fit: {name} must have shape "
                f"{tuple(value.shape)}, got {found}"
            )


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}


def _sync_directory(directory: Path) -> None:
    """Make the rename itself outlast a power cut, where the system can."""
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
