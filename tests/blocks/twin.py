"""The same language model in plain torch.nn, with the same parameter names."""

import torch
from torch import nn
from torch.nn import functional as F

from trilith.blocks import LMConfig


class TwinLM(nn.Module):
    """`build_lm`'s pre-norm models: layer_norm or rms_norm, mlp or gated_mlp, rotary or learned."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        if config.position == "learned":
            self.position = Table(config)
        self.blocks = nn.ModuleList(TwinBlock(config) for _ in range(config.n_layers))
        self.norm = norm(config)
        if not config.tied:
            self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.tied = config.tied

    def forward(self, tokens, targets):
        x = self.embedding(tokens)
        if hasattr(self, "position"):
            x = x + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        head = self.embedding if self.tied else self.head
        logits = F.linear(self.norm(x), head.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Table(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.max_len, config.dim))


class TwinBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = nn.ModuleDict({"branch": TwinAttention(config), "pre": norm(config)})
        mlp = TwinGatedMLP if config.mlp == "gated_mlp" else TwinMLP
        self.mlp = nn.ModuleDict({"branch": mlp(config), "pre": norm(config)})

    def forward(self, x):
        x = x + self.attention["branch"](self.attention["pre"](x))
        return x + self.mlp["branch"](self.mlp["pre"](x))


class TwinAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = [config.n_heads, config.kv_heads, config.kv_heads]
        width = sum(self.heads) * config.head_dim
        self.qkv = nn.Linear(config.dim, width, bias=config.bias)
        self.out = nn.Linear(config.dim, config.dim, bias=config.bias)
        self.rotary = config.position == "rotary"
        frequency = config.rotary_base ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
        angles = torch.arange(config.max_len)[:, None] * frequency
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x):
        packed = self.qkv(x).unflatten(-1, (sum(self.heads), -1)).transpose(1, 2)
        q, k, v = packed.split(self.heads, dim=1)
        if self.rotary:
            q, k = self.rotate(q), self.rotate(k)
        gqa = self.heads[0] != self.heads[1]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        return self.out(y.transpose(1, 2).flatten(2))

    def rotate(self, x):
        cos, sin = self.cos[: x.shape[2]], self.sin[: x.shape[2]]
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class TwinMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden = config.mlp_hidden
        self.up = nn.Linear(config.dim, hidden, bias=config.bias)
        self.down = nn.Linear(hidden, config.dim, bias=config.bias)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class TwinGatedMLP(TwinMLP):
    def __init__(self, config):
        super().__init__(config)
        self.gate = nn.Linear(config.dim, config.mlp_hidden, bias=config.bias)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def norm(config):
    if config.norm == "layer_norm":
        return nn.LayerNorm(config.dim, bias=config.bias)
    return nn.RMSNorm(config.dim, eps=1e-6)
