"""Which blocks go: scores, budgets, plans, directories; alone and with channels."""

from __future__ import annotations

import json

import pytest
import torch
from layered import (
    CASES,
    Counted,
    dropping,
    free,
    images,
    mixer,
    randomize,
    resnet,
    tokens,
    transformer,
    without,
)
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import secateur as sc
from nets import build
from secateur import cli
from secateur.apply.blame import relative_error
from secateur.apply.shrink import carry_out
from secateur.depth import make
from secateur.depth.scores import Calibration, influence, reconstruction, taylor
from secateur.errors import BudgetError, DataError, PlanError, SpecError
from secateur.graph import analyze
from secateur.graph.trace import run
from secateur.patterns import Both, Channel, Layer, parse
from secateur.tasks import Classification

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
