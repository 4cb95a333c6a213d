"""linear_cross_entropy: against float64, chunk by chunk, and in no more memory than it says."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from perf.meters.aten import operators
from perf.meters.live import live_bytes
from tests.support.compare import assert_like_eager
from tests.support.devices import DEVICE, DTYPES, dtype_name
from trilith.kernels import _linear_cross_entropy_chunks as chunks
from trilith.kernels import cross_entropy, linear_cross_entropy
from trilith.plugins.conformance.compare import assert_same

OPTIONS = {
    "plain": {},
    "weight": {"weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing-weight": {"label_smoothing": 0.3, "weight": True},
    "z": {"z_loss": 1e-2},
    "softcap": {"softcap": 5.0},
    "all": {"weight": True, "label_smoothing": 0.2, "z_loss": 1e-2, "softcap": 30.0},
}
REDUCTIONS = ("none", "mean", "sum")
NAN = float("nan")


@pytest.fixture(params=["kernels", "plain"])
def path(request, monkeypatch):
    """Both ways to the rows' losses: Triton's kernels, and PyTorch where Triton is not."""
    if request.param == "plain":
        monkeypatch.setattr(chunks, "runs_kernels", lambda x: False)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", 8)


def drawn(m, k, v, dtype=torch.float32, bias=True):
    x = torch.randn(m, k).to(DEVICE, dtype).requires_grad_()
    head = (2 * torch.randn(v, k) / k**0.5).to(DEVICE, dtype).requires_grad_()
    shift = torch.randn(v).to(DEVICE, dtype).requires_grad_() if bias else None
    return x, head, torch.randint(0, v, (m,), device=DEVICE), shift


def unfused(x, head, target, linear_bias=None, **options):
    """The definition: all logits at once, then the loss in float32 or float64."""
    logits = F.linear(x, head, linear_bias).to(torch.promote_types(x.dtype, torch.float32))
    softcap, z = options.pop("softcap", None), options.pop("z_loss", 0.0)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    reduction, weight = options.pop("reduction", "mean"), options.get("weight")
    counted = target != options.get("ignore_index", -100)
    share = counted.to(logits.dtype)
    if weight is not None:
        share = torch.where(counted, weight[target.clamp_min(0)], 0.0)
    loss = F.cross_entropy(logits, target, reduction="none", **options)
    loss = loss + z * torch.logsumexp(logits, -1).square() * share
    if reduction == "none":
        return loss
    return loss.sum() / (share.sum() if reduction == "mean" else 1)


def rounding_alike(x, head, bias, target, upstream, reduction, **options):
    """Gradients that are rounded where ours are: the logits, their gradients, and the results."""
    logits = F.linear(x, head, bias).detach().requires_grad_()
    eye = torch.eye(logits.shape[1], device=DEVICE, dtype=logits.dtype)
    kept, scale = ("none", upstream) if reduction == "none" else ("sum", None)
    loss = unfused(logits, eye, target, reduction=kept, **options)
    (dlogits,) = torch.autograd.grad(loss, logits, scale if scale is None else scale.to(loss.dtype))
    dlogits = dlogits.double()
    products = (dlogits @ head.double(), dlogits.t() @ x.double(), dlogits.sum(0))
    scale = 1.0 if reduction == "none" else upstream.double()
    if reduction == "mean":
        weight = options.get("weight")
        share = torch.ones_like(target) if weight is None else weight[target.clamp_min(0)]
        scale = scale / torch.where(target != -100, share, 0).sum()
    return [(scale * p).to(x.dtype) for p in products]


def compare(x, head, bias, target, reduction, **options):
    """Loss and gradients by the rule for matrix products: errors near those of equal rounding."""
    wide = [None if t is None else t.detach().double().requires_grad_() for t in (x, head, bias)]
    options64 = {k: v.double() if k == "weight" else v for k, v in options.items()}
    given = {"reduction": reduction, **options}
    loss = linear_cross_entropy(x, head, target, linear_bias=bias, **given)
    loss64 = unfused(*wide[:2], target, wide[2], **{**options64, "reduction": reduction})
    eager = unfused(x, head, target, bias, **given)
    upstream = (torch.rand(loss.shape, device=DEVICE) + 0.5).to(x.dtype)
    leaves = [[t for t in tensors if t is not None] for tensors in ((x, head, bias), wide)]
    ours = torch.autograd.grad(loss, leaves[0], upstream)
    exact = torch.autograd.grad(loss64, leaves[1], upstream.double())
    assert loss.dtype == x.dtype
    assert_like_eager(loss.detach(), loss64.detach(), eager.to(x.dtype).detach())
    alike = rounding_alike(x, head, bias, target, upstream, reduction, **options)
    for a, e, p in zip(ours, exact, alike, strict=False):
        assert_like_eager(a, e, p)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_loss_and_gradients_match_float64(dtype, name, reduction, path, small_chunks, poison):
    x, head, target, bias = drawn(21, 32, 50, dtype)
    target[::5] = -100
    options = dict(OPTIONS[name])
    weight = torch.rand(50, device=DEVICE) + 0.5 if options.pop("weight", False) else None
    if weight is not None:
        options["weight"] = weight
    compare(x, head, bias, target, reduction, **options)


@pytest.mark.parametrize("options", [{"reduction": r} for r in REDUCTIONS] + [{"num_items": 7}])
@pytest.mark.parametrize("kind", ["labels", "probabilities", "deep"])
def test_the_loss_of_16_bit_states_is_float32_where_that_is_asked_for(kind, options, path):
    x, head, target, bias = drawn(6, 16, 33, torch.bfloat16)
    if kind == "probabilities":
        target = torch.randn(6, 33, device=DEVICE).softmax(1)
    elif kind == "deep":  # logits (6, 11, 3)
        head, bias = (t.detach().view(11, 3, *t.shape[1:]) for t in (head, bias))
        target = torch.randint(0, 11, (6, 3), device=DEVICE)
    given = (x, head, target)
    loss = linear_cross_entropy(*given, linear_bias=bias, dtype=torch.float32, **options)
    narrow = linear_cross_entropy(*given, linear_bias=bias, **options)
    assert (loss.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(loss.bfloat16(), narrow) and not torch.equal(loss, narrow.float())
    (dx,) = torch.autograd.grad(loss.sum(), x)
    assert dx.dtype == torch.bfloat16


@pytest.mark.parametrize("v", [1, 7, 2049, 5000])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_vocabularies_of_any_size(v, reduction, path):
    x, head, target, _ = drawn(5, 16, v, bias=False)
    compare(x, head, None, target, reduction)


@pytest.mark.parametrize("m, parts", [(1, 1), (8, 1), (9, 2), (40, 5), (41, 6)])
def test_chunks_are_even_and_none_is_longer_than_allowed(m, parts, small_chunks):
    tokens = chunks.chunk_tokens(m, 50, torch.empty(0))
    assert tokens <= 8 and -(-m // tokens) == parts


def test_chunks_are_as_long_as_memory_allows():
    x = torch.empty(0, device=DEVICE, dtype=torch.bfloat16)
    assert chunks.chunk_tokens(8192, 32000, x) == 4096
    assert chunks.chunk_tokens(8192, 262144, x) == 2048
    assert chunks.chunk_tokens(100, 32000, x) == 100


def products(function) -> Counter:
    counts = Counter()

    def observe(name, *_):
        counts[name.removeprefix("aten::")] += 1

    with operators(observe):
        function()
    return Counter({"products": counts["mm"] + counts["addmm"]})


@pytest.mark.parametrize(
    "wanted, expected",
    [((True, True), 3), ((True, False), 2), ((False, True), 2), ((False, False), 1)],
    ids=["both", "frozen-head", "frozen-input", "neither"],
)
def test_only_what_is_wanted_is_computed(wanted, expected):
    x, head, target, _ = drawn(6, 16, 40, bias=False)
    x.requires_grad_(wanted[0]), head.requires_grad_(wanted[1])
    made = []
    count = products(lambda: made.append(linear_cross_entropy(x, head, target)))
    assert count["products"] == expected
    if any(wanted):
        assert products(lambda: made[0].backward())["products"] == 0
    assert (x.grad is not None, head.grad is not None) == wanted


def test_without_gradients_no_gradient_is_computed():
    x, head, target, bias = drawn(6, 16, 40)
    with torch.no_grad():
        count = products(lambda: linear_cross_entropy(x, head, target, linear_bias=bias))
    assert count["products"] == 1


def test_losses_one_a_token_are_computed_again_in_backward():
    x, head, target, _ = drawn(6, 16, 40, bias=False)
    made = []
    loss = lambda: made.append(linear_cross_entropy(x, head, target, reduction="none"))  # noqa: E731
    assert products(loss)["products"] == 1
    assert products(lambda: made[0].sum().backward())["products"] == 3


def test_tied_embeddings_add_up():
    table = torch.randn(30, 16, device=DEVICE, requires_grad=True)
    tokens, target = torch.randint(0, 30, (2, 11), device=DEVICE)
    found = []
    for loss in (linear_cross_entropy, unfused):
        (gradient,) = torch.autograd.grad(loss(F.embedding(tokens, table), table, target), table)
        found.append(gradient)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
def test_micro_batches_add_up_to_the_batch(weighted):
    x, head, target, _ = drawn(24, 16, 40, bias=False)
    target[3:11] = -100
    weight = torch.rand(40, device=DEVICE) + 0.5 if weighted else None
    whole = linear_cross_entropy(x, head, target, weight=weight)
    expected = torch.autograd.grad(whole, (x, head))
    items = (target != -100).sum()
    if weighted:
        items = torch.where(target != -100, weight[target.clamp_min(0)], 0.0).sum()
    for num_items in (items, items.item()):
        total = torch.zeros((), device=DEVICE)
        for part in (slice(0, 5), slice(5, 10), slice(10, 24)):
            options = {"weight": weight, "num_items": num_items}
            loss = linear_cross_entropy(x[part], head, target[part], **options)
            loss.backward()
            total += loss.detach()
        torch.testing.assert_close(total, whole.detach())
        for leaf, gradient in zip((x, head), expected, strict=True):
            torch.testing.assert_close(leaf.grad, gradient)
            leaf.grad = None


@pytest.mark.parametrize("bias", [False, True])
def test_the_mean_over_no_tokens_is_nan_and_its_gradients_zero(bias, path):
    x, head, _, shift = drawn(5, 16, 9, bias=bias)
    target = torch.full((5,), -100, device=DEVICE)
    loss = linear_cross_entropy(x, head, target, linear_bias=shift)
    loss.backward()
    assert loss.isnan()
    assert all((t.grad == 0).all() for t in (x, head, shift) if t is not None)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("upstream", [float("inf"), NAN], ids=str)
def test_ignored_tokens_are_exactly_zero(upstream, reduction, path):
    x, head, target, _ = drawn(6, 16, 9, bias=False)
    target[1] = target[4] = -100
    with torch.no_grad():
        x[1] = NAN
    loss = linear_cross_entropy(x, head, target, reduction=reduction)
    (dx,) = torch.autograd.grad(loss, x, torch.full_like(loss, upstream))
    assert (dx[[1, 4]] == 0).all() and not dx[[0, 2, 3, 5]].isfinite().any()


@pytest.mark.parametrize("upstream", [0.5, 2.0**16])
def test_backward_twice_multiplies_what_was_saved(upstream, path):
    x, head, target, bias = drawn(6, 16, 9)
    loss = linear_cross_entropy(x, head, target, linear_bias=bias)
    leaves = (x, head, bias)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    scaled = torch.autograd.grad(loss, leaves, loss.new_tensor(upstream), retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    for f, s, a in zip(first, scaled, again, strict=True):
        assert torch.equal(f, a)
        torch.testing.assert_close(s, upstream * f)


def test_leading_shapes_and_byte_labels():
    x, head, target, _ = drawn(12, 16, 40, bias=False)
    expected = linear_cross_entropy(x, head, target, reduction="none")
    shaped = linear_cross_entropy(
        x.reshape(2, 3, 2, 16), head, target.reshape(2, 3, 2).byte(), reduction="none"
    )
    assert_same("shaped", shaped, expected.reshape(2, 3, 2))
    one = linear_cross_entropy(x[0], head, target[0])
    torch.testing.assert_close(one, expected[0])


def test_an_ignore_index_of_none_is_torchs_default():
    x, head, target, _ = drawn(6, 16, 9, bias=False)
    target[2] = -100
    expected = linear_cross_entropy(x, head, target)
    assert torch.equal(linear_cross_entropy(x, head, target, ignore_index=None), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("positions", [(), (2, 3)], ids=["probabilities", "positions"])
def test_unfused_are_probabilities_and_heads_of_more_dimensions(positions, dtype, reduction):
    """The same as the two calls; with probabilities any leading shape, flattened."""
    x = torch.randn(8, 16, device=DEVICE, dtype=dtype, requires_grad=True)
    head = torch.randn(7, *positions, 16, device=DEVICE, dtype=dtype, requires_grad=True)
    bias = torch.randn(7, *positions, device=DEVICE, dtype=dtype, requires_grad=True)
    if positions:
        given, target = x, torch.randint(7, (8, *positions), device=DEVICE)
    else:
        given, target = x.view(2, 4, 16), torch.rand(2, 4, 7, device=DEVICE)
    options = {"z_loss": 1e-2, "softcap": 5.0, "weight": torch.rand(7, device=DEVICE)}
    found = linear_cross_entropy(
        given, head, target, linear_bias=bias, reduction=reduction, **options
    )
    logits = F.linear(x, head.flatten(0, -2), bias.flatten()).view(8, 7, *positions)
    flat = target if positions else target.view(8, 7)
    expected = cross_entropy(logits, flat, reduction=reduction, **options)
    if reduction == "none":
        expected = expected.view(given.shape[:-1] + positions)
    assert_same("loss", found, expected)
    leaves = (x, head, bias)
    theirs = torch.autograd.grad(expected.sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), leaves), theirs, rtol=0, atol=0)


@pytest.mark.parametrize("positions", [(), (2,)], ids=["probabilities", "positions"])
def test_the_unfused_mean_is_divided_by_num_items_without_overflow(positions):
    x = torch.ones(900, 4, device=DEVICE, dtype=torch.float16)
    head = torch.zeros(7, *positions, 4, device=DEVICE, dtype=torch.float16)
    head[1] = 25
    target = torch.zeros(900, *positions, device=DEVICE, dtype=torch.int64)
    target = target if positions else F.one_hot(target, 7).half()
    found = linear_cross_entropy(x, head, target, num_items=2**20)
    rows = linear_cross_entropy(x, head, target, reduction="none")
    assert found.dtype == torch.float16 and rows.double().sum() > 65504
    torch.testing.assert_close(found.double(), rows.double().sum() / 2**20, rtol=2e-3, atol=0)


def test_unfused_under_autocast_is_float32():
    x, head, _, bias = drawn(6, 16, 9)
    target = torch.rand(6, 9, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = linear_cross_entropy(x, head, target, linear_bias=bias)
        expected = cross_entropy(F.linear(x, head, bias), target)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(loss, (x, head, target)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_loss_of_16_bits_is_float32_under_autocast(reduction):
    x, head, target, _ = drawn(4, 8, 9, torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = linear_cross_entropy(x, head, target, reduction=reduction)
    assert loss.dtype == torch.float32


def test_no_tokens_at_all():
    x, head, target, _ = drawn(0, 16, 9, bias=False)
    loss = linear_cross_entropy(x, head, target)
    loss.backward()
    assert loss.isnan() and (head.grad == 0).all() and x.grad.shape == (0, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_autocast_keeps_float32_gradients_of_the_head(dtype):
    x, head, target, bias = drawn(9, 16, 40)
    with torch.autocast(DEVICE, dtype):
        loss = linear_cross_entropy(x, head, target, linear_bias=bias)
        expected = cross_entropy(F.linear(x, head, bias), target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    ours, theirs = (torch.autograd.grad(out, (x, head, bias)) for out in (loss, expected))
    for a, e in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, e, rtol=2e-2, atol=2e-3 * e.abs().max().item())


def test_small_gradients_in_float16_survive_a_scaled_loss():
    """The mean over many tokens divides after the products, so nothing is lost below 6e-8."""
    x, head, target, _ = drawn(64, 16, 40, torch.float16, bias=False)
    scale = torch.tensor(2.0**15, device=DEVICE)
    loss = linear_cross_entropy(x, head, target, num_items=2**20)
    (dx,) = torch.autograd.grad(loss.float() * scale, x)
    expected = unfused(x.double(), head.double(), target, reduction="sum") / 2**20 * scale
    (dx64,) = torch.autograd.grad(expected, x)
    assert ((dx - dx64).abs() <= 1e-2 * dx64.abs() + 1e-3 * dx64.abs().max()).all()


def test_compiles_as_one_graph():
    x, head, target, bias = drawn(9, 16, 40)
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for reduction in ("mean", "none"):
        losses = [f(x, head, target, linear_bias=bias, reduction=reduction).sum()
                  for f in (linear_cross_entropy, compiled)]  # fmt: skip
        eager, traced = (torch.autograd.grad(loss, (x, head, bias)) for loss in losses)
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(eager, traced)


@pytest.mark.parametrize("selective", [False, True])
def test_checkpointing_changes_nothing(selective):
    x, head, target, _ = drawn(9, 16, 40, bias=False)
    op = torch.ops.trilith.linear_cross_entropy_fwd.default

    def policy(context, function, *args, **kwargs):
        keep = function is op
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    options = {}
    if selective:
        options["context_fn"] = lambda: create_selective_checkpoint_contexts(policy)
    expected = torch.autograd.grad(linear_cross_entropy(x.tanh(), head, target), (x, head))
    loss = checkpoint(
        lambda *args: linear_cross_entropy(args[0].tanh(), *args[1:]),
        x, head, target, use_reentrant=False, **options,
    )  # fmt: skip
    count = Counter()
    with operators(lambda name, *_: count.update([name])):
        found = torch.autograd.grad(loss, (x, head))
    assert count["aten::mm"] + count["aten::addmm"] == (0 if selective else 3)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def peak(loss, m, k, v, dtype, *, fake=True, frozen=()):
    """Most bytes alive at once beside the arguments, after forward and in backward too."""
    with FakeTensorMode() if fake else torch.device(DEVICE):
        x = torch.empty(m, k, dtype=dtype, device=DEVICE).requires_grad_("x" not in frozen)
        head = torch.empty(v, k, dtype=dtype, device=DEVICE).requires_grad_("head" not in frozen)
        target = torch.zeros(m, dtype=torch.int64, device=DEVICE)
        if not fake:
            torch.nn.init.normal_(x), torch.nn.init.normal_(head)
        with live_bytes() as live:
            out = loss(x, head, target)
            after_forward = live.peak
            if out.requires_grad:
                out.backward()
        return after_forward, live.peak


SLICES = 2**26  # widened pieces of 16-bit matrices, on a CPU only
SIZES = [(8192, 1024, 32000), (8192, 4096, 128256), (16384, 2048, 50257)]


@pytest.mark.parametrize("m, k, v", SIZES, ids=str)
def test_peak_memory_is_as_stated_and_a_third_of_the_unfused(m, k, v):
    """Counted on fake tensors, bfloat16, at sizes of real models."""
    tokens = 4096
    padded_head = 2 * v * k if v % 16 else 0
    forward = tokens * v * 2 + 4 * m * k + 4 * v * k + padded_head
    backward = (4 + 2) * (m + v) * k
    after_forward, most = peak(linear_cross_entropy, m, k, v, torch.bfloat16)
    small = 1.01
    assert after_forward <= small * forward + SLICES
    assert most <= small * max(forward, backward) + SLICES
    _, naive = peak(unfused, m, k, v, torch.bfloat16)
    assert 3 * most <= naive


@pytest.mark.parametrize("classes", [32, 33])
def test_an_ignored_row_has_no_gradient_whatever_it_holds(classes):
    """Nor where the head has classes that there are none of, to be divisible by 16."""
    x = torch.randn(5, 8, device=DEVICE)
    x[2] = torch.inf
    x.requires_grad_()
    target = torch.tensor([0, 1, -100, 3, 4], device=DEVICE)
    linear_cross_entropy(x, torch.randn(classes, 8, device=DEVICE), target).backward()
    assert torch.equal(x.grad[2], torch.zeros(8, device=DEVICE))
    assert x.grad.isfinite().all() and x.grad[0].any()


@pytest.mark.parametrize("frozen, terms", [(("head",), "x"), (("x",), "head")])
def test_what_is_frozen_takes_no_memory(frozen, terms):
    m, k, v = 8192, 1024, 32000
    after_forward, most = peak(linear_cross_entropy, m, k, v, torch.bfloat16, frozen=frozen)
    kept = {"x": 4 * m * k, "head": 4 * v * k}[terms]
    assert after_forward <= 1.01 * (4096 * v * 2 + kept) + SLICES
    both = peak(linear_cross_entropy, m, k, v, torch.bfloat16)[0]
    assert after_forward < both


def test_eval_needs_one_chunk_of_logits():
    with torch.no_grad():
        most, _ = peak(linear_cross_entropy, 8192, 1024, 32000, torch.bfloat16)
    assert most <= 1.01 * 4096 * 32000 * 2


def test_peak_memory_without_triton(monkeypatch):
    """Counted while it runs, in float32: four buffers of a chunk, and the weight's gradient."""
    monkeypatch.setattr(chunks, "runs_kernels", lambda x: False)
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", 64)
    m, k, v = 1024, 16, 2000
    stated = 4 * 64 * v * 4 + 4 * m * k + 4 * v * k
    _, most = peak(linear_cross_entropy, m, k, v, torch.float32, fake=False)
    assert most <= 1.02 * stated + 64 * m
    _, naive = peak(unfused, m, k, v, torch.float32, fake=False)
    assert 6 * most <= naive


