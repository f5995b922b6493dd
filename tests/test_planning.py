"""Plans: budgets met and never exceeded, the same from the same seed, saved and loaded, hostile files refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from torch import nn

from nets import build
from secateur.errors import BudgetError, DataError, PlanError, PruneError, SpecError
from secateur.graph import analyze
from secateur.plan import Plan
from secateur.planning import make
from secateur.testing import check_groups

FORMAT = Path(__file__).resolve().parents[1] / "docs" / "format.md"


def plan(net="residual", **wishes):
    model, inputs = build(net)
    graph = analyze(model, inputs)
    return model, graph, make(model, graph, **wishes)


def same(a, b):
    return not a.diff(b) and a.allocation == b.allocation and a.shapes == b.shapes


# --- budgets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocate", ["global", "uniform"])
@pytest.mark.parametrize("percent", [10, 37, 50, 90])
def test_unstructured_sparsity_is_met_exactly(allocate, percent):
    _, graph, p = plan(pattern="unstructured", budget=f"sparsity={percent}%", allocate=allocate)
    total = sum(w.numel for w in graph.weights.values())
    kept = sum(int(m.sum()) for m in p.masks.values())
    slack = 0 if allocate == "global" else len(p.masks)
    assert total * (100 - percent) // 100 - slack <= kept <= total * (100 - percent) // 100


@pytest.mark.parametrize("pattern", ["unstructured", "block:4x1", "block:3x2"])
@pytest.mark.parametrize("budget", ["sparsity=60%", "params=40%", "macs=40%", "params=900", "macs=0.05M"])
def test_mask_budgets_are_never_exceeded_and_nearly_used(pattern, budget):
    _, graph, p = plan("plain", pattern=pattern, budget=budget)
    dense = graph.cost()
    kept = {n: int(m.sum()) for n, m in p.masks.items()}
    eligible = sum(graph.weights[n].numel for n in kept)
    params = dense.params - eligible + sum(kept.values())
    macs = sum(w.macs * kept[n] / w.numel for n, w in graph.weights.items())
    found, limit, unit = {
        "sparsity=60%": (sum(kept.values()), 0.4 * eligible, 1),
        "params=40%": (params, 0.4 * dense.params, 1),
        "params=900": (params, 900, 1),
        "macs=40%": (macs, 0.4 * dense.macs, 128),
        "macs=0.05M": (macs, 50_000, 128),
    }[budget]
    assert limit - 14 * unit <= found <= limit


@pytest.mark.parametrize("net", ["plain", "residual", "dense_cat", "grouped", "attention", "option_a_shortcut"])
@pytest.mark.parametrize("allocate", ["global", "uniform"])
@pytest.mark.parametrize("budget", ["macs=50%", "params=50%", "size=60%", "sparsity=40%"])
def test_channel_budgets_are_never_exceeded(net, allocate, budget):
    _, graph, p = plan(net, pattern="channel", budget=budget, allocate=allocate)
    dense, cost = graph.cost(), graph.cost({n: f.numpy() for n, f in p.units.items()})
    what = {"macs": "macs", "para": "params", "size": "bytes", "spar": "weights"}[budget[:4]]
    part = getattr(cost, what) / getattr(dense, what)
    assert part <= 0.6 if budget[0] == "s" else part <= 0.5
    assert all(f.any() for f in p.units.values())


def test_one_unit_more_would_be_too_much():
    """The budget is used: putting back the best unit that went exceeds it."""
    model, inputs = build("plain")
    graph = analyze(model, inputs)
    p = make(model, graph, budget="params=50%")
    counts = {n: int(f.sum()) for n, f in p.units.items()}
    assert graph.cost({n: f.numpy() for n, f in p.units.items()}).params <= 0.5 * graph.cost().params
    richer = [
        graph.cost({n: np.arange(len(f)) < counts[n] + (n == more) for n, f in p.units.items()}).params
        for more in counts
    ]
    assert max(richer) > 0.5 * graph.cost().params


@pytest.mark.parametrize(("net", "multiple"), [("plain", 8), ("plain", 4), ("residual", 4), ("dense_cat", 2)])
def test_kept_channels_are_multiples_or_everything(net, multiple):
    _, _, p = plan(net, pattern=f"channel/{multiple}", budget="params=90%")
    for flags in p.units.values():
        kept = int(flags.sum())
        assert kept % multiple == 0 or kept == len(flags)


def test_every_threshold_is_what_it_says():
    model, _, p = plan(pattern="unstructured", budget="threshold=0.05")
    for name, mask in p.masks.items():
        assert torch.equal(mask, model.get_parameter(name).abs() >= 0.05)


def test_a_channel_threshold_removes_weak_units_and_keeps_one():
    model, inputs = build("plain")
    model[0].weight.data[:3] *= 1e-6
    model[3].weight.data[:, :3] *= 1e-6
    p = make(model, analyze(model, inputs), budget="threshold=1e-4")
    assert p.units["0"].tolist() == [False] * 3 + [True] * 5
    assert p.units["3"].all()
    assert int(make(model, analyze(model, inputs), budget="threshold=1e9").units["0"].sum()) == 1


def test_n_m_needs_no_budget_and_leaves_small_weights_dense():
    _, graph, p = plan("plain", pattern="2:4", budget=None)
    assert set(p.masks) == {"3.weight", "5.2.weight"}
    for name, mask in p.masks.items():
        check_groups(mask, "2:4", graph.weights[name].in_dim)
    assert same(p, plan("plain", pattern="2:4", budget="sparsity=50%")[2])


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"budget": "params=1%"}, r"params=1% cannot be met: .* the nearest possible is params=\d"),
        ({"budget": "macs=10"}, r"macs=10 cannot be met: .* nearest possible is macs="),
        ({"budget": "sparsity=99.99%"}, r"nearest possible is sparsity=\d"),
        ({"pattern": "unstructured", "budget": "params=1%"}, r"nearest possible is params=\d"),
        ({"pattern": "2:4", "budget": "sparsity=70%"}, r"removes exactly 50.*nearest possible is sparsity=50%"),
        ({"pattern": "unstructured", "budget": "size=50%"}, r"take the same bytes .* use pattern='channel'"),
        ({"pattern": "block:4x1", "budget": "latency=50%"}, r"the nearest possible is latency=100%"),
        ({"budget": "sparsity=50%", "ignore": ("*",)}, r"no axis is free to lose units"),
    ],
)
def test_impossible_budgets_name_the_nearest(wishes, message):
    with pytest.raises(BudgetError, match=message):
        plan(**wishes)


def test_the_nearest_possible_value_is_possible():
    with pytest.raises(BudgetError) as caught:
        plan(budget="params=1%")
    nearest = caught.value.nearest
    plan(budget=f"params={100 * nearest + 0.01:.4f}%")
    with pytest.raises(BudgetError):
        plan(budget=f"params={100 * nearest - 0.01:.4f}%")


# --- names -----------------------------------------------------------------------------------------


def test_ignored_places_are_left_alone():
    _, _, p = plan(pattern="unstructured", budget="sparsity=50%", ignore=("tail.*", "stem*"))
    assert set(p.masks) == {"a.weight", "b.weight", "c.weight", "d.weight"}
    _, _, p = plan(budget="params=80%", ignore=("b.weight",))
    assert set(p.units) == {"c"}


def test_overrides_fix_a_place_and_the_rest_meets_the_budget():
    _, graph, p = plan(pattern="unstructured", budget="sparsity=50%", overrides={"a.*": 0.1, "tail*": 0.0})
    assert int(p.masks["a.weight"].sum()) == int(0.9 * 432)
    assert p.masks["tail.2.weight"].all()
    total = sum(w.numel for w in graph.weights.values())
    assert sum(int(m.sum()) for m in p.masks.values()) == total // 2
    _, _, p = plan(pattern="unstructured", budget="threshold=0.01", overrides={"a.weight": 0.5})
    assert int(p.masks["a.weight"].sum()) == 216
    _, _, p = plan(budget="params=70%", overrides={"a": 0.5})
    assert int(p.units["a"].sum()) == 3


@pytest.mark.parametrize("where", ["ignore", "overrides"])
def test_unknown_names_are_errors_that_name_close_ones(where):
    with pytest.raises(SpecError, match=r"'stemm.weight' matches nothing; close names are .*stem"):
        plan(**{where: {"stemm.weight": 0.5} if where == "overrides" else ("stemm.weight",)})


def test_an_override_out_of_range():
    with pytest.raises(SpecError, match=r"removes 1\.0; expected a part from 0 up to 1"):
        plan(overrides={"a": 1.0})


# --- sameness --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["channel", "unstructured", "2:4", "block:4x1"])
def test_same_seed_same_plan(pattern):
    budget = None if pattern == "2:4" else "sparsity=50%"
    one, again, other = (plan(pattern=pattern, budget=budget, criterion="random", seed=s)[2] for s in (3, 3, 4))
    assert same(one, again)
    assert one.diff(other)


@pytest.mark.parametrize("pattern", ["channel", "unstructured", "2:4", "block:4x1"])
def test_scaling_all_weights_changes_nothing(pattern):
    model, inputs = build("residual")
    graph = analyze(model, inputs)
    wishes = {"pattern": pattern, "budget": None if pattern == "2:4" else "sparsity=50%"}
    one = make(model, graph, **wishes)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
    assert same(one, make(model, graph, **wishes))


# --- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wishes", [{"budget": "macs=50%"}, {"pattern": "unstructured", "budget": "sparsity=70%"},
                                    {"pattern": "2:4", "budget": None}])  # fmt: skip
def test_saving_and_loading_is_identity(wishes, tmp_path):
    _, _, p = plan("plain", **wishes)
    p.save(tmp_path)
    loaded = Plan.load(tmp_path)
    assert same(p, loaded)
    assert (loaded.pattern, loaded.budget, loaded.meta) == (p.pattern, p.budget, p.meta)
    assert {t: sorted(d) for t, d in loaded.slices.items()} == {t: sorted(d) for t, d in p.slices.items()}
    assert all(torch.equal(loaded.keep(n), p.keep(n)) for n in p.tensors)
    loaded.check_fits(build("plain")[0])


def test_masks_take_one_bit_a_weight(tmp_path):
    model, x = nn.Linear(512, 1024, bias=False), torch.randn(1, 512)
    make(model, analyze(model, x), pattern="unstructured", budget="sparsity=50%").save(tmp_path)
    assert (tmp_path / "plan.safetensors").stat().st_size < 512 * 1024 / 8 + 1000


def damage(folder, change):
    path = folder / "plan.json"
    text = json.loads(path.read_text())
    change(text)
    path.write_text(json.dumps(text))


HOSTILE = {
    "no shapes": lambda t: t.pop("shapes"),
    "negative shape": lambda t: t["shapes"].update({"0.weight": [-8, 3, 3, 3]}),
    "huge shape": lambda t: t["shapes"].update({"0.weight": [10**12, 3, 3, 3]}),
    "other count": lambda t: t["units"].update({"0": 64}),
    "allocation disagrees": lambda t: t["allocation"].update({"0": [1, 8]}),
    "foreign slice": lambda t: t["slices"].update({"../../etc/passwd": [0]}),
    "bad dimension": lambda t: t["slices"].update({"0.weight": [9]}),
    "not a table": lambda t: t.update(units=[]),
    "allocation of other places": lambda t: t["allocation"].update({"ghost": [1, 8]}),
    "infinite size": lambda t: t["units"].update({"0": float("inf")}),
    "unknown pattern": lambda t: t.update(pattern="rows"),
    "unknown key": lambda t: t.update(extra=1),
    "no table at all": lambda t: t.clear(),
    "newer": lambda t: t.update(version=99),
    "forgotten flags": lambda t: t["units"].pop("0"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_damaged_plans_are_refused(what, tmp_path):
    plan("plain")[2].save(tmp_path)
    damage(tmp_path, HOSTILE[what])
    with pytest.raises((DataError, PlanError)):
        Plan.load(tmp_path)


@pytest.mark.parametrize("file", ["plan.json", "plan.safetensors"])
@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "pickle"])
def test_broken_files_are_refused(file, how, tmp_path):
    plan("plain")[2].save(tmp_path)
    path = tmp_path / file
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "truncated": path.read_bytes()[:-9], "pickle": b"\x80\x04K\x01."}[how])
    with pytest.raises(PruneError, match=r"damaged|cannot be read"):
        Plan.load(tmp_path)


def test_flags_of_the_wrong_type_are_refused(tmp_path):
    plan("plain", pattern="unstructured", budget="sparsity=50%")[2].save(tmp_path)
    names = json.loads((tmp_path / "plan.json").read_text())["masks"]
    (tmp_path / "plan.safetensors").write_bytes(save({f"mask/{n}": torch.zeros(3) for n in names}))
    with pytest.raises(DataError, match="flags packed into"):
        Plan.load(tmp_path)


def test_dimensions_are_not_counted_from_the_end(tmp_path):
    plan("plain")[2].save(tmp_path)
    damage(tmp_path, lambda t: t["slices"].update({"0.weight": [-4]}))
    bits = load_file(tmp_path / "plan.safetensors")
    bits["slice/-4/0.weight"] = bits.pop("slice/0/0.weight")
    (tmp_path / "plan.safetensors").write_bytes(save(bits))
    with pytest.raises(DataError, match=r"'0\.weight' has no dimension -4"):
        Plan.load(tmp_path)


def test_flags_that_the_allocation_does_not_count_are_refused(tmp_path):
    plan("plain", pattern="unstructured", budget="sparsity=50%")[2].save(tmp_path)
    bits = load_file(tmp_path / "plan.safetensors")
    bits["mask/0.weight"][0] ^= 1 << 7
    (tmp_path / "plan.safetensors").write_bytes(save(bits))
    with pytest.raises(DataError, match=r"'0\.weight' keeps \d+ of 216, its allocation \d+ of 216"):
        Plan.load(tmp_path)


def test_the_format_is_as_documented(tmp_path):
    p = plan("plain", pattern="unstructured", budget="sparsity=50%")[2]
    p.save(tmp_path)
    raw = load_file(tmp_path / "plan.safetensors")["mask/0.weight"]
    flags = np.unpackbits(raw.numpy(), count=216).reshape(8, 3, 3, 3)
    assert np.array_equal(flags, p.masks["0.weight"].numpy())
    documented = re.findall(r"^\| `(\w+)` \|", FORMAT.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(documented) == set(json.loads((tmp_path / "plan.json").read_text()))


def test_keep_of_an_untouched_tensor():
    with pytest.raises(PlanError, match="does not touch 'nope'"):
        plan("plain")[2].keep("nope")
