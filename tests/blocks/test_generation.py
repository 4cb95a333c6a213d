"""generate: what a cache makes faster must not change a token; sampling, stops, streams, limits.

Models here are float64, which takes the reference path and is fast where kernels are interpreted;
`test_generated_tokens` runs the kernels.
"""

import copy

import pytest
import torch
from torch import nn

from perf.meters.aten import syncs
from perf.meters.launches import launches
from perf.meters.live import live_bytes
from tests.support.devices import DEVICE, INTERPRETING
from trilith.blocks import LMConfig, SelfAttention, build_lm
from trilith.blocks.generation import Sampling, cache_obstacle

needs_kernels = pytest.mark.skipif(
    not (INTERPRETING or DEVICE == "cuda"), reason="the reference's work grows with the text"
)
SIZES = {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 4, "max_len": 24}
KINDS = {
    "rotary": {},
    "grouped": {"n_kv_heads": 2, "n_layers": 1},
    "learned": {"position": "learned", "n_kv_heads": 1},
    "sinusoidal": {"position": "sinusoidal", "norm": "layer_norm", "mlp": "mlp"},
    "untied_sandwich": {"tied": False, "residual": "sandwich"},
    "dropout": {"dropout": 0.5},
}


def model_of(kind="rotary", dtype=torch.float64):
    torch.manual_seed(5)
    model = build_lm(LMConfig(**{**SIZES, **KINDS[kind]})).to(DEVICE, dtype)
    for parameter in model.parameters():  # far from uniform, so that no two tokens are close
        parameter.data *= 3
    return model


def prompts(*lengths):
    return [torch.randint(0, 40, (n,), device=DEVICE) for n in lengths]


def greedy_by_forward(model, prompt, steps):
    model = copy.deepcopy(model).eval()
    text = prompt
    for _ in range(steps):
        text = torch.cat([text, model(text[None])[0, -1:].argmax(-1)])
    return text


@pytest.mark.parametrize("kind", KINDS)
def test_cached_tokens_are_those_of_the_whole_forward(kind):
    model, texts = model_of(kind), prompts(5, 1, 9)
    cached = model.generate(texts, 14, use_cache=True)
    whole = model.generate(texts, 14, use_cache=False)
    with torch.no_grad():
        expected = [greedy_by_forward(model, text, 14) for text in texts]
    assert all(torch.equal(a, e) for a, e in zip(cached, expected, strict=True))
    assert all(torch.equal(a, e) for a, e in zip(whole, expected, strict=True))
    assert all(len(a) == len(t) + 14 for a, t in zip(cached, texts, strict=True))


def test_a_cache_runs_the_model_on_one_token_a_step():
    model, seen = model_of(), []
    model.embedding.register_forward_hook(lambda _, args, out: seen.append(args[0].shape))
    model.generate(prompts(4, 2), 3)
    assert seen == [(2, 4), (2, 1), (2, 1)]
    seen.clear()
    model.generate([torch.ones(4, dtype=torch.long)], 3, use_cache=False)
    assert seen == [(1, 4), (1, 5), (1, 6)]


def cost_of_a_step(model, batch, length, new):
    """Launches, and bytes allocated, of the third step."""
    stream = model.generate_stream(prompts(*[length] * batch), new)
    next(stream), next(stream)
    with launches() as launched, live_bytes() as live:
        next(stream)
    return launched.total(), live.made


@needs_kernels
def test_a_step_costs_the_same_whatever_was_read_and_is_to_come():
    model = model_of("grouped", torch.float32)
    short, read, to_come = (
        cost_of_a_step(model, 2, *sizes) for sizes in ((4, 3), (18, 3), (4, 20))
    )
    assert short == read == to_come
    assert cost_of_a_step(model, 4, 4, 3)[0] == short[0]


@needs_kernels
def test_without_stop_tokens_the_host_waits_for_nothing():
    model = model_of("grouped", torch.float32)
    with syncs() as waits:
        list(model.generate_stream(prompts(4, 4), 3))
    assert not waits


@pytest.mark.parametrize("use_cache", [True, False])
def test_only_the_last_token_of_a_text_has_logits(use_cache, monkeypatch):
    model, shapes = model_of(), []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda h: shapes.append(h.shape) or logits(h))
    model.generate(prompts(5, 5), 3, use_cache=use_cache)
    assert shapes == [(2, SIZES["dim"])] * 3


def test_a_batch_equals_its_prompts_one_by_one():
    model, texts = model_of("grouped"), prompts(7, 2, 3)
    together = model.generate(texts, 5)
    for ours, text in zip(together, texts, strict=True):
        assert torch.equal(ours, model.generate(text[None], 5)[0])


