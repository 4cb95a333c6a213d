"""Where this run's tensors live."""

import os

import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def dtype_name(dtype: torch.dtype) -> str:
    """A short id: fp32, fp16, bf16."""
    short = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16"}
    return short.get(dtype, "bf16")
