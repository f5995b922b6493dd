"""Rows 24, 29, 39, 53: heads that are mixed, biased, prefixed, or attend between channels."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from nets import Net
from structures import case, ids, tokens
from structures.attention import four, heads_of, merged


@case(24, free=[4, 5, 4, 4, 6], inputs=tokens())
def talking_heads():
    """As in CaiT: linear layers over the heads, before and after the softmax, so that heads become others."""

    def body(s, x):
        q, k, v = heads_of(s.q(x), 4), heads_of(s.k(x), 4), heads_of(s.v(x), 4)
        scores = s.before((q @ k.mT / 2).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
        return s.o(merged(s.after(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v))

    return Net(body, **four(20, 20, 24, 8), before=nn.Linear(4, 4), after=nn.Linear(4, 4))


@case(24, free=[4, 5, 6], frozen="softmax runs over them", inputs=tokens())
def learned_prefix():
    """Keys and values of a few positions are parameters."""

    def body(s, x):
        q, k, v = heads_of(s.q(x), 4), heads_of(s.k(x), 4), heads_of(s.v(x), 4)
        k, v = (torch.cat([p.expand(x.shape[0], -1, -1, -1), t], 2) for p, t in ((s.keys, k), (s.values, v)))
        return s.o(merged(F.scaled_dot_product_attention(q, k, v)))

    prefix = {"keys": nn.Parameter(torch.randn(1, 4, 3, 5)), "values": nn.Parameter(torch.randn(1, 4, 3, 6))}
    return Net(body, **four(20, 20, 24, 8), **prefix)


@case(24, free=[8, 2, 4, 4], inputs=lambda n: (ids()(n), torch.ones(n, 7, dtype=torch.bool)), inexact=True)
def padding_hidden_by_a_mask():
    def body(s, words, mask):
        x = s.emb(words)
        q, k, v = heads_of(s.q(x), 2), heads_of(s.k(x), 2), heads_of(s.v(x), 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        x = s.norm(x + s.o(merged(y)))
        return s.head((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    parts = {"emb": nn.Embedding(20, 8), "norm": nn.LayerNorm(8), "head": nn.Linear(8, 3)}
    return Net(body, **four(8, 8, 8, 8), **parts)


@case(39, free=[4, 6], inputs=tokens(), inexact=True)
def attention_between_channels_of_a_head():
    """As in XCiT: widths attend to widths, with a temperature per head."""

    def body(s, x):
        b, n, _ = x.shape
        q, k, v = s.qkv(x).reshape(b, n, 3, 4, 6).permute(2, 0, 3, 4, 1)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * s.temperature
        return s.o((scores.softmax(-1) @ v).permute(0, 3, 1, 2).reshape(b, n, -1))

    return Net(body, qkv=nn.Linear(8, 72), temperature=nn.Parameter(torch.rand(4, 1, 1) + 1), o=nn.Linear(24, 8))


@case(39, free=[5, 7], inputs=tokens())
def causal_linear_attention():
    def body(s, x):
        q, k, v = F.relu(s.q(x)), F.relu(s.k(x)), s.v(x)
        past = torch.cumsum(k[..., :, None] * v[..., None, :], 1)
        return s.o(torch.einsum("bnd,bnde->bne", q, past))

    return Net(body, **four(5, 5, 7, 3))


@case(53, "buckets", free=[4, 5, 6], frozen="vocabulary", inputs=tokens())
@case(53, "slopes", free=[4, 5, 6], inputs=tokens())
def bias_of_every_head(how):
    """As in T5, an embedding of distances whose features are heads; as in ALiBi, a slope per head."""

    def body(s, x):
        q, k, v = heads_of(s.q(x), 4), heads_of(s.k(x), 4), heads_of(s.v(x), 4)
        distance = torch.arange(5)[None] - torch.arange(5)[:, None]
        if how == "buckets":
            bias = s.buckets((distance + 4).clamp(0, 8)).permute(2, 0, 1)[None]
        else:
            bias = -distance.abs() * s.slopes[:, None, None]
        return s.o(merged((q @ k.mT + bias).softmax(-1) @ v))

    part = {"buckets": nn.Embedding(9, 4)} if how == "buckets" else {"slopes": torch.tensor([0.5, 0.25, 0.12, 0.06])}
    return Net(body, **four(20, 20, 24, 8), **part)


@case(29, "bias_k and bias_v", free=[2, 4], inputs=tokens())
@case(29, "zeros for nobody", free=[2, 4], inputs=tokens())
@case(29, "weights of every head", free=[4], frozen="model output 1", inputs=tokens(), budget="params=80%")
def multihead_attention_with(what):
    def body(s, x):
        if what == "weights of every head":
            return s.attention(x, x, x, average_attn_weights=False)
        return s.attention(x, x, x, need_weights=False)[0]

    options = {"bias_k and bias_v": {"add_bias_kv": True}, "zeros for nobody": {"add_zero_attn": True, "bias": False}}
    return Net(body, attention=nn.MultiheadAttention(8, 2, batch_first=True, **options.get(what, {})))


@case(29, free=[8, 2, 4, 12], inputs=lambda n: (ids()(n), torch.zeros(n, 7, dtype=torch.bool)), inexact=True)
def encoder_with_hidden_padding():
    def body(s, words, hidden):
        return s.head(s.encoder(s.emb(words), src_key_padding_mask=hidden))

    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 1, enable_nested_tensor=False
    )
    return Net(body, emb=nn.Embedding(20, 8), encoder=encoder, head=nn.Linear(8, 3))
