"""Arithmetic that kernels do, counted in Triton's interpreter: masked elements too.

What bytes do not show: a product made twice or of wider operands, an exponential in the inner loop,
a row summed up twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

# Methods of InterpreterBuilder. Of integers only what Philox is made of, wide multiplications: the
# interpreter checks every other one for overflow, with more of them.
_ELEMENTWISE = ("unary_op", "binary_op", "ternary_op", "create_fma")
_SPECIAL = (
    *("create_exp", "create_exp2", "create_log", "create_log2", "create_sin", "create_cos"),
    *("create_erf", "create_sqrt", "create_precise_sqrt", "create_rsqrt"),
    *("create_fdiv", "create_precise_divf", "create_idiv", "create_umulhi"),
)


@dataclass
class Arithmetic:
    """What was done inside one `with arithmetic():` block.

    `products` are multiply-adds of `tl.dot`, one of 32-bit operands counted as two; `elementwise`
    operations are those of floats, and `special` those that a GPU does at a fourth of their rate or
    less: counted once more, but for rsqrt, erf and integers', which count here alone. `reduced` are
    the elements that reductions and scans take in, of each tensor of theirs. They are as written:
    the compiler may merge equal ones. Not counted is abs.
    """

    products: int = 0
    elementwise: int = 0
    special: int = 0
    reduced: int = 0


@contextmanager
def arithmetic() -> Iterator[Arithmetic]:
    """Count the arithmetic of every kernel launched inside. Needs TRITON_INTERPRET=1."""
    from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps

    done = Arithmetic()
    dot = InterpreterBuilder.create_dot

    def multiplied(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        halves = max(16, a.dtype.primitive_bitwidth, b.dtype.primitive_bitwidth) // 16
        done.products += a.data.size * b.data.shape[-1] * halves
        return dot(builder, a, b, *rest)

    def taking_in(over: type) -> Callable[..., Any]:
        original = over.apply_impl

        def taken(ops: Any, tensors: Any) -> Any:
            done.reduced += sum(tensor.handle.data.size for tensor in tensors)
            return original(ops, tensors)

        return taken

    def counting(method: str, kind: str) -> Callable[..., Any]:
        original = getattr(InterpreterBuilder, method)

        def counted(*args: Any) -> Any:
            result = original(*args)
            if kind == "special" or result.dtype.scalar.is_floating():
                setattr(done, kind, getattr(done, kind) + result.data.size)
            return result

        return counted

    with ExitStack() as patches:
        patches.enter_context(patch.object(InterpreterBuilder, "create_dot", multiplied))
        for over in (ReduceOps, ScanOps):
            patches.enter_context(patch.object(over, "apply_impl", taking_in(over)))
        for kind, methods in (("elementwise", _ELEMENTWISE), ("special", _SPECIAL)):
            for method in methods:
                counted = counting(method, kind)
                patches.enter_context(patch.object(InterpreterBuilder, method, counted))
        yield done
