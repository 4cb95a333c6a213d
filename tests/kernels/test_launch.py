"""What every launch rests on: the launch helper, the architecture, attention's tables, costs."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.support.devices import DTYPES, dtype_name
from trilith.kernels import _norm_backward
from trilith.kernels._runtime import device, launch
from trilith.kernels._runtime.sizes import next_power_of_2
from trilith.kernels.attention import config, decode, launchers
from trilith.kernels.attention.launchers import AttentionCall
from trilith.kernels.attention.tables import TABLES
from trilith.plugins import manager, registry

ARCHITECTURES = {
    (8, 0): "sm_80",
    (8, 6): "sm_86",
    (8, 7): "sm_80",
    (8, 9): "sm_86",
    (9, 0): "sm_90",
    (10, 0): "sm_100",
    (10, 3): "sm_100",
    (12, 0): "sm_86",
    (12, 1): "sm_86",
}


class Kernel:
    """Stands for a kernel: notes its launches."""

    def __init__(self):
        self.started = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.started.append((grid, options))


class OnSecondDevice(Tensor):
    is_cuda = True
    device = torch.device("cuda", 1)


def test_an_empty_grid_starts_nothing_and_is_not_observed(monkeypatch):
    kernel, seen = Kernel(), []
    monkeypatch.setattr(launch, "observers", [lambda *told: seen.append(told)])
    launch.launch(kernel, (4, 0), torch.empty(0), BLOCK=16)
    assert not kernel.started and not seen
    launch.launch(kernel, (4, 1), torch.empty(4), BLOCK=16)
    assert kernel.started == [((4, 1), {"BLOCK": 16})] and len(seen) == 1


def test_a_launch_without_a_tensor_is_refused():
    with pytest.raises(TypeError, match="must be given a tensor"):
        launch.launch(Kernel(), (4,), None, 4)


@pytest.mark.parametrize("current", [0, 1])
def test_a_kernel_starts_on_its_tensors_device(monkeypatch, current):
    entered, kernel = [], Kernel()

    @contextmanager
    def guard(index):
        entered.append(index)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", guard)
    launch.launch(kernel, (1,), None, torch.empty(4).as_subclass(OnSecondDevice))
    assert entered == ([OnSecondDevice.device] if current == 0 else [])
    assert len(kernel.started) == 1


class Binary:
    """Stands for what Triton has compiled: notes what it is started with."""

    def __init__(self):
        self.started = []

    def __getitem__(self, grid):
        return lambda *args: self.started.append((grid, args))


class Compiled(Kernel):
    """Stands for a kernel whose parameters are x, n, BLOCK and LAST."""

    def __init__(self, binary):
        self.params = [
            SimpleNamespace(name=name, default=default)
            for name, default in (("x", None), ("n", None), ("BLOCK", None), ("LAST", 7))
        ]
        self.binary = binary

    def __getitem__(self, grid):
        return lambda *args, **options: self.binary


@pytest.mark.parametrize(
    ("grid", "whole"), [((4,), (4, 1, 1)), ((4, 3), (4, 3, 1)), ((4, 3, 2), (4, 3, 2))]
)
def test_a_launch_is_noted_as_its_binary_takes_it(monkeypatch, grid, whole):
    class Recorder:
        def note(self, start, args):
            start(*args)

    binary, x = Binary(), torch.empty(4)
    monkeypatch.setattr(launch, "INTERPRETING", False)
    monkeypatch.setattr(launch.here, "recorder", Recorder())
    launch.launch(Compiled(binary), grid, x, 5, num_warps=4, BLOCK=16)
    assert binary.started == [(whole, (x, 5, 16, 7))]
    assert launch.here.recorder.busy is False


@pytest.mark.parametrize("capability", ARCHITECTURES, ids=str)
def test_launch_tables_are_keyed_by_the_generation(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert device._architecture_of.__wrapped__(0) == ARCHITECTURES[capability]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert device._architecture_of.__wrapped__(0) == "gfx942"


@pytest.mark.parametrize("arch", TABLES)
@pytest.mark.parametrize("kernel", ["fwd", "dkdv", "dq", "dbias"])
def test_the_wider_head_dim_chooses_attentions_tiles(monkeypatch, arch, kernel):
    monkeypatch.setattr(config, "INTERPRETING", False)
    with device.assume_architecture(arch):
        for dtype in DTYPES:
            for narrow, wide in ((64, 128), (64, 256), (16, 256), (128, 256), (64, 512)):
                found = []
                for d, dv in ((narrow, wide), (wide, narrow), (wide, wide)):
                    q, v = (torch.empty(1, 1, 4, n, dtype=dtype) for n in (d, dv))
                    terms = (None, None, None, None, 1.0, 0.0, 0.0, "top_left", -1, -1)
                    options = AttentionCall(q, q, v, *terms).options(kernel)
                    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
                    found.append([options[n] for n in names])
                assert found[0] == found[1] == found[2]


ANY_TILES = config.Tiles(64, 64, 64, 4, 2)
LADEN = {  # what is given beside q, k and v -> AttentionCall's arguments
    "nothing": {},
    "nothing but an idle seed": {"seed": torch.ones(1, dtype=torch.int64)},
    "bias": {"bias": torch.zeros(1, 1, 4, 4)},
    "key mask": {"key_mask": torch.ones(1, 4, dtype=torch.bool)},
    "slopes": {"slopes": torch.ones(1, 1)},
    "dropout": {"seed": torch.ones(1, dtype=torch.int64), "p": 0.5},
    "soft cap": {"softcap": 30.0},
    "score_mod": {"score_mod": "straight"},
}


@pytest.mark.parametrize("given", LADEN)
def test_scores_with_a_term_take_the_tiles_that_have_room_for_it(monkeypatch, given):
    asked = []
    monkeypatch.setattr(launchers, "tiles_for", lambda *args: asked.append(args) or ANY_TILES)
    monkeypatch.setattr(launchers.registry, "score_mod", lambda name: SimpleNamespace(forward=None))
    terms = dict.fromkeys(("bias", "key_mask", "slopes", "seed"))
    rest = {"scale": 1.0, "softcap": 0.0, "p": 0.0, "alignment": "top_left", "left": -1, "right": 0}
    q = torch.empty(1, 1, 4, 64)
    AttentionCall(q, q, q, **{**terms, **rest, **LADEN[given]}).options("fwd")
    assert asked == [("fwd", q, "ieee", 64, "nothing" in given)]


def powers_of_two(numbers):
    return all(n > 0 and n & (n - 1) == 0 for n in numbers)


@pytest.mark.parametrize("arch", TABLES)
@pytest.mark.parametrize("dtypes", ["half", "single"])
def test_attentions_tiles_fit_each_other(arch, dtypes):
    """Masked tiles divide the loop's, so that bounds on one's borders are on the other's."""
    entries = TABLES[arch][dtypes]
    wider = {1024} if dtypes == "half" else set()
    assert {d for _, d in entries} == {64, 128, 256, 512} | wider
    alone = {key for key in entries if key[0] in ("dk", "dv")}
    assert len(entries) == 20 + 4 * len(wider) + len(alone)
    for (kernel, head_dim), pair in entries.items():
        apart = {("dk", head_dim), ("dv", head_dim)} & alone
        assert len(apart) in (0, 2)
        none_plain = kernel in ("dbias", "decode") or head_dim in wider
        assert (pair[0] is None) == (none_plain or (kernel == "dkdv" and bool(apart)))
        assert (pair[1] is None) == (kernel in ("dk", "dv"))
        for tiles in (config.Tiles(*numbers) for numbers in pair if numbers):
            loop = tiles.block_m if kernel in ("dkdv", "dk", "dv") else tiles.block_n
            assert loop % tiles.block_masked == 0 or kernel == "dbias"
            assert powers_of_two((*tiles[:4], tiles.chunk)) and 1 <= tiles.num_stages <= 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("rows", [1, 24, 100])
