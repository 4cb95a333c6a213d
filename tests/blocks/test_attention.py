"""SelfAttention against torch's function, and what it keeps for backward."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from perf.meters.launches import launches
from tests.support.devices import DEVICE, INTERPRETING
from trilith import use_implementation
from trilith.blocks import Alibi, KVCache, Rotary, SelfAttention

B, T, DIM, HEADS = 2, 9, 24, 4


def make(n_kv_heads=None, **options) -> SelfAttention:
    width = (HEADS + 2 * (n_kv_heads or HEADS)) * DIM // HEADS
    return SelfAttention(
        qkv=nn.Linear(DIM, width),
        out=nn.Linear(DIM, DIM),
        n_heads=HEADS,
        n_kv_heads=n_kv_heads,
        **options,
    ).to(DEVICE)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n_kv_heads", [None, 2, 1])
def test_is_torch_attention_of_the_projected_heads(n_kv_heads, causal):
    attention = make(n_kv_heads, causal=causal)
    x = torch.randn(B, T, DIM, device=DEVICE, requires_grad=True)
    y = attention(x)

    kv = n_kv_heads or HEADS
    q, k, v = attention.qkv(x).split([DIM, kv * DIM // HEADS, kv * DIM // HEADS], dim=-1)
    q, k, v = (t.unflatten(-1, (-1, DIM // HEADS)).transpose(1, 2) for t in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    expected = attention.out(mixed.transpose(1, 2).flatten(2))

    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(y)
    ours, theirs = (
        torch.autograd.grad((out * weight).sum(), [x, *attention.parameters()], retain_graph=True)
        for out in (y, expected)
    )
    for ours_grad, their_grad in zip(ours, theirs, strict=True):
        torch.testing.assert_close(ours_grad, their_grad, rtol=1e-4, atol=1e-4)


def test_a_token_does_not_see_what_follows():
    attention = make(position=Rotary(DIM // HEADS, T))
    x = torch.randn(1, T, DIM, device=DEVICE)
    changed = x.clone()
    changed[:, 5:] += 1.0
    before, after = attention(x), attention(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=0, atol=0)
    assert (before[:, 5:] != after[:, 5:]).any()


@pytest.mark.parametrize("rotated", [True, False])
def test_keeps_q_k_and_v_once(rotated):
    attention = make(position=Rotary(DIM // HEADS, T) if rotated else None)
    x = torch.randn(B, T, DIM, device=DEVICE, requires_grad=True)
    constants = {
        t.untyped_storage().data_ptr() for t in [*attention.buffers(), *attention.parameters(), x]
    }
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in constants:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = attention(x)

    once = B * T * DIM * x.element_size()
    attended, lse = 2 * once, B * HEADS * T * 4
    assert sum(kept.values()) <= 3 * once + attended + lse
    y.sum().backward()


def ran(call):
    """Kernels launched by a forward."""
    with launches() as counts:
        result = call()
    return result, counts


class TestPacked:
    """Where kernels run q, k and v stay in one tensor, unless somebody else has a say in them."""

    pytestmark = pytest.mark.skipif(not (INTERPRETING or DEVICE == "cuda"), reason="needs Triton")

    @pytest.fixture
    def attention(self):
        return make(2, position=Rotary(DIM // HEADS, T))

    @pytest.fixture
    def x(self):
        return torch.randn(B, T, DIM, device=DEVICE)

    def test_one_pass_turns_q_and_k(self, attention, x):
        y, counts = ran(lambda: attention(x))
        assert counts["_rotary_kernel"] == 1 and "aten::clone" not in counts
        mixed = attention.mix(*attention.heads_of(attention.qkv(x)))
        expected = attention.out(mixed.transpose(1, 2).flatten(2))
        torch.testing.assert_close(y, expected, rtol=0, atol=0)

    def test_a_hook_on_the_position_sees_q_and_k(self, attention, x):
        expected, seen = attention(x), []
        attention.position.register_forward_hook(lambda _, heads, out: seen.append(heads))
        torch.testing.assert_close(attention(x), expected, rtol=0, atol=0)
        assert [t.shape[1] for t in seen[0]] == [HEADS, 2]

    @pytest.mark.parametrize("part", ["attention", "rotary"])
    def test_who_was_chosen_for_a_part_runs_it(self, attention, x, part):
        expected = attention(x)
        with use_implementation(f"trilith::{part}", "reference"):
            y, counts = ran(lambda: attention(x))
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        kernel = {"attention": "attention_fwd_kernel", "rotary": "_rotary_kernel"}[part]
        assert kernel not in counts

    @pytest.mark.parametrize("method", ["mix", "heads_of"])
    def test_what_a_subclass_overrides_is_called(self, attention, x, method):
        def doubled(self, *given):
            found = getattr(SelfAttention, method)(self, *given)
            return 2 * found if method == "mix" else (*found[:2], 2 * found[2])

        expected = 2 * attention(x) - attention.out.bias
        attention.__class__ = type("Own", (SelfAttention,), {method: doubled})
        torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-5)

    def test_another_position_is_called(self, attention, x):
        class Own(Rotary):
            def forward(self, q, k):
                return q, k

        attention.position = None
        expected = attention(x)
        attention.position = Own(DIM // HEADS, T).to(DEVICE)
        torch.testing.assert_close(attention(x), expected, rtol=0, atol=0)


def test_head_dims_beyond_the_kernels_are_torchs():
    attention = SelfAttention(qkv=nn.Linear(8, 3 * 516), out=nn.Identity(), n_heads=1).to(DEVICE)
    x = torch.randn(1, 3, 8, device=DEVICE)
    q, k, v = attention.qkv(x)[:, None].chunk(3, dim=-1)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]
    torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-5)


def test_dropout_acts_in_training_only():
    attention = make(dropout=0.5)
    x = torch.randn(B, T, DIM, device=DEVICE)
    assert (attention(x) != attention(x)).any()
    attention.eval()
    torch.testing.assert_close(attention(x), attention(x), rtol=0, atol=0)


@pytest.mark.parametrize("n_kv_heads", [3, 0, 8])
def test_heads_that_do_not_divide_are_refused(n_kv_heads):
    with pytest.raises(ValueError, match="n_kv_heads must divide n_heads=4"):
        SelfAttention(qkv=nn.Identity(), out=nn.Identity(), n_heads=HEADS, n_kv_heads=n_kv_heads)


def test_a_row_that_is_free_is_filled_while_others_go_on():
    attention, x = make(), torch.randn(B, T, DIM, device=DEVICE)
    with torch.no_grad():
        whole, alone = attention(x), attention(x[1:, -1:])
        attention.cache = KVCache(T)
        attention(x[:, :-1])
        attention.cache.truncate(1, 0)
        last = attention(x[:, -1:])
    torch.testing.assert_close(last, torch.cat([whole[:1, -1:], alone]), rtol=1e-4, atol=1e-5)


def test_slopes_do_not_go_with_a_cache():
    attention = make(position=Alibi(HEADS))
    attention.cache = KVCache(T)
    with pytest.raises(NotImplementedError, match="cache must be None with Alibi"):
        attention(torch.randn(B, T, DIM, device=DEVICE))
