"""Whole blocks: found, scored, dropped; the class keeps running; alone and with channels under one budget."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import secateur as sc
from nets import Net, attention, build, conv, tail
from secateur import api, cli
from secateur.apply.blame import relative_error
from secateur.apply.depth import Skip
from secateur.apply.shrink import carry_out
from secateur.depth import make
from secateur.depth.scores import Calibration, influence, reconstruction, taylor
from secateur.errors import BudgetError, DataError, PlanError, SpecError
from secateur.graph import analyze
from secateur.graph.trace import run
from secateur.patterns import Both, Channel, Layer, parse
from secateur.tasks import Classification


@pytest.fixture(autouse=True)
def _short_timing(monkeypatch):
    monkeypatch.setattr(api, "SECONDS", 0.02)


# --- networks --------------------------------------------------------------------------------------


class Basic(nn.Module):
    """A ResNet's block; where the width changes there is no identity."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.a, self.n = conv(inputs, outputs), nn.BatchNorm2d(outputs)
        self.b, self.m = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.down = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x):
        return F.relu(self.m(self.b(F.relu(self.n(self.a(x)), inplace=True))) + self.down(x), inplace=True)


class Layer_(nn.Module):
    """A transformer's layer. ``post``: norms after the sums; ``index`` is remembered, as Hugging Face's layers do."""

    def __init__(self, post=False, index=0, pair=False):
        super().__init__()
        self.attn, self.up, self.out = attention(2, 4), nn.Linear(8, 12), nn.Linear(12, 8)
        self.n1, self.n2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.post, self.layer_idx, self.pair = post, index, pair

    def forward(self, x, scale=None):
        if self.post:
            x = self.n1(x + self.attn(x))
            x = self.n2(x + self.out(F.gelu(self.up(x))))
        else:
            x = x + self.attn(self.n1(x))
            x = x + self.out(F.gelu(self.up(self.n2(x))))
        return (x, None) if self.pair else x


def images():
    return torch.randn(2, 3, 8, 8)


def tokens():
    return torch.randn(2, 5, 8)


def resnet():
    stage = nn.Sequential(*(Basic(8, 8) for _ in range(3)))
    return nn.Sequential(conv(3, 8), stage, nn.Sequential(Basic(8, 12), Basic(12, 12)), tail(12))


def transformer(post=False, layers=4):
    return nn.Sequential(
        nn.Linear(8, 8), nn.Sequential(*(Layer_(post, i) for i in range(layers))), nn.LayerNorm(8), nn.Linear(8, 3)
    )


def mixer():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.n, self.t, self.u = nn.LayerNorm(8), nn.Linear(5, 7), nn.Linear(7, 5)
            self.m, self.c, self.d = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x):
            x = x + self.u(F.gelu(self.t(self.n(x).transpose(1, 2)))).transpose(1, 2)
            return x + self.d(F.gelu(self.c(self.m(x))))

    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(Mixer(), Mixer(), Mixer()), nn.Linear(8, 3))


class Counted(nn.Module):
    """Runs its list by a count of its own, and keeps one factor a layer elsewhere where ``factors``."""

    def __init__(self, layers=4, pair=False, factors=False):
        super().__init__()
        self.stem, self.num_layers = nn.Linear(8, 8), layers
        self.layers = nn.ModuleList(Layer_(index=i, pair=pair) for i in range(layers))
        self.head = nn.Linear(8, 3)
        self.factors = [1.0, 2.0, 3.0, 4.0] if factors else [1.0] * layers

    def forward(self, x):
        x = self.stem(x)
        for i in range(self.num_layers):
            x = self.layers[i](x * self.factors[i])
            x = x[0] if isinstance(x, tuple) else x
        return self.head(x)


