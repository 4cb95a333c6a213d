"""torch.nn's layers on Trilith's kernels: same constructors, state dicts, results and errors."""

from trilith.blocks.drop_in.activations import ELU, GELU, LeakyReLU, ReLU, Sigmoid, SiLU, Tanh
from trilith.blocks.drop_in.attention import MultiheadAttention
from trilith.blocks.drop_in.batch_norm import BatchNorm1d
from trilith.blocks.drop_in.dropout import Dropout
from trilith.blocks.drop_in.losses import BCEWithLogitsLoss, CrossEntropyLoss, MSELoss
from trilith.blocks.drop_in.norms import LayerNorm, RMSNorm
from trilith.blocks.drop_in.softmax import LogSoftmax, Softmax
from trilith.blocks.drop_in.transformer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "BCEWithLogitsLoss",
    "BatchNorm1d",
    "LogSoftmax",
    "MSELoss",
    "Softmax",
    "ELU",
    "CrossEntropyLoss",
    "Dropout",
    "GELU",
    "LayerNorm",
    "LeakyReLU",
    "MultiheadAttention",
    "RMSNorm",
    "ReLU",
    "SiLU",
    "Sigmoid",
    "Tanh",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
]