def test_stop_tokens_end_their_sequence_alone():
    model, texts = model_of(), prompts(5, 3)
    free = model.generate(texts, 8)
    stop = int(free[0][5 + 2])
    ended = model.generate(texts, 8, stop_tokens=[stop])
    for ours, all_, text in zip(ended, free, texts, strict=True):
        new = all_[len(text) :].tolist()
        kept = new.index(stop) + 1 if stop in new else 8
        assert torch.equal(ours, all_[: len(text) + kept])
    assert len(ended[0]) <= 8


def test_the_stream_gives_what_generate_joins():
    model, texts = model_of(), prompts(5, 3)
    stop = int(model.generate(texts, 3)[0][6])
    steps = list(model.generate_stream(texts, 6, stop_tokens=[stop]))
    joined = model.generate(texts, 6, stop_tokens=[stop])
    for i, text in enumerate(texts):
        new = [int(step[i]) for step in steps if step[i] >= 0]
        assert joined[i].tolist() == [*text.tolist(), *new]
    assert all(step.shape == (2,) for step in steps)


def test_a_stream_can_be_left_and_the_model_is_as_it_was():
    model = model_of("dropout")
    model.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    stream = model.generate_stream(prompts(3), 5)
    next(stream)
    assert [m.training for m in model.modules()] == modes
    assert all(m.cache is None for m in model.modules() if isinstance(m, SelfAttention))
    loss = model(prompts(4)[0][None], prompts(4)[0][None])
    loss.backward()
    assert len(next(stream)) == 1 and not list(model.buffers(recurse=False))


def test_a_stream_ends_with_its_last_sequence():
    model, texts = model_of(), prompts(5, 3)
    (first,) = model.generate_stream(texts, 1)
    assert len(list(model.generate_stream(texts, 6, stop_tokens=first.tolist()))) == 1


class Breaks(nn.Module):
    def forward(self, x):
        raise KeyError("in the middle")


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "whole"])
def test_an_error_leaves_the_model_as_it_was(use_cache):
    model = model_of("learned")
    model.blocks[1].mlp.branch = Breaks()
    with pytest.raises(KeyError):
        model.generate(prompts(4, 2), 3, use_cache=use_cache)
    assert all(m.training for m in model.modules())
    assert all(m.cache is None for m in model.modules() if isinstance(m, SelfAttention))
    assert model.position.offsets is None


def test_a_seed_decides_what_is_drawn():
    model, texts = model_of(), prompts(5, 3)

    def draw(seed, **options):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        return model.generate(texts, 8, temperature=1.5, generator=generator, **options)

    first, again, other = draw(1), draw(1), draw(2)
    whole = draw(1, use_cache=False)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, whole, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


LOGITS = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))


@pytest.mark.parametrize(
    ("options", "chances"),
    [
        ({"temperature": 1.0}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"temperature": 1.0, "top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 1.0, "top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 1.0, "top_p": 0.65}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 1.0, "top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"temperature": 1.0, "top_p": 1e-6}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.7}, [0, 4 / 7, 0, 3 / 7]),
        ({}, [0, 1, 0, 0]),
    ],
)
def test_tokens_are_drawn_by_their_chances(options, chances):
    draws = 20000
    generator = torch.Generator().manual_seed(0)
    tokens = Sampling(**options, generator=generator)(LOGITS.expand(draws, 4))
    shares = tokens.bincount(minlength=4) / draws
    torch.testing.assert_close(shares, torch.tensor(chances).float(), rtol=0, atol=0.02)
    assert (shares[torch.tensor(chances) == 0] == 0).all()


def test_a_share_that_is_reached_exactly_is_enough():
    logits = torch.log(torch.tensor([[0.25, 0.5, 0.25]])).expand(200, 3)
    assert (Sampling(temperature=1.0, top_p=0.5)(logits) == 1).all()


def test_logits_of_16_bits_are_drawn_from_in_float32():
    logits = torch.randn(1, 500).bfloat16().expand(2000, -1)
    drawn = [
        Sampling(temperature=0.7, generator=torch.Generator().manual_seed(0))(given)
        for given in (logits, logits.float())
    ]
    assert torch.equal(*drawn)


class Running(nn.Module):
    """A mixer that knows no cache: the mean of what came before."""

    def forward(self, x):
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]


def test_an_attention_without_a_cache_computes_the_text_anew():
    model, texts = model_of("learned"), prompts(4, 2)
    model.blocks[1].attention.branch = Running()
    assert cache_obstacle(model).startswith("block 1 must have one attention module with a cache")
    tokens = model.generate(texts, 5)
    with torch.no_grad():
        expected = [greedy_by_forward(model, text, 5) for text in texts]
    assert all(torch.equal(a, e) for a, e in zip(tokens, expected, strict=True))
    with pytest.raises(ValueError, match="use_cache must be False or None here, got True: block 1"):
        model.generate(texts, 5, use_cache=True)