def randomize(model, seed=0):
    """Norms that do something, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.6, 1.4, generator=generator)
            nn.init.uniform_(module.bias, -0.3, 0.3, generator=generator)
    return model.eval()


def without(model, names, x):
    """What the model gives where each of these modules hands its first argument on: independent of the program."""
    handles = []
    for name in names:

        def hand_on(module, args, output):
            return args[0] if isinstance(output, torch.Tensor) else (args[0], *output[1:])

        handles.append(model.get_submodule(name).register_forward_hook(hand_on))
    try:
        return run(model, x)
    finally:
        for handle in handles:
            handle.remove()


def free(model, x):
    return [b.name for b in analyze(model, x).blocks if not b.frozen]


def frozen(model, x):
    return {b.name: b.frozen for b in analyze(model, x).blocks if b.frozen}


def dropping(model, x, names):
    """A plan that drops exactly these blocks."""
    graph = analyze(model, x)
    keep = [b.name for b in graph.blocks if not b.frozen and b.name not in names]
    plan = make(model, graph, pattern="layer", budget="threshold=2", criterion="random", ignore=keep)
    assert set(plan.dropped) == set(names)
    return plan


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

CASES = {
    "resnet": (resnet, images, ["1.1", "2.1"]),
    "pre-norm": (transformer, tokens, ["1.0", "1.2"]),
    "post-norm": (lambda: transformer(post=True), tokens, ["1.1", "1.2"]),
    "neighbours": (transformer, tokens, ["1.0", "1.1", "1.2", "1.3"]),
    "mixer": (mixer, tokens, ["1.1"]),
    "counted": (Counted, tokens, ["layers.1", "layers.3"]),
}


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


# --- scores ----------------------------------------------------------------------------------------


class Gated(nn.Module):
    """x + g f(x)."""

    def __init__(self, gate):
        super().__init__()
        self.f, self.gate = nn.Linear(8, 8), gate

    def forward(self, x):
        return x + self.gate * torch.tanh(self.f(x))


def gated(*gates):
    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(*map(Gated, gates)), nn.Linear(8, 3)).eval()


def classes(n=24):
    x, y = torch.randn(n, 8), torch.randint(0, 3, (n,))
    return Classification((x, y), (x, y), (x, y), batch_size=10)


@pytest.mark.parametrize("criterion", ["influence", "reconstruction", "taylor"])
def test_the_block_that_does_least_goes_first(criterion):
    model, task = gated(1.0, 0.01, 0.5, 2.0), classes()
    plan = sc.plan(model, torch.randn(2, 8), pattern="layer", budget="params=90%", criterion=criterion, task=task)
    assert plan.dropped == ("1.1",)
    assert plan.meta["criterion"] == criterion


def test_influence_is_one_minus_the_mean_cosine_over_all_calibration_batches():
    model, task = gated(1.0, 0.5), classes()
    with torch.no_grad():
        x = model[0](task.train[0])
        y = model[1][0](x)
    found = influence(Calibration(model, analyze(model, torch.randn(2, 8)), task), ["1.0", "1.1"])
    assert found["1.0"] == pytest.approx(float(1 - F.cosine_similarity(x, y, dim=1).mean()), rel=1e-4)


def test_reconstruction_is_the_relative_squared_error_of_the_output_and_knows_what_is_gone():
    model, task = gated(1.0, 0.5, 2.0), classes()
    x, names = task.train[0], ["1.0", "1.1", "1.2"]
    data = Calibration(model, analyze(model, torch.randn(2, 8)), task)
    dense, bare = run(model, x), without(model, ["1.0", "1.2"], x)
    found = reconstruction(data, names, ["1.2"])
    assert found.keys() == {"1.0", "1.1"}
    assert found["1.0"] == pytest.approx(float((bare - dense).square().sum() / dense.square().sum()), rel=1e-4)


def test_taylor_is_the_derivative_of_the_loss_along_the_way_to_the_input():
    model, task = gated(1.0, 0.5), classes(10)
    data = Calibration(model, analyze(model, torch.randn(2, 8)), task)
    x, y = task.train

    def loss(gate):
        model[1][0].gate = gate
        return float(task.loss(model.double()(x.double()), y).detach())

    found = taylor(data, ["1.0", "1.1"])["1.0"]
    model = gated(1.0, 0.5)
    model.load_state_dict(data.model.state_dict())
    assert found == pytest.approx(abs(loss(1.001) - loss(0.999)) / 0.002, rel=1e-3)
    assert all(p.grad is None for p in data.model.parameters())


def test_random_is_the_same_from_the_same_seed_and_magnitude_goes_by_the_weights():
    model, x = gated(1.0, 1.0, 1.0, 1.0), torch.randn(2, 8)
    wishes = {"pattern": "layer", "budget": "params=85%"}
    found = {seed: sc.plan(model, x, criterion="random", seed=seed, **wishes).dropped for seed in range(8)}
    assert found[3] == sc.plan(model, x, criterion="random", seed=3, **wishes).dropped
    assert len(set(found.values())) > 1
    with torch.no_grad():
        model[1][2].f.weight *= 0.1
    assert sc.plan(model, x, criterion="magnitude", **wishes).dropped == ("1.2",)


def test_scoring_changes_nothing_and_works_on_what_the_example_does_not_look_like():
    model, task = randomize(transformer()), tokens_task()
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for criterion in ("influence", "reconstruction", "taylor"):
        sc.plan(model, torch.randn(1, 3, 8), pattern="layer", budget="params=80%", criterion=criterion, task=task)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())


def tokens_task():
    class Tokens(Classification):
        def loss(self, output, target):
            return F.cross_entropy(output.mean(1), target)

        def scores(self, output, target):
            return (output.mean(1).argmax(1) == target).float()

    x, y = torch.randn(12, 5, 8), torch.randint(0, 3, (12,))
    return Tokens((x, y), (x, y), (x, y), batch_size=8)


# --- budgets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["macs=60%", "params=55%", "sparsity=30%", "size=70%", "params=700"])
def test_budgets_are_met_and_what_was_needless_comes_back(budget):
    model, x = randomize(resnet()), images()
    graph = analyze(model, x)
    if budget == "params=700":
        model, x = randomize(mixer()), tokens()
        graph = analyze(model, x)
    plan = make(model, graph, pattern="layer", budget=budget)
    kind = {"macs": "macs", "para": "params", "spar": "weights", "size": "bytes"}[budget[:4]]
    dense = getattr(graph.cost(), kind)
    limit = {"macs=60%": 0.6, "params=55%": 0.55, "sparsity=30%": 0.7, "size=70%": 0.7, "params=700": 700 / dense}[
        budget
    ]

    def part(gone):
        return getattr(graph.cost({name: torch.zeros(1, dtype=bool).numpy() for name in gone}), kind) / dense

    assert part(plan.dropped) <= limit
    for name in plan.dropped:
        assert part([other for other in plan.dropped if other != name]) > limit


def test_a_budget_that_blocks_cannot_meet_says_what_they_can():
    model, x = randomize(transformer()), tokens()
    graph = analyze(model, x)
    least = graph.cost({f"1.{i}": torch.zeros(1, dtype=bool).numpy() for i in range(4)}).params / graph.cost().params
    with pytest.raises(BudgetError, match="nearest possible") as caught:
        make(model, graph, pattern="layer", budget="params=1%")
    assert caught.value.nearest == pytest.approx(least)
    model, x = build("plain")
    with pytest.raises(BudgetError, match="no residual blocks") as caught:
        sc.plan(model, x, pattern="layer", budget="macs=50%")
    assert caught.value.nearest == 1.0


def test_ignored_blocks_stay_whether_named_by_themselves_or_by_a_weight():
    model, x = randomize(transformer()), tokens()
    wishes = {"pattern": "layer", "criterion": "random"}
    for ignore, stay in ((["1.0", "1.1"], {"1.0", "1.1"}), (["1.2.up.weight"], {"1.2"}), ([model[1][3]], {"1.3"})):
        plan = sc.plan(model, x, budget="threshold=2", ignore=ignore, **wishes)
        assert set(plan.dropped) == {"1.0", "1.1", "1.2", "1.3"} - stay


def test_wishes_that_do_not_fit_blocks_are_refused():
    model, x = gated(1.0, 0.5), torch.randn(2, 8)
    for wishes, error, words in (
        ({"criterion": "l2"}, SpecError, "does not score blocks"),
        ({"criterion": lambda w, s: w}, SpecError, "does not score blocks"),
        ({"criterion": "taylor"}, DataError, "needs gradients"),
        ({"budget": "max_drop=1%"}, SpecError, "needs a budget of size"),
        ({"budget": None}, SpecError, "needs a budget of size"),
        ({"overrides": {"1.0*": 0.5}}, SpecError, "does not remove"),
        ({"minimum": 4}, SpecError, "does not remove"),
        ({"budget": "latency=50%"}, PlanError, "needs measuring"),
        ({"pattern": "channel+layer", "budget": "threshold=1"}, SpecError, "scores of one kind"),
    ):
        with pytest.raises(error, match=words):
            sc.plan(model, x, **{"pattern": "layer", "budget": "macs=50%", **wishes})


@pytest.mark.parametrize("text", ["layer", "channel+layer", "channel/8+layer"])
def test_notation(text):
    assert str(parse(text)) == text
    assert parse(text) in (Layer(), Both(Channel()), Both(Channel(8)))
    for wrong in ("layers", "layer+channel", "2:4+layer", "layer+layer", "channel+layer+layer"):
        with pytest.raises(SpecError):
            parse(wrong)


# --- with channels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["macs=50%", "params=40%", "sparsity=50%", "size=60%"])
@pytest.mark.parametrize("net", ["resnet", "post-norm"])
def test_width_and_depth_meet_one_budget_and_the_law_holds(net, budget):
    factory, inputs, _ = CASES[net]
    model, x = randomize(factory()), inputs()
    graph = analyze(model, x)
    plan = make(model, graph, pattern="channel+layer", budget=budget)
    kind = {"macs": "macs", "para": "params", "spar": "weights", "size": "bytes"}[budget[:4]]
    cost = graph.cost({name: flags.numpy() for name, flags in plan.units.items()})
    assert getattr(cost, kind) <= {"p": 0.4, "m": 0.5}.get(budget[0], 0.5 if budget[:4] == "spar" else 0.6) * getattr(
        graph.cost(), kind
    )
    done = carry_out(model, plan)
    assert done.law.error < 1e-5
    assert sum(p.numel() for p in done.model.parameters()) == cost.params


def test_the_split_is_the_one_that_the_output_feels_least():
    """Blocks that do nothing go and every channel stays; where blocks do everything, channels go and blocks stay."""
    idle, busy = gated(1e-4, 1e-4, 1e-4, 1e-4), gated(5.0, 5.0, 5.0, 5.0)
    with torch.no_grad():  # half of the stream carries nothing
        for layer in (busy[0], *(block.f for block in busy[1])):
            layer.weight[4:], layer.bias[4:] = 0, 0
    x = torch.randn(6, 8)
    plan = sc.plan(idle, x, pattern="channel+layer", budget="params=45%")
    assert len(plan.dropped) == 3
    assert all(flags.all() for name, flags in plan.units.items() if name not in plan.dropped)
    plan = sc.plan(busy, x, pattern="channel+layer", budget="params=60%")
    assert plan.dropped == ()
    assert plan.meta["criterion"] == "magnitude+influence"


def test_wishes_about_axes_hold_beside_blocks():
    model, x = randomize(transformer()), tokens()
    hidden = [a.name for a in analyze(model, x).free if a.units == 12]
    assert len(hidden) == 4
    wishes = {"budget": "params=60%", "minimum": dict.fromkeys(hidden, 12), "ignore": ["1.0", "residual stream"]}
    plan = sc.plan(model, x, pattern="channel+layer", **wishes)
    assert "1.0" not in plan.dropped
    assert "residual stream" not in plan.units
    assert all(plan.units[name].all() for name in hidden if name in plan.units)


def test_without_values_the_counts_are_real():
    with torch.device("meta"):
        model, x = transformer(), tokens()
    plan = sc.plan(model.eval(), x, pattern="layer", budget="params=60%")
    assert len(plan.dropped) == 2
    assert len(sc.shrink(model, plan)[1]) == 2
    assert sc.plan(model, x, pattern="channel+layer", budget="params=60%").dropped == ()


# --- plans and directories -------------------------------------------------------------------------


def test_plans_are_saved_and_loaded_and_carried_out(tmp_path):
    model, x = randomize(transformer()), tokens()
    plan = dropping(model, x, ["1.1", "1.3"])
    plan.save(tmp_path)
    loaded = sc.Plan.load(tmp_path)
    assert loaded.dropped == plan.dropped
    assert not loaded.diff(plan)
    assert loaded.allocation.kept == {"1.1": 0, "1.3": 0}
    assert relative_error(run(sc.shrink(model, loaded, x), x), without(model, ["1.1", "1.3"], x)) < 1e-6
    text = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**text, "pattern": "channel"}))
    with pytest.raises(DataError, match="keeps no unit at all"):
        sc.Plan.load(tmp_path)


def test_plans_are_refused_where_they_do_not_fit():
    model, x = randomize(transformer()), tokens()
    plan = dropping(model, x, ["1.1"])
    with pytest.raises(PlanError, match="zeros do not show"):
        sc.mask(model, plan)
    with pytest.raises(PlanError, match=r"no such tensor|no such axis or block"):
        sc.shrink(randomize(transformer(layers=1)), plan, x)
    frozen_now = nn.Sequential(*transformer()[:2]).eval()  # the last layer's output is all that is returned
    assert free(frozen_now, x) == ["1.0", "1.1", "1.2", "1.3"]


@pytest.mark.parametrize("case", ["resnet", "counted", "skipped", "program"])
def test_directories_bring_the_model_back(case, tmp_path):
    if case in CASES:
        factory, inputs, names = CASES[case]
    elif case == "skipped":
        factory, inputs, names = lambda: Counted(factors=True), tokens, ["layers.1"]
    else:
        factory, inputs, names = lambda: build("residual")[0], images, ["branch a..b"]
    model, x = randomize(factory()), inputs()
    keep = [name for name in free(model, x) if name not in names]
    result = sc.prune(model, x, pattern="layer", budget="threshold=2", criterion="random", ignore=keep)
    assert result.plan.dropped == tuple(names)
    sc.save(result, tmp_path / "out")
    again = sc.load(tmp_path / "out", randomize(factory(), seed=1))
    assert type(again).__name__ == type(result.model).__name__
    assert relative_error(run(again, x), run(result.model, x)) < 1e-6


def test_a_directory_that_says_nonsense_about_blocks_is_refused(tmp_path):
    model, x = randomize(transformer()), tokens()
    sc.save(sc.prune(model, x, pattern="layer", budget="params=80%"), tmp_path / "out")
    path = tmp_path / "out" / "model.json"
    about = json.loads(path.read_text())
    assert set(about["taken"].values()) == {-1}
    for taken, error in (({"1.0": "x"}, DataError), ({"nowhere": -1}, PlanError), ([1], DataError)):
        path.write_text(json.dumps({**about, "taken": taken}))
        with pytest.raises(error):
            sc.load(tmp_path / "out", model)


def test_the_whole_road_with_data_and_in_place(tmp_path):
    model, task = randomize(transformer()), tokens_task()
    x = tokens()
    result = sc.prune(model, x, pattern="layer", budget="params=60%", task=task, epochs=1, inplace=True)
    assert result.model is model
    assert len(model[1]) == 4 - len(result.plan.dropped)
    assert [row.stage for row in result.report.rows] == ["dense", "pruned", "recovered"]
    assert result.report.rows[-1].params <= 0.6 * result.report.rows[0].params
    assert any(layer.kept == 0 for layer in result.report.layers)


def test_a_latency_budget_drops_blocks_too():
    model, x = randomize(transformer(layers=8)), torch.randn(16, 32, 8)
    result = sc.prune(model, x, pattern="layer", budget="latency=80%", criterion="random")
    assert result.plan.dropped
    assert result.plan.budget == "latency=80%"


def test_the_command_line_drops_layers_and_inspect_lists_them(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "class Block(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.f = nn.Linear(8, 8)\n"
        "    def forward(self, x):\n"
        "        return x + self.f(x).relu()\n"
        "def net():\n"
        "    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(Block(), Block(), Block()), nn.Linear(8, 3)).eval()\n"
    )
    source, runner = f"{tmp_path / 'net.py'}:net", CliRunner()
    shown = runner.invoke(cli.app, ["inspect", source, "--input", "2x8", "--json"])
    blocks = json.loads(shown.stdout)["blocks"]
    assert [(b["block"], b["parameters"], b["frozen"]) for b in blocks] == [(f"1.{i}", 72, "") for i in range(3)]
    out = str(tmp_path / "out")
    words = ["prune", source, "--input", "2x8", "--pattern", "layer", "--budget", "params=60%", "--out", out, "--json"]
    done = runner.invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["rows"][-1]["params"] <= 0.6 * report["rows"][0]["params"]
    assert report["meta"]["criterion"] == "influence"


# --- real classes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "budget", "left"),
    [
        ("vit_tiny_patch16_224", 64, "params=77%", 9),
        ("convnext_atto", 64, "params=80%", None),
        ("resnet26d", 64, "macs=80%", None),
        ("swin_tiny_patch4_window7_224", 64, "params=80%", None),
    ],
)
def test_timm_classes_lose_blocks(torchvision, name, size, budget, left):
    timm = pytest.importorskip("timm")
    sized = {"img_size": size} if name.startswith(("vit", "swin")) else {}
    model = timm.create_model(name, num_classes=10, **sized)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.6, 1.4)  # timm starts the last norm of a block at zero
    x = torch.randn(1, 3, size, size)
    plan = sc.plan(model.eval(), x, pattern="layer", budget=budget, criterion="random")
    assert plan.dropped
    done = carry_out(model, plan)
    assert done.form == "module"
    assert type(done.model) is type(model)
    assert relative_error(run(done.model, x), without(model, plan.dropped, x)) < 1e-5
    if left is not None:
        assert len(done.model.blocks) == left


def _llama(transformers):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**_sizes(), num_key_value_heads=2, use_cache=False)
    ), {}


def _qwen3(transformers):
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    window = {"layer_types": kinds, "sliding_window": 3, "use_sliding_window": True}
    config = transformers.Qwen3Config(**_sizes(), head_dim=8, num_key_value_heads=2, use_cache=False, **window)
    return transformers.Qwen3ForCausalLM(config), {}


def _bert(transformers):
    return transformers.BertForSequenceClassification(transformers.BertConfig(**_sizes())), {}


def _gpt2(transformers):
    config = transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=4, n_head=4, use_cache=False)
    return transformers.GPT2LMHeadModel(config), {}


def _t5(transformers):
    config = transformers.T5Config(
        vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=4, num_heads=4, use_cache=False
    )
    return transformers.T5ForConditionalGeneration(config), {"decoder_input_ids": torch.randint(0, 40, (2, 5))}


def _sizes():
    return {
        "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48,
    }  # fmt: skip


HUGGING_FACE = {
    "llama": (_llama, "model.layers", "num_hidden_layers"),
    "qwen3": (_qwen3, "model.layers", "num_hidden_layers"),
    "bert": (_bert, "bert.encoder.layer", "num_hidden_layers"),
    "gpt2": (_gpt2, "transformer.h", "n_layer"),
    "t5": (_t5, "decoder.block", "num_decoder_layers"),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_classes_lose_layers_with_their_configuration(torchvision, name, tmp_path):
    transformers = pytest.importorskip("transformers")
    factory, path, count = HUGGING_FACE[name]
    model, more = factory(transformers)
    x = {"input_ids": torch.randint(0, 40, (2, 6)), **more}
    names = [f"{path}.1", f"{path}.2"]
    model.eval()
    done = carry_out(model, dropping(model, x, names))
    assert (done.form, done.unsaved) == ("module", "")
    assert (getattr(done.model.config, count), getattr(model.config, count)) == (2, 4)
    if name == "t5":
        assert done.model.config.num_layers == 4  # of the encoder
        assert "is also used by" in frozen(model, x)["decoder.block.0"]  # its position bias serves all
    if name == "qwen3":
        assert done.model.config.layer_types == ["full_attention", "sliding_attention"]
    numbers = [m.layer_idx for m in done.model.get_submodule(path).modules() if hasattr(m, "layer_idx")]
    assert set(numbers) <= {0, 1}
    if name != "t5":  # its layers hand a bias on besides
        assert relative_error(run(done.model, x), without(model, names, x)) < 1e-5
    done.model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    if hasattr(again.config, "use_cache"):
        again.config.use_cache = False
    assert relative_error(run(again, x), run(done.model, x)) < 1e-6


def test_a_class_that_its_configuration_cannot_make_says_so(torchvision):
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[1, 4], num_heads=[2, 2], window_size=4
    )
    model, x = transformers.SwinModel(config).eval(), {"pixel_values": torch.randn(2, 3, 32, 32)}
    done = carry_out(model, dropping(model, x, ["encoder.layers.1.blocks.0"]))
    assert done.form == "module"
    assert "its class computes something else" in done.unsaved  # which blocks shift their windows goes by number


def test_real_weights_of_a_resnet(data):
    from secateur.recipe import load_callable

    model = load_callable(f"{Path(__file__).resolve().parents[1] / 'benchmarks' / 'nets.py'}:resnet20")()
    x = torch.randn(2, 3, 32, 32)
    plan = sc.plan(model, x, pattern="layer", budget="macs=75%")
    done = carry_out(model, plan)
    assert done.form == "module"  # no size changes, so the shortcut that pads by a number still fits
    assert relative_error(run(done.model, x), without(model, plan.dropped, x)) < 1e-5
