"""The promise max_drop, and rounds of pruning and fine-tuning."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from secateur.api import prune
from secateur.budget import parse, rounds
from secateur.errors import DataError, SpecError
from secateur.promise import CHECKING, CHOOSING, Half, HalfTask, keep
from secateur.tasks import Classification, Scores, evaluate, paired_difference

# --- the decision, on scores alone -----------------------------------------------------------------


def answers(n: int, right: float, seed: int = 0) -> Scores:
    return (np.random.default_rng(seed).random(n) < right).astype(float)


def ladder(n: int, loses: dict[float, float]) -> tuple[Half, Any]:
    """A dense model that is always right, and models that lose so much from that part down."""
    dense = np.ones(n)

    def attempt(part: float) -> Half:
        lost = max((loss for limit, loss in loses.items() if part <= limit), default=0.0)
        rows = [answers(n, 1 - lost, seed=half + int(1000 * part)) for half in (CHOOSING, CHECKING)]
        return lambda half: rows[half]

    return lambda half: dense, attempt


def test_the_smallest_that_keeps_the_limit_is_found() -> None:
    verdict = keep(*ladder(4000, {0.3: 0.5}), limit=0.02, least=0.05)
    assert verdict.kept is not None
    assert 0.3 < verdict.kept.part < 0.34
    assert verdict.kept.checked is not None
    assert verdict.kept.checked.high <= 0.02
    parts = [c.part for c in verdict.candidates]
    assert parts == sorted(parts, reverse=True)
    assert "With 95 % confidence this model loses at most 2 points" in verdict.told("macs")[0]


def test_where_none_keeps_it_the_nearest_is_named() -> None:
    verdict = keep(*ladder(2000, {1.0: 0.2}), limit=0.02, least=0.05)
    assert verdict.kept is None
    said, tried = verdict.told("macs")
    assert "the dense model was left as it is" in said
    assert tried.count("drop") == len(verdict.candidates)


def test_a_check_that_fails_ends_the_sequence() -> None:
    """What one half says is not believed where the other disagrees, and nothing smaller is looked at after that."""
    looked: list[tuple[float, int]] = []

    def attempt(part: float) -> Half:
        def scores(half: int) -> Scores:
            looked.append((part, half))
            return answers(2000, 0.5) if half == CHECKING and part < 0.3 else np.ones(2000)

        return scores

    verdict = keep(lambda half: np.ones(2000), attempt, limit=0.02, least=0.05)
    assert verdict.kept is not None
    assert verdict.kept.part == 0.5
    checked = [part for part, half in looked if half == CHECKING]
    assert checked == sorted(checked, reverse=True)
    assert len(checked) == 3
    first_check = [half for _, half in looked].index(CHECKING)
    assert all(half == CHECKING for _, half in looked[first_check:]), "the checking half was read while choosing"


def test_a_safe_size_is_left_where_the_check_fails_for_half() -> None:
    def attempt(part: float) -> Half:
        return lambda half: answers(2000, 0.9) if half == CHECKING and part < 0.7 else np.ones(2000)

    verdict = keep(lambda half: np.ones(2000), attempt, limit=0.02, least=0.05)
    assert verdict.kept is not None
    assert verdict.kept.part == 0.75


def test_one_size_only() -> None:
    verdict = keep(*ladder(2000, {}), limit=0.02, least=0.5, largest=0.5)
    assert [c.part for c in verdict.candidates] == [0.5]
    assert verdict.kept is not None


@pytest.mark.parametrize("limit", [0.01, 0.05])
def test_too_few_examples_are_counted(limit: float) -> None:
    half = np.ones(20)
    with pytest.raises(DataError, match="would do in both together") as caught:
        keep(lambda _: half, lambda _: lambda _: half, limit, 0.1)
    enough = int(str(caught.value).split("at least ")[1].split()[0])
    for n, holds in ((enough // 2, True), (enough // 2 - 4, False)):
        assert (paired_difference(np.ones(n), np.ones(n)).high <= limit) == holds
    with pytest.raises(DataError, match="above 0"):
        keep(lambda _: half, lambda _: lambda _: half, 0.0, 0.1)


# --- on models --------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.inside, self.norm, self.out = nn.Linear(8, width), nn.BatchNorm1d(width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.norm(self.inside(x))))


def data(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] > 0).long()


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Classification]:
    torch.manual_seed(0)
    task = Classification(data(512, 0), data(1200, 1), data(400, 2), batch_size=50)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(10):
        for x, y in task.batches("train"):
            optimizer.zero_grad()
            task.loss(model(x), y).backward()
            optimizer.step()
    return model.eval(), task


@pytest.mark.parametrize("pattern", ["channel", "unstructured", "block:4x1", "1:2"])
@pytest.mark.parametrize("reconstruct", [None, "least_squares"])
def test_prune_keeps_the_promise(trained: Any, pattern: str, reconstruct: str | None) -> None:
    model, task = trained
    before = copy.deepcopy(model.state_dict())
    result = prune(model, task.train[0][:2], pattern=pattern, budget="max_drop=5%", task=task, reconstruct=reconstruct)
    assert result.plan.budget == "max_drop=5%"
    first = result.report.notes[0]
    assert first.startswith(("With 95 % confidence", "No model could be shown"))
    dense, small = (evaluate(m, HalfTask(task, CHECKING), "validation") for m in (model, result.model))
    assert paired_difference(dense, small).high <= 0.05
    if first.startswith("With"):
        nonzero = sum(int(p.count_nonzero()) for p in result.model.parameters())
        assert nonzero < 0.8 * sum(p.numel() for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Watched(Classification):
    """Notes which half of the validation batches is scored."""

    def batches(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        for i, batch in enumerate(super().batches(split)):
            self.now[:] = [i % 2] if split == "validation" else []
            yield batch

    def scores(self, output: Tensor, target: Tensor) -> Tensor:
        self.used.extend(self.now)
        return super().scores(output, target)

    now: list[int] = []  # noqa: RUF012
    used: list[int] = []  # noqa: RUF012


class Deep(nn.Module):
    """Residual blocks, of which some do nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(8, 16), nn.Linear(16, 2)
        self.blocks = nn.Sequential(*(Branch(scale) for scale in (1.0, 0.0, 0.0, 0.0)))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.blocks(torch.relu(self.stem(x))))


