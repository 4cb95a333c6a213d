"""Text from a language model: prompts first, then token by token over cached keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from trilith.blocks.cache import KVCache

if TYPE_CHECKING:
    from trilith.blocks.transformer import TransformerLM

ENDED = -1


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; see `TransformerLM.generate`."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"generate: temperature must be 0 or positive, got {self.temperature}")
        if not isinstance(self.top_k, int | None):
            raise TypeError(f"generate: top_k must be an int, got {type(self.top_k).__name__}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"generate: top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"generate: top_p must be above 0 and at most 1, got {self.top_p}")

    def __call__(self, logits: Tensor) -> Tensor:
        """Token ids (B,) of logits (B, vocabulary)."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        chances, tokens = logits.softmax(-1).sort(descending=True)
        if self.top_p is not None:
            before = chances.cumsum(-1) - chances
            chances = chances.masked_fill(before >= self.top_p, 0.0)
        drawn = chances.multinomial(1, generator=self.generator)
        return tokens.gather(1, drawn).squeeze(1)


def generate(
    model: TransformerLM, prompts: Tensor | Sequence[Tensor], max_new_tokens: int, **options: Any
) -> list[Tensor]:
    """The prompts and their continuations, 1-D each; see `TransformerLM.generate`."""
    steps = list(stream(model, prompts, max_new_tokens, **options))
    device = model.embedding.weight.device
    texts = _texts(prompts, device)
    if not steps:
        return texts
    new = torch.stack(steps, dim=1)
    return [torch.cat([text, row[row != ENDED]]) for text, row in zip(texts, new, strict=True)]


def stream(
    model: TransformerLM,
    prompts: Tensor | Sequence[Tensor],
    max_new_tokens: int,
    *,
    stop_tokens: Sequence[int] = (),
    use_cache: bool | None = None,
    **sampling: Any,
) -> Iterator[Tensor]:
    """Yield the next ids (B,), -1 where a sequence has ended; arguments are checked at once."""
    choose = Sampling(**sampling)
    device = model.embedding.weight.device
    texts = _texts(prompts, device)
    if not isinstance(max_new_tokens, int):
        kind = type(max_new_tokens).__name__
        raise TypeError(f"generate: max_new_tokens must be an int, got {kind}")
    if isinstance(stop_tokens, int):
        raise TypeError(
            f"generate: stop_tokens must be several ids, got {stop_tokens}; give [{stop_tokens}]"
        )
    _require_whole_sequences(model)
    _require_room(model, texts, max_new_tokens)
    obstacle = cache_obstacle(model)
    if use_cache and obstacle is not None:
        raise ValueError(f"generate: use_cache must be False or None here, got True: {obstacle}")
    cached = obstacle is None and use_cache is not False
    room = max(map(len, texts)) + max_new_tokens
    decoder = _Cached(model, room) if cached else _Whole(model)
    stops = torch.tensor(list(stop_tokens), device=device)
    return _steps(decoder, texts, max_new_tokens, stops, choose)


def _steps(
    decoder: _Decoder, texts: list[Tensor], steps: int, stops: Tensor, choose: Sampling
) -> Iterator[Tensor]:
    new = texts
    ended = torch.zeros(len(texts), dtype=torch.bool, device=texts[0].device)
    for _ in range(steps):
        # what one step keeps must be good for the next, which may be taken outside inference mode
        with torch.inference_mode(False), torch.no_grad():
            tokens = choose(decoder.logits(new)).masked_fill(ended, ENDED)
        yield tokens
        if len(stops):
            ended = ended | torch.isin(tokens, stops)
            if ended.all():
                return
        new = list(tokens.clamp_min(0)[:, None])


def cache_obstacle(model: TransformerLM) -> str | None:
    """Why a model cannot generate over a cache, or None.

    Each block must have one attention with a `cache`, causal, of its own; position modules must
    have `offsets`. All else is taken to act on each token alone.
    """
    seen: dict[nn.Module, int] = {}
    for i, block in enumerate(model.blocks):
        attentions = _attentions(block)
        if len(attentions) != 1:
            return f"block {i} must have one attention module with a cache, got {len(attentions)}"
        if seen.setdefault(attentions[0], i) != i:
            return f"the attention of block {i} is that of block {seen[attentions[0]]}"
        if not getattr(attentions[0], "causal", True):
            return f"the attention of block {i} is not causal"
    for name, module in model.named_modules():
        if hasattr(module, "acts_on") and not hasattr(module, "offsets"):
            return f"the position module {name} takes no offsets"
    return None


