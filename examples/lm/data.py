"""Text as bytes: a corpus, batches to train on, held-out windows, and two count baselines."""

from __future__ import annotations

import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from examples.lm import BadInput

VOCAB_SIZE = 256
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_ONE_IN = 20


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes held out, both 1-D uint8."""

    name: str
    train: Tensor
    held_out: Tensor

    def fingerprint(self) -> str:
        return f"{self.name} {zlib.crc32(self.train.numpy()):08x}"


def standard_library() -> Corpus:
    """Python's standard library; one file in twenty, by its name's CRC, is held out."""
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if _LEFT_OUT.isdisjoint(path.relative_to(root).parts[:-1])
    )
    held_out = {name for name in names if zlib.crc32(name.encode()) % _ONE_IN == 0}
    if not held_out or len(held_out) == len(names):
        raise BadInput(f"no Python sources in {root}; give a text with --text PATH")
    parts = [
        b"\n".join((root / name).read_bytes() for name in names if (name in held_out) == wanted)
        for wanted in (False, True)
    ]
    version = sysconfig.get_python_version()
    return Corpus(f"Python {version} standard library", *map(_as_tensor, parts))


def text_file(path: Path) -> Corpus:
    """One file of any bytes; its last twentieth is held out."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise BadInput(f"cannot read --text {path}: {error.strerror}") from None
    if not text:
        raise BadInput(f"--text {path} is empty")
    split = len(text) - max(1, len(text) // _ONE_IN)
    return Corpus(path.name, _as_tensor(text[:split]), _as_tensor(text[split:]))


def require_windows(corpus: Corpus, length: int) -> None:
    """Refuse a corpus of which a part cannot give one window of `length` bytes and its target."""
    for part, text in (("training", corpus.train), ("held-out", corpus.held_out)):
        if len(text) <= length:
            raise BadInput(
                f"{corpus.name}: the {part} part has {len(text)} bytes, and one window needs "
                f"{length + 1}; give a longer text or a smaller --context"
            )


class Batches:
    """Windows at random positions of a text. `state` decides all those still to come."""

    def __init__(self, text: Tensor, batch: int, length: int, seed: int) -> None:
        self.text = text
        self.batch = batch
        self.span = torch.arange(length + 1)
        self.generator = torch.Generator().manual_seed(seed)

    def next(self) -> tuple[Tensor, Tensor]:
        """Tokens and next tokens, each int64 (batch, length)."""
        last = len(self.text) - len(self.span)
        starts = torch.randint(last + 1, (self.batch, 1), generator=self.generator)
        windows = self.text[starts + self.span].long()
        return windows[:, :-1], windows[:, 1:]

    @property
    def state(self) -> Tensor:
        return self.generator.get_state()

    @state.setter
    def state(self, state: Tensor) -> None:
        self.generator.set_state(state)


def held_out_windows(text: Tensor, length: int, limit: int) -> Tensor:
    """At most `limit` windows spread evenly over a text, (windows, length + 1) int64."""
    count = (len(text) - 1) // length
    chosen = torch.linspace(0, count - 1, min(count, limit)).long()
    return text[chosen[:, None] * length + torch.arange(length + 1)].long()


def unigram_loss(train: Tensor, windows: Tensor) -> float:
    """Nats per byte of the training text's byte frequencies, on the windows' targets."""
    return -_unigram(train)[windows[:, 1:]].log().mean().item()


def bigram_loss(train: Tensor, windows: Tensor) -> float:
    """Nats per byte of guessing each byte from the one before, by counts in the training text."""
    pairs = train[:-1].long() * VOCAB_SIZE + train[1:].long()
    counts = torch.bincount(pairs, minlength=VOCAB_SIZE**2).view(VOCAB_SIZE, VOCAB_SIZE).double()
    table = counts + _unigram(train)
    table /= table.sum(dim=1, keepdim=True)
    return -table[windows[:, :-1], windows[:, 1:]].log().mean().item()


def _unigram(train: Tensor) -> Tensor:
    counts = torch.bincount(train.long(), minlength=VOCAB_SIZE).double() + 1
    return counts / counts.sum()


def _as_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