class Branch(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        with torch.no_grad():
            self.down.weight.mul_(scale)
            self.down.bias.mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("pattern", ["layer", "channel+layer", "channel/8"])
def test_the_promise_holds_for_blocks_and_multiples(trained: Any, pattern: str) -> None:
    task = trained[1]
    torch.manual_seed(0)
    model = Deep().eval()
    labels = {name: model(getattr(task, name)[0]).argmax(1) for name in ("train", "validation", "test")}
    own = replace(task, **{name: (getattr(task, name)[0], y) for name, y in labels.items()})  # it is always right
    result = prune(model, task.train[0][:2], pattern=pattern, budget="max_drop=5%", task=own)
    assert result.report.notes[0].startswith("With 95 % confidence")
    dense, small = (evaluate(m, HalfTask(own, CHECKING), "validation") for m in (model, result.model))
    assert paired_difference(dense, small).high <= 0.05
    macs = [row.macs for row in result.report.rows]
    assert macs[-1] < (1.0 if pattern == "channel/8" else 0.7) * macs[0]  # three of four blocks do nothing
    if pattern == "channel/8":
        assert all(n % 8 == 0 for n in result.plan.allocation.kept.values())
    assert result.report.tried


def test_fine_tuning_is_part_of_it_and_never_sees_the_half_that_checks(trained: Any) -> None:
    model, task = trained
    Watched.used.clear()
    watched = Watched(task.train, task.validation, task.test, batch_size=50)
    result = prune(model, task.train[0][:2], budget="max_drop=5%", task=watched, epochs=1, lr=0.05)
    assert [row.stage for row in result.report.rows][-1] in ("recovered", "kept whole")
    assert Watched.used[:24] == [CHOOSING] * 12 + [CHECKING] * 12  # the dense model
    after = Watched.used[24:]
    first = after.index(CHECKING)
    assert first > 12 * 10  # candidates, and the epochs of each
    assert set(after[first:]) == {CHECKING}


def test_an_impossible_promise_leaves_the_dense_model(trained: Any, tmp_path: Any) -> None:
    from secateur.store import load, save

    model, task = trained
    guess = replace(task, validation=(task.validation[0], 1 - task.validation[1]))
    flipped = copy.deepcopy(model)
    with torch.no_grad():
        flipped.out.weight.neg_()
        flipped.out.bias.neg_()
    result = prune(flipped, task.train[0][:2], budget="max_drop=0.7%", pattern="1:16", task=guess)
    assert result.report.notes[0].startswith("No model could be shown to lose at most 0.7 points")
    x = task.test[0]
    assert torch.equal(result.model(x), flipped(x))
    assert result.model is not flipped
    save(result, tmp_path / "kept")
    assert torch.equal(load(tmp_path / "kept", model=Net())(x), flipped(x))


def test_bad_promises(trained: Any) -> None:
    model, task = trained
    x = task.train[0][:2]
    with pytest.raises(SpecError, match="needs task="):
        prune(model, x, budget="max_drop=1%")
    with pytest.raises(DataError, match="fewer than two"):
        prune(model, x, budget="max_drop=5%", task=replace(task, batch_size=5000))
    empty = replace(task, validation=tuple(part[:0] for part in task.validation))
    with pytest.raises(DataError, match="fewer than two"):
        prune(model, x, budget="max_drop=5%", task=empty)
    ones = replace(task, validation=(task.validation[0], torch.ones(1200, dtype=torch.long)))
    with pytest.raises(DataError, match="of class 1, and a score on one class"):
        prune(model, x, budget="max_drop=5%", task=ones)
    nan = replace(task, validation=(torch.full_like(task.validation[0], float("nan")), task.validation[1]))
    with pytest.raises(DataError, match="NaN"):
        prune(model, x, budget="max_drop=5%", task=_NanScores(nan))


class _NanScores:
    def __init__(self, task: Classification) -> None:
        self.task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def scores(self, output: Tensor, target: Tensor) -> Tensor:
        return torch.where(output.isnan().any(1), torch.nan, self.task.scores(output, target))


def test_compensation_that_does_harm_is_taken_back(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = trained

    def harmful(dense: nn.Module, *_: Any) -> nn.Module:
        wrong = copy.deepcopy(dense)
        with torch.no_grad():
            wrong.out.weight.neg_()
        return wrong

    x = task.train[0][:2]
    plain = prune(model, x, pattern="unstructured", budget="sparsity=20%", task=task)
    monkeypatch.setattr("secateur.road.reconstruct", harmful)
    result = prune(model, x, pattern="unstructured", budget="sparsity=20%", task=task, reconstruct="bias")
    assert [row.stage for row in result.report.rows][:4] == ["dense", "pruned", "compensated", "taken back"]
    assert torch.equal(result.model(task.test[0]), plain.model(task.test[0]))


# --- rounds -----------------------------------------------------------------------------------------


def test_rounds_keep_the_same_part_each() -> None:
    assert [str(b) for b in rounds(parse("macs=25%"), 2)] == ["macs=50%", "macs=25%"]
    assert [str(b) for b in rounds(parse("sparsity=75%"), 2)] == ["sparsity=50%", "sparsity=75%"]
    assert [b.value for b in rounds(parse("params=50%"), 1)] == [Fraction(1, 2)]
    for wrong in ("macs=40M", "threshold=0.1", "latency=50%", "max_drop=1%"):
        with pytest.raises(SpecError, match="cannot be split into rounds"):
            list(rounds(parse(wrong), 3))


@pytest.mark.parametrize("pattern", ["channel", "unstructured"])
@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_what_went_in_one_round_stays_gone(trained: Any, pattern: str, criterion: str, monkeypatch: Any) -> None:
    from secateur import road

    plans: list[Any] = []
    real = road._choose

    def watched(*args: Any) -> Any:
        plans.append(real(*args))
        return plans[-1]

    monkeypatch.setattr(road, "_choose", watched)
    model, task = trained
    budget = "params=40%" if pattern == "channel" else "sparsity=60%"
    wishes: dict[str, Any] = {"pattern": pattern, "budget": budget, "criterion": criterion, "task": task}
    result = prune(model, task.train[0][:2], rounds=3, epochs=1, lr=0.02, **wishes)
    assert len(plans) == 3
    for earlier, later in itertools.pairwise(plans):
        for name in earlier.tensors:
            assert not (later.keep(name) & ~earlier.keep(name)).any(), f"{name} came back"
    assert result.report.rows[-1].accuracy.value > 0.8
    if pattern == "channel":
        assert sum(p.numel() for p in result.model.parameters()) <= 0.4 * sum(p.numel() for p in model.parameters())


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.norm, self.out = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.norm(self.inside(x))))


