"""A decoder of Llama's shape that takes one token and the keys and values of those before it, as plain tensors.

Every runtime can take that in; what a library does around it (caches as objects, sampling) is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYERS, WIDTH, INNER, HEADS, GROUPS, VOCABULARY = 16, 2048, 5632, 32, 4, 32000
"""Of TinyLlama, with 16 of its 22 layers."""

TOKENS = 128
"""Tokens in the cache."""


class Layer(nn.Module):
    def __init__(self, width: int, inner: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.groups, self.head = heads, groups, width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, groups * self.head, bias=False)
        self.v = nn.Linear(width, groups * self.head, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """x (1, 1, width); keys and values (1, groups, tokens, head) of the tokens before; those of this one last."""
        y = self.norm1(x)
        q, k, v = (
            f(y).view(1, 1, n, self.head).transpose(1, 2)
            for f, n in ((self.q, self.heads), (self.k, self.groups), (self.v, self.groups))
        )
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        wide = [
            torch.cat([old, new], 2).repeat_interleave(self.heads // self.groups, 1)
            for old, new in ((keys, k), (values, v))
        ]
        seen = F.scaled_dot_product_attention(q, *wide)
        x = x + self.o(seen.transpose(1, 2).reshape(1, 1, -1))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y)), k, v


class Decoder(nn.Module):
    """Input: a token (1, 1), keys and values (layers, 1, groups, tokens, head). Output: logits, new keys and values."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self, layers: int = LAYERS, width: int = WIDTH, inner: int = INNER, heads: int = HEADS, groups: int = GROUPS,
        vocabulary: int = VOCABULARY,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, inner, heads, groups) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)
        half = width // heads // 2
        angle = TOKENS / 10000 ** (torch.arange(half) / half)
        self.register_buffer("cos", angle.cos().repeat(2))
        self.register_buffer("sin", angle.sin().repeat(2))

    def forward(self, token: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, new = self.embed(token), []
        for layer, old in zip(self.layers, zip(keys.unbind(), values.unbind(), strict=True), strict=True):
            x, k, v = layer(x, *old, self.cos, self.sin)
            new.append((k, v))
        return self.head(self.norm(x)), torch.stack([k for k, _ in new]), torch.stack([v for _, v in new])

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """A token, and a cache of others."""
        first = self.layers[0]
        shape = (len(self.layers), 1, first.groups, TOKENS, first.head)
        return torch.tensor([[7]]), torch.randn(shape), torch.randn(shape)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding (Su et al. 2021) of one position."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin
