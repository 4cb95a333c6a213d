"""attn_implementation="trilith": tiny random models compute what eager attention computes."""

import subprocess
import sys
from types import ModuleType

import pytest
import torch

import trilith
from tests.blocks.test_transformers import DECODER, MODELS, inputs, transformers
from tests.support.devices import DEVICE
from trilith.blocks.drop_in.attention_interface import attention_forward, attention_mask

trilith.register_transformers()

SLIDING = {"sliding_window": 4, "query_pre_attn_scalar": 8}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
# class prefix: configuration and model, and options
OWN = {
    **{name: MODELS[name] for name in ("Llama", "GPT-2", "BERT", "ViT", "T5", "Whisper")},
    "Mistral": ("MistralConfig", "MistralForCausalLM", {**DECODER, "sliding_window": 4}),
    "Qwen2": ("Qwen2Config", "Qwen2ForCausalLM")
    + ({**DECODER, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},),
    "Qwen2-MoE": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM")
    + (
        {**DECODER, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
        | {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
        | {"shared_expert_intermediate_size": 16},
    ),
    "Qwen3": ("Qwen3Config", "Qwen3ForCausalLM", DECODER),
    "Gemma 2": ("Gemma2Config", "Gemma2ForCausalLM")
    + ({**DECODER, **SLIDING, "attn_logit_softcapping": 2.0},),
    "Gemma 3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**DECODER, **SLIDING}),
    "gpt-oss": ("GptOssConfig", "GptOssForCausalLM", {**DECODER, **EXPERTS, "sliding_window": 4}),
    "Llama 4": ("Llama4TextConfig", "Llama4ForCausalLM")
    + (
        {**DECODER, **EXPERTS, "attention_chunk_size": 4, "intermediate_size_mlp": 48}
        | {"no_rope_layers": [1, 0]},
    ),
}
CACHED = [n for n in OWN if n not in ("BERT", "ViT", "Whisper", "Llama 4")]


def build(name, dtype=torch.float64):
    """The same model twice: eager, and ours. float64 is fast where kernels are interpreted."""
    config, model, *options = OWN[name]
    merged = {key: value for option in options for key, value in option.items()}
    made = []
    for implementation in ("eager", "trilith"):
        torch.manual_seed(0)
        settings = getattr(transformers, config)(**merged)
        settings._attn_implementation = implementation
        settings._experts_implementation = "eager"  # the others take no float64
        made.append(getattr(transformers, model)(settings).to(DEVICE, dtype).eval())
        for parameter in made[-1].parameters():  # far from uniform: attention matters
            parameter.data *= 3 if parameter.ndim == 2 else 1
    assert made[1].config._attn_implementation == "trilith"
    return made


def results(model, given):
    out = model(**given)
    logits = out.logits
    if "attention_mask" in given:
        logits = logits[given["attention_mask"].bool()]
    model.zero_grad()
    logits.square().mean().backward()
    return logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def given_to(name, dtype=torch.float64, padding=()):
    """Tokens, of which each row's last are padding, or pictures, or sounds."""
    given = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs(name).items()}
    if padding:
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        for row, n in enumerate(padding):
            given["attention_mask"][row, given["input_ids"].shape[1] - n :] = 0
    return given


@pytest.mark.parametrize("name", OWN)
def test_logits_and_gradients_are_those_of_eager(name):
    """Of right padding: a query that sees no key spoils eager's whole sequence in float64."""
    models = build(name)
    for padding in [(), (2, 0)] if name not in ("ViT", "Whisper") else [()]:
        given = given_to(name, padding=padding)
        expected, actual = (results(model, given) for model in models)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["T5", "gpt-oss"])
def test_kernels_compute_what_eager_does(name):
    given = given_to(name, torch.float32, (2, 0))
    expected, actual = (results(model, given) for model in build(name, torch.float32))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", CACHED)
def test_a_padded_batch_generates_what_each_prompt_does_alone(name, cache):
    eager, ours = build(name)
    tokens, padding = given_to(name)["input_ids"], (2, 0)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "use_cache": True}
    alone = [
        eager.generate(row[n:][None], **options) for row, n in zip(tokens, padding, strict=True)
    ]
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    mask = torch.arange(6, device=DEVICE) >= torch.tensor(padding, device=DEVICE)[:, None]
    together = ours.generate(tokens * mask, attention_mask=mask.long(), **options)
    for row, expected in zip(together, alone, strict=True):
        assert torch.equal(row[-4:], expected[0, -4:])


