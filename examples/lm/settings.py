"""What a run is: its options, its presets, and the settings that a checkpoint must share."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import NoReturn

import torch

from examples.lm import BadInput
from examples.lm.data import VOCAB_SIZE
from examples.lm.ranks import MODES
from trilith.blocks import LMConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides a run's losses. A resumed run must have the same."""

    model: LMConfig
    steps: int
    batch: int
    accumulate: int = 1
    lr: float
    warmup: float = 0.05
    final_lr: float = 0.03
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    text: str = ""

    @property
    def context(self) -> int:
        return self.model.max_len

    def describe(self) -> dict[str, object]:
        """One level of plain values, for JSON and for comparison."""
        values = dataclasses.asdict(self)
        model = values.pop("model")
        del model["checkpoint_activations"]
        values["betas"] = list(self.betas)
        return {**model, **values}


PRESETS = {
    # Two or three minutes on two CPU cores.
    "small": Settings(
        model=LMConfig(
            vocab_size=VOCAB_SIZE, dim=128, n_layers=4, n_heads=2, max_len=128, tied=False
        ),
        steps=1000,
        batch=16,
        lr=5e-3,
    ),
    # GPT-2 small's shape, 124M with its vocabulary (bytes use 256 of its rows), to compare speed.
    "gpt2-small": Settings(
        model=LMConfig(
            vocab_size=50257,
            dim=768,
            n_layers=12,
            n_heads=12,
            max_len=1024,
            norm="layer_norm",
            mlp="mlp",
            activation="gelu_tanh",
            position="learned",
            bias=True,
        ),
        steps=1000,
        batch=32,
        accumulate=2,
        lr=6e-4,
        betas=(0.9, 0.95),
    ),
}
_MODEL_OPTIONS = {
    "dim": "dim",
    "layers": "n_layers",
    "heads": "n_heads",
    "context": "max_len",
    "dropout": "dropout",
}
_RUN_OPTIONS = ("steps", "batch", "accumulate", "lr", "seed")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; see --help")


def parse(argv: list[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = _Parser(
        prog="train_lm.py",
        description="Train a byte-level language model on real text.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="gpt2-small" if cuda else "small")
    add("--text", type=Path, help="train on this file, not on Python's standard library")
    add("--out", type=Path, default=Path("runs/train_lm"), help="where everything is written")
    add(
        "--resume",
        type=Path,
        nargs="?",
        const=Path(),
        help="go on from this checkpoint; without a path, from the one in --out",
    )
    add("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    add("--parallel", choices=MODES, help="over the processes of torchrun; see blocks/parallel")
    add("--tensor-ranks", type=_positive, default=2, help="of fsdp+tp: that share each layer")
    add("--checkpoint-activations", action="store_true", help="less memory, more time")
    add(
        "--compile",
        action="store_true",
        help="train under torch.compile; a C++ compiler is needed on a CPU",
    )
    add("--save-every", type=_positive, default=200, help="steps between checkpoints")
    add("--eval-every", type=_positive, default=250, help="steps between validations")
    kinds = {"dropout": float, "lr": _learning_rate, "seed": int}
    for name in (*_MODEL_OPTIONS, *_RUN_OPTIONS):
        add(f"--{name}", type=kinds.get(name, _positive), help="instead of the preset's")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not cuda:
        raise BadInput("--device cuda: PyTorch sees no GPU here; leave --device out")
    if args.compile and args.parallel in ("tp", "fsdp+tp"):
        raise BadInput(
            f"--compile --parallel {args.parallel}: torch.compile cannot take torch's embedding "
            "that is split over ranks; give ddp or fsdp, or leave --compile out"
        )
    return args


def settings_from(args: argparse.Namespace, text: str) -> Settings:
    """The preset with the options that were given in place of its own."""
    preset = PRESETS[args.preset]
    model = {field: getattr(args, option) for option, field in _MODEL_OPTIONS.items()}
    run = {name: getattr(args, name) for name in _RUN_OPTIONS}
    try:
        config = dataclasses.replace(
            preset.model,
            checkpoint_activations=args.checkpoint_activations,
            **{field: value for field, value in model.items() if value is not None},
        )
    except ValueError as error:
        raise BadInput(str(error)) from None
    given = {name: value for name, value in run.items() if value is not None}
    return dataclasses.replace(preset, model=config, text=text, **given)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _learning_rate(text: str) -> float:
    value = float(text)
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {value}")
    return value