class _Decoder(Protocol):
    def logits(self, new: list[Tensor]) -> Tensor:
        """Logits (B, vocabulary) after each sequence's new tokens."""
        ...


class _Cached:
    """Runs the model on the new tokens alone, over caches of what came before."""

    def __init__(self, model: TransformerLM, room: int) -> None:
        self.model = model
        self.caches = [(a, KVCache(room)) for block in model.blocks for a in _attentions(block)]
        self.positions: list[Any] = [m for m in model.modules() if hasattr(m, "acts_on")]
        self.starts: Tensor | int = 0  # how many tokens of each sequence have been read

    def logits(self, new: list[Tensor]) -> Tensor:
        counts = [len(tokens) for tokens in new]
        alike = min(counts) == max(counts)  # as after the prompts: one launch, whatever the batch
        padded = torch.stack(new) if alike else pad_sequence(new, batch_first=True)
        if isinstance(self.starts, int):
            self.starts = torch.zeros(len(new), dtype=torch.long, device=padded.device)
        for _, cache in self.caches:
            cache.expect(counts)
        with evaluating(self.model), self._attached():
            hidden = self.model.hidden(padded)
            taken: Tensor | int = padded.shape[1]
            last = hidden[:, -1]
            if not alike:  # else nothing need be copied to the device
                taken = torch.tensor(counts, device=padded.device)
                last = hidden[torch.arange(len(new), device=padded.device), taken - 1]
            self.starts = self.starts + taken
            return self.model.logits(last)

    @contextmanager
    def _attached(self) -> Iterator[None]:
        try:
            for attention, cache in self.caches:
                attention.cache = cache
            for position in self.positions:
                position.offsets = self.starts
            yield
        finally:
            for attention, _ in self.caches:
                attention.cache = None
            for position in self.positions:
                del position.offsets


class _Whole:
    """Runs the model on all of the text for each token; texts of one length go together."""

    def __init__(self, model: TransformerLM) -> None:
        self.model = model
        self.texts: list[Tensor] = []

    def logits(self, new: list[Tensor]) -> Tensor:
        pairs = zip(self.texts or [tokens[:0] for tokens in new], new, strict=True)
        self.texts = [torch.cat(pair) for pair in pairs]
        found: dict[int, Tensor] = {}
        with evaluating(self.model):
            for length in sorted({len(text) for text in self.texts}):
                rows = [i for i, text in enumerate(self.texts) if len(text) == length]
                hidden = self.model.hidden(torch.stack([self.texts[i] for i in rows]))
                found |= zip(rows, self.model.logits(hidden[:, -1]), strict=True)
        return torch.stack([found[i] for i in range(len(new))])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; each module's own mode comes back."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _attentions(block: nn.Module) -> list[Any]:
    return [module for module in block.modules() if hasattr(module, "cache")]


def _texts(prompts: Tensor | Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """int64 ids on the device; sequences of ints are taken too."""
    texts = [torch.as_tensor(prompt) for prompt in prompts]
    for text in texts:
        if text.numel() and (text.is_floating_point() or text.dtype == torch.bool):
            raise TypeError(f"generate: prompts must be integer token ids, got {text.dtype}")
    return [text.to(device, torch.long) for text in texts]


def _require_whole_sequences(model: TransformerLM) -> None:
    in_a_ring = any(getattr(module, "ring", None) is not None for module in model.modules())
    if in_a_ring or model.projection.splits_tokens:
        what = "context_parallel" if in_a_ring else "sequence_parallel"
        raise NotImplementedError(
            f"generate: the model must have whole sequences, got one that {what} spread over "
            "ranks; load its weights into one that is not"
        )


def _require_room(model: nn.Module, texts: list[Tensor], new: int) -> None:
    if not texts or any(text.ndim != 1 or not len(text) for text in texts):
        shapes = [tuple(text.shape) for text in texts]
        raise ValueError(
            "generate: prompts must be 1-D tensors of at least one token id, a batch of them, got "
            f"{shapes}; a single prompt is given as prompt[None]"
        )
    if new < 0:
        raise ValueError(f"generate: max_new_tokens must not be negative, got {new}")
    limits: list[Any] = [
        m.max_len for m in model.modules() if hasattr(m, "acts_on") and hasattr(m, "max_len")
    ]
    longest = max(map(len, texts)) + new - 1  # the last token is not read again
    if limits and longest > min(limits):
        raise ValueError(
            f"generate: a prompt and max_new_tokens={new} must fit the positions' max_len="
            f"{min(limits)}, got a prompt of {longest + 1 - new} tokens"
        )
