"""Fused kernels: tensors in, tensors out."""

if __name__ == "kernels":
    raise ImportError("import trilith.kernels, not kernels: the folder is mapped by the package")