def test_whispers_decoder_generates():
    features = given_to("Whisper")["input_features"]
    expected, actual = (m.generate(features, max_new_tokens=4) for m in build("Whisper"))
    assert torch.equal(actual, expected)


def test_masks_by_rule_take_no_memory_of_queries_by_keys():
    model, seen = build("Mistral")[1], []
    model.model.layers[0].self_attn.register_forward_hook(
        lambda _, args, kwargs, out: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    tokens = torch.randint(4, 64, (2, 9), device=DEVICE)
    model(tokens)
    padding = torch.arange(9, device=DEVICE) >= torch.tensor([[3], [0]], device=DEVICE)
    model(tokens, attention_mask=padding)
    model(tokens[:, :3], attention_mask=padding[:, 3:6])
    assert [None if m is None else m.untyped_storage().nbytes() for m in seen] == [18, 18, None]


def test_an_encoders_mask_is_its_padding_and_any_other_rule_is_kept():
    from transformers.masking_utils import bidirectional_mask_function

    queries, keys = torch.arange(4)[:, None], torch.arange(5)
    padding = keys < torch.tensor([[3], [5]])
    rules = {bidirectional_mask_function: None, lambda b, h, q, k: k <= q + 1: keys <= queries + 1}
    for function, rule in rules.items():
        mask = attention_mask(
            *(2, 4, 5),
            mask_function=function,
            attention_mask=padding,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=True,
        )
        expected = padding[:, None] if rule is None else padding[:, None] & rule
        assert torch.equal(mask, expected[:, None])


def test_a_mask_of_ones_own_is_taken_as_eager_takes_it():
    models, tokens = build("Llama"), torch.randint(4, 64, (2, 6), device=DEVICE)
    kept = torch.rand(2, 1, 6, 6, device=DEVICE) > 0.3
    kept |= torch.eye(6, device=DEVICE).bool()
    added = torch.where(kept, 0.0, torch.finfo(torch.float32).min).double()
    eager, ours = (model(tokens, attention_mask=added).logits for model in models)
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(models[1](tokens, attention_mask=kept).logits, ours)


def test_a_continued_cache_and_packed_positions():
    eager, ours = build("Llama")
    tokens = torch.randint(4, 64, (2, 8), device=DEVICE)
    whole = eager(tokens).logits
    cache = ours(tokens[:, :3]).past_key_values
    parts = [
        ours(tokens[:, i:j], past_key_values=cache).logits for i, j in ((3, 6), (6, 7), (7, 8))
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole[:, 3:], rtol=1e-5, atol=1e-6)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]], device=DEVICE).expand(2, -1)
    packed = ours(tokens, position_ids=positions, use_cache=False).logits
    parts = [eager(tokens[:, :3]).logits, eager(tokens[:, 3:]).logits]
    torch.testing.assert_close(packed, torch.cat(parts, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma 2", "gpt-oss", "BERT"])
def test_documents_by_their_lengths_do_not_see_each_other(name):
    """As flash-attention takes them; a cache at hand keeps transformers from masking them."""
    model = build(name)[1]
    documents, packed = documents_by_their_lengths()
    options = {} if name == "BERT" else {"use_cache": True}
    actual = model(**packed, **options)[0]
    expected = torch.cat([model(document)[0] for document in documents], 1)
    torch.testing.assert_close(actual, expected)


def documents_by_their_lengths():
    lengths = (7, 1, 12)
    documents = [torch.randint(1, 30, (1, n), device=DEVICE) for n in lengths]
    ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0, dtype=torch.int32)
    return documents, {
        "input_ids": torch.cat(documents, 1),
        "position_ids": torch.cat([torch.arange(n, device=DEVICE) for n in lengths])[None],
        **{"cu_seq_lens_q": ends, "cu_seq_lens_k": ends},
        **{"max_length_q": max(lengths), "max_length_k": max(lengths)},
    }


@pytest.mark.parametrize("name", ["Llama", "BERT"])
def test_documents_by_their_lengths_are_apart_beside_a_mask(name):
    """Compiled code may not look whether padding is there, nor where positions begin anew."""
    model = build(name)[1]
    documents, packed = documents_by_their_lengths()
    if name == "BERT":
        packed["attention_mask"] = torch.ones_like(packed["input_ids"])
    else:
        del packed["position_ids"]
    actual = torch.compile(model, backend="aot_eager")(**packed, use_cache=False)[0]
    expected = torch.cat([model(document)[0] for document in documents], 1)
    torch.testing.assert_close(actual, expected)


def test_dropout_and_switching_by_name():
    model = build("Llama")[0]
    model.set_attn_implementation("trilith")
    given = given_to("Llama")
    plain = model(**given).logits
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    first, second = (model(**given).logits for _ in range(2))
    assert not torch.equal(first, second)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model.eval()(**given).logits, plain, rtol=1e-5, atol=1e-6)


