"""Rows 39, 52-55: products of features, mixing over tokens, windows, experts, computed weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import nets
from nets import Net, conv, tail
from structures import case, tokens, vectors
from structures.attention import heads_of, merged

case(39, free=[6, 5])(nets.outer_product)
case(39, free=[6])(nets.bilinear_pooling)
case(39, free=[8, 6], inexact=True)(nets.softmax_over_channels)


@case(39, "embedded", free=[8, 5, 7])
@case(39, "dot product", free=[8, 5, 7])
def non_local(how):
    def body(s, x):
        x = F.relu(s.stem(x))
        theta, phi, g = s.theta(x).flatten(2).transpose(1, 2), s.phi(x).flatten(2), s.g(x).flatten(2).transpose(1, 2)
        scores = theta @ phi
        y = (scores.softmax(-1) if how == "embedded" else scores / scores.shape[-1]) @ g
        return s.tail(x + s.out(y.transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])))

    parts = {"theta": conv(8, 5, 1), "phi": conv(8, 5, 1), "g": conv(8, 7, 1), "out": conv(7, 8, 1)}
    return Net(body, stem=conv(3, 8), tail=tail(8), **parts)


@case(39, free=[8, 12], inexact=True)
def attention_between_channels():
    """As in DANet: every channel asks every other."""

    def body(s, x):
        x = F.relu(s.stem(x))
        flat = s.a(x).flatten(2)
        y = (flat @ flat.mT).softmax(-1) @ flat
        return s.tail(F.relu(s.b(y.view(x.shape[0], -1, 8, 8))) + x)

    return Net(body, stem=conv(3, 8), a=conv(8, 12), b=conv(12, 8), tail=tail(8))


@case(39, free=[4, 5], inputs=tokens(6), budget="params=80%", inexact=True)
def linear_attention():
    """Without a softmax over tokens: keys meet values first."""

    def body(s, x):
        q, k, v = F.elu(s.q(x)) + 1, F.elu(s.k(x)) + 1, s.v(x)
        return s.o((q @ (k.mT @ v)) / (q @ k.sum(1)[..., None]))

    return Net(body, q=nn.Linear(6, 4), k=nn.Linear(6, 4), v=nn.Linear(6, 5), o=nn.Linear(5, 3))


@case(39, free=[5, 4], inputs=vectors())
def low_rank_outer_sum():
    def body(s, x):
        a, b = s.a(x), s.b(x)
        return s.c(torch.einsum("bi,bj->bij", a, b).flatten(1)) + s.c(torch.einsum("bi,bj->bij", a, b.exp()).flatten(1))

    return Net(body, a=nn.Linear(6, 5), b=nn.Linear(6, 4), c=nn.Linear(20, 3))


@case(39, free=[8, 7], inputs=vectors(), inexact=True)
def gates_multiplied_and_summed():
    """No factor of the sum is zero where its weights are: the sigmoid of zero is a half."""

    def body(s, x):
        a, b, c = torch.sigmoid(s.a(x)), torch.sigmoid(s.b(x)), torch.sigmoid(s.c(x))
        return s.d(torch.einsum("bij,bi->bj", torch.einsum("bi,bj->bij", a, b), c))

    return Net(body, a=nn.Linear(6, 8), b=nn.Linear(6, 7), c=nn.Linear(6, 8), d=nn.Linear(7, 3))


@case(52, free=[16, 10, 24, 10, 24], inexact=True)
def mlp_mixer():
    def body(s, x):
        x = s.patch(x).flatten(2).transpose(1, 2)
        for block in (s.one, s.two):
            x = x + block["t2"](F.gelu(block["t1"](block["n1"](x).transpose(1, 2)))).transpose(1, 2)
            x = x + block["c2"](F.gelu(block["c1"](block["n2"](x))))
        return s.head(s.norm(x).mean(1))

    def block():
        parts = {"n1": nn.LayerNorm(16), "n2": nn.LayerNorm(16), "t1": nn.Linear(4, 10), "t2": nn.Linear(10, 4)}
        return nn.ModuleDict(parts | {"c1": nn.Linear(16, 24), "c2": nn.Linear(24, 16)})

    return Net(
        body, patch=nn.Conv2d(3, 16, 4, 4), one=block(), two=block(), norm=nn.LayerNorm(16), head=nn.Linear(16, 3)
    )


@case(52, free=[8, 12], inexact=True)
def gated_mlp_over_tokens():
    """The spatial gating unit of gMLP: half of the channels, mixed over tokens, gates the other half."""

    def body(s, x):
        x = s.patch(x).flatten(2).transpose(1, 2)
        u, v = F.gelu(s.up(s.norm(x))).chunk(2, -1)
        v = s.space(s.inner(v).transpose(1, 2)).transpose(1, 2)
        return s.head((x + s.down(u * v)).mean(1))

    parts = {"up": nn.Linear(8, 24), "inner": nn.LayerNorm(12), "space": nn.Linear(4, 4), "down": nn.Linear(12, 8)}
    return Net(body, patch=nn.Conv2d(3, 8, 4, 4), norm=nn.LayerNorm(8), head=nn.Linear(8, 3), **parts)


@case(52, free=[5, 8], frozen="spatial dimension of aten.conv1d", inputs=tokens(6), inexact=True)
def convolution_over_tokens():
    """A convolution whose channels are tokens slides along the features."""

    def body(s, x):
        return s.c(F.relu(s.b(F.relu(s.mix(s.a(x)))))).mean(1)

    parts = {"b": nn.Linear(6, 8), "c": nn.Linear(8, 3)}
    return Net(body, a=nn.Linear(6, 6), mix=nn.Conv1d(5, 5, 3, padding=1), **parts)


def quarters(x):
    """(batch, height, width, channels) to a quarter of the positions with four times the channels."""
    return torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)


@case(53, "strided slices", free=[6, 10], inexact=True)
@case(53, "view", free=[6, 10], inexact=True)
def patch_merging(how):
    def body(s, x):
        x = F.gelu(s.patch(x)).permute(0, 2, 3, 1)
        if how == "view":
            b, h, w, c = x.shape
            x = x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
        else:
            x = quarters(x)
        return s.head(s.reduce(s.norm(x)).mean((1, 2)))

    parts = {"norm": nn.LayerNorm(24), "reduce": nn.Linear(24, 10, bias=False), "head": nn.Linear(10, 3)}
    return Net(body, patch=nn.Conv2d(3, 6, 2, 2), **parts)


def relative_index(size=2):
    """Positions in a table of relative offsets, for every pair of positions in a window."""
    grid = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).flatten(1)
    offsets = (grid[:, :, None] - grid[:, None, :]) + size - 1
    return offsets[0] * (2 * size - 1) + offsets[1]


def window_attention(s, x, mask=None):
    """As in Swin: x is (windows, positions, channels)."""
    b, n, _ = x.shape
    qkv = s.qkv(x).reshape(b, n, 3, 2, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    scores = q @ k.transpose(-2, -1) * 0.5
    scores = scores + s.table[s.index.view(-1)].view(n, n, -1).permute(2, 0, 1)[None]
    if mask is not None:
        scores = (scores.view(-1, len(mask), 2, n, n) + mask[None, :, None]).view(-1, 2, n, n)
    return s.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1))


@case(53, "plain", free=[8, 2, 4], inexact=True)
@case(53, "shifted", free=[8, 2, 4], inexact=True)
def windows(how):
    def body(s, x):
        x = s.patch(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        y = s.norm(x)
        if how == "shifted":
            y = torch.roll(y, (-1, -1), (1, 2))
        y = y.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        y = window_attention(s, y, s.mask if how == "shifted" else None)
        y = y.view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        if how == "shifted":
            y = torch.roll(y, (1, 1), (1, 2))
        return s.head((x + y).mean((1, 2)))

    parts = {"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8), "head": nn.Linear(8, 3), "norm": nn.LayerNorm(8)}
    parts |= {"table": nn.Parameter(torch.randn(9, 2)), "index": relative_index(), "mask": -9.0 * torch.eye(4)[None]}
    parts["mask"] = parts["mask"].repeat(4, 1, 1)
    return Net(body, patch=nn.Conv2d(3, 8, 2, 2), **parts)


@case(53, free=[8, 2, 4, 4, 5, 2], inexact=True)
def bias_from_a_small_network():
    """As in Swin V2: positions to biases of the heads by an MLP; cosine attention with a scale per head."""

    def body(s, x):
        x = s.patch(x).flatten(2).transpose(1, 2)
        q, k, v = (heads_of(t, 2) for t in s.qkv(x).chunk(3, -1))
        bias = s.up(F.relu(s.down(s.positions))).permute(2, 0, 1)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * s.scale.exp() + bias
        return s.head((x + s.proj(merged(scores.softmax(-1) @ v))).mean(1))

    parts = {"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8), "head": nn.Linear(8, 3)}
    parts |= {"down": nn.Linear(2, 5), "up": nn.Linear(5, 2), "positions": torch.randn(4, 4, 2)}
    return Net(body, patch=nn.Conv2d(3, 8, 4, 4), scale=nn.Parameter(torch.rand(2, 1, 1)), **parts)


class Branch(nn.Module):
    """A decision taken in Python, on the values."""

    def __init__(self, into=6, out=3):
        super().__init__()
        self.a, self.b = nn.Linear(into, 8), nn.Linear(8, out)

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.b(x) if x.sum() > 0 else -self.b(x)


case(54, inputs=vectors(), refused=r"cannot be captured.*control flow")(Branch)


@case(54, free=[10, 12], frozen=r"cannot follow choose \(Branch\)", inputs=vectors())
def decision_inside():
    """The module that decides stays whole; what comes before and after it does not have to."""
    first = [nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8)]
    last = [nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)]
    return Net(
        lambda s, x: s.last(s.choose(s.first(x))),
        first=nn.Sequential(*first), choose=Branch(8, 8), last=nn.Sequential(*last),
    )  # fmt: skip


@case(54, "taken", free=[8, 8, 10, 12], inputs=vectors(), inexact=True)
@case(54, "not taken", free=[8, 8, 10, 12], inputs=vectors(), inexact=True)
def branches_of_cond(first):
    def body(s, x):
        x = F.relu(s.a(x))
        choice = x.sum() >= 0 if first == "taken" else x.sum() < 0
        return s.head(torch.cond(choice, lambda t: s.b2(F.relu(s.b1(t))), lambda t: s.c2(F.relu(s.c1(t))), (x,)))

    parts = {"b1": nn.Linear(8, 10), "b2": nn.Linear(10, 8), "c1": nn.Linear(8, 12), "c2": nn.Linear(12, 8)}
    return Net(body, a=nn.Linear(6, 8), head=nn.Linear(8, 3), **parts)


@case(54, free=[8, 8, 12, 12, 12], frozen="picked out by a fixed index", inputs=tokens(6))
def every_expert_weighted():
    def body(s, x):
        x = F.relu(s.a(x))
        gates = s.router(x).softmax(-1)
        y = sum(gates[..., i : i + 1] * s.down[i](F.silu(s.up[i](x))) for i in range(3))
        return s.head(y)

    parts = {"up": [nn.Linear(8, 12) for _ in range(3)], "down": [nn.Linear(12, 8) for _ in range(3)]}
    lists = {name: nn.ModuleList(layers) for name, layers in parts.items()}
    return Net(body, a=nn.Linear(6, 8), router=nn.Linear(8, 3), head=nn.Linear(8, 3), **lists)


@case(54, free=[8, 8, 10, 3], inputs=tokens(6), inexact=True)
def fused_experts():
    """All experts in one tensor, each computed for every token, weighted by the router."""

    def body(s, x):
        x = F.relu(s.a(x)).flatten(0, 1)
        gates = s.router(x).softmax(-1)
        hidden = F.silu(torch.bmm(x.expand(3, -1, -1), s.up))
        y = (torch.bmm(hidden, s.down) * gates.t()[..., None]).sum(0)
        return s.head(y)

    parts = {"up": nn.Parameter(torch.randn(3, 8, 10) / 3), "down": nn.Parameter(torch.randn(3, 10, 8) / 3)}
    return Net(body, a=nn.Linear(6, 8), router=nn.Linear(8, 3), head=nn.Linear(8, 3), **parts)


@case(54, free=[8, 12, 12, 12], inputs=tokens(6))
def tokens_routed_to_experts():
    """Sparse: every token's two best experts, through a mask; nothing depends on which tokens those are."""

    def body(s, x):
        b, n, _ = x.shape
        x = F.relu(s.a(x)).flatten(0, 1)
        best = s.router(x).softmax(-1).topk(2, -1)
        gates = torch.zeros(len(x), 3, dtype=x.dtype).scatter(1, best.indices, best.values)
        y = torch.zeros_like(x)
        for i in range(3):
            y = y + gates[:, i, None] * s.down[i](F.relu(s.up[i](x)))
        return s.head(y).view(b, n, -1)

    parts = {"up": [nn.Linear(8, 12) for _ in range(3)], "down": [nn.Linear(12, 8) for _ in range(3)]}
    lists = {name: nn.ModuleList(layers) for name, layers in parts.items()}
    return Net(body, a=nn.Linear(6, 8), router=nn.Linear(8, 3), head=nn.Linear(8, 3), **lists)


