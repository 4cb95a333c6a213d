"""Transformer blocks made of the kernels."""

if __name__ == "blocks":
    raise ImportError("import trilith.blocks, not blocks: the folder is mapped by the package")