def test_one_sequence_of_keys_may_be_that_of_a_batch():
    q, k = torch.randn(3, 2, 4, 8, device=DEVICE), torch.randn(1, 2, 5, 8, device=DEVICE)
    out, _ = attention_forward(torch.nn.Module(), q, k, k, None, is_causal=False)
    repeated = k.expand(3, -1, -1, -1)
    expected = torch.nn.functional.scaled_dot_product_attention(q, repeated, repeated)
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_a_single_query_has_dropout():
    q = torch.randn(64, 1, 1, 8, device=DEVICE)
    with torch.no_grad():
        out, _ = attention_forward(torch.nn.Module(), q, q, q, None, dropout=0.5)
    assert 0 < (out == 0).all(-1).sum() < 64


def test_a_paged_cache_is_refused():
    q = torch.zeros(1, 2, 1, 8, device=DEVICE)
    with pytest.raises(NotImplementedError, match="continuous batching is not supported"):
        attention_forward(None, q, q, q, None, cache=object())


@pytest.mark.parametrize("name", ["indices", "block_indices", "sinks"])
def test_what_changes_the_result_and_is_not_there_is_refused(name):
    q = torch.randn(1, 2, 4, 8, device=DEVICE)
    module = torch.nn.Module()
    attention_forward(module, q, q, q, None, **{name: None})
    with pytest.raises(NotImplementedError, match="is not supported|are not supported"):
        attention_forward(module, q, q, q, None, **{name: torch.zeros(1, 4, 2)})


def test_a_model_that_does_not_say_what_is_causal_is_refused():
    config = transformers.SplinterConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, question_token_id=4,
    )  # fmt: skip
    model = transformers.SplinterModel(config).to(DEVICE, torch.float64).eval()
    tokens = torch.ones(1, 3, dtype=torch.long, device=DEVICE)
    padding = torch.tensor([[1, 1, 0]], device=DEVICE)
    expected = model(tokens, attention_mask=padding)[0]
    model.set_attn_implementation("trilith")
    torch.testing.assert_close(model(tokens, attention_mask=padding)[0], expected)
    q = torch.randn(1, 2, 4, 8, device=DEVICE)
    layer = model.encoder.layer[0].attention.self
    for attend in (attention_forward, torch.compile(attention_forward, backend="eager")):
        with pytest.raises(NotImplementedError, match="do not say, without a mask, what is causal"):
            attend(layer, q, q, q, None)
    with pytest.raises(NotImplementedError, match="do not say, without a mask, what is causal"):
        model(tokens)


def padded(mask):
    return torch.nn.functional.pad(mask, (0, 2))


def cut(mask):
    return mask[..., :2]


def of_one_query(mask):
    return mask[:, :, -1:]


@pytest.mark.parametrize(
    ("window", "change"),
    [(3, padded), (3, of_one_query), (None, padded), (None, cut), (None, of_one_query)],
)
def test_a_mask_that_the_model_changed_is_refused(window, change):
    q = torch.randn(1, 2, 5, 8, device=DEVICE)
    padding = torch.tensor([[False, True, True, True, True]], device=DEVICE)
    mask = attention_mask(1, 5, 5, attention_mask=padding, local_size=window, device=DEVICE)
    attention_forward(torch.nn.Module(), q, q, q, mask)
    with pytest.raises(NotImplementedError, match="Module changes the mask for keys of its own"):
        attention_forward(torch.nn.Module(), q, q, q, change(mask))


@pytest.mark.parametrize(
    ("module", "says"),
    [(None, "import of transformers halted"), (ModuleType("transformers"), "AttentionInterface")],
    ids=["not there", "old"],
)
def test_registering_without_transformers_says_what_failed(module, says, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", module)
    with pytest.raises(ImportError, match=f"version 5 or newer and import, got .*{says}.*pip"):
        trilith.register_transformers()


def test_importing_trilith_imports_no_transformers():
    code = (
        "import sys, torch, pluggy; before = 'transformers' in sys.modules; "
        "import trilith.blocks.drop_in; sys.exit('transformers' in sys.modules and not before)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
