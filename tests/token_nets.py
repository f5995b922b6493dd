"""Small networks over tokens: attention in several layouts, and tied embeddings."""

from __future__ import annotations

from parts import Net
from torch import nn
from torch.nn import functional as F


def tied_linear():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.up, self.down = nn.Embedding(20, 8), nn.Linear(8, 24), nn.Linear(24, 8)
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, ids):
            x = self.emb(ids)
            return self.head(x + self.down(F.gelu(self.up(x))))

    return Tied()


def attention(heads=4, width=6):
    def body(s, x):
        b, n, _ = x.shape
        q, k, v = (p(x).view(b, n, heads, width).transpose(1, 2) for p in (s.q, s.k, s.v))
        y = F.scaled_dot_product_attention(q, k, v)
        return s.o(y.transpose(1, 2).reshape(b, n, heads * width))

    e = heads * width
    return Net(body, q=nn.Linear(8, e), k=nn.Linear(8, e), v=nn.Linear(8, e), o=nn.Linear(e, 8))


def fused_attention(heads=4, width=6):
    def body(s, x):
        b, n, _ = x.shape
        q, k, v = s.qkv(x).view(b, n, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1) * 0.4).softmax(-1) @ v
        return s.o(y.transpose(1, 2).reshape(b, n, -1))

    e = heads * width
    return Net(body, qkv=nn.Linear(8, 3 * e), o=nn.Linear(e, 8))


def grouped_queries():
    def body(s, x):
        b, n, _ = x.shape
        q = s.q(x).view(b, n, 6, 4).transpose(1, 2)
        k = s.k(x).view(b, n, 2, 4).transpose(1, 2)[:, :, None].expand(b, 2, 3, n, 4).reshape(b, 6, n, 4)
        v = s.v(x).view(b, n, 2, 4).transpose(1, 2)[:, :, None].expand(b, 2, 3, n, 4).reshape(b, 6, n, 4)
        return s.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, 24))

    return Net(body, q=nn.Linear(8, 24), k=nn.Linear(8, 8), v=nn.Linear(8, 8), o=nn.Linear(24, 8))


def heads_merged_into_the_batch():
    def body(s, x):
        b, n, _ = x.shape
        q, k, v = s.qkv(x).view(b, n, 3, 4, 6).permute(2, 0, 3, 1, 4).reshape(3, b * 4, n, 6).unbind(0)
        y = (q @ k.transpose(1, 2)).softmax(-1) @ v
        return s.o(y.reshape(b, 4, n, 6).transpose(1, 2).flatten(2))

    return Net(body, qkv=nn.Linear(8, 72), o=nn.Linear(24, 8))
