"""The corpus, its batches and windows, and the count baselines."""

import math

import pytest
import torch

from examples.lm import BadInput, data


def as_bytes(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def test_standard_library_is_split_by_file_and_leaves_out_tests(monkeypatch, tmp_path):
    for index in range(200):
        path = tmp_path / f"module{index}.py"
        path.write_text(f"# file {index:03d}\n")
    for folder in ("test", "site-packages/pkg", "json/tests"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "left_out.py").write_text("# left out\n")
    monkeypatch.setattr(data.sysconfig, "get_path", lambda name: str(tmp_path))

    first, second = data.standard_library(), data.standard_library()

    assert torch.equal(first.train, second.train) and torch.equal(first.held_out, second.held_out)
    parts = [set(bytes(t).decode().split("\n")) - {""} for t in (first.train, first.held_out)]
    assert not parts[0] & parts[1]
    assert len(parts[0] | parts[1]) == 200 and 2 <= len(parts[1]) <= 25
    assert "# left out" not in parts[0] | parts[1]


def test_no_standard_library_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(data.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(BadInput, match="no Python sources in"):
        data.standard_library()


def test_text_holds_out_its_end(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(bytes(range(200)))
    corpus = data.text_file(path)
    assert bytes(corpus.train) + bytes(corpus.held_out) == bytes(range(200))
    assert len(corpus.held_out) == 10


def test_batches_are_windows_and_targets_follow():
    batches = data.Batches(torch.arange(100, dtype=torch.uint8), batch=50, length=9, seed=0)
    tokens, targets = batches.next()
    assert tokens.shape == targets.shape == (50, 9)
    assert torch.equal(targets, tokens + 1)
    assert (tokens[:, 1:] == tokens[:, :-1] + 1).all()


def test_batches_reach_both_ends_of_the_text():
    batches = data.Batches(torch.arange(12, dtype=torch.uint8), batch=64, length=9, seed=0)
    tokens, targets = batches.next()
    assert tokens.min() == 0 and targets.max() == 11


def test_batches_go_on_from_their_state():
    text = torch.randint(0, 256, (500,)).to(torch.uint8)
    batches = data.Batches(text, batch=4, length=8, seed=1)
    batches.next()
    state = batches.state
    expected = [batches.next()[0] for _ in range(3)]
    other = data.Batches(text, batch=4, length=8, seed=2)
    other.state = state
    assert all(torch.equal(other.next()[0], tokens) for tokens in expected)


@pytest.mark.parametrize(("length", "limit", "count"), [(10, 100, 9), (10, 4, 4), (99, 5, 1)])
def test_held_out_windows_are_whole_and_apart(length, limit, count):
    windows = data.held_out_windows(torch.arange(100, dtype=torch.uint8), length, limit)
    assert windows.shape == (count, length + 1)
    assert (windows[:, 1:] == windows[:, :-1] + 1).all()
    starts = windows[:, 0].tolist()
    assert all(b - a >= length for a, b in zip(starts, starts[1:], strict=False))


def test_unigram_loss_is_the_entropy_of_a_long_text():
    train = as_bytes(0, 0, 0, 1).repeat(5000)
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    windows = train[:401].long()[None]
    assert data.unigram_loss(train, windows) == pytest.approx(entropy, abs=0.02)


def test_bigram_loss_knows_what_follows():
    train = as_bytes(0, 1, 2, 3).repeat(5000)
    windows = train[:401].long()[None]
    assert data.bigram_loss(train, windows) < 0.01
    assert data.unigram_loss(train, windows) == pytest.approx(math.log(4), abs=0.02)


def test_bigram_loss_is_of_chances_that_sum_to_one():
    train = as_bytes(0, 1, 0, 2, 0, 1)
    after = [data.bigram_loss(train, torch.tensor([[0, n]])) for n in range(256)]
    assert sum(math.exp(-loss) for loss in after) == pytest.approx(1)
    assert math.exp(-after[1]) == pytest.approx((2 + 3 / 262) / 4)  # seen, and smoothed by one


def test_bigram_loss_of_what_was_never_seen_is_finite():
    windows = torch.tensor([[200, 201, 202]])
    assert math.isfinite(data.bigram_loss(as_bytes(0, 1).repeat(50), windows))
