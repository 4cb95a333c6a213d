"""Hugging Face models of every usual kind, tiny and random: fused, they compute what they did.

`python -m tests.blocks.test_transformers --update` writes the README's table of models.
"""

import copy
import functools
import pickle
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import trilith
from tests.support.devices import DEVICE
from trilith.blocks.lookalike import known_activation

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"


@contextmanager
def away_from_the_checkout():
    """transformers asks once whether a package `kernels` exists; the checkout has such a folder."""
    path = list(sys.path)
    sys.path[:] = [p for p in path if Path(p or ".").resolve() != ROOT]
    try:
        yield
    finally:
        sys.path[:] = path


with away_from_the_checkout():
    transformers = pytest.importorskip("transformers")
    transformers.utils.import_utils.is_kernels_available()

START, END = "<!-- models: begin -->\n", "<!-- models: end -->"
DECODER = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
DECODER |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
DECODER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
ENCODER |= {"num_attention_heads": 4}
SPEECH = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
SPEECH |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48}
SPEECH |= {"decoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 10}
SPEECH |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
T5 = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8}
IMAGE = {"image_size": 16, "patch_size": 8}

MODELS = {
    "Llama": ("LlamaConfig", "LlamaForCausalLM", DECODER),
    "Mistral": ("MistralConfig", "MistralForCausalLM", DECODER),
    "Qwen2": ("Qwen2Config", "Qwen2ForCausalLM", DECODER),
    "Qwen3": ("Qwen3Config", "Qwen3ForCausalLM", DECODER),
    "Gemma": ("GemmaConfig", "GemmaForCausalLM", DECODER),
    "Gemma 2": ("Gemma2Config", "Gemma2ForCausalLM", DECODER),
    "Gemma 3": ("Gemma3TextConfig", "Gemma3ForCausalLM", DECODER),
    "GPT-2": ("GPT2Config", "GPT2LMHeadModel", {"vocab_size": 64, "n_embd": 32, "n_layer": 2})
    + ({"n_head": 4, "bos_token_id": 1, "eos_token_id": 2},),
    "BERT": ("BertConfig", "BertForMaskedLM", {"vocab_size": 64, **ENCODER}),
    "ViT": ("ViTConfig", "ViTForImageClassification", {**ENCODER, **IMAGE}),
    "CLIP": ("CLIPConfig", "CLIPForImageClassification", {"vision_config": {**ENCODER, **IMAGE}}),
    "T5": ("T5Config", "T5ForConditionalGeneration", {**T5, "decoder_start_token_id": 0}),
    "Whisper": ("WhisperConfig", "WhisperForConditionalGeneration", SPEECH),
}
models = pytest.mark.parametrize("name", MODELS)
CAUSAL = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma 2", "Gemma 3", "GPT-2")


