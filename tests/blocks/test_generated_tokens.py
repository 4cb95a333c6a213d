"""Text generated over a cache in float32, token for token beside a loop over the whole forward."""

import pytest
import torch

from tests.support.covering import pairwise
from tests.support.devices import DEVICE
from trilith.blocks import LMConfig, PagedKVCache, SelfAttention, build_lm, generation
from trilith.blocks.generation import Sampling
from trilith.kernels import attention

STEPS, VOCABULARY = 3, 40
HEADS = {"equal": (2, 2), "grouped": (4, 2), "one": (2, 1)}
SCORES = {"plain": {}, "window": {"window": (2, None)}, "cap": {"softcap": 2.0}}
SCORES["window_cap"] = SCORES["window"] | SCORES["cap"]
PROMPTS = {"equal": (3, 3), "unequal": (2, 4, 1), "single": (5,)}
CHOICES = {
    "greedy": {},
    "sampled": {"temperature": 1.5},
    "of_few": {"temperature": 2.0, "top_k": 9, "top_p": 0.9},
}
FACTORS = {
    "prompts": PROMPTS,
    "scores": SCORES,
    "choice": CHOICES,
    "heads": HEADS,
    "position": ("rotary", "learned", "sinusoidal"),
    "cache": ("rows", "pages"),
    "stops": ("none", "some"),
    "how": ("at_once", "stream"),
}
ROWS = pairwise(FACTORS)


class Altered(SelfAttention):
    """An attention whose scores are windowed or capped, with a cache and without."""

    options: dict

    def mix(self, q, k, v):
        continued = self.cache is not None and any(self.cache.filled)
        if self.cache is not None:
            self.cache.append(k, v)
        if continued:
            return self.cache.attend(q, **self.options)
        return attention(q, k, v, causal="top_left", **self.options)


def model_of(position, heads, options):
    n_heads, n_kv_heads = heads
    sizes = {"vocab_size": VOCABULARY, "dim": 16, "n_layers": 2, "max_len": 12}
    config = LMConfig(**sizes, n_heads=n_heads, n_kv_heads=n_kv_heads, position=position)
    model = build_lm(config).to(DEVICE)
    for parameter in model.parameters():  # far from uniform, so that no two tokens are close
        parameter.data *= 3
    for block in model.blocks if options else ():
        old = block.attention.branch
        parts = {"qkv": old.qkv, "out": old.out, "position": old.position}
        block.attention.branch = Altered(**parts, n_heads=n_heads, n_kv_heads=n_kv_heads)
        block.attention.branch.options = options
    return model.eval()


@torch.no_grad()
def by_whole_forward(model, texts, choose):
    """The new tokens of each text, which is read by itself and anew for each of them."""
    whole = list(texts)
    for _ in range(STEPS):
        tokens = choose(torch.stack([model(text[None])[0, -1] for text in whole]))
        whole = [torch.cat([text, token[None]]) for text, token in zip(whole, tokens, strict=True)]
    return [new[len(text) :].tolist() for new, text in zip(whole, texts, strict=True)]


def until(stop, tokens):
    return tokens[: tokens.index(stop) + 1] if stop in tokens else tokens


def generated(model, texts, how, **options):
    """The new tokens of each text."""
    if how == "at_once":
        whole = model.generate(texts, STEPS, use_cache=True, **options)
        assert all(torch.equal(a[: len(t)], t) for a, t in zip(whole, texts, strict=True))
        return [a[len(t) :].tolist() for a, t in zip(whole, texts, strict=True)]
    steps = list(model.generate_stream(texts, STEPS, use_cache=True, **options))
    return [[int(step[i]) for step in steps if step[i] >= 0] for i in range(len(texts))]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(row.values()))
def test_cached_tokens_are_those_of_the_whole_forward(row, monkeypatch):
    model = model_of(row["position"], HEADS[row["heads"]], SCORES[row["scores"]])
    texts = [torch.randint(VOCABULARY, (n,), device=DEVICE) for n in PROMPTS[row["prompts"]]]
    if row["cache"] == "pages":
        blocks = 4 * len(texts)
        monkeypatch.setattr(generation, "KVCache", lambda room: PagedKVCache(blocks, 3, room))
    options = CHOICES[row["choice"]]
    expected = by_whole_forward(model, texts, Sampling(**options, generator=seeded()))
    stops = ()
    if row["stops"] == "some":
        stops = (expected[0][1], VOCABULARY)
        expected = [until(stops[0], new) for new in expected]
    options = {**options, "generator": seeded(), "stop_tokens": stops}
    assert generated(model, texts, row["how"], **options) == expected


def seeded():
    return torch.Generator(DEVICE).manual_seed(3)
