"""Makes Triton's interpreter treat bfloat16 and tf32 as a GPU does, wherever kernels run in it.

It keeps bfloat16 as uint16 bit patterns, truncates on fp32 -> bf16, and multiplies bit patterns in
`tl.dot`. With `apply()` casts round to nearest even and dots take the values in fp32. Arithmetic on
bfloat16 tiles stays wrong: kernels convert to fp32 before any. A product in tf32 has its factors
rounded to 10 bits of mantissa, where the interpreter takes all 23. Products are summed in float64:
the interpreter's sums depend on the CPU's BLAS and on where an element lies in its tile, so that a
backward that makes forward's scores again got others.

It makes it quicker too. `tl.reduce` with a function of one's own takes half of the elements at a
time, where the interpreter takes one. `triton.language` is patched once in a launch, where the
interpreter does it at each call of a device function. numpy's dtypes are looked up, where it makes
a table of them each time.

And threads wait for each other: the language that is patched and the program's indices are of the
process, so that two launches at once would write each other's tiles.
"""

from __future__ import annotations

import threading
from functools import cache
from importlib.util import find_spec
from typing import Any

from trilith.plugins.spec import INTERPRETING


def require_numpy() -> None:
    """Neither Trilith nor Triton asks pip for it: a GPU's kernels run without."""
    if find_spec("numpy") is None:
        raise ModuleNotFoundError(
            "the conformance checks and Triton's interpreter need numpy: pip install numpy",
            name="numpy",
        )


def apply() -> None:
    """Patch the interpreter, if it is in use. Idempotent; for triton 3.6 and 3.7."""
    if not INTERPRETING:
        return
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    if not getattr(interpreter, "_is_patched_by_trilith", False):
        _round_as_a_gpu(interpreter)
        _reduce_by_halves(interpreter.ReduceOps)
        _patch_the_language_once(interpreter)
        _look_dtypes_up(interpreter)
        interpreter._is_patched_by_trilith = True


def _round_as_a_gpu(interpreter: Any) -> None:
    import numpy as np
    import triton.language as tl

    builder, TensorHandle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot, fp_to_fp = builder.cast_impl, builder.create_dot, builder.create_fp_to_fp

    def widened(data: Any) -> Any:
        data = np.ascontiguousarray(data)
        return (data.astype(np.uint32) << np.uint32(16)).view(np.float32)

    def rounded(data: Any) -> Any:
        bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
        even = (bits >> np.uint32(16)) & np.uint32(1)
        nearest = ((bits + np.uint32(0x7FFF) + even) >> np.uint32(16)).astype(np.uint16)
        return np.where(np.isnan(data), np.uint16(0x7FC0), nearest).reshape(np.shape(data))

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        """From bfloat16 and float16, `tl.cast` itself goes by float32."""
        old, new = src.dtype.scalar, dst_type.scalar
        if old == tl.float32 and new == tl.bfloat16:
            return TensorHandle(rounded(src.data), new)
        if old == tl.bfloat16 and new == tl.float32:
            return TensorHandle(widened(src.data).reshape(np.shape(src.data)), new)
        if new == tl.bfloat16:
            return cast_impl(self, cast(self, src, tl.float32), dst_type)
        return cast(self, src, dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        nearest = str(rounding_mode).rpartition(".")[2] == "RTNE"
        if nearest and src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return cast_impl(self, src, dst_type)
        return fp_to_fp(self, src, dst_type, rounding_mode)

    def tf32(x: Any) -> Any:
        mantissa, power = np.frexp(x.data)
        return TensorHandle(np.ldexp(np.rint(mantissa * 2048), power - 11), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, *rest: Any) -> Any:
        a, b = (
            cast_impl(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)
        )
        if str(precision).rpartition(".")[2] == "TF32":
            a, b = (tf32(x) if x.dtype.scalar == tl.float32 else x for x in (a, b))
        if not {a.data.dtype.char, b.data.dtype.char} <= {"e", "f"}:  # float16 and float32
            return dot(self, a, b, d, precision, *rest)
        product = np.matmul(a.data, b.data, dtype=np.float64)
        return TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp
    builder.create_dot = create_dot


def _reduce_by_halves(reduce_ops: Any) -> None:
    one_by_one = reduce_ops.generic_reduce

    def generic_reduce(self: Any, input: Any) -> Any:
        if self.axis is None:
            return one_by_one(self, input)
        tiles, lanes = tuple(input), (slice(None),) * self.axis
        while tiles[0].handle.data.shape[self.axis] > 1:
            halves = (
                self.to_tensor(t.handle.data[(*lanes, slice(first, None, 2))], t.dtype)
                for first in (0, 1)
                for t in tiles
            )
            combined = self.combine_fn.fn(*halves)
            tiles = combined if isinstance(combined, tuple) else (combined,)
        if self.keep_dims:
            return list(tiles)
        return [self.to_tensor(t.handle.data.squeeze(self.axis), t.dtype) for t in tiles]

    reduce_ops.generic_reduce = generic_reduce


def _patch_the_language_once(interpreter: Any) -> None:
    tl, launch = interpreter.tl, interpreter.GridExecutor.__call__
    patched: set[tuple[bool, bool]] = set()
    one_launch = threading.Lock()

    @cache
    def languages(function: Any) -> tuple[bool, bool]:
        """Which modules a patch for this function is of."""
        seen = function.__globals__.values()
        return any(v is tl for v in seen), any(v is tl.core for v in seen)

    def launch_afresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        with one_launch:
            patched.clear()
            try:
                return launch(self, *args, **kwargs)
            finally:
                patched.clear()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        needed = languages(self.fn)
        if needed not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(needed)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.GridExecutor.__call__ = launch_afresh
    interpreter.InterpretedFunction.__call__ = call


def _look_dtypes_up(interpreter: Any) -> None:
    tl, make = interpreter.tl, interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def look_up(dtype: Any) -> Any:
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        found = known.get(element.name)
        if found is None:
            found = known[element.name] = make(element)
        return found

    interpreter._get_np_dtype = look_up