def build(name):
    config, model, *options = MODELS[name]
    merged = {key: value for option in options for key, value in option.items()}
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**merged))
    for module in made.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for attribute in ("dropout", "attention_dropout", "dropout_rate"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    return made.to(DEVICE)


def inputs(name):
    tokens = torch.randint(4, 64, (2, 6), device=DEVICE)
    if name in ("ViT", "CLIP"):
        return {"pixel_values": torch.randn(2, 3, 16, 16, device=DEVICE)}
    if name == "Whisper":
        features = torch.randn(2, 8, 20, device=DEVICE)
        return {"input_features": features, "labels": tokens}
    return {"input_ids": tokens, "labels": tokens}


def results(model, given, **asked):
    out = model(**given, **asked)
    loss = out.logits.square().mean() if out.loss is None else out.loss
    model.zero_grad()
    loss.backward()
    return out.logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@models
def test_logits_and_gradients_are_as_before(name):
    model, given = build(name), inputs(name)
    was, keys = [type(m) for m in model.modules()], list(model.state_dict())
    expected = results(model, given)
    report = trilith.fuse(model)
    assert report.swapped
    asked = {"logits": True} if name in CAUSAL else {}
    actual = results(model, given, **asked)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)
    if name in CAUSAL:
        logits, gradients = results(model, given)
        assert logits is None
        torch.testing.assert_close(gradients, expected[1], rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        fused_eval = model.eval()(**given).logits
    assert list(model.state_dict()) == keys
    trilith.unfuse(model)
    assert [type(m) for m in model.modules()] == was
    with torch.no_grad():
        torch.testing.assert_close(fused_eval, model(**given).logits, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", [*CAUSAL, "T5"])
def test_generating_with_a_cache_gives_the_same_tokens(name):
    model = build(name).eval()
    tokens = inputs(name)["input_ids"][:1]
    options = {"max_new_tokens": 5, "do_sample": False, "use_cache": True, "min_new_tokens": 5}
    expected = model.generate(tokens, **options)
    trilith.fuse(model)
    assert torch.equal(model.generate(tokens, **options), expected)


def loss_calls():
    """What the loss of a causal model may depend on, beside tokens and labels."""
    tokens = inputs("Llama")
    given = {**tokens, "labels": tokens["labels"].masked_fill(tokens["labels"] % 5 == 0, -100)}
    yield "ignored labels", given
    yield "a batch in parts", {**given, "num_items_in_batch": torch.tensor(17, device=DEVICE)}
    yield "labels that are shifted already", {**given, "shift_labels": given["labels"].roll(-1)}
    yield "another ignored label", {**tokens, "ignore_index": int(tokens["labels"][0, 1])}


@pytest.mark.parametrize("name", ["Llama", "Gemma 2"])
def test_the_loss_of_a_causal_model_needs_no_logits(name, monkeypatch):
    model, heads = build(name), []
    model.lm_head.weight.data *= 60  # the soft cap matters
    calls = list(loss_calls())
    expected = [model(**given).loss for _, given in calls]
    trilith.fuse(model)
    forward = torch.nn.Linear.forward
    monkeypatch.setattr(
        torch.nn.Linear, "forward", lambda self, x: heads.append(self) or forward(self, x)
    )
    for (what, given), theirs in zip(calls, expected, strict=True):
        torch.testing.assert_close(model(**given).loss, theirs, rtol=1e-4, atol=1e-5, msg=what)
    assert heads and model.lm_head not in heads
    labels = calls[0][1]
    assert model(**labels, logits=True).logits.shape == (2, 6, 64)
    assert isinstance(model(**labels, return_dict=False), tuple)
    assert model.eval()(**labels).logits.shape == (2, 6, 64)


def test_the_loss_of_a_bfloat16_model_is_float32():
    model, given = build("Llama").bfloat16(), inputs("Llama")
    expected = model(**given).loss
    trilith.fuse(model)
    loss = model(**given).loss
    assert loss.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", ["Llama", "Gemma 2"])
def test_a_fused_causal_models_training_compiles_to_one_graph(name):
    model, given = build(name), inputs(name)
    trilith.fuse(model)
    expected = results(model, given)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    _, gradients = results(compiled, given)
    gradients = {n.removeprefix("_orig_mod."): g for n, g in gradients.items()}
    torch.testing.assert_close(gradients, expected[1], rtol=1e-3, atol=1e-5)


def test_a_head_that_must_be_called_and_a_loss_of_ones_own_are():
    model, given, seen = build("Llama"), inputs("Llama"), []
    trilith.fuse(model)
    hook = model.lm_head.register_forward_hook(lambda *_: seen.append(True))
    assert model(**given).logits is not None
    assert seen
    hook.remove()
    own = model.loss_function
    for loss in (functools.partial(own), lambda logits, labels, vocab_size, **_: logits.sum()):
        model.loss_function = loss
        out = model(**given)
        vocab_size = model.config.vocab_size
        expected = loss(logits=out.logits, labels=given["labels"], vocab_size=vocab_size)
        torch.testing.assert_close(out.loss, expected)


def test_fused_causal_models_copy_pickle_and_keep_their_name(tmp_path):
    model, given = build("Llama"), inputs("Llama")
    trilith.fuse(model)
    expected = model(**given).loss
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**given).loss, expected)
        assert twin(**given).logits is None
        trilith.unfuse(twin)
        assert type(twin) is transformers.LlamaForCausalLM
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).to(DEVICE)
    assert type(again) is transformers.LlamaForCausalLM
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_causal_models_keep_their_logits_where_they_are_told_to():
    model = build("Llama")
    report = trilith.fuse(model, fused_linear_cross_entropy=False)
    assert type(model) is transformers.LlamaForCausalLM
    assert "fused_linear_cross_entropy is off" in {entry.why for entry in report.left}
    assert model(**inputs("Llama")).logits is not None


