"""What a launcher costs the host: as it is written, and by its plan. Needs Triton, but no GPU.

    python -m perf.host

Kernels are compiled for sm_90, and a driver that has no device takes the launches: all is timed but
Triton's C launcher and the driver's own work. Times of this machine, for the two ways side by side.
"""

from __future__ import annotations

import os
import sys
import timeit
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before anything imports triton

import torch
from torch import Tensor

from perf.gate import markdown
from trilith.kernels._runtime.language import triton
from trilith.kernels.activations import _bias_act_bwd, _bias_act_fwd
from trilith.kernels.attention.launchers import attention_bwd, attention_fwd
from trilith.kernels.norms import _layer_norm_bwd, _layer_norm_fwd
from trilith.kernels.softmax import _softmax_bwd, _softmax_fwd
from trilith.plugins import BackwardContext

_CALLS, _ROUNDS = 50, 40

Case = tuple[str, Callable[..., Any], tuple[Any, ...]]


class _Nowhere:
    """Triton's driver of an sm_90 that is not there."""

    utils = SimpleNamespace(
        load_binary=lambda *_: (1, 1, 64, 0, 1024),
        get_device_properties=lambda _: {"max_shared_mem": 227 << 10},
    )

    @staticmethod
    def launcher_cls(source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *args: None

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def cases() -> Iterator[Case]:
    def pair(
        name: str, forward: Any, backward: Any, inputs: tuple[Any, ...], outputs: int, saved: int
    ) -> Iterator[Case]:
        yield f"{name} forward", forward, inputs
        results = forward(*inputs)
        needs = tuple(isinstance(a, Tensor) for a in inputs)
        ctx = BackwardContext(inputs, results[:saved], results[outputs:], needs)
        grads = [torch.randn(r.shape).to(r.dtype) for r in results[:outputs]]
        yield f"{name} backward", backward, (ctx, *grads)

    x, weight, bias = torch.randn(64, 256), torch.randn(256), torch.randn(256)
    yield from pair("layer_norm", _layer_norm_fwd, _layer_norm_bwd, (x, weight, bias, 1e-5), 1, 0)
    yield from pair("bias_act", _bias_act_fwd, _bias_act_bwd, (x, bias, None, "gelu", 0.0), 1, 0)
    yield from pair("softmax", _softmax_fwd, _softmax_bwd, (x, 1, x.dtype), 1, 0)
    q, k, v = torch.randn(3, 1, 2, 64, 64, dtype=torch.float16).unbind()
    rest = (None,) * 5 + (0.125, 0.0, 0.0, "top_left", -1, 0, "", "ieee")
    yield from pair("attention", attention_fwd, attention_bwd, (q, k, v, *rest), 2, 1)


def microseconds(call: Callable[[], Any]) -> float:
    """The least of short rounds, some of which are undisturbed on a busy machine too."""
    for _ in range(3):
        call()
    return min(timeit.repeat(call, number=_CALLS, repeat=_ROUNDS)) / _CALLS * 1e6


def rows() -> list[list[str]]:
    found = []
    with torch.no_grad():
        for name, launcher, args in cases():
            written = microseconds(partial(launcher.__wrapped__, *args))  # type: ignore[attr-defined]
            planned = microseconds(partial(launcher, *args))
            found.append([name, f"{written:.1f}", f"{planned:.1f}", f"{planned / written:.2f}"])
    return found


def main() -> int:
    if not hasattr(triton, "__version__"):
        print("perf.host needs Triton", file=sys.stderr)
        return 2
    from triton.runtime import driver

    torch.set_num_threads(1)
    driver.set_active(_Nowhere())
    print(markdown(["launcher, host us a call", "as written", "by its plan", "ratio"], rows()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
