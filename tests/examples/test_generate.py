"""The generation example: what it prints from a checkpoint, and its one-line errors."""

import re

import pytest
import torch

from examples import generate, train_lm


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "text").write_bytes(b"to be or not to be, that is the question; " * 40)
    sizes = ["--dim", "16", "--layers", "1", "--heads", "2", "--context", "16"]
    run = ["--preset", "small", "--steps", "1", "--batch", "1", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_lm, "SAMPLE_BYTES", 1)
        patch.setattr(train_lm, "EVAL_WINDOWS", 1)
        assert not train_lm.main(
            [*sizes, *run, "--text", str(folder / "text"), "--out", str(folder)]
        )
    return folder / "checkpoint.safetensors"


def test_prints_text_and_both_speeds(checkpoint, capsys):
    torch.manual_seed(0)
    code = generate.main(["--checkpoint", str(checkpoint), "--tokens", "3", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert code == 0 and printed.startswith("def ")
    assert re.search(r"with cache: [\d.]+ tokens/s, without cache: [\d.]+ tokens/s\n$", printed)


def test_bad_input_gives_one_line(checkpoint, tmp_path, capsys):
    (tmp_path / "bad").write_bytes(b"nothing")
    for options, message in (
        (["--checkpoint", str(tmp_path / "none")], "no checkpoint at .*; run `make train` first"),
        (["--checkpoint", str(tmp_path / "bad")], "cannot read checkpoint"),
        (["--checkpoint", str(checkpoint), "--prompt", "x" * 40], "has 40 bytes"),
        (["--checkpoint", str(checkpoint), "--tokens", "400"], "must fit the positions' max_len"),
        (["--prompt", ""], "--prompt is empty"),
        (["--tokens", "0"], "--tokens must be positive, got 0"),
        (["--device", "meta:x"], "--device meta:x: Invalid device string"),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "--device cuda: .*CUDA")]),
    ):
        assert generate.main(options) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("generate: ") and printed.err.count("\n") == 1
        assert re.search(message, printed.err)
