"""Multi-head attention and the transformer layers as torch.nn has them."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tests.support.compare import assert_like_eager
from tests.support.devices import DEVICE
from trilith.blocks import drop_in

E, H, B, T, S = 16, 4, 2, 6, 5
OPTIONS = (
    {},
    {"bias": False, "batch_first": True},
    {"kdim": 10, "vdim": 12},
    {"add_bias_kv": True, "batch_first": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "kdim": 10, "vdim": 12, "batch_first": True},
)
options = pytest.mark.parametrize("options", OPTIONS, ids=str)
NO_WEIGHTS = {"need_weights": False}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def randn(*shape):
    return torch.randn(*shape, device=DEVICE)


def pair(**given):
    theirs = nn.MultiheadAttention(E, H, **given).to(DEVICE)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    ours = drop_in.MultiheadAttention(E, H, **given).to(DEVICE)
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    return ours, theirs


def inputs(module, batched=True):
    def one(length, dim):
        if not batched:
            return randn(length, dim)
        return randn(B, length, dim) if module.batch_first else randn(length, B, dim)

    return one(T, E), one(S, module.kdim), one(S, module.vdim)


def masks(kind, batched=True):
    padding = torch.zeros(B, S, dtype=torch.bool, device=DEVICE)
    padding[1, 3:] = True
    mask = torch.rand(T, S, device=DEVICE) > 0.7
    mask[:, 0] = False
    heads = torch.rand(B * H if batched else H, T, S, device=DEVICE) > 0.7
    heads[..., 0] = False
    padding = padding if batched else padding[1]
    given = {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "mask": {"attn_mask": mask},
        "heads": {"attn_mask": heads},
        "both": {"key_padding_mask": padding, "attn_mask": mask},
        "added": {"attn_mask": randn(T, S)},
        "both-added": {"key_padding_mask": randn(B, S) if batched else randn(S)}
        | {"attn_mask": randn(T, S)},
        "causal": {"attn_mask": torch.triu(torch.ones(T, S, device=DEVICE) > 0, 1)}
        | {"is_causal": True},
    }
    given["causal-padding"] = given["causal"] | given["padding"]
    return given[kind]


def widened(values):
    if isinstance(values, dict):
        return {name: widened(value) for name, value in values.items()}
    floating = isinstance(values, torch.Tensor) and values.is_floating_point()
    return values.double() if floating else values


def results(module, args, given):
    leaves = [a.detach().clone().requires_grad_() for a in args]
    out = module(*leaves, **given)
    out = out[0] if isinstance(out, tuple) else out
    dy = torch.linspace(-1, 1, out.numel(), device=DEVICE, dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad(out, [*leaves, *module.parameters()], dy)]


def compare(ours, theirs, args, given):
    wide = copy.deepcopy(theirs).double()
    expected = results(wide, [a.double() for a in args], widened(given))
    actual, eager = (results(module, args, given) for module in (ours, theirs))
    for a, e, t in zip(actual, expected, eager, strict=True):
        assert_like_eager(a, e, t)


@options
@pytest.mark.parametrize("kind", ["none", "both"])
def test_attention_of_every_construction(options, kind, launches):
    ours, theirs = pair(**options)
    compare(ours, theirs, inputs(ours), masks(kind) | NO_WEIGHTS)
    assert any("fwd" in name for name in launches)


@pytest.mark.parametrize(
    "kind", ["padding", "mask", "heads", "added", "both-added", "causal", "causal-padding"]
)
@pytest.mark.parametrize("batch_first", [False, True])
def test_masks_mean_what_they_mean_in_torch(kind, batch_first, launches):
    ours, theirs = pair(batch_first=batch_first)
    compare(ours, theirs, inputs(ours), masks(kind) | NO_WEIGHTS)
    assert launches


@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_a_boolean_and_an_added_mask_at_once():
    ours, theirs = pair()
    given = masks("padding") | masks("added")
    compare(ours, theirs, inputs(ours), given | NO_WEIGHTS)


@pytest.mark.parametrize("kind", ["none", "padding", "heads", "both"])
def test_one_sequence_without_batch(kind, launches):
    ours, theirs = pair(batch_first=True)
    compare(ours, theirs, inputs(ours, batched=False), masks(kind, batched=False) | NO_WEIGHTS)
    assert launches


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("kind", ["none", "both", "heads"])
def test_weights_that_are_asked_for(kind, average):
    ours, theirs = pair()
    for module in (ours, theirs):
        module.eval()
    args, given = inputs(ours), masks(kind)
    actual, expected = (
        m(*args, need_weights=True, average_attn_weights=average, **given) for m in (ours, theirs)
    )
    torch.testing.assert_close(actual, expected, **CLOSE)
    assert actual[1].shape == ((B, T, S) if average else (B, H, T, S))


def test_keys_that_are_values_and_queries_are_projected_together():
    ours, theirs = pair()
    x, y = randn(T, B, E), randn(S, B, E)
    for args in ((x, x, x), (x, y, y)):
        torch.testing.assert_close(
            ours(*args, need_weights=False), theirs(*args, need_weights=False), **CLOSE
        )


class OfItself(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x, **given):
        return self.attention(x, x, x, **given)


@pytest.mark.parametrize("kind", ["none", "padding", "mask", "heads", "both-added", "causal"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_one_product_that_holds_q_k_and_v_is_read_where_it_lies(kind, batch_first, launches):
    ours, theirs = pair(batch_first=batch_first)
    given = masks(kind)
    if "attn_mask" in given:
        given["attn_mask"] = given["attn_mask"][..., :S, :]
    x = inputs(ours)[1]
    compare(OfItself(ours), OfItself(theirs), [x], given | NO_WEIGHTS)
    assert any("fwd" in name for name in launches)


def test_dropout_of_the_weights_acts_in_training_only():
    ours, theirs = pair(dropout=0.5)
    args = inputs(ours)
    a, b = (ours(*args, need_weights=False)[0] for _ in range(2))
    assert not torch.equal(a, b)
    actual, expected = (m.eval()(*args, need_weights=False) for m in (ours, theirs))
    torch.testing.assert_close(actual, expected, **CLOSE)


WRONG = {
    "width": lambda: ((randn(T, B, E + 1), randn(S, B, E), randn(S, B, E)), {}),
    "dims": lambda: ((randn(T, B, E), randn(S, E), randn(S, B, E)), {}),
    "lengths": lambda: ((randn(T, B, E), randn(S, B, E), randn(S + 1, B, E)), {}),
    "4-D": lambda: ((randn(1, T, B, E),) * 3, {}),
    "mask": lambda: ((randn(T, B, E),) * 3, {"attn_mask": randn(T, T + 1)}),
    "padding": lambda: ((randn(T, B, E),) * 3, {"key_padding_mask": randn(B, T + 1) > 0}),
    "integers": lambda: ((randn(T, B, E),) * 3, {"attn_mask": torch.ones(T, T, dtype=torch.long)}),
    "causal": lambda: ((randn(T, B, E),) * 3, {"is_causal": True}),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_of_torchs_kind(case):
    ours, theirs = pair()
    args, given = WRONG[case]()
    kinds = []
    for module in (ours, theirs):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            module(*args, need_weights=False, **given)
        kinds.append((caught.type, str(caught.value)))
    assert kinds[0] == kinds[1]


LAYERS = (
    {"dim_feedforward": 24},
    {"dim_feedforward": 24, "norm_first": True, "batch_first": True, "activation": "gelu"},
    {"dim_feedforward": 24, "batch_first": True, "bias": False},
    {"dim_feedforward": 24, "activation": nn.SiLU(), "layer_norm_eps": 0.1},
)
layers = pytest.mark.parametrize("given", LAYERS, ids=str)


def layer_pair(name, p=0.0, **given):
    torch.manual_seed(1)
    theirs = getattr(nn, name)(E, H, dropout=p, **given).to(DEVICE)
    torch.manual_seed(1)
    ours = getattr(drop_in, name)(E, H, dropout=p, **given).to(DEVICE)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    return ours, theirs


@torch.no_grad()
def in_eval(theirs, *args, **given):
    """What torch's module gives; on a GPU its quick path for eval has the GELU of tanh."""
    quick = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(quick and DEVICE == "cpu")
    try:
        return theirs.eval()(*args, **given)
    finally:
        torch.backends.mha.set_fastpath_enabled(quick)