X, W, T = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
ERRORS = {
    "width": (ValueError, "end in 3", (X, W[:, :3], T), {}),
    "head": (ValueError, r"\(V, K\)", (X, W[0], T), {}),
    "rows": (ValueError, r"\(3,\), got \(4,\)", (X, W, torch.zeros(4, dtype=torch.int64)), {}),
    "bias": (ValueError, "linear_bias", (X, W, T), {"linear_bias": torch.ones(4)}),
    "weight": (ValueError, r"\(5,\)", (X, W, T), {"weight": torch.ones(4)}),
    "int32": (RuntimeError, "int32", (X, W, T.int()), {}),
    "grad": (RuntimeError, "detach", (X, W, T), {"weight": torch.ones(5, requires_grad=True)}),
    "dtypes": (TypeError, "float64", (X, W.double(), T), {}),
    "integers": (TypeError, "floating-point", (X, W.int(), T), {}),
    "dtype": (ValueError, "dtype must be .*float32", (X, W, T), {"dtype": "float32"}),
    "probabilities": (ValueError, r"\(3, 5\), got \(3, 4\)", (X, W, torch.rand(3, 4)), {}),
    "ignored": (RuntimeError, "zero the rows", (X, W, torch.rand(3, 5)), {"ignore_index": 0}),
    "positions": (ValueError, r"input \(N, K\)", (X[None], W[:, None], T[None, :, None]), {}),
    "reduction": (ValueError, "batchmean", (X, W, T), {"reduction": "batchmean"}),
    "smoothing": (RuntimeError, "label_smoothing", (X, W, T), {"label_smoothing": 1.5}),
    "softcap": (ValueError, "softcap", (X, W, T), {"softcap": 0.0}),
    "num_items": (ValueError, "num_items", (X, W, T), {"num_items": 3, "reduction": "sum"}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_argument_and_value(name):
    error, match, args, options = ERRORS[name]
    with pytest.raises(error, match=match):
        linear_cross_entropy(*args, **options)


@pytest.mark.parametrize("label", [5, -1, 2**40])
def test_a_label_out_of_range_is_an_index_error_on_cpu(label):
    with pytest.raises(IndexError, match=str(label)):
        linear_cross_entropy(X, W, torch.tensor([0, label, 1]))
