"""Trilith: fused Triton kernels, transformer blocks, and a plugin contract."""

from trilith._version import __version__

__all__ = ["__version__"]
