"""Checkpoints: whole or not at all, exact, and refused where they do not fit."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from examples.lm import BadInput, checkpoint, data
from examples.lm.ranks import Ranks
from examples.lm.settings import PRESETS, Settings
from examples.train_lm import fresh_state
from trilith.blocks import LMConfig

TINY = dataclasses.replace(
    PRESETS["small"],
    model=LMConfig(vocab_size=256, dim=16, n_layers=1, n_heads=2, max_len=8, dropout=0.1),
    steps=6,
    batch=2,
)
CORPUS = data.Corpus("numbers", torch.arange(100, dtype=torch.uint8), torch.zeros(9).byte())


def state_of(settings: Settings = TINY, steps: int = 0) -> checkpoint.State:
    state = fresh_state(settings, CORPUS, Ranks("cpu"))
    for _ in range(steps):
        for parameter in state.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        state.optimizer.step()
        state.batches.next()
        state.losses[state.step] = torch.rand(())
        state.step += 1
    return state


def everything(state: checkpoint.State) -> dict[str, torch.Tensor]:
    tensors = {f"m.{k}": v for k, v in state.model.state_dict().items()}
    for index, values in state.optimizer.state_dict()["state"].items():
        tensors |= {f"o.{index}.{k}": v for k, v in values.items()}
    next_random = torch.rand(3)
    return {**tensors, "losses": state.losses, "batch": state.batches.next()[0], "r": next_random}


def test_restores_everything(tmp_path):
    path = tmp_path / "c.safetensors"
    saved = state_of(steps=3)
    saved.evals.append((2, 1.5))
    checkpoint.save(path, saved, TINY)
    expected = everything(saved)

    torch.manual_seed(99)
    restored = state_of(steps=1)
    checkpoint.restore(path, restored, TINY)
    found = everything(restored)

    assert restored.step == 3 and restored.evals == [(2, 1.5)]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("when", ["before", "midway"])
def test_failed_write_leaves_what_was_there(tmp_path, when):
    path = tmp_path / "c"
    path.write_text("old")

    def write(temporary):
        if when == "midway":
            temporary.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(BadInput, match="cannot write .*No space left.*unchanged"):
        checkpoint.replace_file(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_loss_that_is_not_finite_is_not_saved(tmp_path):
    path = tmp_path / "c.safetensors"
    state = state_of(steps=2)
    checkpoint.save(path, state, TINY)
    before = path.read_bytes()
    state.losses[1] = torch.nan
    with pytest.raises(BadInput, match="not finite at step 2; lower --lr"):
        checkpoint.save(path, state, TINY)
    assert path.read_bytes() == before


def test_other_settings_are_named(tmp_path):
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, state_of(steps=1), TINY)
    wider = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, dim=32), batch=4)
    state = state_of(wider)
    before = everything(state_of(wider))
    with pytest.raises(BadInput, match="made with dim=16, batch=2, and this run has dim=32, batch"):
        checkpoint.restore(path, state, wider)
    assert all(
        torch.equal(value, before[f"m.{name}"]) for name, value in state.model.state_dict().items()
    )


@pytest.mark.parametrize(("had", "found"), [(None, "nothing"), (2, r"\(2,\)")])
def test_a_model_of_other_parameters_is_refused(tmp_path, had, found):
    path = tmp_path / "c.safetensors"
    saved, state = state_of(steps=1), state_of()
    if had is not None:
        saved.model.more = torch.nn.Parameter(torch.ones(had))
    state.model.more = torch.nn.Parameter(torch.ones(3))
    checkpoint.save(path, saved, TINY)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    with pytest.raises(BadInput, match=rf"model.more must have shape \(3,\), got {found}"):
        checkpoint.restore(path, state, TINY)
    assert state.step == 0
    assert all(torch.equal(v, before[name]) for name, v in state.model.state_dict().items())


def test_recomputing_activations_is_no_other_setting(tmp_path):
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, state_of(steps=1), TINY)
    model = dataclasses.replace(TINY.model, checkpoint_activations=True)
    settings = dataclasses.replace(TINY, model=model)
    state = state_of(settings)
    checkpoint.restore(path, state, settings)
    assert state.step == 1


@pytest.mark.parametrize("damage", ["truncated", "emptied", "text"])
def test_damaged_file_is_refused(tmp_path, damage):
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, state_of(steps=1), TINY)
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[:-100], "emptied": b"", "text": b"hello " * 50}[damage])
    with pytest.raises(BadInput, match="cannot read checkpoint") as error:
        checkpoint.restore(path, state_of(), TINY)
    assert "\n" not in str(error.value)


def test_someone_elses_file_is_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    save_file({"w": torch.zeros(3)}, path)
    with pytest.raises(BadInput, match="not a checkpoint of train_lm"):
        checkpoint.restore(path, state_of(), TINY)


def test_missing_file_is_said(tmp_path):
    with pytest.raises(BadInput, match="no checkpoint at .*start without --resume"):
        checkpoint.restore(tmp_path / "none", state_of(), TINY)


def test_each_rank_goes_on_with_its_own_random_numbers(tmp_path):
    """The first of two ranks writes both states; a third, which was not there, keeps its own."""

    class Second(Ranks):
        rank, world = 1, 2

        def all_of(self, state):
            return [torch.zeros_like(state), state]

        first = True  # to have it write

    path = tmp_path / "c.safetensors"
    saved = state_of(steps=1)
    saved.ranks = Second("cpu")
    checkpoint.save(path, saved, TINY)
    expected = torch.rand(3)
    torch.manual_seed(99)
    checkpoint.restore(path, saved, TINY)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(99)
    saved.ranks.rank = 2
    checkpoint.restore(path, saved, TINY)
    found = torch.rand(3)
    torch.manual_seed(99)
    assert torch.equal(found, torch.rand(3))