def test_decodings_tiles_are_the_tables_and_of_queries_no_more_than_there_are(
    monkeypatch, rows, dtype
):
    monkeypatch.setattr(config, "INTERPRETING", False)
    q = torch.empty(1, 1, rows, 64, dtype=dtype)
    for d in (64, 128, 256, 512):
        tiles = config.tiles_for("decode", q, "ieee", d, False)
        found = decode._tiles(q, d, rows)
        assert found["BLOCK_M"] == min(max(16, next_power_of_2(rows)), tiles.block_m)
        assert (found["BLOCK_N"], found["num_warps"]) == (tiles.block_n, tiles.num_warps)


@pytest.mark.parametrize("kernel", ["fwd", "dkdv", "dq", "dbias"])
def test_tf32_takes_the_tiles_of_16_bit_rows_twice_as_long(monkeypatch, kernel):
    monkeypatch.setattr(config, "INTERPRETING", False)
    single, half = (torch.empty(1, 1, 4, 64, dtype=d) for d in (torch.float32, torch.float16))
    for d in (64, 128, 256, 512):
        found = config.tiles_for(kernel, single, "tf32", d, True)
        expected = config.tiles_for(kernel, half, "ieee", 2 * d, False)
        assert found == expected._replace(chunk=expected.chunk // 2)
    assert config.tiles_for(kernel, half, "tf32", 64, True) == config.tiles_for(
        kernel, half, "ieee", 64, True
    )


def costs():
    manager.load()
    for name in registry.op_names():
        spec = registry.op(name).spec
        if name.startswith("trilith::") and spec.cost is not None:
            yield pytest.param(spec, id=name.removeprefix("trilith::"))


@pytest.mark.parametrize("spec", list(costs()))
def test_the_cost_is_no_less_than_the_outputs(spec):
    for sample in spec.samples(torch.device("cpu"), torch.float32):
        args = registry.op(spec.name).parameters.bind(sample.args, sample.kwargs)
        outputs = spec.reference(*args)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        written = sum(o.nbytes for o in outputs)
        assert spec.cost(*args).forward_bytes >= written


def test_the_cost_of_causal_attention_is_half():
    spec = registry.op("trilith::attention").spec
    q = torch.empty(2, 4, 64, 16)
    terms = (None, None, None, None, None, 0.25, 0.0, 0.0, "top_left", -1)
    whole, causal = (spec.cost(q, q, q, *terms, right) for right in (-1, 0))
    assert whole.forward_flops == 2 * causal.forward_flops == 2 * 2 * 4 * 64 * 64 * (16 + 16)
    assert whole.backward_flops == 2 * causal.backward_flops


@pytest.mark.parametrize(
    ("kibibytes", "dtype", "stages"),
    [(227, "bfloat16", 3), (163, "bfloat16", 3), (99, "bfloat16", 2)]
    + [(227, "float32", 2), (163, "float32", 2), (99, "float32", 1)],
)
def test_norms_hold_fewer_rows_where_shared_memory_is_small(kibibytes, dtype, stages, monkeypatch):
    """Three rows of 8192 take 49 KB in bfloat16, 98 in float32, beside 32 that threads exchange."""
    monkeypatch.setattr(_norm_backward, "shared_bytes", lambda device: kibibytes * 1024)
    rows = [torch.empty(1, 8192, dtype=getattr(torch, dtype))] * 3
    tile, _, chosen = _norm_backward._tile(8192, rows, dropping=False)
    assert (tile.block_n, chosen) == (8192, stages)
