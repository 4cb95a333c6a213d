"""A small language model trains with what the plugin brings, by naming it."""

from __future__ import annotations

import torch

import trilith
from trilith.blocks import LMConfig, build_lm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_a_model_trains_with_the_mlp_and_the_norm() -> None:
    torch.manual_seed(0)
    config = LMConfig(vocab_size=16, dim=16, n_layers=1, n_heads=2, mlp="acme.relu2_mlp")
    model = build_lm(config).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.arange(32, device=DEVICE).remainder(16).view(2, 16)
    losses = []
    with trilith.use_implementation("trilith::rms_norm", "acme"), trilith.trace() as events:
        for _ in range(10):
            loss = model(tokens, targets=tokens.roll(-1, 1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    ran = {(event.op, event.provider, event.direction) for event in events}
    for direction in ("forward", "backward"):
        assert ("acme::relu2_gate", "acme", direction) in ran
        assert ("trilith::rms_norm", "acme", direction) in ran
    assert ("trilith::rms_norm", "trilith", "forward") not in ran
