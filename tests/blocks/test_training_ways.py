"""Checkpointing, gradient accumulation and mixed precision, each beside the plain run."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from tests.support.devices import DEVICE
from trilith.blocks import LMConfig, build_lm
from trilith.kernels._runtime.launch import observers

SIZES = {"vocab_size": 50, "dim": 16, "n_layers": 1, "n_heads": 2, "mlp_hidden": 24, "max_len": 6}
STYLES = {
    "llama": {"n_kv_heads": 1, "tied": False},
    "gpt": {
        "norm": "layer_norm",
        "mlp": "mlp",
        "activation": "gelu",
        "position": "learned",
        "bias": True,
    },
}


def model_of(style="llama", dropout=0.2, **changes):
    torch.manual_seed(1)
    return build_lm(LMConfig(**SIZES, **STYLES[style], dropout=dropout, **changes)).to(DEVICE)


def batch(n=4):
    torch.manual_seed(2)
    data = torch.randint(0, 50, (n, 7), device=DEVICE)
    return data[:, :-1], data[:, 1:]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def stepped(model, run):
    """Gradients of one pass with the dropout of seed 5, and the kernels that it started."""
    started = []
    observers.append(lambda kernel, *_: started.append(kernel.fn.__name__))
    torch.manual_seed(5)
    try:
        run(model)
    finally:
        observers.pop()
    return gradients(model), started


def plain(model):
    model(*batch()).backward()


def assert_same(found, expected):
    """To the bit on a CPU.

    A block that is recomputed hands its sum on; the sum of one that is kept is fused with the norm
    after it. On a GPU that other kernel's multiply-adds round otherwise, in the last bit.
    """
    exact = {"rtol": 0, "atol": 0} if DEVICE == "cpu" else {}
    torch.testing.assert_close(found, expected, **exact)


@pytest.mark.parametrize("style", STYLES)
def test_checkpointed_blocks_give_the_same_bits(style):
    expected, kernels = stepped(model_of(style), plain)
    found, more = stepped(model_of(style, checkpoint_activations=True), plain)
    assert len(more) > len(kernels)
    assert_same(found, expected)


@pytest.mark.parametrize("kept", ["attention", "matrix products"])
def test_checkpointing_selected_by_op_gives_the_same_bits(kept):
    """What the policy saves is not run again; the rest is, with the same dropout."""
    saved = {
        "attention": [torch.ops.trilith.attention_qkvpacked_fwd.default],
        "matrix products": [torch.ops.aten.mm.default],
    }[kept]

    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE

    def run(model):
        tokens, targets = batch()

        def loss(*_):
            return model(tokens, targets)

        anchor = torch.ones((), device=DEVICE, requires_grad=True)
        contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
        checkpoint(loss, anchor, use_reentrant=False, context_fn=contexts).backward()

    expected, kernels = stepped(model_of(), plain)
    found, more = stepped(model_of(), run)
    assert_same(found, expected)
    again = more.count("attention_fwd_kernel") - kernels.count("attention_fwd_kernel")
    assert again == (0 if kept == "attention" else 1)


@pytest.mark.parametrize("style", STYLES)
def test_accumulated_gradients_are_those_of_the_batch(style):
    """Micro-batches with different numbers of targets, each divided by the batch's."""
    tokens, targets = batch()
    targets = targets.clone()
    targets[0, :4] = targets[3, 4:6] = -100
    items = (targets != -100).sum()

    def whole(model):
        model(tokens, targets).backward()

    def parts(model):
        for part in (slice(0, 1), slice(1, 4)):
            model(tokens[part], targets[part], num_items=items).backward()

    expected, _ = stepped(model_of(style, dropout=0.0), whole)
    found, _ = stepped(model_of(style, dropout=0.0), parts)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_accumulation_draws_new_dropout_for_each_micro_batch():
    """With dropout the sum is that of the micro-batches apart, each with its own draws."""
    tokens, targets = batch()
    halves = (slice(0, 2), slice(2, 4))
    model = model_of()
    torch.manual_seed(5)
    total = {}
    for part in halves:
        model.zero_grad()
        model(tokens[part], targets[part], num_items=24).backward()
        for name, gradient in gradients(model).items():
            total[name] = total.get(name, 0) + gradient
    model.zero_grad()

    def accumulate(model):
        for part in halves:
            model(tokens[part], targets[part], num_items=24).backward()

    found, _ = stepped(model, accumulate)
    for name, gradient in total.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("style", STYLES)
def test_gradients_of_a_scaled_loss_are_the_plain_ones_times_the_scale(style):
    """float16 under autocast, dropout on: a power of two scales exactly, above the least number."""
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)

    def run(model):
        with torch.autocast(DEVICE, torch.float16):
            loss = model(*batch())
        scaler.scale(loss).backward()

    def in_float32(model):
        model(*batch()).backward()

    exact, _ = stepped(model_of(style), in_float32)
    scaled, kernels = stepped(model_of(style), run)
    assert kernels
    for name, gradient in exact.items():
        error = (scaled[name] / 2.0**10 - gradient).norm()
        assert error <= 2e-2 * gradient.norm() + 1e-4, name


def test_a_scaler_trains_as_float32_does_and_skips_overflow():
    """The loss curve of float16 with GradScaler stays by that of float32, with the same dropout."""
    curves, generator = [], torch.cuda if DEVICE == "cuda" else torch.random
    for half in (False, True):
        model = model_of(dropout=0.1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**26, enabled=half)
        torch.manual_seed(6)
        skipped, losses = 0, []
        while len(losses) < 5:
            state = generator.get_rng_state()
            with torch.autocast(DEVICE, torch.float16, enabled=half):
                loss = model(*batch())
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if half and scaler.get_scale() < before:
                skipped += 1
                generator.set_rng_state(state)  # the same step again
                assert skipped < 20
                continue
            losses.append(loss.item())
        assert (skipped > 0) == half
        curves.append(torch.tensor(losses))
    assert curves[0][-1] < curves[0][0] - 0.1
    assert (curves[0] - curves[1]).abs().max() < 0.05


class LanguageModule(nn.Module):
    """What Lightning asks of a module, around a model of ours."""

    def __init__(self, style, lr):
        super().__init__()
        self.model, self.lr = model_of(style, dropout=0.1), lr

    def training_step(self, batch, batch_idx):
        tokens, targets = batch
        return self.model(tokens, targets)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 3)]


@pytest.mark.parametrize("style", STYLES)
def test_a_module_around_a_model_trains_under_a_trainers_loop_and_is_saved(style, tmp_path):
    """A trainer's loop in bfloat16, then safetensors of the wrapper's state into a new wrapper."""
    safetensors = pytest.importorskip("safetensors.torch")
    module = LanguageModule(style, lr=2e-2)
    (optimizer,), (schedule,) = module.configure_optimizers()
    losses = []
    for step in range(3):
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = module.training_step(batch(), step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in module.parameters())
    safetensors.save_file(module.state_dict(), tmp_path / "wrapper.safetensors")

    again = LanguageModule(style, lr=2e-2)
    before = again.eval().training_step(batch(), 0)
    again.load_state_dict(safetensors.load_file(tmp_path / "wrapper.safetensors"))
    found, expected = (m.eval().training_step(batch(), 0) for m in (again, module))
    assert_same(found, expected)
    assert not torch.equal(found, before)
