"""The benchmark suite: its oracle, its providers, its clock."""

import dataclasses
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from perf import suite
from perf.attention_workloads import attention
from perf.models import block_workload, train_step
from perf.oracle import Wrong, check, seeded_arguments
from perf.providers import Unavailable, function_of, providers_of
from perf.suite import launched
from perf.timing import VirtualClock, prepare
from perf.workloads import bias_act, cross_entropy, dropout, layer_norm, rotary
from tests.plugins.negative import SOUND, Bringing
from tests.support.devices import INTERPRETING
from trilith.plugins import Cost, Manager, Registry

CPU = torch.device("cpu")
NORM = layer_norm(8, 64)


def checked(function, workload=NORM, dtype=torch.float32):
    check(function, workload, CPU, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_is_right_by_its_own_oracle(dtype):
    for workload in (NORM, cross_entropy(8, 64), rotary(1, 2, 8, 16), attention(2, 2, 8, 16)):
        checked(workload.eager, workload, dtype)


def test_a_slightly_wrong_output_is_caught():
    with pytest.raises(Wrong, match="output is off"):
        checked(lambda x, w, b: F.layer_norm(x, (64,), w, b, eps=1e-2))


def test_a_wrong_gradient_is_caught():
    def function(x, w, b):
        return F.layer_norm(x, (64,), w, b.detach()) + (b - b.detach()) * 1.01

    with pytest.raises(Wrong, match="gradient 2 is off"):
        checked(function)


def test_nan_is_caught():
    with pytest.raises(Wrong):
        checked(lambda x, w, b: F.layer_norm(x, (64,), w, b) * torch.nan)


@pytest.mark.parametrize(
    "workload", [dropout(64, 64), bias_act(64, 64, p=0.1)], ids=["dropout", "bias_act"]
)
def test_dropped_elements_are_taken_for_either_branch(workload):
    checked(workload.plain, workload)


def test_dropping_another_share_is_caught():
    with pytest.raises(Wrong):
        checked(lambda x: F.dropout(x, 0.2) * (0.8 / 0.9), dropout(64, 64, p=0.1))


def test_whole_blocks_and_losses_are_checked_too():
    for kind in ("gpt", "gated"):
        workload = block_workload(kind, 1, 8, 32, 2)
        checked(workload.eager, workload)
        step = train_step(kind, b=1, t=8, dim=32, n_heads=2, n_layers=1, vocab_size=16)
        checked(step.eager, step)
        with pytest.raises(Wrong):
            checked(lambda *args, eager=step.eager: eager(*args) * 1.001, step)


def test_what_trilith_computes_is_right_on_this_path():
    checked(NORM.trilith)


@pytest.mark.skipif(not INTERPRETING or find_spec("triton") is None, reason="needs kernels on CPU")
def test_the_chosen_configuration_is_noted():
    x = torch.randn(4, 64)
    (norm,) = launched(lambda: NORM.trilith(x, x[0], x[1]))
    assert norm.startswith("_norm_fwd_kernel grid=(")
    assert "num_warps=" in norm
    (act,) = launched(lambda: bias_act(4, 64).trilith(x, x[0]))
    assert "gelu" in act and "object at" not in act


@pytest.mark.parametrize("provider", ["compile", "liger"])
def test_a_provider_that_is_not_here_says_why(provider):
    assert provider in providers_of(NORM)
    with pytest.raises(Unavailable, match=f"{provider}: .+"):
        function_of(provider, NORM, CPU, torch.float32)


def test_a_peer_that_cannot_be_imported_says_why(monkeypatch):
    def broken():
        raise ImportError("no module named nothing")

    workload = dataclasses.replace(NORM, peers={"other": broken})
    with pytest.raises(Unavailable, match="other: no module named nothing"):
        function_of("other", workload, torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize("error", [Wrong("off by one"), RuntimeError("cannot be compiled")])
@pytest.mark.parametrize("provider", ["trilith", "trilith-compile", "compile"])
def test_a_peer_that_fails_is_skipped_and_ours_fails(provider, error, monkeypatch):
    def failing(*_):
        raise error

    monkeypatch.setattr(suite, "check", failing)
    case = suite.Case(NORM, torch.float32, provider, "forward")
    is_ours = provider != "compile"
    with pytest.raises(type(error) if is_ours else pytest.skip.Exception, match=str(error)):
        suite._check(case, NORM.trilith)


def test_the_clock_moves_only_when_told():
    clock = VirtualClock()
    before = clock()
    assert clock() == before
    clock.advance(0.25)
    assert clock() == before + 0.25


def test_a_region_is_warmed_up_and_sampled():
    calls = []
    prepared = prepare(lambda: calls.append(1), CPU)
    warm = len(calls)
    assert prepared.sample() > 0
    assert len(calls) == warm + 1 > 1
    assert 10 <= prepared.rounds <= 100


@pytest.fixture
def brought(monkeypatch):
    """`bench_plugins` over a registry with one op of a plugin, and what its launchers ran."""
    from perf import bench_plugins

    own = Manager(Registry())
    own.load([])
    ran = []

    def forward(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ran.append("forward")
        return SOUND.forward(x, weight)

    spec = dataclasses.replace(
        SOUND, name="negative::benchmarked", forward=forward, cost=lambda x, weight: Cost(8, 16)
    )
    assert own.add("acme-layers:benchmarked", lambda: Bringing(spec))
    monkeypatch.setattr(bench_plugins, "registry", own.registry)
    yield bench_plugins, ran
    for op in own.registry.ops():
        op.destroy()


def test_a_plugins_op_is_a_workload_by_being_registered(brought):
    bench_plugins, ran = brought
    (workload,) = bench_plugins.workloads()
    assert workload.name == "negative::benchmarked by negative"
    assert workload.cost(None, None) == Cost(8, 16)
    checked(workload.eager, workload)
    assert not ran
    checked(workload.trilith, workload)
    assert ran
    args = seeded_arguments(workload, CPU, torch.float32)
    sizes = [s.args[0].numel() for s in SOUND.samples(CPU, torch.float32)]
    assert args[0].numel() == max(sizes)
    assert all(a.requires_grad for a in args)


def test_a_plugins_wrong_op_is_not_timed(brought):
    bench_plugins, _ = brought
    (workload,) = bench_plugins.workloads()
    with pytest.raises(Wrong, match="output is off"):
        checked(lambda *args: workload.trilith(*args) * 1.01, workload)
