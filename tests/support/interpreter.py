"""Triton's interpreter with the conformance kit's corrections."""

from trilith.plugins.conformance.interpreter import apply

__all__ = ["apply"]
