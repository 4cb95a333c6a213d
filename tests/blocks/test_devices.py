"""What a model makes on its way lies where the model is: a GPU would refuse, or wait for, the rest.

On "meta", which every machine has beside its CPU. And a GPU's tensors take kernels.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import trilith
from tests.blocks.test_compile_each import EACH, results
from tests.blocks.test_fuse import SwiGLU
from tests.support.devices import INTERPRETING
from trilith import kernels
from trilith.blocks import KVCache, LMConfig, PagedKVCache, build_lm
from trilith.kernels._runtime.launch import observers

COPIES = ("aten::copy_", "aten::_to_copy")


class OneDevice(TorchDispatchMode):
    """Refuses operators whose tensors lie on two devices, as a GPU does; scalars lie anywhere."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim]
        if func._schema.name not in COPIES:
            assert len({t.device for t in given}) < 2, f"{func} is given tensors of two devices"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("make", "arguments"), EACH)
def test_a_module_stays_on_its_device(make, arguments):
    module, given = make().to("meta"), [a.to("meta") for a in arguments(5)]
    with OneDevice():
        found = results(module, module, given)
    assert all(t.is_meta for t in found if t is not None)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("position", ["rotary", "learned", "sinusoidal"])
def test_text_is_generated_on_the_models_device(position, use_cache):
    config = LMConfig(vocab_size=19, dim=16, n_layers=1, n_heads=2, position=position, max_len=16)
    model, tokens = build_lm(config).to("meta"), torch.zeros(2, 8, dtype=torch.long, device="meta")
    for prompts in (tokens, [tokens[0], tokens[1, :3]]):
        with OneDevice():
            steps = model.generate_stream(
                prompts, 3, use_cache=use_cache, temperature=1.0, top_p=0.9
            )
            assert [(t.is_meta, t.shape) for t in steps] == [(True, (2,))] * 3


@pytest.mark.parametrize("make", [lambda: KVCache(8), lambda: PagedKVCache(4, 4, 8)])
def test_a_cache_lies_where_what_is_stored_does(make):
    cache, k = make(), torch.zeros(2, 2, 3, 16, device="meta")
    with OneDevice():
        cache.expect([3, 2])
        cache.append(k, k)
        cache.append(k, k)
        assert cache.attend(k).is_meta
        cache.truncate(0, 1)
        if isinstance(cache, KVCache):
            cache.reorder([1, 0])
        cache.reset()
    assert all(t.is_meta for t in cache.buffers())


class Swish(nn.Module):
    __module__ = "transformers.activations"  # where fuse looks at what a module computes

    def forward(self, x):
        return x * torch.sigmoid(x)


FUSED = {
    "sequence": lambda: nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12)),
    "norm and linear": lambda: nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 20)),
    "gated MLP": SwiGLU,
    "activation": lambda: nn.Sequential(nn.Identity(), Swish()),
}


@pytest.mark.skipif(not INTERPRETING, reason="a CPU's tensors stand for a GPU's")
@pytest.mark.parametrize("name", FUSED)
def test_what_is_fused_takes_kernels_for_a_gpus_tensors_where_ops_are_their_reference_on_cpus(
    name, monkeypatch
):
    model, x = FUSED[name](), torch.randn(3, 12, requires_grad=True)
    assert trilith.fuse(model).swapped
    launched = []
    for _ in range(2):
        seen = []
        observers.append(lambda kernel, *_, seen=seen: seen.append(kernel))
        model(x).sum().backward()
        observers.pop()
        launched.append(seen)
        for op in kernels.OPS:
            monkeypatch.setattr(op, "is_reference_on_cpu", True)
        monkeypatch.setattr(Tensor, "is_cpu", False)
    assert launched[0] and launched[0] == launched[1]
