"""Whole blocks: found, and dropped so that the class keeps running."""

from __future__ import annotations

import pytest
import torch
from layered import (
    CASES,
    Counted,
    Layer_,
    dropping,
    free,
    frozen,
    images,
    randomize,
    resnet,
    tokens,
    transformer,
    without,
)
from torch import nn
from torch.nn import functional as F

import secateur as sc
from nets import Net, build, conv
from secateur.apply.blame import relative_error
from secateur.apply.depth import Skip
from secateur.apply.shrink import carry_out
from secateur.graph import analyze
from secateur.graph.trace import run

# --- finding ---------------------------------------------------------------------------------------


def test_blocks_with_an_identity_are_found_and_those_that_change_the_width_are_not():
    assert free(randomize(resnet()), images()) == ["1.0", "1.1", "1.2", "2.1"]


@pytest.mark.parametrize("post", [False, True])
def test_layers_are_found_whole_with_norms_before_or_after_the_sum(post):
    assert free(randomize(transformer(post)), tokens()) == ["1.0", "1.1", "1.2", "1.3"]


def test_a_stack_within_a_stack_gives_its_layers_and_a_layer_made_of_residual_parts_is_one():
    class Add(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(8, 8)

        def forward(self, x):
            return x + self.f(x)

    class Other(Add):
        pass

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([Add(), Other()])

        def forward(self, x):
            return self.parts[1](self.parts[0](x))

    stages = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Sequential(Add(), Add()), nn.Sequential(Add(), Add())))
    assert free(stages, tokens()) == ["1.0.0", "1.0.1", "1.1.0", "1.1.1"]
    assert free(nn.Sequential(nn.Linear(8, 8), nn.Sequential(Pair(), Pair())), tokens()) == ["1.0", "1.1"]


def test_a_network_without_block_modules_has_branches_for_blocks():
    assert free(*build("residual")) == ["branch a..b", "branch c..d"]
    assert free(*build("tied_linear")) == ["branch up..down"]
    assert free(*build("plain")) == []
    assert free(*build("dense_cat")) == []


def test_a_body_that_adds_several_times_by_itself_is_taken_apart():
    net = randomize(nn.Sequential(nn.Linear(8, 8), Layer_(), nn.Linear(8, 3)))
    assert free(net, tokens()) == ["1"]  # an item of a list is a layer
    named = Net(lambda s, x: s.head(s.core(s.stem(x))), stem=nn.Linear(8, 8), core=Layer_(), head=nn.Linear(8, 3))
    assert len(free(randomize(named), tokens())) == 2


def test_a_block_that_others_read_from_is_frozen_and_says_who_does():
    def body(s, x):
        x, bias = s.layers[0](s.stem(x), None)
        return s.head(s.layers[1](x, bias)[0])

    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.g = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, bias):
            bias = self.g(x) if bias is None else bias
            return x + self.f(x) * bias, bias

    net = Net(body, stem=nn.Linear(8, 8), head=nn.Linear(8, 3))
    net.layers = nn.ModuleList([Biased(), Biased()])
    assert free(net, tokens()) == ["layers.1"]
    assert "is also used by aten.mul" in frozen(net, tokens())["layers.0"]


def test_internal_features_that_the_model_returns_freeze_blocks_and_its_last_output_does_not():
    class Hidden(nn.Module):
        def __init__(self, every):
            super().__init__()
            self.every, self.stem, self.layers = every, nn.Linear(8, 8), nn.ModuleList(Layer_() for _ in range(3))

        def forward(self, x):
            seen = [x := self.stem(x)]
            for layer in self.layers:
                seen.append(x := layer(x))
            return seen if self.every else x

    assert free(randomize(Hidden(every=False)), tokens()) == ["layers.0", "layers.1", "layers.2"]
    assert free(randomize(Hidden(every=True)), tokens()) == []
    assert "internal feature" in frozen(randomize(Hidden(every=True)), tokens())["layers.2"]


def test_a_block_that_runs_twice_goes_from_both_places():
    model, x = randomize(nn.Sequential(nn.Linear(8, 8), Twice(), nn.Linear(8, 3))), tokens()
    assert [(b.name, len(b.spans)) for b in analyze(model, x).blocks] == [("1.list.0", 2)]
    done = carry_out(model, dropping(model, x, ["1.list.0"]))
    assert relative_error(run(done.model, x), without(model, ["1.list.0"], x)) < 1e-6
    assert not any("list" in name for name, _ in done.model.named_parameters())


def test_a_tensor_that_another_block_shares_stays_until_both_are_gone():
    twin = Net(lambda s, x: s.head(s.one(s.mid(s.two(s.stem(x))))), stem=nn.Linear(8, 8), mid=nn.Linear(8, 8))
    twin.one, twin.two, twin.head = Basic1(), Basic1(), nn.Linear(8, 3)
    twin.two.f.weight = twin.one.f.weight
    graph, off = analyze(twin, tokens()), torch.zeros(1, dtype=torch.bool).numpy()
    dense, one, both = (graph.cost(dict.fromkeys(names, off)).params for names in ([], ["one"], ["one", "two"]))
    assert (dense - one, one - both) == (8, 64 + 8)
    x = tokens()
    done = carry_out(twin, dropping(twin, x, ["one"]))
    assert relative_error(run(done.model, x), without(twin, ["one"], x)) < 1e-6