def test_what_cannot_be_is_said_before_anything_is_computed(trained: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("secateur.api.analyze", lambda *_: pytest.fail("something was computed"))
    model, task = trained
    for wishes, words in (
        ({"reconstruct": "magic"}, "expected one of bias, least_squares, blockwise"),
        ({"reconstruct": "bias", "pattern": "layer"}, "pattern 'layer' drops whole blocks"),
        ({"reconstruct": "bias", "pattern": "channel+layer"}, "drops whole blocks"),
        ({"rounds": 0, "epochs": 1}, "rounds=0 needs"),
        ({"rounds": 2}, "epochs for every round"),
        ({"rounds": 2, "epochs": 1, "pattern": "2:4", "budget": "max_drop=1%"}, "a budget that can be split"),
        ({"rounds": 2, "epochs": 1, "budget": "latency=50%"}, "cannot be split into rounds"),
    ):
        with pytest.raises(SpecError, match=words):
            prune(model, task.train[0][:2], task=task, **wishes)


def test_rounds_that_zeros_cannot_stand_for_are_refused(trained: Any) -> None:
    model, task = trained
    x = task.train[0][:2]
    with pytest.raises(SpecError, match="a norm or mean runs over axis"):
        prune(Normed(), x, budget="params=50%", task=task, rounds=2, epochs=1)
    with pytest.raises(SpecError, match="needs a budget that can be split, a task, and epochs"):
        prune(model, x, budget="params=50%", task=task, rounds=2)