def check_layers(ours, theirs, *args, **given):
    compare(ours.train(), theirs.train(), args, given)
    with torch.no_grad():
        actual = ours.eval()(*args, **given)
    torch.testing.assert_close(actual, in_eval(theirs, *args, **given), **CLOSE)


def sources(given):
    shapes = ((B, T), (B, S)) if given.get("batch_first") else ((T, B), (S, B))
    return [randn(*shape, E) for shape in shapes]


@layers
def test_encoder_layer(given, launches):
    ours, theirs = layer_pair("TransformerEncoderLayer", **given)
    x, _ = sources(given)
    padding = torch.arange(T, device=DEVICE) >= torch.tensor([[T], [4]], device=DEVICE)
    check_layers(ours, theirs, x, src_key_padding_mask=padding)
    causal = nn.Transformer.generate_square_subsequent_mask(T, device=DEVICE)
    check_layers(ours, theirs, x, src_mask=causal, is_causal=True)
    assert len(set(launches)) > 3


@layers
def test_decoder_layer(given, launches):
    ours, theirs = layer_pair("TransformerDecoderLayer", **given)
    causal = nn.Transformer.generate_square_subsequent_mask(T, device=DEVICE)
    padding = torch.arange(S, device=DEVICE) >= torch.tensor([[S], [3]], device=DEVICE)
    masks = {"tgt_mask": causal, "tgt_is_causal": True, "memory_key_padding_mask": padding}
    check_layers(ours, theirs, *sources(given), **masks)
    assert len(set(launches)) > 3


