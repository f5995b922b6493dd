"""The user's class keeps running: what modules remember follows the program, and nothing is guessed."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nets import Net, conv
from secateur import api, store
from secateur.apply.attributes import write_
from secateur.apply.shrink import carry_out, shrink_
from secateur.errors import DataError, PlanError
from secateur.graph import analyze
from secateur.planning import make

X = torch.randn(2, 5, 8)
WIDTHS, HEADS = ("*head width", "*value width"), ("*heads",)


class Attention(nn.Module):
    """Remembers heads and their width; ``scale`` is its own unless ``implicit``, ``fused`` has one projection."""

    def __init__(self, heads=3, width=6, fused=False, implicit=False, norm=False):
        super().__init__()
        self.num_heads, self.head_dim, self.scale = heads, width, None if implicit else width**-0.5
        inner = heads * width
        if fused:
            self.qkv = nn.Linear(8, 3 * inner)
        else:
            self.q, self.k, self.v = (nn.Linear(8, inner) for _ in range(3))
        if norm:
            self.norm = nn.LayerNorm(width)
        self.o = nn.Linear(inner, 8)

    def forward(self, x):
        b, n, _ = x.shape
        shape = (b, n, self.num_heads, self.head_dim)
        if hasattr(self, "qkv"):
            q, k, v = self.qkv(x).view(b, n, 3, *shape[2:]).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (p(x).view(shape).transpose(1, 2) for p in (self.q, self.k, self.v))
        if hasattr(self, "norm"):
            q = self.norm(q)
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return x + self.o(y.transpose(1, 2).reshape(b, n, self.num_heads * self.head_dim))


class Stack(nn.Module):
    """Layers one after the other, as many as it remembers."""

    def __init__(self, *layers):
        super().__init__()
        self.layers, self.num_layers = nn.ModuleList(layers), len(layers)

    def forward(self, x):
        for i in range(self.num_layers):
            x = self.layers[i](x)
        return x


def shrunk(model, inputs=X, budget="params=70%", allocate="uniform", **wishes):
    graph = analyze(model.eval(), inputs)
    return carry_out(model, make(model, graph, budget=budget, allocate=allocate, criterion="random", **wishes))


def only(model, ignore, inputs=X):
    names = [a.name for a in analyze(model.eval(), inputs).axes]
    return tuple(g for g in ignore if any(g.strip("*") in n for n in names))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("ignore", [(), WIDTHS, HEADS])
@pytest.mark.parametrize(("heads", "width"), [(3, 6), (4, 4), (2, 8)])
def test_heads_and_their_width_follow_even_where_both_are_the_same_number(heads, width, ignore, fused):
    model = Attention(heads, width, fused)
    done = shrunk(model, budget="params=80%", ignore=only(model, ignore))
    assert done.form == "module", done.why
    small = done.model
    assert small.o.weight.shape[1] == small.num_heads * small.head_dim < heads * width
    assert ignore != WIDTHS or small.head_dim == width
    assert ignore != HEADS or small.num_heads == heads
    assert small.scale == width**-0.5
    assert (model.num_heads, model.head_dim) == (heads, width)


def test_layers_of_one_class_may_differ():
    model = Stack(Attention(4), Attention(4), Attention(4))
    part = {"layers.0 heads": 0.75, "layers.1 heads": 0.5, "layers.2 heads": 0.0}
    done = shrunk(model, overrides=part, ignore=WIDTHS)
    assert done.form == "module", done.why
    assert [layer.num_heads for layer in done.model.layers] == [1, 2, 4]
    assert done.attributes == {"layers.0": {"num_heads": 1}, "layers.1": {"num_heads": 2}}


def test_what_only_happens_to_be_the_same_number_stays():
    model = Stack(Attention(4, 6), Attention(4, 6), Attention(4, 6), Attention(4, 6))
    model.heads_by_name = 4
    done = shrunk(model)
    assert done.form == "module"
    assert (done.model.num_layers, done.model.heads_by_name) == (4, 4)


@dataclass
class Config:
    heads: int = 4
    width: int = 6
    layers: int = 2


class Configured(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        inner = config.heads * config.width
        self.q, self.k, self.v, self.o = (
            nn.Linear(8, inner),
            nn.Linear(8, inner),
            nn.Linear(8, inner),
            nn.Linear(inner, 8),
        )

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (p(x).view(b, n, self.config.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, scale=0.4)
        return x + self.o(y.transpose(1, 2).reshape(b, n, -1))


def test_an_object_that_modules_share_changes_only_where_one_value_serves_them_all():
    config = Config()
    model = Stack(Configured(config), Configured(config))
    done = shrunk(model, overrides={"layers.* heads": 0.5}, ignore=WIDTHS)
    assert done.form == "module", done.why
    assert done.model.layers[0].config is done.model.layers[1].config
    assert (done.model.layers[0].config, config) == (Config(heads=2), Config())
    done = shrunk(model, overrides={"layers.0 heads": 0.5, "layers.1 heads": 0.25}, ignore=WIDTHS)
    assert done.form == "program"
    assert config == Config()


def test_a_frozen_object_is_no_obstacle():
    @dataclass(frozen=True)
    class Frozen:
        heads: int = 4

    model = Attention(4, 6)
    model.settings = Frozen()
    assert shrunk(model).form == "module"


def test_tuples_lists_and_unflatten():
    class Shaped(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.a, self.b, self.shape = nn.Linear(6, 96), conv(6, 4), kind((6, 4, 4))

        def forward(self, x):
            return self.b(F.relu(self.a(x)).view(-1, *self.shape))

    for kind in (tuple, list, torch.Size):
        done = shrunk(Shaped(kind), torch.randn(3, 6))
        assert done.form == "module", done.why
        assert tuple(done.model.shape)[1:] == (4, 4)
        assert done.model.shape[0] == done.model.b.in_channels < 6
    model = nn.Sequential(nn.Linear(6, 96), nn.Unflatten(1, (6, 4, 4)), conv(6, 4))
    done = shrunk(model, torch.randn(3, 6))
    assert done.form == "module", done.why
    assert done.model[1].unflattened_size[0] == done.model[2].in_channels < 6


def test_what_no_attribute_holds_gives_the_program_and_says_why():
    class Fixed(Attention):
        def forward(self, x):
            return super().forward(x).view(2, 5, 8) + self.o.weight.view(8, 18).sum()

    model = Fixed()
    before = copy.deepcopy(vars(model))
    done = shrunk(model)
    assert done.form == "program"
    assert "holds on to the old sizes" in done.why
    assert not done.attributes
    assert {k: before[k] for k in ("num_heads", "head_dim", "scale")} == {
        k: vars(model)[k] for k in ("num_heads", "head_dim", "scale")
    }


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_a_scale_that_the_class_derives_moves_into_the_query(fused, norm):
    model = Attention(3, 8, fused, implicit=True, norm=norm)
    done = shrunk(model, ignore=HEADS)
    assert done.form == "module", done.why
    left = done.model.head_dim
    expected = {"norm"} if norm else {"qkv" if fused else "q"}
    assert {name.rpartition(".")[0] for name in done.factors} == expected
    assert set(done.factors.values()) == {(left / 8) ** 0.5}
    if fused and not norm:
        graph = analyze(model, X)
        plan = make(model, graph, budget="params=70%", allocate="uniform", criterion="random", ignore=HEADS)
        kept = model.qkv.weight[plan.slices["qkv.weight"][0]]
        ratio = done.model.qkv.weight.norm(dim=1) / kept.norm(dim=1)
        assert torch.allclose(ratio[: 3 * left], torch.tensor((left / 8) ** 0.5))
        assert torch.allclose(ratio[3 * left :], torch.tensor(1.0))


def test_a_scale_is_left_alone_where_the_class_states_it_or_the_width_stays():
    assert not shrunk(Attention(3, 8)).factors
    assert not shrunk(Attention(3, 8, implicit=True), ignore=WIDTHS).factors


def test_a_query_that_is_the_key_too_cannot_take_the_scale():
    class Shared(Attention):
        def forward(self, x):
            b, n, _ = x.shape
            q, v = (p(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2) for p in (self.q, self.v))
            y = F.scaled_dot_product_attention(q, q, v)
            return self.o(y.transpose(1, 2).reshape(b, n, -1)) + self.k(x).sum()

    done = shrunk(Shared(3, 8), ignore=HEADS)
    assert done.form == "program"
    assert "scale from the width of its heads" in done.why


@pytest.mark.parametrize("implicit", [False, True])
def test_in_place_is_the_same_as_a_copy(implicit):
    model = Stack(Attention(3, 8, implicit=implicit), Attention(3, 8, implicit=implicit)).eval()
    plan = make(model, analyze(model, X), budget="params=70%", allocate="uniform")
    want = carry_out(model, plan)
    assert want.form == "module"
    assert torch.equal(shrink_(model, plan)(X), want.model(X))
    assert [(m.num_heads, m.head_dim) for m in model.layers] == [(m.num_heads, m.head_dim) for m in want.model.layers]


def test_axes_of_which_a_class_remembers_one_size_keep_the_same_part():
    torch.manual_seed(0)
    model = Stack(Attention(3, 8), Attention(3, 8)).eval()
    with torch.no_grad():
        model.layers[0].v.weight.mul_(5)  # so that the width of values would stay and that of queries go
    graph = analyze(model, X)
    alone = carry_out(model, make(model, graph, budget="params=60%"))
    assert alone.form == "program"
    assert alone.equal
    result = api.prune(model, X, budget="params=60%")
    assert result.form == "module"
    kept = {name: int(flags.sum()) for name, flags in result.plan.units.items()}
    assert kept["layers.0 head width"] == kept["layers.0 value width"] == result.model.layers[0].head_dim < 8
    assert any("remembers one size" in note for note in result.report.notes)


def test_attributes_and_factors_survive_saving(tmp_path):
    model = Stack(Attention(3, 8, implicit=True), Attention(3, 8, implicit=True)).eval()
    result = api.prune(model, X, budget="params=60%")
    assert result.form == "module"
    assert result.attributes
    store.save(result, tmp_path / "out")
    loaded = store.load(tmp_path / "out", Stack(Attention(3, 8, implicit=True), Attention(3, 8, implicit=True)))
    assert torch.equal(loaded(X), result.model(X))
    assert [vars(m)["head_dim"] for m in loaded.layers] == [vars(m)["head_dim"] for m in result.model.layers]


@pytest.mark.parametrize(
    ("attributes", "error", "message"),
    [
        ({"": {"forward": 1}}, PlanError, "no such attribute"),
        ({"": {"__class__": 1}}, PlanError, "no such attribute"),
        ({"": {"num_heads": "os.abort"}}, DataError, "attributes are damaged"),
        ({"": {"num_heads": True}}, DataError, "attributes are damaged"),
        ({"": {"num_heads": 2.5}}, PlanError, "hold a value like"),
        ({"": {"training": 1}}, PlanError, "hold a value like"),
        ({"nowhere": {"num_heads": 2}}, PlanError, "no such attribute"),
        ({"": 3}, DataError, "attributes are damaged"),
        ([], DataError, "attributes are damaged"),
    ],
)
def test_hostile_attributes_are_refused(attributes, error, message, tmp_path):
    model = Attention(3, 8).eval()
    store.save(api.prune(model, X, budget="params=60%"), tmp_path / "out")
    about = json.loads((tmp_path / "out" / "model.json").read_text())
    (tmp_path / "out" / "model.json").write_text(json.dumps(about | {"attributes": attributes}))
    with pytest.raises(error, match=message):
        store.load(tmp_path / "out", model)


def test_nothing_is_written_before_everything_fits():
    model = Attention(3, 8)
    with pytest.raises(PlanError, match="no such attribute"):
        write_(model, {"": {"num_heads": 2, "nothing": 1}})
    assert model.num_heads == 3


def test_multi_head_attention_runs_where_heads_and_input_lose_the_same_part():
    model = Net(
        lambda s, x: s.o(s.mha(s.i(x), s.i(x), s.i(x), need_weights=False)[0]),
        i=nn.Linear(8, 16), mha=nn.MultiheadAttention(16, 4, batch_first=True), o=nn.Linear(16, 3),
    ).eval()  # fmt: skip
    names = {a.name: a.units for a in analyze(model, X).free}
    heads = next(n for n in names if n.endswith("heads"))
    stream = next(n for n, units in names.items() if units == 16)
    done = shrunk(model, overrides={heads: 0.25, stream: 0.25}, ignore=WIDTHS, budget="params=85%")
    assert done.form == "module", done.why
    assert (done.model.mha.embed_dim, done.model.mha.num_heads, done.model.mha.head_dim) == (12, 3, 4)
    assert (done.model.mha.kdim, done.model.mha.vdim) == (12, 12)
    done = shrunk(model, overrides={heads: 0.25, stream: 0.5}, ignore=WIDTHS, budget="params=85%")
    assert done.form == "program"


def test_uniform_counts_are_equal_where_sizes_are_equal():
    model = Stack(*(Attention(5, 6) for _ in range(3))).eval()
    for budget in ("params=83%", "params=71%", "params=64%", "macs=77%"):
        plan = make(model, analyze(model, X), budget=budget, allocate="uniform")
        by_size = {}
        for name, kept in plan.allocation.kept.items():
            by_size.setdefault(plan.allocation.total[name], set()).add(kept)
        assert {len(kept) for kept in by_size.values()} == {1}


def test_grouped_queries_lose_whole_groups_and_the_same_queries_of_each():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.groups, self.kv_heads, self.head_dim = 3, 4, 6
            self.q, self.k, self.v = nn.Linear(8, 72), nn.Linear(8, 24), nn.Linear(8, 24)
            self.o = nn.Linear(72, 8)

        def forward(self, x):
            b, n, _ = x.shape
            q, k, v = (p(x).view(b, n, -1, self.head_dim).transpose(1, 2) for p in (self.q, self.k, self.v))
            k, v = (t.repeat_interleave(self.groups, 1) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, scale=0.4)
            return self.o(y.transpose(1, 2).reshape(b, n, -1))

    model = Grouped().eval()
    graph = analyze(model, X)
    plan = make(model, graph, budget="params=45%", criterion="random", ignore=only(model, WIDTHS))
    queries = plan.slices["q.weight"][0].view(4, 3, 6)
    groups = plan.slices["k.weight"][0].view(4, 6)
    assert torch.equal(queries.any(2).any(1), groups.any(1))
    kept = queries.any(2)[groups.any(1)]
    assert bool((kept == kept[:1]).all())
    assert 0 < int(kept[0].sum()) <= 3
    done = carry_out(model, plan)
    assert done.form == "module", done.why
    assert done.model.q.out_features == int(groups.any(1).sum()) * done.model.groups * 6
