"""batch_norm for any shape, layout and dtype, against float64."""

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.support import strategies as draw
from tests.support.compare import assert_fair
from tests.support.devices import DEVICE
from trilith.kernels import batch_norm


@draw.bounded()
@given(
    call=draw.calls,
    samples=draw.sizes,
    channels=draw.sizes,
    inner=st.sampled_from(((), (1,), (6,), (3, 5))),
    dtype=draw.dtypes,
    affine=st.booleans(),
    training=st.booleans(),
)
def test_batch_norm(call, samples, channels, inner, dtype, affine, training):
    samples += 1  # training wants more than one value a channel
    x = call.randn(samples, channels, *inner, dtype=dtype)
    parameters = [call.randn(channels) for _ in "wb"] if affine else [None, None]
    start = torch.linspace(0.5, 1.5, channels, device=DEVICE)

    def run(function, x, parameters):
        mean, var = start.clone().to(parameters_dtype(x)), start.clone().to(parameters_dtype(x))
        y = function(x, mean, var, *parameters, training, 0.25)
        leaves = draw.given(x, *parameters)
        return [y.detach(), mean, var, *draw.gradients(y, leaves, upstream(y))]

    def upstream(y):
        above.append(call.upstream(y) if not above else above[0])
        return above[0]

    above = []
    ours = run(batch_norm, x, parameters)
    wide = [draw.doubled(p) for p in parameters]
    exact = run(F.batch_norm, draw.doubled(x), wide)
    # torch's own, in float32 on a CPU, reads a weight of other strides as if it were dense
    dense = [None if p is None else p.detach().contiguous().requires_grad_() for p in parameters]
    eager = run(F.batch_norm, x, dense)
    assert ours[0].dtype == dtype
    rows = samples * x[0, 0].numel()
    for a, e, y in zip(ours, exact, eager, strict=True):
        assert_fair(a, e, y, rows)


def parameters_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32