def test_the_loss_of_the_last_logits_is_as_before():
    model, given = build("Llama"), inputs("Llama")
    given["labels"] = given["labels"][:, -3:]
    expected = results(model, given, logits_to_keep=3)
    trilith.fuse(model)
    actual = results(model, given, logits_to_keep=3)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


def test_a_causal_model_whose_loss_is_another_is_left():
    class Scaled(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.loss = None if out.loss is None else 2 * out.loss
            return out

    config = transformers.LlamaConfig(**DECODER)
    report = trilith.fuse(Scaled(config))
    assert "a causal model whose loss is another" in {entry.why for entry in report.left}


@pytest.mark.parametrize(
    ("name", "known"),
    [("gelu", "gelu"), ("gelu_new", "gelu_tanh"), ("gelu_fast", "gelu_tanh")]
    + [("gelu_pytorch_tanh", "gelu_tanh"), ("gelu_python", "gelu"), ("silu", "silu")]
    + [("quick_gelu", "quick_gelu")],
)
def test_activations_are_known_by_what_they_compute(name, known):
    assert known_activation(transformers.activations.ACT2FN[name]) == known


@pytest.mark.parametrize("name", ["gelu_10", "relu6", "mish"])
def test_an_activation_that_is_clipped_or_another_is_left(name):
    module = transformers.activations.ACT2FN[name]
    assert not trilith.fuse(torch.nn.Sequential(module)).swapped


def with_forward(base, forward):
    return type("Own", (base,), {"forward": forward})


def own_positions(self, input_ids=None, labels=None, **given):
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).flip(0)[None]
    return super(type(self), self).forward(
        input_ids, labels=labels, **{"position_ids": positions, **given}
    )


def own_labels(self, input_ids=None, attention_mask=None, labels=None, **given):
    if labels is not None and attention_mask is not None:
        labels = labels.masked_fill(attention_mask == 0, -100)
    return super(type(self), self).forward(
        input_ids, attention_mask=attention_mask, labels=labels, **given
    )


def test_a_fused_model_takes_no_argument_twice():
    model = build("Llama").train()
    tokens = torch.randint(3, 64, (2, 5))
    for _ in range(2):
        with pytest.raises(TypeError, match="multiple values for .*argument 'input_ids'"):
            model(tokens, input_ids=tokens, labels=tokens)
        trilith.fuse(model)


@pytest.mark.parametrize("forward", [own_positions, own_labels])
def test_a_causal_model_that_prepares_its_arguments_is_left(forward):
    model = with_forward(transformers.LlamaForCausalLM, forward)(
        transformers.LlamaConfig(**DECODER)
    )
    assert "" not in {entry.name for entry in trilith.fuse(model).swapped}


def test_training_through_the_trainer(tmp_path):
    pytest.importorskip("accelerate")
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(4, 64, (8, 6))]
    losses = []
    model = build("Llama").cpu()
    for fused in (False, True):
        trained = copy.deepcopy(model)
        if fused:
            trilith.fuse(trained)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, logging_steps=1
        )
        trainer = transformers.Trainer(model=trained, args=arguments, train_dataset=rows)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert len(losses[0]) == 3
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)


def table():
    kinds = ("norms", "gated MLP", "activations", "dropout", "loss", "left")
    lines = ["| model | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for name in MODELS:
        report = trilith.fuse(build(name))
        cells = dict.fromkeys(kinds[:-1], 0)
        for entry in report.swapped:
            became = entry.became or ""
            parts = {"Norm": "norms", "MLP": "gated MLP", "Dropout": "dropout", "entropy": "loss"}
            kind = next((kind for part, kind in parts.items() if part in became), "activations")
            cells[kind] += 1
        left = sorted({entry.was for entry in report.left})
        row = [str(cells[kind] or "–") for kind in kinds[:-1]] + [", ".join(left)]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def test_the_readmes_table_is_current():
    found = re.search(f"{START}(.*?){END}", README.read_text(), re.DOTALL)
    assert found, "README.md has no table of models"
    assert found[1] == table(), "run python -m tests.blocks.test_transformers --update"


if __name__ == "__main__" and "--update" in sys.argv:
    text = README.read_text()
    head, rest = text.split(START)
    README.write_text(head + START + table() + END + rest.split(END)[1])
