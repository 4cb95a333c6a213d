"""PyTorch's own module inputs: each drop-in beside the module it replaces, and the same errors."""

import random

import pytest
import torch
from torch import nn

from tests.support.devices import DEVICE
from trilith.blocks import drop_in

common = pytest.importorskip("torch.testing._internal.common_modules")

MODULES = {info.name.removeprefix("nn."): info for info in common.module_db}
MODULES = {name: MODULES[name] for name in sorted(drop_in.__all__) if name in MODULES}
MOST_ELEMENTS = 4096
FEW = 4  # of what a module with many samples is tried with
modules = pytest.mark.parametrize("name", MODULES)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def own(value):
    """Fresh leaves, for what a module or backward writes to."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, (tuple, list)):
        return type(value)(own(v) for v in value)
    if isinstance(value, dict):
        return {key: own(v) for key, v in value.items()}
    return value


def tensors(*values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors(*value)
        elif isinstance(value, dict):
            yield from tensors(*value.values())


def samples(name, training):
    """What the module is tried with: not too large for the interpreter, spread over the list."""
    random.seed(0)
    torch.manual_seed(0)
    info = MODULES[name]
    made = info.module_inputs_func(
        info, device=DEVICE, dtype=torch.float32, requires_grad=True, training=training
    )
    given = [s for s in made if s.forward_input is not None]
    small = [s for s in given if all(t.numel() <= MOST_ELEMENTS for t in tensors(*inputs(s)))]
    few = 2 if "Layer" in name and "Transformer" in name else FEW
    return [small[i * len(small) // few] for i in range(few)] if len(small) > few else small


def inputs(sample):
    return sample.forward_input.args, sample.forward_input.kwargs


def module_of(source, name, sample, training):
    torch.manual_seed(1)
    built = sample.constructor_input
    module = getattr(source, name)(*own(built.args), **own(built.kwargs)).to(DEVICE)
    for part in module.modules():
        if "Dropout" in type(part).__name__:
            part.p = 0.0
        if isinstance(part, nn.MultiheadAttention):
            part.dropout = 0.0
    return module.train(training)


def results(module, sample):
    args, kwargs = (own(value) for value in inputs(sample))
    out = module(*args, **kwargs)
    outputs = [o for o in tensors(out) if o.requires_grad]
    wanted = [t for t in (*tensors(args, kwargs), *module.parameters()) if t.requires_grad]
    weights = [torch.linspace(-1, 1, o.numel(), device=DEVICE).view(o.shape) for o in outputs]
    gradients = torch.autograd.grad(outputs, wanted, weights, allow_unused=True) if outputs else ()
    return out, gradients, module.state_dict()


@modules
@modes
@pytest.mark.filterwarnings("ignore")
def test_results_gradients_and_state_are_torchs(name, training):
    compared = 0
    for sample in samples(name, training):
        ours, theirs = (module_of(source, name, sample, training) for source in (drop_in, nn))
        expected = results(theirs, sample)
        actual = results(ours, sample)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
        compared += 1
    assert compared


@modules
@pytest.mark.filterwarnings("ignore")
def test_errors_are_of_torchs_kind(name):
    info = MODULES[name]
    if info.module_error_inputs_func is None:
        pytest.skip("torch has no error inputs for it")
    for bad in info.module_error_inputs_func(
        info, device=DEVICE, dtype=torch.float32, requires_grad=False, training=True
    ):
        sample = bad.module_error_input
        with pytest.raises(bad.error_type):
            built = sample.constructor_input
            module = getattr(drop_in, name)(*built.args, **built.kwargs)
            module(*sample.forward_input.args, **sample.forward_input.kwargs)
