"""Hugging Face models of every usual kind, tiny and random: fused, they compute what they did.

`python -m tests.blocks.test_transformers --update` writes the README's table of models.
"""

import copy
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import trilith
from tests.support.devices import DEVICE

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
    "GPT-2": ("GPT2Config", "GPT2LMHeadModel", {"vocab_size": 64, "n_embd": 32, "n_layer": 2})
    + ({"n_head": 4, "bos_token_id": 1, "eos_token_id": 2},),
    "BERT": ("BertConfig", "BertForMaskedLM", {"vocab_size": 64, **ENCODER}),
    "ViT": ("ViTConfig", "ViTForImageClassification", {**ENCODER, **IMAGE}),
    "T5": ("T5Config", "T5ForConditionalGeneration", {**T5, "decoder_start_token_id": 0}),
    "Whisper": ("WhisperConfig", "WhisperForConditionalGeneration", SPEECH),
}
models = pytest.mark.parametrize("name", MODELS)
CAUSAL = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "GPT-2")


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
    if name == "ViT":
        return {"pixel_values": torch.randn(2, 3, 16, 16, device=DEVICE)}
    if name == "Whisper":
        features = torch.randn(2, 8, 20, device=DEVICE)
        return {"input_features": features, "labels": tokens}
    return {"input_ids": tokens, "labels": tokens}


def results(model, given):
    out = model(**given)
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
    actual = results(model, given)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)
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
    kinds = ("norms", "gated MLP", "activations", "dropout", "left")
    lines = ["| model | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for name in MODELS:
        report = trilith.fuse(build(name))
        cells = dict.fromkeys(kinds[:-1], 0)
        for entry in report.swapped:
            became = entry.became or ""
            kind = "norms" if "Norm" in became else "gated MLP" if "MLP" in became else None
            cells[kind or ("dropout" if became == "Dropout" else "activations")] += 1
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