@pytest.mark.parametrize("given", LAYERS[:2], ids=str)
def test_within_torchs_decoder(given, launches):
    """Its copies of our layer, a norm of ours at the end, in training and in eval."""
    ours, theirs = (
        nn.TransformerDecoder(layer, 2, norm.to(DEVICE))
        for layer, norm in zip(
            layer_pair("TransformerDecoderLayer", **given),
            (drop_in.LayerNorm(E), nn.LayerNorm(E)),
            strict=True,
        )
    )
    theirs.load_state_dict(ours.state_dict())
    assert all(type(layer) is drop_in.TransformerDecoderLayer for layer in ours.layers)
    causal = nn.Transformer.generate_square_subsequent_mask(T, device=DEVICE)
    padding = torch.arange(S, device=DEVICE) >= torch.tensor([[S], [3]], device=DEVICE)
    masks = {"tgt_mask": causal, "memory_key_padding_mask": padding}
    check_layers(ours, theirs, *sources(given), **masks)
    check_layers(ours, theirs, *sources(given), **masks, tgt_is_causal=True)
    assert len(set(launches)) > 3


def padded_batch():
    padding = torch.arange(T, device=DEVICE) >= torch.tensor([[T], [4]], device=DEVICE)
    return randn(B, T, E), padding


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_within_torchs_encoder_its_eval_path_does_not_pass_ours_over(launches):
    given = {"dim_feedforward": 24, "batch_first": True}
    encoders = [
        nn.TransformerEncoder(m, 2).eval() for m in layer_pair("TransformerEncoderLayer", **given)
    ]
    assert all(e.use_nested_tensor for e in encoders)
    x, padding = padded_batch()
    with torch.no_grad():
        actual, expected = (e(x, src_key_padding_mask=padding) for e in encoders)
    torch.testing.assert_close(actual, expected, **CLOSE)
    assert sum("norm" in name for name in launches) == 4
    assert sum("attention" in name or "fwd" in name for name in launches) >= 6


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("within", [False, True], ids=["layer", "encoder"])
@pytest.mark.parametrize("child", ["norm1", "self_attn", "activation"])
def test_one_of_ours_in_torchs_layer_is_called_in_eval(child, within, launches):
    theirs = nn.TransformerEncoderLayer(E, H, 24, 0.0, nn.GELU(), batch_first=True).to(DEVICE)
    mixed = copy.deepcopy(theirs)
    made = {
        "norm1": lambda: drop_in.LayerNorm(E),
        "self_attn": lambda: drop_in.MultiheadAttention(E, H, batch_first=True),
        "activation": drop_in.GELU,
    }[child]()
    made.load_state_dict(getattr(mixed, child).state_dict())
    setattr(mixed, child, made.to(DEVICE))
    mixed, theirs = (nn.TransformerEncoder(m, 1) if within else m for m in (mixed, theirs))
    x, padding = padded_batch()
    with torch.no_grad():
        actual = mixed.eval()(x, src_key_padding_mask=padding)
    expected = in_eval(theirs, x, src_key_padding_mask=padding)
    torch.testing.assert_close(actual[~padding], expected[~padding], **CLOSE)
    assert launches


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors_keep_their_parts_and_layout(layout):
    parts = [randn(n, E) for n in (3, 5)]
    x = torch.nested.as_nested_tensor(parts, layout=layout)
    attention, _ = pair(batch_first=True)
    layer, _ = layer_pair("TransformerEncoderLayer", dim_feedforward=24, batch_first=True)
    for attend in (lambda x: attention(x, x, x, **NO_WEIGHTS)[0], layer):
        y = attend(x)
        assert y.layout == layout
        for of_part, part in zip(y.unbind(), parts, strict=True):
            torch.testing.assert_close(of_part, attend(part[None])[0], **CLOSE)


