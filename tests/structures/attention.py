"""Rows 24-29, 35: attention in every layout, and the transformers built from it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import nets
from nets import Net, conv
from structures import case, ids, maps, tokens


def heads_of(x, heads):
    """(batch, tokens, heads * width) to (batch, heads, tokens, width)."""
    b, n, e = x.shape
    return x.view(b, n, heads, e // heads).transpose(1, 2)


def merged(x):
    return x.transpose(1, 2).flatten(2)


def four(q, k, v, out, width=8, **more):
    """The projections of an attention over ``width`` features, of these sizes."""
    return {
        "q": nn.Linear(width, q),
        "k": nn.Linear(width, k),
        "v": nn.Linear(width, v),
        "o": nn.Linear(v, out),
        **more,
    }


case(24, free=[4, 6, 6], inputs=tokens())(nets.attention)


@case(24, "matmul", free=[4, 5, 6], inputs=tokens())
@case(24, "einsum", free=[4, 5, 6], inputs=tokens())
@case(24, "bmm", free=[4, 5, 6], inputs=tokens())
@case(24, "causal", free=[4, 5, 6], inputs=tokens())
@case(24, "additive mask", free=[4, 5, 6], inputs=tokens())
def attention_by(how):
    def body(s, x):
        q, k, v = heads_of(s.q(x), 4), heads_of(s.k(x), 4), heads_of(s.v(x), 4)
        if how == "causal":
            return s.o(merged(F.scaled_dot_product_attention(q, k, v, is_causal=True)))
        if how == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k) * 5**-0.5
            return s.o(torch.einsum("bhij,bhjd->bihd", scores.softmax(-1), v).flatten(2))
        if how == "bmm":
            scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)) / 5**0.5
            return s.o(merged(torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view(x.shape[0], 4, -1, 6)))
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        if how == "additive mask":
            hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, float("-inf")) + s.bias
        return s.o(merged(scores.softmax(-1) @ v))

    part = {"bias": nn.Parameter(torch.randn(4, 5, 5))} if how == "additive mask" else {}
    return Net(body, **four(20, 20, 24, 8), **part)


@case(24, free=[16, 4, 6, 6], inputs=ids(), inexact=True)
def attention_in_a_stream():
    def body(s, words):
        x = s.emb(words)
        q, k, v = (heads_of(p(s.norm(x)), 4) for p in (s.q, s.k, s.v))
        return s.head(x + s.o(merged(F.scaled_dot_product_attention(q, k, v))))

    parts = four(24, 24, 24, 16, width=16)
    return Net(body, emb=nn.Embedding(20, 16), norm=nn.LayerNorm(16), head=nn.Linear(16, 3), **parts)


@case(24, free=[6, 10], inputs=tokens())
def attention_of_one_head():
    def body(s, x):
        return s.o((s.q(x) @ s.k(x).mT * 0.4).softmax(-1) @ s.v(x))

    return Net(body, **four(6, 6, 10, 8))


case(25, free=[4, 6], inputs=tokens())(nets.fused_attention)
case(25, free=[4, 6], inputs=tokens())(nets.heads_merged_into_the_batch)


@case(25, "chunk", free=[4, 6, 6], inputs=tokens())
@case(25, "split", free=[4, 6, 6], inputs=tokens())
@case(25, "split unevenly", free=[4, 6, 8], inputs=tokens())
@case(25, "interleaved unbind", free=[4, 6], inputs=tokens())
@case(25, "interleaved chunk", free=[4, 6, 6], inputs=tokens())
@case(25, "indexed", free=[4, 6], inputs=tokens())
def fused_projection(how):
    def body(s, x):
        b, n, _ = x.shape
        y = s.qkv(x)
        if how == "interleaved unbind":
            q, k, v = (t.transpose(1, 2) for t in y.view(b, n, 4, 3, 6).unbind(3))
        elif how == "interleaved chunk":
            q, k, v = y.view(b, n, 4, 18).transpose(1, 2).chunk(3, -1)
        elif how == "indexed":
            y = y.view(b, n, 3, 4, 6).permute(2, 0, 3, 1, 4)
            q, k, v = y[0], y[1], y[2]
        else:
            sizes = {"chunk": None, "split": [24, 24, 24], "split unevenly": [24, 24, 32]}[how]
            parts = y.chunk(3, -1) if sizes is None else y.split(sizes, -1)
            q, k, v = (heads_of(t, 4) for t in parts)
        return s.o(merged(F.scaled_dot_product_attention(q, k, v)))

    v = 32 if how == "split unevenly" else 24
    return Net(body, qkv=nn.Linear(8, 48 + v), o=nn.Linear(v, 8))


@case(25, free=[4, 6, 6], inputs=tokens())
def fused_keys_and_values():
    def body(s, x):
        k, v = (heads_of(t, 4) for t in s.kv(x).chunk(2, -1))
        return s.o(merged(F.scaled_dot_product_attention(heads_of(s.q(x), 4), k, v)))

    return Net(body, q=nn.Linear(8, 24), kv=nn.Linear(8, 48), o=nn.Linear(24, 8))


@case(26, "repeat_interleave", free=[2, 3, 4, 5], inputs=tokens())
@case(26, "expand", free=[2, 3, 4, 5], inputs=tokens())
@case(26, "enable_gqa", free=[2, 3, 4, 5], inputs=tokens())
@case(26, "five dimensions", free=[2, 3, 4, 5], inputs=tokens())
def grouped_queries(how):
    def body(s, x):
        b, n, _ = x.shape
        q, k, v = heads_of(s.q(x), 6), heads_of(s.k(x), 2), heads_of(s.v(x), 2)
        if how == "five dimensions":
            q = q.reshape(b, 2, 3, n, 4)
            scores = torch.einsum("bgqid,bgjd->bgqij", q, k) / 2
            y = torch.einsum("bgqij,bgjd->bgqid", scores.softmax(-1), v).flatten(1, 2)
            return s.o(merged(y))
        if how == "repeat_interleave":
            k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
        elif how == "expand":
            k, v = (t[:, :, None].expand(b, 2, 3, n, t.shape[-1]).reshape(b, 6, n, t.shape[-1]) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=how == "enable_gqa")
        return s.o(merged(y))

    return Net(body, q=nn.Linear(8, 24), k=nn.Linear(8, 8), v=nn.Linear(8, 10), o=nn.Linear(30, 8))


case(26, free=[2, 3, 4, 4], inputs=tokens())(nets.grouped_queries)


@case(26, "broadcast", free=[6, 4, 5], inputs=tokens())
@case(26, "expand", free=[6, 4, 5], inputs=tokens())
def one_key_for_all_heads(how):
    def body(s, x):
        q, k, v = heads_of(s.q(x), 6), s.k(x)[:, None], s.v(x)[:, None]
        if how == "expand":
            k, v = k.expand(-1, 6, -1, -1), v.expand(-1, 6, -1, -1)
            return s.o(merged(F.scaled_dot_product_attention(q, k, v)))
        return s.o(merged((q @ k.mT / 2).softmax(-1) @ v))

    return Net(body, q=nn.Linear(8, 24), k=nn.Linear(8, 4), v=nn.Linear(8, 5), o=nn.Linear(30, 8))


def rotated_half(x):
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat([-b, a], -1)


@case(27, "table", free=[4, 3, 5], inputs=tokens())
@case(27, "frequencies", free=[4, 3, 5], inputs=tokens())
@case(27, "chunks", free=[4, 3, 5], inputs=tokens())
@case(27, "grouped", free=[2, 2, 3, 5], inputs=tokens())
def rotary_halves(how):
    def body(s, x):
        q, k, v = heads_of(s.q(x), 4), heads_of(s.k(x), 2 if how == "grouped" else 4), s.v(x)
        v = heads_of(v, 2 if how == "grouped" else 4)
        if how == "table":
            cos, sin = s.cos, s.sin
        else:
            angles = torch.arange(5)[:, None] * s.inverse[None]
            cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
        if how == "chunks":

            def turn(t):
                a, b = t.chunk(2, -1)
                c, d = cos[..., :3], sin[..., :3]
                return torch.cat([a * c - b * d, b * c + a * d], -1)
        else:

            def turn(t):
                return t * cos + rotated_half(t) * sin

        return s.o(merged(F.scaled_dot_product_attention(turn(q), turn(k), v, enable_gqa=how == "grouped")))

    kv = 2 if how == "grouped" else 4
    inverse = torch.tensor([1.0, 0.1, 0.01])
    angles = torch.cat([torch.arange(5)[:, None] * inverse] * 2, -1)
    parts = {"cos": angles.cos(), "sin": angles.sin()} if how == "table" else {"inverse": inverse}
    layers = {"q": nn.Linear(8, 24), "k": nn.Linear(8, 6 * kv), "v": nn.Linear(8, 5 * kv), "o": nn.Linear(20, 8)}
    return Net(body, **parts, **layers)


@case(27, "strided", free=[4, 3, 5], inputs=tokens())
@case(27, "view", free=[4, 3, 5], inputs=tokens())
@case(27, "complex", free=[4, 3, 5], inputs=tokens(), inexact=True)
def rotary_neighbours(how):
    def body(s, x):
        q, k, v = heads_of(s.q(x), 4), heads_of(s.k(x), 4), heads_of(s.v(x), 4)

        def turn(t):
            if how == "complex":
                z = torch.view_as_complex(t.reshape(*t.shape[:-1], -1, 2).contiguous())
                return torch.view_as_real(z * s.turns).flatten(-2)
            if how == "strided":
                a, b = t[..., ::2], t[..., 1::2]
            else:
                a, b = t.unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack([a * s.cos - b * s.sin, a * s.sin + b * s.cos], -1).flatten(-2)

        return s.o(merged(F.scaled_dot_product_attention(turn(q), turn(k), v)))

    angles = torch.arange(5)[:, None] * torch.tensor([1.0, 0.1, 0.01])
    turns = {"turns": torch.polar(torch.ones_like(angles), angles)}
    return Net(
        body, **four(24, 24, 20, 8), **(turns if how == "complex" else {"cos": angles.cos(), "sin": angles.sin()})
    )


@case(28, "rms_norm", free=[4, 6, 5], inputs=tokens(), inexact=True)
@case(28, "layer_norm", free=[4, 6, 5], inputs=tokens(), inexact=True)
@case(28, "shared", free=[4, 6, 5], inputs=tokens(), inexact=True)
@case(28, "normalize", free=[4, 6, 5], inputs=tokens(), inexact=True)
@case(28, "whole width", free=[4, 6, 5], inputs=tokens(), inexact=True)
def normalized_queries(how):
    def body(s, x):
        q, k, v = s.q(x), s.k(x), heads_of(s.v(x), 4)
        if how == "whole width":
            q, k = heads_of(s.q_norm(q), 4), heads_of(s.k_norm(k), 4)
        else:
            q, k = heads_of(q, 4), heads_of(k, 4)
            if how == "normalize":
                q, k = F.normalize(q, dim=-1) * s.scale, F.normalize(k, dim=-1)
            else:
                q, k = s.q_norm(q), (s.q_norm if how == "shared" else s.k_norm)(k)
        return s.o(merged(F.scaled_dot_product_attention(q, k, v)))

    kind = nn.LayerNorm if how == "layer_norm" else nn.RMSNorm
    n = 24 if how == "whole width" else 6
    norms = {"q_norm": kind(n)} | ({} if how == "shared" else {"k_norm": kind(n)})
    if how == "normalize":
        norms = {"scale": nn.Parameter(torch.rand(4, 1, 1) + 1)}
    return Net(body, **four(24, 24, 20, 8), **norms)


@case(29, "alone", free=[2, 4], inputs=tokens())
@case(29, "with weights", free=[2, 4], inputs=tokens())
@case(29, "sequence first", free=[2, 4], inputs=lambda n: torch.randn(5, n, 8), batches=())
def multihead_self_attention(how):
    def body(s, x):
        y, _ = s.attention(x, x, x, need_weights=how == "with weights")
        return x + y

    return Net(body, attention=nn.MultiheadAttention(8, 2, batch_first=how != "sequence first"))


@case(29, "same widths", free=[8, 2, 4, 8], inputs=lambda n: (torch.randn(n, 5, 6), torch.randn(n, 7, 6)))
@case(29, "kdim and vdim", free=[2, 4, 4], inputs=lambda n: (torch.randn(n, 5, 8), torch.randn(n, 7, 6)))
@case(29, "causal", free=[2, 4], inputs=lambda n: (torch.randn(n, 5, 8), torch.randn(n, 5, 8)))
def multihead_cross_attention(how):
    def body(s, x, memory):
        hidden = torch.ones(5, 5, dtype=torch.bool).triu(1) if how == "causal" else None
        if how == "same widths":
            x, memory = s.a(x), s.b(memory)
        y, _ = s.attention(x, memory, memory, need_weights=False, attn_mask=hidden)
        return s.c(F.gelu(y)) if how == "same widths" else y

    if how == "kdim and vdim":
        return Net(body, attention=nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True))
    if how == "causal":
        return Net(body, attention=nn.MultiheadAttention(8, 2, batch_first=True))
    parts = {"a": nn.Linear(6, 8), "b": nn.Linear(6, 8), "c": nn.Linear(8, 3)}
    return Net(body, attention=nn.MultiheadAttention(8, 2, batch_first=True), **parts)


@case(29, "after", free=[8, 2, 4, 12], inputs=ids(), inexact=True)
@case(29, "before", free=[8, 2, 4, 12], inputs=ids(), inexact=True)
def transformer_encoder_layer(how):
    layer = nn.TransformerEncoderLayer(8, 2, 12, norm_first=how == "before", batch_first=True)
    return nn.Sequential(nn.Embedding(20, 8), layer, nn.Linear(8, 3))


@case(29, free=[8, 2, 4, 12, 2, 4, 12], inputs=ids(), inexact=True)
def transformer_encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, activation="gelu", batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(20, 8), encoder, nn.Linear(8, 3))


@case(29, free=[8, 6, 2, 4, 2, 4, 12], inputs=lambda n: (ids()(n), torch.randn(n, 4, 5)), inexact=True)
def transformer_decoder_layer():
    def body(s, words, memory):
        return s.head(s.layer(s.emb(words), s.up(F.relu(s.low(memory)))))

    layer = nn.TransformerDecoderLayer(8, 2, 12, batch_first=True)
    parts = {"low": nn.Linear(5, 6), "up": nn.Linear(6, 8), "head": nn.Linear(8, 3)}
    return Net(body, emb=nn.Embedding(20, 8), layer=layer, **parts)


class Block(nn.Module):
    """A pre-norm block as vision transformers have it."""

    def __init__(self, width=16, heads=4, hidden=24):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        b, n, _ = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(y.transpose(1, 2).reshape(b, n, -1))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


@case(35, "class token", free=[16, 4, 4, 24, 4, 4, 24], inexact=True)
@case(35, "mean", free=[16, 4, 4, 24, 4, 4, 24], inexact=True)
@case(35, "two tokens", free=[16, 4, 4, 24, 4, 4, 24], inexact=True)
def vision_transformer(head):
    def body(s, x):
        x = s.patch(x).flatten(2).transpose(1, 2)
        if head != "mean":
            x = torch.cat([s.token.expand(x.shape[0], -1, -1), x], 1)
        x = s.norm(s.two(s.one(x + s.position)))
        return s.last(x.mean(1) if head == "mean" else x[:, 0] if head == "class token" else x[:, :2].flatten(1))

    n = {"mean": 0, "class token": 1, "two tokens": 2}[head]
    parts = {"position": nn.Parameter(torch.randn(1, 4 + n, 16))}
    if n:
        parts["token"] = nn.Parameter(torch.randn(1, n, 16))
    last = nn.Linear(32 if n == 2 else 16, 3)
    patch = nn.Conv2d(3, 16, 4, 4)
    return Net(body, patch=patch, one=Block(), two=Block(), norm=nn.LayerNorm(16), last=last, **parts)


@case(35, free=[16, 4, 4, 24, 2, 5, 6], inputs=maps(3, 8), inexact=True)
def class_attention_with_pooled_queries():
    """Attention pooling: a learned query asks the patches."""

    def body(s, x):
        x = s.one(s.patch(x).flatten(2).transpose(1, 2))
        q = heads_of(s.latent.expand(x.shape[0], -1, -1), 2)
        k, v = heads_of(s.k(x), 2), heads_of(s.v(x), 2)
        return s.head(merged(F.scaled_dot_product_attention(q, k, v))[:, 0])

    parts = {"k": nn.Linear(16, 10), "v": nn.Linear(16, 12), "head": nn.Linear(12, 3)}
    return Net(
        body,
        patch=conv(3, 16, 4, stride=4, padding=0),
        one=Block(),
        latent=nn.Parameter(torch.randn(1, 1, 10)),
        **parts,
    )
