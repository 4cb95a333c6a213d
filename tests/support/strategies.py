"""What property tests draw: sizes, shapes, dtypes, and the tensors of one call by a seed.

A failure prints the drawn values and a `@reproduce_failure` line that runs the same example again.
"""

import os
from dataclasses import dataclass, field

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.devices import DEVICE, DTYPES
from tests.support.layouts import EXPANDED, LAYOUTS

SIZES = (1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 31, 32, 33, 48, 63, 64, 65, 127, 128, 129)


def leading_transposed(tensor: Tensor) -> Tensor:
    """The first two dimensions lie the other way round in memory: rows have no single step."""
    if tensor.ndim < 3:
        return tensor.detach().clone()
    swapped = tensor.detach().transpose(0, 1)
    return swapped.clone(memory_format=torch.contiguous_format).transpose(0, 1)


_DENSE = (*LAYOUTS, leading_transposed)
_NAMED = {layout.__name__: layout for layout in (*_DENSE, *EXPANDED)}

dtypes = st.sampled_from(DTYPES)
sizes = st.sampled_from(SIZES)
few = st.sampled_from((1, 2, 3, 5))
seeds = st.integers(0, 2**16)


def bounded(examples: int = 12) -> settings:
    """The settings of every property test: few examples, new ones in each run but on CI.

    There the same ones each time: a change is judged by what it changes.
    """
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize="CI" in os.environ,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],
    )


@st.composite
def shapes(draw, least_dims: int = 1, most_dims: int = 4):
    """Rows of a length around a tile's border, under a few small leading dimensions."""
    leading = draw(st.lists(few, min_size=least_dims - 1, max_size=most_dims - 1))
    return (*leading, draw(sizes))


@dataclass
class Call:
    """The tensors of one call: values by a seed, each tensor in the next of the drawn layouts."""

    seed: int
    layouts: tuple[str, ...]
    upstream_layout: str
    _made: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A leaf that requires a gradient."""
        return self.constant(torch.randn(shape, generator=self.generator), dtype).requires_grad_()

    def constant(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """These values in the next layout."""
        layout = _NAMED[self.layouts[self._made % len(self.layouts)]]
        self._made += 1
        return layout(values.to(DEVICE, dtype or values.dtype))

    def upstream(self, output: Tensor) -> Tensor:
        """A gradient of an output."""
        values = torch.randn(output.shape, generator=self.generator).to(DEVICE, output.dtype)
        return _NAMED[self.upstream_layout](values)


calls = st.builds(
    Call,
    seed=seeds,
    layouts=st.lists(st.sampled_from([f.__name__ for f in _DENSE]), min_size=3, max_size=3),
    upstream_layout=st.sampled_from(list(_NAMED)),
)


def gradients(outputs: Tensor, inputs: list[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, inputs, upstream.to(outputs.dtype), allow_unused=True)


def doubled(tensor: Tensor | None) -> Tensor | None:
    """The oracle's copy of an argument: float64, a leaf where the argument is one."""
    if tensor is None or not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def given(*tensors: Tensor | None) -> list[Tensor]:
    """Those that are there and take a gradient."""
    return [t for t in tensors if t is not None and t.requires_grad]
