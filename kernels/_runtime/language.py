"""`triton` and `tl`, or stand-ins that let kernel files be imported where Triton is missing."""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:

    class _Missing:
        """Answers to any attribute and call, so that decorators and annotations evaluate."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self

    triton: Any = _Missing()  # type: ignore[no-redef]
    tl: Any = _Missing()  # type: ignore[no-redef]

__all__ = ["tl", "triton"]