@case(54, free=[8, 12, 12, 12], frozen="positions in it are computed with", inputs=tokens(6))
def tokens_sorted_to_experts():
    """Every expert takes the tokens that chose it, however many, and adds its results where they came from."""

    def body(s, x):
        b, n, _ = x.shape
        x = F.relu(s.a(x)).flatten(0, 1)
        best = s.router(x).argmax(-1)
        y = torch.zeros_like(x)
        for i in range(3):
            (rows,) = torch.where(best == i)
            y.index_add_(0, rows, s.down[i](F.relu(s.up[i](x[rows]))))
        return s.head(y).view(b, n, -1)

    parts = {"up": [nn.Linear(8, 12) for _ in range(3)], "down": [nn.Linear(12, 8) for _ in range(3)]}
    lists = {name: nn.ModuleList(layers) for name, layers in parts.items()}
    return Net(body, a=nn.Linear(6, 8), router=nn.Linear(8, 3), head=nn.Linear(8, 3), **lists)


@case(54, free=[8, 12], inputs=tokens(6))
def tokens_gathered_and_added_back():
    """Some tokens are taken by index, changed, and added where they came from."""

    def body(s, x):
        x = F.relu(s.a(x)).flatten(0, 1)
        best = s.score(x)[:, 0].topk(4).indices
        y = s.down(F.relu(s.up(x[best])))
        return s.head(x.index_add(0, best, y))

    parts = {"up": nn.Linear(8, 12), "down": nn.Linear(12, 8), "score": nn.Linear(8, 1)}
    return Net(body, a=nn.Linear(6, 8), head=nn.Linear(8, 3), **parts)