class Basic1(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x):
        return x + F.relu(self.f(x))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.list, self.mid = nn.ModuleList([Basic1()]), nn.Linear(8, 8)

    def forward(self, x):
        for block in self.list:
            x = block(x)
        x = self.mid(x)
        for block in self.list:
            x = block(x)
        return x


# --- dropping: the law -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_class_without_blocks_equals_the_original_that_skips_them(case):
    factory, inputs, names = CASES[case]
    model, x = randomize(factory()), inputs()
    graph, before = analyze(model, x), {k: v.clone() for k, v in model.state_dict().items()}
    expected = without(model, names, x)
    assert relative_error(expected, run(model, x)) > 1e-3  # the blocks do something
    plan = dropping(model, x, names)
    done = carry_out(model, plan)
    assert done.form == "module"
    assert set(done.taken.values()) == {-1}  # deleted, not replaced
    assert type(done.model) is type(model)
    assert relative_error(run(done.model, x), expected) < 1e-6
    assert done.law.oracle == "zeroed original without the blocks that go"
    cost = graph.cost({name: flags.numpy() for name, flags in plan.units.items()})
    assert sum(p.numel() for p in done.model.parameters()) == cost.params
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_numbers_that_layers_and_their_owner_remember_follow():
    model, x = randomize(Counted()), tokens()
    small = sc.shrink(model, dropping(model, x, ["layers.0", "layers.2"]))
    assert [layer.layer_idx for layer in small.layers] == [0, 1]
    assert (small.num_layers, model.num_layers) == (2, 4)


def test_where_deleting_shifts_something_else_the_place_is_kept():
    model, x = randomize(Counted(factors=True)), tokens()
    done = carry_out(model, dropping(model, x, ["layers.1"]))
    assert isinstance(done.model.layers[1], Skip)
    assert relative_error(run(done.model, x), without(model, ["layers.1"], x)) < 1e-6


@pytest.mark.parametrize("pair", [False, True])
def test_blocks_in_no_list_are_replaced_by_what_hands_their_input_on(pair):
    class Attributes(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.one, self.two = nn.Linear(8, 8), Layer_(pair=pair), Layer_(pair=pair)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            x = self.one(x=self.stem(x)) if not pair else self.one(self.stem(x))[0]
            x = self.two(x)[0] if pair else self.two(x)
            return self.head(x)

    model, x = randomize(Attributes()), tokens()
    names = ["two"] if not pair else ["one", "two"]
    done = carry_out(model, dropping(model, x, names))
    assert done.form == "module"
    assert all(isinstance(done.model.get_submodule(name), Skip) for name in names)
    assert relative_error(run(done.model, x), without(model, names, x)) < 1e-6
    assert done.taken == dict.fromkeys(names, 2 if pair else 0)


def test_branches_go_as_a_program_that_trains_and_takes_any_batch():
    model, x = build("residual")
    done = carry_out(model, dropping(model, x, ["branch c..d"]))
    assert (done.form, done.why) == ("program", "'branch c..d' is no module that could be taken out")

    def by_hand(x):
        x = model.stem(x)
        return model.tail(x + model.b(F.relu(model.a(x))))

    assert relative_error(run(done.model, x), by_hand(x)) < 1e-6
    assert {name.split(".")[0] for name, _ in done.model.named_parameters()} == {"stem", "a", "b", "tail"}
    more = torch.randn(5, 3, 8, 8)
    out = done.model.train()(more)
    out.sum().backward()
    assert relative_error(out, by_hand(more)) < 1e-5
    assert all(p.grad is not None for p in done.model.parameters())


def test_what_is_written_into_later_is_not_what_others_still_read():
    def body(s, x):
        kept = s.stem(x)
        y = kept + s.b(F.relu(s.a(kept)))
        return s.head(F.relu(y, inplace=True)) + s.side(kept)

    parts = {"stem": conv(3, 8), "a": conv(8, 8), "b": conv(8, 8), "head": conv(8, 4), "side": conv(8, 4)}
    model, x = Net(body, **parts).eval(), images()
    done = carry_out(model, dropping(model, x, ["branch a..b"]))
    kept = model.stem(x)
    assert relative_error(run(done.model, x), model.head(F.relu(kept)) + model.side(kept)) < 1e-6


def test_in_place_as_well():
    model, x = randomize(Counted()), tokens()
    plan, expected = dropping(model, x, ["layers.2"]), without(model, ["layers.2"], x)
    assert sc.shrink_(model, plan) is model
    assert relative_error(run(model, x), expected) < 1e-6
    assert len(model.layers) == 3
