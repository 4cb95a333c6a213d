"""The meters: bytes moved, launches, bytes saved."""

import gc
from importlib.util import find_spec

import numpy
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from perf.meters.arithmetic import Arithmetic, arithmetic
from perf.meters.aten import syncs
from perf.meters.bands import share_read
from perf.meters.compiled import scheduled
from perf.meters.launches import launches
from perf.meters.live import live_bytes
from perf.meters.recompiles import compilations
from perf.meters.saved import saved_bytes
from perf.meters.traffic import RESIDENT_PROGRAMS, traffic
from tests.support.devices import INTERPRETING
from trilith.kernels import attention, bias_act
from trilith.kernels._runtime.language import tl, triton
from trilith.kernels._runtime.launch import launch
from trilith.plugins import OpSpec, Sample
from trilith.plugins.op import Op

interpreted = pytest.mark.skipif(
    not INTERPRETING or find_spec("triton") is None, reason="counts in Triton's interpreter"
)


@triton.jit
def _centre_kernel(x_ptr, y_ptr, x_stride, N, BLOCK: tl.constexpr, TWICE: tl.constexpr):
    """One program owns a row: y = x + max(x), or a copy in one pass."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    y_ptr += row * N
    cols = tl.arange(0, BLOCK)
    largest = 0.0
    if TWICE:
        for start in range(0, N, BLOCK):
            x = tl.load(x_ptr + start + cols, mask=start + cols < N, other=0.0)
            largest = tl.maximum(largest, tl.max(x, axis=0))
    for start in range(0, N, BLOCK):
        x = tl.load(x_ptr + start + cols, mask=start + cols < N, other=0.0)
        tl.store(y_ptr + start + cols, x + largest, mask=start + cols < N)


@triton.jit
def _accumulate_kernel(x_ptr, sum_ptr, BLOCK: tl.constexpr):
    """Each program adds a block to one sum."""
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.atomic_add(sum_ptr, tl.sum(x, axis=0))


@triton.jit
def _claim_kernel(lock_ptr):
    """The first program takes the lock."""
    tl.atomic_cas(lock_ptr, 0, 1)


@triton.jit
def _product_kernel(x_ptr, y_ptr, SIZE: tl.constexpr, OF: tl.constexpr):
    """exp of x [SIZE, 2 * SIZE] times its transpose."""
    at = tl.arange(0, SIZE)
    x = tl.load(x_ptr + at[:, None] * (2 * SIZE) + tl.arange(0, 2 * SIZE)[None, :])
    y = tl.dot(x.to(OF), tl.trans(x).to(OF))
    tl.store(y_ptr + at[:, None] * SIZE + at[None, :], tl.exp(y))


@triton.jit
def _special_kernel(x_ptr, n, SIZE: tl.constexpr):
    """Each function that a GPU is slow at, of every element."""
    at = tl.arange(0, SIZE)
    x = tl.load(x_ptr + at)
    x = tl.sin(tl.cos(tl.erf(tl.exp2(tl.exp(x)))))
    x = tl.rsqrt(tl.sqrt(tl.sqrt_rn(tl.log2(tl.log(x)))))
    x = tl.div_rn(1.0 / x, x)
    high = tl.umulhi(at.to(tl.uint32), at.to(tl.uint32)) + (at // n).to(tl.uint32)
    tl.store(x_ptr + at, x + high.to(tl.float32))


@triton.jit
def _elementwise_kernel(x_ptr, SIZE: tl.constexpr):
    """A sum, a product, a choice, a bound and a fused product and sum of every element."""
    at = tl.arange(0, SIZE)
    x = tl.load(x_ptr + at)
    x = tl.fma(tl.maximum(x + x, x), x, x) * x
    tl.store(x_ptr + at, tl.where(at < 4, x, tl.floor(x)))


@triton.jit
def _wider(value, at, other_value, other_at):
    keep = value > other_value
    return tl.where(keep, value, other_value), tl.where(keep, at, other_at)


@triton.jit
def _reducing_kernel(x_ptr, SIZE: tl.constexpr):
    """The sum and the greatest of every element, running sums, and a reduction of two tensors."""
    at = tl.arange(0, SIZE)
    x = tl.load(x_ptr + at)
    x = tl.cumsum(x) - tl.sum(x) + tl.max(x, axis=0)
    widest, where = tl.reduce((x, at), 0, _wider)
    tl.store(x_ptr + at, widest + where)


def centre(x, *, twice=False):
    y = x.new_empty(x.shape)
    launch(_centre_kernel, (x.shape[0],), x, y, x.stride(0), x.shape[1], BLOCK=4096, TWICE=twice)
    return y


@interpreted
class TestTraffic:
    def test_one_pass_moves_what_it_must(self):
        x = torch.randn(4, 5000)
        with traffic() as moved:
            centre(x)
        assert moved.total == moved.requested == 2 * x.nbytes

    def test_a_second_pass_costs_device_memory_where_the_row_leaves_the_cache(self):
        x = torch.randn(1, 128 * 1024)
        assert x.nbytes * RESIDENT_PROGRAMS > 50_000_000
        with traffic() as moved:
            centre(x, twice=True)
        assert moved.total == 3 * x.nbytes

    def test_a_second_pass_over_a_row_that_stays_cached_shows_as_requests(self):
        x = torch.randn(2, 20_000)
        assert 0.8 < 2 * x[0].nbytes * RESIDENT_PROGRAMS / 50_000_000 < 1  # with what is written
        with traffic() as moved:
            centre(x, twice=True)
        assert moved.total == 2 * x.nbytes
        assert moved.requested == 3 * x.nbytes

    def test_a_hidden_copy_counts(self):
        x = torch.randn(5000, 4).t()
        with traffic() as moved:
            centre(x.contiguous())
        assert moved.requested == 4 * x.nbytes
        assert moved.total == moved.scratch == 2 * x.nbytes

    def test_a_row_that_all_programs_read_again_counts_once(self):
        x = torch.randn(128 * 1024).expand(2, -1)
        with traffic() as moved:
            y = centre(x, twice=True)
        assert moved.total == x[0].nbytes + y.nbytes

    def test_what_a_later_launch_reads_back_is_scratch(self):
        x = torch.randn(4, 4096)
        with traffic() as moved:
            centre(centre(x))
        assert moved.scratch == 2 * x.nbytes
        assert moved.total == 2 * x.nbytes

    def test_what_launches_only_write_is_no_scratch(self):
        x, y = torch.randn(4, 64), torch.empty(4, 64)
        with traffic() as moved:
            for _ in range(2):
                launch(_centre_kernel, (4,), x, y, 64, 64, BLOCK=64, TWICE=False)
        assert moved.scratch == 0
        assert moved.total == 2 * (x.nbytes + y.nbytes)

    def test_atomics_count(self):
        x, total = torch.ones(256), torch.zeros(1)
        with traffic() as moved:
            launch(_accumulate_kernel, (4,), x, total, BLOCK=64)
        assert total.item() == 256
        assert moved.total == x.nbytes + 2 * total.nbytes
        assert moved.requested == x.nbytes + 4 * 2 * total.nbytes
        lock = torch.zeros(1, dtype=torch.int32)
        with traffic() as moved:
            launch(_claim_kernel, (3,), lock)
        assert moved.total == 2 * lock.nbytes
        assert moved.requested == 3 * 2 * lock.nbytes


@interpreted
@pytest.mark.parametrize(("of", "halves"), [(tl.bfloat16, 1), (tl.float16, 1), (tl.float32, 2)])
def test_arithmetic_is_counted_by_kind(of, halves):
    x, y = torch.randn(16, 32), torch.empty(16, 16)
    with arithmetic() as done:
        launch(_product_kernel, (2,), x, y, SIZE=16, OF=of)
    products = 2 * halves * 16 * 32 * 16
    assert done == Arithmetic(products, elementwise=2 * 16**2, special=2 * 16**2)


@interpreted
def test_each_function_that_a_gpu_is_slow_at_counts_also_of_integers():
    with arithmetic() as done:
        launch(_special_kernel, (2,), torch.rand(8), 3, SIZE=8)
    assert done.special == 2 * 14 * 8


@interpreted
def test_what_reductions_and_scans_take_in_counts_for_each_of_their_tensors():
    with arithmetic() as done:
        launch(_reducing_kernel, (2,), torch.rand(8), SIZE=8)
    assert done.reduced == 2 * 5 * 8


@interpreted
def test_elementwise_operations_count_once_each_and_those_of_integers_do_not():
    with arithmetic() as done:
        launch(_elementwise_kernel, (2,), torch.rand(8), SIZE=8)
    assert done == Arithmetic(elementwise=2 * 6 * 8)


@interpreted
class TestLaunches:
    def test_our_kernels_and_torchs_operators_count_once_each(self):
        x = torch.randn(4, 64)
        with launches() as counts:
            y = centre(x)
            y = y.view(64, 4).t()
            torch.add(y, 1)
        assert counts == {"_centre_kernel": 1, "aten::add": 1}

    def test_an_operator_in_place_counts_and_does_what_it_is_told(self):
        x = torch.ones(4)
        with launches() as counts:
            x.add_(1, alpha=2).zero_()[1:].fill_(3)
            total = x.sum(dtype=torch.float64)
        assert counts == {"aten::add_": 1, "aten::zero_": 1, "aten::fill_": 1, "aten::sum": 1}
        assert total.dtype == torch.float64 and total.item() == 9

    def test_a_copy_inside_an_op_counts(self):
        def forward(x: torch.Tensor) -> torch.Tensor:
            return centre(x.contiguous())

        spec = OpSpec(
            name="metered::centre",
            forward=forward,
            backward=None,
            reference=lambda x: x.clone(),
            samples=lambda device, dtype: [Sample(torch.randn(4, 64))],
        )
        op = Op(spec)
        try:
            x = torch.randn(4, 64)
            with launches() as plain:
                op(x)
            with launches() as transposed:
                op(x.t())
        finally:
            op.destroy()
        assert plain == {"_centre_kernel": 1}
        assert transposed == {"_centre_kernel": 1, "aten::clone": 1}


class TestLiveBytes:
    def test_storages_count_while_they_are_there_and_no_view_of_them_does(self):
        with live_bytes() as live:
            x = torch.zeros(100)
            y = x[::2].t() + 1
            assert (live.made, live.now, live.peak) == (600, 600, 600)
            del x
            assert (live.made, live.now, live.peak) == (600, 200, 600)
            z = y + 1
        assert (live.made, live.now, live.peak) == (800, 400, 600)
        del y, z
        assert (live.made, live.now, live.peak) == (800, 0, 600)

    def test_what_was_there_before_does_not_count(self):
        x = torch.zeros(100)
        with live_bytes() as live:
            x.add_(1).view(10, 10)
            torch.mul(x, x, out=torch.zeros(100))
        assert (live.made, live.peak) == (400, 400)

    @interpreted
    def test_what_an_op_allocates_inside_counts(self):
        x, bias = torch.randn(4, 64, requires_grad=True), torch.randn(64, requires_grad=True)
        above = torch.randn(4, 64)
        with live_bytes() as live:
            y = bias_act(x, bias)
            gc.collect()  # the interpreter leaves cycles
            assert live.now == y.nbytes
            grads = torch.autograd.grad(y, (x, bias), above)
        assert live.peak > sum(t.nbytes for t in (y, *grads))  # partial sums

    def test_fake_tensors_count_as_what_they_stand_for(self):
        with FakeTensorMode(), live_bytes() as live:
            x = torch.empty(1000, 1000, device="cuda")
            y = x @ x
        assert live.now == live.peak == x.nbytes + y.nbytes


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, x[:1], torch.ones(3, dtype=torch.float64), weight)
        return x * x * weight

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


WAITING = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "int": lambda x: int(x[0]),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "asarray": lambda x: numpy.asarray(x),
    "size": lambda x: x[: x.long()[0]],
    "chosen": lambda x: x[x > 0],
    "put": lambda x: x.index_put((x > 0,), x[0]),
    "put in place": lambda x: x.index_put_((x > 0,), torch.ones(())),
    "nonzero": lambda x: (x > 0).nonzero(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "unique": lambda x: x.unique(),
    "unique rows": lambda x: x.unique(dim=0),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "bincount": lambda x: x.long().bincount(),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
}


@pytest.mark.parametrize("name", WAITING)
def test_where_the_host_would_wait_is_counted(name):
    with syncs() as waits:
        WAITING[name](torch.arange(4.0))
    assert waits.total() == 1


def test_a_copy_to_the_host_waits_and_one_from_it_does_not():
    with FakeTensorMode(), syncs() as waits:
        x = torch.empty(4, device="meta")
        x.copy_(torch.empty(4))
        assert not waits
        x.to("cpu")
        assert waits.total() == 1
        torch.empty(4).copy_(x)
        assert waits.total() == 2


def test_a_lookup_does_not_wait():
    x, at = torch.randn(4), torch.tensor([1, 2])
    with syncs() as waits:
        x[at] + x.index_select(0, at)
        x.index_put((at,), x[0])
        x.repeat_interleave(at[:1], output_size=4)
        x.repeat_interleave(2)
    assert not waits


@interpreted
def test_what_the_interpreter_reads_is_no_wait():
    with syncs() as waits:
        centre(torch.randn(4, 64))
    assert not waits


def test_saved_bytes_count_each_storage_once_and_no_parameters():
    x = torch.randn(10, 7, requires_grad=True)
    weight = torch.ones(7, requires_grad=True)
    kept = saved_bytes(lambda: _Square.apply(x, weight), [weight])
    assert kept == 10 * 7 * 4 + 3 * 8


def test_what_torch_compile_would_launch_is_counted_by_graph():
    kernels = []
    weight = torch.randn(8, 8, requires_grad=True)
    scheduled(lambda x: torch.relu(x @ weight + 1), kernels)(torch.randn(4, 8)).sum().backward()
    assert kernels == [2, 2]  # a product and what is fused after it; a mask and a product
    kernels.clear()
    torch._dynamo.reset()
    with torch.no_grad():
        scheduled(lambda x: (x + 1).relu().sum(), kernels)(torch.randn(4, 8))
    assert kernels == [1]


def calls(sizes):
    return ((torch.randn(n, 4, requires_grad=True),) for n in sizes)


def test_a_function_of_any_size_is_compiled_twice():
    assert compilations(lambda x: x.relu(), calls(range(4, 12))) == [1] + 7 * [2]


def test_a_function_that_depends_on_its_size_is_compiled_each_time():
    counts = compilations(lambda x: x * 2 if x.shape[0] % 2 else x * 3, calls(range(4, 10)))
    assert counts[-1] > 2


@interpreted
def test_causal_attention_goes_through_half_of_the_tiles():
    for kernel in ("fwd", "dkdv", "dq"):
        assert share_read(kernel, 4096, -1, -1) == 1.0
        assert 0.5 < share_read(kernel, 4096, -1, 0) <= 0.55
        assert 0.117 < share_read(kernel, 4096, 511, 0) < 0.16  # pairs: 511.5 / 4096 less a corner


@interpreted
@pytest.mark.parametrize("kept", [slice(0, 30), slice(100, 128), slice(40, 60)], ids=str)
def test_keys_before_the_first_and_after_the_last_that_is_kept_are_not_read(kept):
    q, k, v, dout = (torch.randn(1, 1, 128, 16, requires_grad=True) for _ in range(4))
    requested = []
    for keys in (slice(None), kept):
        mask = torch.zeros(1, 128, dtype=torch.bool)
        mask[:, keys] = True
        with traffic() as measured:
            out = attention(q, k, v, key_padding_mask=mask)
            torch.autograd.grad(out, (q, k, v), dout)
        requested.append({launch.kernel: launch.requested for launch in measured.launches})
    for kernel in ("attention_fwd_kernel", "attention_bwd_dq_kernel", "attention_bwd_dkdv_kernel"):
        assert requested[1][kernel] < 0.6 * requested[0][kernel]