@case(55, free=[8, 6, 3], inexact=True)
def mixture_of_kernels():
    """Dynamic convolution: kernels weighted by attention over the image, one convolution per image as groups."""

    def body(s, x):
        x = F.relu(s.a(x))
        b, c, h, w = x.shape
        mix = s.attend(x.mean((2, 3))).softmax(-1)
        kernels = torch.einsum("bk,koihw->boihw", mix, s.kernels)
        y = F.conv2d(x.reshape(1, b * c, h, w), kernels.flatten(0, 1), padding=1, groups=b)
        return s.b(F.relu(y.view(b, -1, h, w)))

    kernels = nn.Parameter(torch.randn(3, 6, 8, 3, 3) / 9)
    return Net(body, a=conv(3, 8), attend=nn.Linear(8, 3), kernels=kernels, b=conv(6, 4))


@case(55, free=[8, 6])
def depthwise_kernels_from_a_linear():
    def body(s, x):
        x = F.relu(s.a(x))
        kernels = s.make(F.relu(s.seed.expand(1, -1))).view(8, 1, 3, 3)
        return s.b(F.conv2d(x, kernels, padding=1, groups=8))

    seed = nn.Parameter(torch.randn(6))
    return Net(body, a=conv(3, 8), make=nn.Linear(6, 72), seed=seed, b=conv(8, 4))


@case(55, free=[4, 8, 10], inputs=tokens(6))
def weights_from_a_linear():
    """A hyper-network: the weight of a layer is the output of another."""

    def body(s, x):
        x = F.relu(s.a(x))
        w = s.make(s.seed).view(10, 8)
        return s.b(torch.relu(F.linear(x, w)))

    return Net(body, a=nn.Linear(6, 8), make=nn.Linear(4, 80), seed=torch.randn(4), b=nn.Linear(10, 3))


@case(55, "complex", free=[8])
@case(55, "real pairs", free=[8])
def filter_in_frequencies(how):
    """As in GFNet: the features' Fourier transform times a learned complex filter."""

    def body(s, x):
        x = s.a(x)
        f = torch.fft.rfft2(x, norm="ortho")
        weight = s.filter if how == "complex" else torch.view_as_complex(s.filter)
        return s.b(F.relu(torch.fft.irfft2(f * weight, s=x.shape[-2:], norm="ortho")))

    weight = torch.randn(8, 8, 5, 2)
    return Net(
        body,
        a=conv(3, 8),
        b=conv(8, 4),
        filter=nn.Parameter(torch.view_as_complex(weight) if how == "complex" else weight),
    )
