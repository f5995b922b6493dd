"""Rows 36, 37, 40: parameters in products of every form, recurrent layers and scans, embeddings."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import nets
from nets import Net
from structures import case, ids, tokens, vectors

case(36, free=[16], inputs=vectors())(nets.parameter_matmul)

PRODUCTS = {
    "einsum": lambda s, x: torch.einsum("bni,io->bno", x, s.w),
    "einsum of two letters": lambda s, x: torch.einsum("...i,oi->...o", x, s.w.t()),
    "linear": lambda s, x: F.linear(x, s.w.t(), s.b),
    "addmm": lambda s, x: torch.addmm(s.b, x.flatten(0, 1), s.w).view(*x.shape[:-1], -1),
    "conv": lambda s, x: F.conv1d(x.mT, s.w.t()[..., None], s.b).mT,
    "tensordot": lambda s, x: torch.tensordot(x, s.w, 1),
    "broadcast sum": lambda s, x: (x[..., None] * s.w).sum(-2),
}


@case(36, "einsum", free=[16], inputs=tokens(6))
@case(36, "einsum of two letters", free=[16], inputs=tokens(6))
@case(36, "linear", free=[16], inputs=tokens(6))
@case(36, "addmm", free=[16], inputs=tokens(6))
@case(36, "conv", free=[16], inputs=tokens(6))
@case(36, "tensordot", free=[16], inputs=tokens(6))
@case(36, "broadcast sum", free=[16], inputs=tokens(6))
def parameter_in(how):
    parts = {"w": nn.Parameter(torch.randn(6, 16)), "b": nn.Parameter(torch.randn(16))}
    return Net(lambda s, x: s.head(F.gelu(PRODUCTS[how](s, x))), head=nn.Linear(16, 3), **parts)


@case(36, "einsum", free=[4, 6, 5], inputs=tokens())
@case(36, "tensors of heads", free=[4, 6, 5], inputs=tokens(), inexact=True)
def projections_with_head_dimensions(how):
    def body(s, x):
        if how == "einsum":
            q, k, v = (torch.einsum("bnc,chd->bhnd", x, w) for w in (s.q, s.k, s.v))
            return torch.einsum("bhnd,hdc->bnc", F.scaled_dot_product_attention(q, k, v), s.o)
        q, k, v = (x[:, None] @ w.transpose(0, 1) for w in (s.q, s.k, s.v))
        return (F.scaled_dot_product_attention(q, k, v) @ s.o).sum(1)

    shapes = {"q": (8, 4, 6), "k": (8, 4, 6), "v": (8, 4, 5), "o": (4, 5, 8)}
    return Net(body, **{name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()})


class Conv1D(nn.Module):
    """The linear layer of GPT-2: weight (in, out)."""

    def __init__(self, n_out, n_in):
        super().__init__()
        self.n_out = n_out
        self.weight, self.bias = nn.Parameter(torch.randn(n_in, n_out) / 3), nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.size()[:-1], self.n_out)


@case(36, free=[24, 4, 6, 6], inputs=tokens())
def gpt2_layers():
    def body(s, x):
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, 4, 6).transpose(1, 2) for t in s.attn(x).split(24, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous()
        x = x + s.proj(y.view(b, n, -1))
        return x + s.down(F.gelu(s.up(x)))

    return Net(body, attn=Conv1D(72, 8), proj=Conv1D(8, 24), up=Conv1D(24, 8), down=Conv1D(8, 24))


@case(36, free=[6, 10], inputs=tokens(6))
def slices_of_one_weight():
    def body(s, x):
        a, b = F.linear(x, s.w[:6]), F.linear(x, s.w[6:])
        return s.c(torch.relu(a)) + s.d(torch.tanh(b))

    return Net(body, w=nn.Parameter(torch.randn(16, 6)), c=nn.Linear(6, 3), d=nn.Linear(10, 3))


@case(36, "module", free=[7, 5, 10], inputs=lambda n: (torch.randn(n, 6), torch.randn(n, 4)))
@case(36, "functional", free=[7, 5, 10], inputs=lambda n: (torch.randn(n, 6), torch.randn(n, 4)))
def bilinear(how):
    def body(s, x, y):
        x, y = torch.relu(s.a(x)), torch.relu(s.b(y))
        return s.c(torch.relu(s.both(x, y) if how == "module" else F.bilinear(x, y, s.w, None)))

    part = {"both": nn.Bilinear(7, 5, 10)} if how == "module" else {"w": nn.Parameter(torch.randn(10, 7, 5))}
    return Net(body, a=nn.Linear(6, 7), b=nn.Linear(4, 5), c=nn.Linear(10, 3), **part)


@case(36, free=[5, 6], inputs=tokens(8))
def low_rank_product():
    def body(s, x):
        return s.o(torch.relu(x @ (s.u @ s.v)))

    return Net(body, u=nn.Parameter(torch.randn(8, 5)), v=nn.Parameter(torch.randn(5, 6)), o=nn.Linear(6, 3))


LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


@case(37, "lstm", free=[10], inputs=tokens(6))
@case(37, "gru", free=[10], inputs=tokens(6))
@case(37, "rnn", free=[10], inputs=tokens(6))
def recurrent_layer(kind):
    def body(s, x):
        return s.head(s.layer(x)[0][:, -1])

    return Net(body, layer=LAYERS[kind](6, 10, batch_first=True), head=nn.Linear(10, 3))


@case(37, "lstm", free=[8, 10], inputs=tokens(6))
@case(37, "gru", free=[8, 10], inputs=tokens(6))
def recurrent_between_linears(kind):
    def body(s, x):
        return s.head(torch.relu(s.layer(torch.relu(s.a(x)))[0]))

    return Net(body, a=nn.Linear(6, 8), layer=LAYERS[kind](8, 10, batch_first=True), head=nn.Linear(10, 3))


@case(37, "lstm", free=[10], inputs=tokens(6))
@case(37, "gru", free=[10], inputs=tokens(6))
@case(37, "rnn", free=[10], inputs=tokens(6))
def two_recurrent_layers(kind):
    def body(s, x):
        return s.head(s.layer(x)[0].mean(1))

    return Net(body, layer=LAYERS[kind](6, 10, num_layers=2, batch_first=True, dropout=0.1), head=nn.Linear(10, 3))


@case(37, free=[10], inputs=tokens(6))
def two_layers_both_ways():
    layer = nn.LSTM(6, 10, 2, bidirectional=True, batch_first=True)
    return Net(lambda s, x: s.head(s.layer(x)[0]), layer=layer, head=nn.Linear(20, 3))


@case(37, free=[10], inputs=tokens(6))
def last_state_without_biases():
    layer = nn.GRU(6, 10, bias=False, batch_first=True)
    return Net(lambda s, x: s.head(s.layer(x)[1][0]), layer=layer, head=nn.Linear(10, 3))


@case(37, "lstm", free=[10], inputs=tokens(6))
@case(37, "gru", free=[10], inputs=tokens(6))
def recurrent_both_ways(kind):
    def body(s, x):
        return s.head(s.layer(x)[0])

    return Net(body, layer=LAYERS[kind](6, 10, bidirectional=True, batch_first=True), head=nn.Linear(20, 3))


@case(37, free=[10], inputs=lambda n: torch.randn(5, n, 6))
def last_states_of_both_ways():
    def body(s, x):
        _, (h, _) = s.layer(x)
        return s.head(torch.cat([h[0], h[1]], -1))

    return Net(body, layer=nn.LSTM(6, 10, bidirectional=True), head=nn.Linear(20, 3))


CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}


@case(37, "lstm", free=[10], inputs=tokens(6))
@case(37, "gru", free=[10], inputs=tokens(6))
@case(37, "rnn", free=[10], inputs=tokens(6))
def loop_over_a_cell(kind):
    def body(s, x):
        state = None
        for step in x.unbind(1):
            state = s.cell(step, state)
        return s.head(state[0] if kind == "lstm" else state)

    return Net(body, cell=CELLS[kind](6, 10), head=nn.Linear(10, 3))


@case(37, "lstm", free=[10], inputs=tokens(6))
@case(37, "gru", free=[10], inputs=tokens(6))
def cell_from_zeros_of_a_fixed_size(kind):
    def body(s, x):
        h = x.new_zeros(x.shape[0], 10)
        state = (h, h) if kind == "lstm" else h
        for step in x.unbind(1):
            state = s.cell(step, state)
        return s.head(state[0] if kind == "lstm" else state)

    return Net(body, cell=CELLS[kind](6, 10), head=nn.Linear(10, 3))


@case(37, free=[10, 4], inputs=tokens(6), budget="params=75%")
def lstm_with_projection():
    def body(s, x):
        return s.head(s.layer(x)[0])

    return Net(body, layer=nn.LSTM(6, 10, proj_size=4, batch_first=True), head=nn.Linear(4, 3))


@case(37, free=[10], inputs=tokens(6))
def lstm_with_learned_state():
    def body(s, x):
        n = x.shape[0]
        return s.head(s.layer(x, (s.h.expand(1, n, -1).contiguous(), s.c.expand(1, n, -1).contiguous()))[0])

    states = {name: nn.Parameter(torch.randn(1, 1, 10)) for name in ("h", "c")}
    return Net(body, layer=nn.LSTM(6, 10, batch_first=True), head=nn.Linear(10, 3), **states)


@case(37, free=[8, 10], inputs=lambda n: (ids()(n), torch.randint(0, 20, (n, 4))))
def encoder_and_decoder():
    def body(s, source, target):
        _, state = s.encoder(s.emb(source))
        return s.head(s.decoder(s.emb(target), state)[0])

    parts = {"encoder": nn.GRU(8, 10, batch_first=True), "decoder": nn.GRU(8, 10, batch_first=True)}
    return Net(body, emb=nn.Embedding(20, 8), head=nn.Linear(10, 20), **parts)


def sequences(n):
    return torch.randn(n, 5, 6), torch.full((n,), 5)


@case(37, refused="cannot be captured.*pad_packed_sequence", inputs=sequences)
def packed_sequences():
    """Lengths in a tensor decide how many steps there are."""

    def body(s, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True)
        return s.head(pad_packed_sequence(s.layer(packed)[0], batch_first=True)[0])

    return Net(body, layer=nn.LSTM(6, 10, batch_first=True), head=nn.Linear(10, 3))


@case(40, free=[8, 10], inputs=ids())
def embedding_and_mlp():
    return nn.Sequential(nn.Embedding(20, 8, padding_idx=0), nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 3))


@case(40, "slice", free=[8], inputs=ids(), inexact=True)
@case(40, "arange", free=[8], inputs=ids(), inexact=True)
@case(40, "buffer", free=[8], inputs=ids(), inexact=True)
def words_and_positions(how):
    def body(s, words):
        n = words.shape[1]
        at = {"arange": lambda: s.position(torch.arange(n)), "buffer": lambda: s.position(s.ids[:, :n])}
        x = s.emb(words) + (s.position.weight[:n] if how == "slice" else at[how]())
        return s.head(s.norm(x).mean(1))

    parts = {"emb": nn.Embedding(20, 8), "position": nn.Embedding(12, 8), "norm": nn.LayerNorm(8)}
    return Net(body, head=nn.Linear(8, 3), ids=torch.arange(12)[None], **parts)


@case(40, "mean", free=[8], inputs=ids())
@case(40, "sum", free=[8], inputs=ids())
def embedding_bag(how):
    return nn.Sequential(nn.EmbeddingBag(20, 8, mode=how), nn.Linear(8, 3))


@case(40, free=[8], inputs=lambda n: (torch.randint(0, 20, (7,)), torch.tensor([0, 3])), batches=())
def embedding_bag_with_offsets():
    return Net(lambda s, x, offsets: s.head(s.bag(x, offsets)), bag=nn.EmbeddingBag(20, 8), head=nn.Linear(8, 3))


@case(40, free=[4, 8], inputs=ids())
def factorized_embedding():
    def body(s, words):
        x = s.emb(words) * 8**0.5
        return s.head(F.gelu(s.up(x)))

    return Net(body, emb=nn.Embedding(20, 4), up=nn.Linear(4, 8, bias=False), head=nn.Linear(8, 3))


@case(37, free=[12, 4, 8, 3], inputs=ids(), inexact=True)
def selective_state_space():
    """As in Mamba: a scan whose decay, input and output weights are computed from what is scanned."""

    def body(s, words):
        x = s.emb(words)
        u, gate = s.into(s.norm(x)).chunk(2, -1)
        u = F.silu(s.conv(u.transpose(1, 2))[..., :7]).transpose(1, 2)
        step, b, c = s.weights(u).split([3, 4, 4], -1)
        step, decay = F.softplus(s.step(step)), -torch.exp(s.log_decay)
        state, ys = torch.zeros(x.shape[0], 12, 4), []
        for t in range(7):
            state = torch.exp(step[:, t, :, None] * decay) * state + (step * u)[:, t, :, None] * b[:, t, None, :]
            ys.append((state * c[:, t, None]).sum(-1))
        return s.head(x + s.out((torch.stack(ys, 1) + u * s.skip) * F.silu(gate)))

    parts = {"into": nn.Linear(8, 24), "conv": nn.Conv1d(12, 12, 4, padding=3, groups=12), "out": nn.Linear(12, 8)}
    parts |= {"weights": nn.Linear(12, 11), "step": nn.Linear(3, 12), "log_decay": nn.Parameter(torch.randn(12, 4) / 9)}
    parts |= {"skip": nn.Parameter(torch.ones(12)), "emb": nn.Embedding(20, 8), "head": nn.Linear(8, 5)}
    return Net(body, norm=nn.RMSNorm(8), **parts)


@case(37, free=[10, 16, 10], inputs=tokens(8))
def tokens_shifted_by_one():
    """As in RWKV: every token is mixed with the one before it, channel by channel."""

    def body(s, x):
        x = s.into(x)
        before = F.pad(x, (0, 0, 1, -1))
        keys = s.k(x * s.mix_k + before * (1 - s.mix_k))
        gate = torch.sigmoid(s.r(x * s.mix_r + before * (1 - s.mix_r)))
        return s.out(gate * s.v(F.relu(keys).square()))

    parts = {"mix_k": nn.Parameter(torch.rand(10)), "mix_r": nn.Parameter(torch.rand(10)), "k": nn.Linear(10, 16)}
    return Net(body, into=nn.Linear(8, 10), v=nn.Linear(16, 10), r=nn.Linear(10, 10), out=nn.Linear(10, 3), **parts)