def test_layers_copy_pickle_and_start_on_meta():
    ours, _ = layer_pair("TransformerEncoderLayer", dim_feedforward=24)
    x = randn(T, B, E)
    expected = ours.eval()(x)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(again(x), expected)
    with torch.device("meta"):
        empty = drop_in.TransformerEncoderLayer(E, H, 24)
    empty.to_empty(device=DEVICE).load_state_dict(ours.state_dict())
    assert torch.equal(empty.eval()(x), expected)


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_layers_compile_to_one_graph_and_export(name):
    ours, _ = layer_pair(name, dim_feedforward=24)
    args = (randn(T, B, E),) if "Encoder" in name else (randn(T, B, E), randn(S, B, E))
    expected = ours(*args)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*args), expected)
    torch.testing.assert_close(torch.export.export(ours, args).module()(*args), expected)


def hooked(child, told):
    child.register_forward_hook(lambda *_: told())


def subclassed(child, told):
    class Own(type(child)):
        def forward(self, *args, **given):
            told()
            return super().forward(*args, **given)

    child.__class__ = Own


@pytest.mark.parametrize("change", [hooked, subclassed])
@pytest.mark.parametrize("norm_first", [True, False])
def test_children_that_are_not_plain_are_called(norm_first, change):
    names = ("linear1", "linear2", "dropout", "dropout1", "norm1", "norm2", "self_attn")
    names += ("self_attn.out_proj",)
    for name in names:  # one at a time: of two the first may keep the second from being read
        ours, _ = layer_pair("TransformerEncoderLayer", dim_feedforward=24, norm_first=norm_first)
        seen = []
        change(ours.get_submodule(name), lambda seen=seen, name=name: seen.append(name))
        ours(randn(T, B, E))
        assert seen == [name]


def test_dropout_in_training_changes_the_result_and_keeps_the_scale():
    ours, _ = layer_pair("TransformerEncoderLayer", p=0.5, dim_feedforward=24)
    x = randn(T, B, E)
    assert not torch.equal(ours(x), ours(x))
    assert torch.equal(ours.eval()(x), ours(x))