class Ahead(nn.Module):
    """A position that knows no offsets."""

    acts_on = "tokens"

    def forward(self, x):
        return x + torch.arange(x.shape[1], device=x.device)[:, None].sin()


def test_a_position_without_offsets_computes_the_text_anew():
    model, texts = model_of("learned"), prompts(4, 2)
    model.position = Ahead()
    assert cache_obstacle(model) == "the position module position takes no offsets"
    with torch.no_grad():
        expected = [greedy_by_forward(model, text, 5) for text in texts]
    assert all(map(torch.equal, model.generate(texts, 5), expected))


def test_blocks_that_share_an_attention_compute_the_text_anew():
    model, (text,) = model_of(), prompts(5)
    model.blocks[1].attention.branch = model.blocks[0].attention.branch
    assert cache_obstacle(model) == "the attention of block 1 is that of block 0"
    with torch.no_grad():
        expected = greedy_by_forward(model, text, 6)
    assert torch.equal(model.generate([text], 6)[0], expected)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "whole"])
def test_a_stream_goes_on_outside_the_inference_mode_it_began_in(use_cache):
    model, texts = model_of(), prompts(5, 3)
    expected = [tokens.tolist() for tokens in model.generate_stream(texts, 4, use_cache=use_cache)]
    with torch.inference_mode():
        stream = model.generate_stream(texts, 4, use_cache=use_cache)
        found = [next(stream).tolist()]
    found += [tokens.tolist() for tokens in stream]
    assert found == expected


def test_a_model_that_is_spread_over_ranks_does_not_generate():
    model = model_of()
    model.blocks[0].attention.branch.ring = object()
    with pytest.raises(NotImplementedError, match="context_parallel spread over ranks"):
        model.generate(prompts(3), 2)


def test_an_attention_that_sees_ahead_is_not_cached():
    model = model_of()
    model.blocks[0].attention.branch.causal = False
    assert cache_obstacle(model) == "the attention of block 0 is not causal"


@pytest.mark.parametrize("use_cache", [True, False])
def test_text_fills_the_positions_to_the_last(use_cache):
    model = model_of("learned")
    (text,) = model.generate(prompts(20), 5, use_cache=use_cache)
    assert len(text) == 25
    with pytest.raises(ValueError, match="max_new_tokens=6 must fit the positions' max_len=24"):
        model.generate(prompts(20), 6, use_cache=use_cache)


def test_the_shortest_of_several_positions_is_the_limit():
    model = model_of()
    model.blocks[1].attention.branch.position.max_len = 8
    with pytest.raises(ValueError, match="must fit the positions' max_len=8, got a prompt of 6"):
        model.generate(prompts(6), 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or positive, got -1.0"),
        ({"temperature": float("inf")}, "temperature must be 0 or positive, got inf"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"max_new_tokens": -1}, "max_new_tokens must not be negative, got -1"),
        ({"prompts": []}, "prompts must be 1-D"),
        ({"prompts": [torch.zeros(0).long()]}, "prompts must be 1-D"),
        ({"prompts": torch.zeros(3).long()}, "prompts must be 1-D .* given as prompt"),
        ({"prompts": [torch.zeros(3)]}, "prompts must be integer token ids, got torch.float32"),
        ({"prompts": [torch.ones(3).bool()]}, "prompts must be integer token ids, got torch.bool"),
        ({"top_k": 2.5}, "top_k must be an int, got float"),
        ({"max_new_tokens": 2.0}, "max_new_tokens must be an int, got float"),
        ({"stop_tokens": 5}, r"stop_tokens must be several ids, got 5; give \[5\]"),
    ],
)
def test_bad_options_are_refused_at_once(options, message):
    given = {"prompts": prompts(2), "max_new_tokens": 1, **options}
    with pytest.raises((ValueError, TypeError), match=f"generate: {message}"):
        model_of().generate_stream(**given)


def test_no_new_tokens_gives_the_prompts():
    texts = prompts(2, 3)
    assert all(map(torch.equal, model_of().generate(texts, 0), texts))


def test_prompts_of_any_integers_are_one_text():
    model, (text,) = model_of(), prompts(4)
    expected = model.generate([text], 3)[0]
    for given in ([text.tolist()], text[None].to(torch.uint8), [text.int()]):
        assert torch.equal(model.generate(given, 3)[0], expected)
