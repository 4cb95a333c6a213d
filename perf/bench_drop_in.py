"""Each drop-in against the torch.nn module it replaces, in turns, on a CPU without interpreter."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perf.timing import environment
from trilith.blocks import drop_in
from trilith.plugins import TRITON_DEVICES

LEAST = 0.97  # of torch's speed
_SECONDS, _LEAST_SECONDS = 1.5, 5e-4  # of all pairs, and of one side of a pair
_FEWEST_PAIRS, _MOST_PAIRS = 15, 201
ROWS, DIM, HEADS = 2048, 512, 8
CPU = torch.device("cpu")

CASES: dict[str, tuple[Any, ...]] = {
    "LayerNorm": (DIM,),
    "RMSNorm": (DIM,),
    "Dropout": (0.1,),
    "ReLU": (),
    "LeakyReLU": (),
    "ELU": (),
    "Sigmoid": (),
    "Tanh": (),
    "GELU": (),
    "SiLU": (),
    "Softmax": (-1,),
    "LogSoftmax": (-1,),
    "BatchNorm1d": (DIM,),
    "CrossEntropyLoss": (),
    "BCEWithLogitsLoss": (),
    "MSELoss": (),
    "MultiheadAttention": (DIM, HEADS),
    "TransformerEncoderLayer": (DIM, HEADS),
    "TransformerDecoderLayer": (DIM, HEADS),
}


def inputs(name: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    if name in ("MultiheadAttention", "TransformerDecoderLayer"):
        x = torch.randn(128, 4, DIM, dtype=dtype, requires_grad=True)
        return (x, x, x) if name == "MultiheadAttention" else (x, x)
    if name == "TransformerEncoderLayer":
        return (torch.randn(128, 4, DIM, dtype=dtype, requires_grad=True),)
    x = torch.randn(ROWS, DIM, dtype=dtype, requires_grad=True)
    if name in ("BCEWithLogitsLoss", "MSELoss"):
        return x, torch.rand_like(x)
    return (x, torch.randint(DIM, (ROWS,))) if name == "CrossEntropyLoss" else (x,)


def region(module: nn.Module, args: tuple[Tensor, ...], training: bool) -> Callable[[], None]:
    options = {"need_weights": False} if isinstance(module, nn.MultiheadAttention) else {}

    def run() -> None:
        out = module(*args, **options)
        out = out[0] if isinstance(out, tuple) else out
        if training:
            out.backward(torch.ones_like(out))

    def evaluate() -> None:
        with torch.no_grad():
            module(*args, **options)

    return run if training else evaluate


def seconds(run: Callable[[], None], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def speed(ours: Callable[[], None], theirs: Callable[[], None]) -> float:
    """Torch's time over ours: the median of pairs, first the one and then the other."""
    once = min(seconds(run, 1) for run in (ours, theirs, ours, theirs))
    calls = max(1, round(_LEAST_SECONDS / once))
    pairs = min(max(round(_SECONDS / (2 * calls * once)), _FEWEST_PAIRS), _MOST_PAIRS)
    ratios = []
    for i in range(pairs):
        pair = [(ours, 0), (theirs, 1)] if i % 2 else [(theirs, 1), (ours, 0)]
        took = {which: seconds(run, calls) for run, which in pair}
        ratios.append(took[1] / took[0])
    return statistics.median(ratios)


@pytest.mark.skipif("cpu" in TRITON_DEVICES, reason="the interpreter is no measure of speed")
@pytest.mark.benchmark(timer=time.perf_counter)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_drop_in(benchmark: Any, name: str, dtype: torch.dtype, mode: str) -> None:
    benchmark.group = f"drop_in {mode}"
    args = inputs(name, dtype)
    ours, theirs = (
        region(
            getattr(source, name)(*CASES[name]).to(dtype).train(mode == "train"),
            args,
            mode == "train",
        )
        for source in (drop_in, nn)
    )
    seconds(ours, 3), seconds(theirs, 3)
    measured = speed(ours, theirs)
    if measured < LEAST:  # what looks slower is measured again before it fails
        measured = speed(ours, theirs)
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(
        workload=f"drop_in.{name}",
        provider="trilith",
        direction=mode,
        dtype=str(dtype).removeprefix("torch."),
        environment=environment(CPU),
        speed_against_torch=measured,
    )
    assert measured >= LEAST, f"{name}: {measured:.3f} of torch's speed"
