"""Compensation: what is kept makes up for what goes, in closed form and stretch by stretch."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.api import plan as make_plan
from secateur.apply.mask import mask
from secateur.apply.shrink import carry_out
from secateur.errors import DataError, PlanError, SpecError
from secateur.graph import analyze
from secateur.plan import Plan
from secateur.recover import reconstruct
from secateur.recover.blockwise import Small, differing, stretches
from secateur.recover.places import places
from secateur.solvers import Moments, solve
from secateur.tasks import Classification


def task_of(x: Tensor, batch_size: int = 32) -> Classification:
    data = (x, torch.zeros(len(x), dtype=torch.long))
    return Classification(data, data, data, data, batch_size)


class Twice(nn.Module):
    """Two convolutions with a norm and an activation between them."""

    def __init__(self, first: nn.Module, norm: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.second = first, norm, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu_(self.norm(self.first(x))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(Branch() for _ in range(3)))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        out += x
        return torch.relu(out)


class Conv1D(nn.Module):
    """A linear layer with its weight the other way round, as in GPT-2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Product(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def settle_(model: nn.Module, x: Tensor) -> nn.Module:
    """Norms as after training."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
        for _ in range(30):
            model.train()(x)
    return model.eval()


def error(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - other(x)).square().mean() / other(x).square().mean())


def halves(model: nn.Module, x: Tensor, **wishes: Any) -> Plan:
    return make_plan(model, x[:2], pattern="channel", budget="params=60%", **wishes)


TWINS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (Twice(nn.Linear(6, 8), nn.Identity(), nn.Linear(8, 4)), torch.randn(256, 6)),
    "no bias": lambda: (Twice(nn.Linear(6, 8), nn.Identity(), nn.Linear(8, 4, bias=False)), torch.randn(256, 6)),
    "tokens": lambda: (Twice(nn.Linear(6, 8), nn.Identity(), nn.Linear(8, 4)), torch.randn(64, 5, 6)),
    "addmm": lambda: (Twice(nn.Linear(6, 8), nn.Identity(), Conv1D(8, 4)), torch.randn(256, 6)),
    "product": lambda: (Twice(nn.Linear(6, 8), nn.Identity(), Product(8, 4)), torch.randn(256, 6)),
    "conv1d": lambda: (
        Twice(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.Conv1d(8, 4, 3, 2, 1)),
        torch.randn(64, 3, 20),
    ),
    "conv2d": lambda: (
        Twice(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, (3, 1), (1, 2), (1, 0), (2, 1))),
        torch.randn(64, 3, 9, 9),
    ),
    "conv2d same": lambda: (
        Twice(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 4, padding="same", bias=False)),
        torch.randn(64, 3, 9, 9),
    ),
    "conv3d": lambda: (
        Twice(nn.Conv3d(3, 8, 1), nn.BatchNorm3d(8), nn.Conv3d(8, 4, (1, 2, 3), padding=(0, 1, 1))),
        torch.randn(32, 3, 4, 5, 5),
    ),
    "grouped": lambda: (
        Twice(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, groups=2)),
        torch.randn(64, 3, 9, 9),
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("method", ["least_squares", "blockwise"])
def test_what_a_twin_can_say_is_not_lost(name: str, method: str) -> None:
    """Half of the channels are the others times two: without them the next layer can give exactly what it gave."""
    torch.manual_seed(0)
    model, x = TWINS[name]()
    with torch.no_grad():
        for key in ("weight", "bias"):
            tensor = getattr(model.first, key)
            tensor[1::2] = tensor[::2] * 2
        model = settle_(model, x)
        if isinstance(model.norm, nn.modules.batchnorm._BatchNorm):
            model.norm.weight[1::2], model.norm.bias[1::2] = model.norm.weight[::2], model.norm.bias[::2]
    graph = analyze(model, x[:2])
    free = next(a for a in graph.free if any(m.tensor == "first.weight" for m in a.members))
    chosen = make_plan(model, graph, pattern="channel", budget="params=90%", overrides={free.name: 0.4})
    chosen = _keeping(chosen, free.name, torch.arange(free.units) % 2 == 0)
    small = carry_out(reconstruct(model, graph, chosen, task_of(x), method), chosen, graph.inputs).model
    assert error(small, model, x) < 1e-3 < 0.03 < error(carry_out(model, chosen).model, model, x)


def _keeping(plan: Plan, axis: str, flags: Tensor) -> Plan:
    assert plan.graph is not None
    slices = plan.graph.slices({axis: flags.numpy()})
    return replace(
        plan,
        units={axis: flags},
        slices={n: {d: torch.from_numpy(f) for d, f in dims.items()} for n, dims in slices.items()},
        shapes={n: plan.graph.program.tensors[n].shape for n in slices},
        allocation=replace(plan.allocation, kept={axis: int(flags.sum())}, total={axis: len(flags)}),
    )


def test_each_step_comes_closer_on_a_residual_network() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 3, 8, 8)
    model = settle_(Residual(), x)
    before = copy.deepcopy(model.state_dict())
    plan, task, fresh = halves(model, x), task_of(x[:192]), x[192:]
    assert plan.graph is not None
    errors = [error(carry_out(model, plan).model, model, fresh)]
    for method in ("bias", "least_squares", "blockwise"):
        found = reconstruct(model, plan.graph, plan, task, method)
        done = carry_out(found, plan, plan.graph.inputs)  # holds the result to the law
        errors.append(error(done.model, model, fresh))
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.5 * errors[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:2x1"])
@pytest.mark.parametrize("method", ["least_squares", "blockwise"])
def test_masked_weights_are_refitted_within_their_masks(pattern: str, method: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 3, 8, 8)
    model = settle_(Residual(), x)
    plan = make_plan(model, x[:2], pattern=pattern, budget=None if pattern == "2:4" else "sparsity=60%")
    assert plan.graph is not None
    found = mask(reconstruct(model, plan.graph, plan, task_of(x[:192]), method), plan)
    for name, keep in plan.masks.items():
        assert not found.get_parameter(name)[~keep].any()
    assert error(found, model, x[192:]) < 0.5 * error(mask(model, plan), model, x[192:])


def test_solve_is_least_squares_row_by_row() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(200, 6) @ torch.randn(6, 6), torch.randn(200, 3)
    keep = torch.rand(3, 6) < 0.6
    keep[1] = False
    moments = Moments()
    for rows in range(0, 200, 64):
        moments.add_(x[rows : rows + 64], y[rows : rows + 64])
    gram, cross, mean_x, mean_y = moments.centred()
    torch.testing.assert_close(mean_x.float(), x.mean(0), atol=1e-5, rtol=1e-4)
    found = solve(gram, cross, torch.randn(3, 6), keep, 1e-9)
    for row in range(3):
        kept = keep[row]
        best = torch.linalg.lstsq((x - mean_x)[:, kept].double(), (y - mean_y)[:, row].double()).solution
        torch.testing.assert_close(found[row, kept], best, atol=1e-4, rtol=1e-3)
        assert not found[row, ~kept].any()
    gram, cross = moments.raw()
    alike = solve(gram, cross, torch.zeros(3, 6), torch.ones(3, 6, dtype=torch.bool), 1e-9)
    torch.testing.assert_close(alike.T, torch.linalg.lstsq(x.double(), y.double()).solution, atol=1e-4, rtol=1e-3)


def test_solve_needs_no_steps_where_whole_outputs_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels take rows and columns of a weight: what is left still has one set of inputs."""
    torch.manual_seed(0)
    x, y = torch.randn(100, 6), torch.randn(100, 3)
    moments = Moments()
    moments.add_(x, y)
    keep = torch.tensor([[True], [False], [True]]) & (torch.arange(6) < 4)
    monkeypatch.setattr("secateur.solvers.least_squares.STEPS", 0)
    found = solve(*moments.raw(), torch.randn(3, 6), keep, 1e-9)
    best = torch.linalg.lstsq(x[:, :4].double(), y[:, [0, 2]].double()).solution
    torch.testing.assert_close(found[[0, 2], :4].T, best, atol=1e-4, rtol=1e-3)
    assert not found[~keep].any()


def test_without_data_on_an_input_its_weight_stays() -> None:
    x, y = torch.randn(100, 4), torch.randn(100, 2)
    x[:, 3] = 0
    moments = Moments()
    moments.add_(x, y)
    weight = torch.randn(2, 4)
    found = solve(*moments.raw(), weight, torch.ones(2, 4, dtype=torch.bool), 1e-3)
    torch.testing.assert_close(found[:, 3].float(), weight[:, 3])


def test_bias_keeps_the_means() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 6) + 1
    model = Twice(nn.Linear(6, 16), nn.Identity(), nn.Linear(16, 4)).eval()
    plan = halves(model, x)
    assert plan.graph is not None
    found = carry_out(reconstruct(model, plan.graph, plan, task_of(x), "bias"), plan, x[:2]).model
    with torch.no_grad():
        torch.testing.assert_close(found(x).mean(0), model(x).mean(0), atol=1e-4, rtol=1e-4)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.again, self.out = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.inside(x))
        return self.out(torch.relu(self.again(torch.relu(self.again(x)))))


def test_a_weight_that_is_used_twice_is_left_alone() -> None:
    torch.manual_seed(0)
    model, x = Shared().eval(), torch.randn(128, 6)
    plan = make_plan(model, x[:2], pattern="unstructured", budget="sparsity=50%")
    assert plan.graph is not None
    found = reconstruct(model, plan.graph, plan, task_of(x), "blockwise")
    assert torch.equal(found.again.weight, model.again.weight)
    assert not torch.equal(found.out.weight, model.out.weight)
    assert error(mask(found, plan), model, x) < error(mask(model, plan), model, x)


def test_batches_of_other_sizes_than_the_example() -> None:
    torch.manual_seed(0)
    x = torch.randn(65, 3, 8, 8)  # the last batch is a single one
    model = settle_(Residual(), x)
    plan = halves(model, x)
    assert plan.graph is not None
    found = carry_out(reconstruct(model, plan.graph, plan, task_of(x)), plan, x[:2]).model
    assert error(found, model, x) < 0.5 * error(carry_out(model, plan).model, model, x)


def test_stretches_hold_every_weight_that_changes_once() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    model = settle_(Residual(), x)
    plan = halves(model, x, criterion="l2")
    graph = plan.graph
    assert graph is not None
    alive = graph.alive({n: f.numpy() for n, f in plan.units.items()})
    differs = differing(graph.program, Small(graph.program, model, alive, {}), plan.tensors)
    found = stretches(list(graph.program.module.graph.nodes), differs)
    nodes = [node for stretch in found for node in stretch.nodes]
    assert len(nodes) == len(set(nodes))
    assert {node for node in places(graph) if node in differs} <= set(nodes)
    assert len(found) == 5  # stem, three blocks, head
    for stretch, following in itertools.pairwise(found):
        assert {n for n in following.outside if n in differs and n.op != "get_attr"} == {stretch.exit}


def test_mistakes_are_named() -> None:
    x = torch.randn(16, 3, 8, 8)
    model = settle_(Residual(), x)
    plan = halves(model, x)
    graph = plan.graph
    assert graph is not None
    with pytest.raises(SpecError, match="bias, least_squares, blockwise"):
        reconstruct(model, graph, plan, task_of(x), "magic")
    with pytest.raises(DataError, match="no batches"):
        reconstruct(model, graph, plan, task_of(x[:0]))
    with pytest.raises(DataError, match=r"fails on calibration batch 0, .*\[16, 5, 8, 8\].*the form of the example"):
        reconstruct(model, graph, plan, task_of(torch.randn(16, 5, 8, 8)))
    with pytest.raises(DataError, match="is NaN or infinite on the calibration data"):
        reconstruct(model, graph, plan, task_of(torch.full_like(x, float("nan"))))
    blocks = make_plan(model, graph, pattern="layer", budget="params=80%", task=task_of(x))
    with pytest.raises(PlanError, match="drops whole blocks"):
        reconstruct(model, graph, blocks, task_of(x))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.inside, self.out = nn.Embedding(20, 8), nn.Linear(8, 24), nn.Linear(24, 20)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.relu(self.inside(self.words(ids))))


class Texts:
    """Texts of all lengths, each a batch of its own."""

    def __init__(self, texts: list[Tensor]) -> None:
        self.texts = texts

    def batches(self, split: str) -> Any:
        return ((text[None], text[None]) for text in self.texts)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        raise AssertionError("labels are not needed")

    scores = loss


def test_texts_of_every_length_count() -> None:
    torch.manual_seed(0)
    model, texts = Words().eval(), [torch.randint(20, (n,)) for n in range(3, 40)]
    plan = make_plan(model, texts[5][None], pattern="unstructured", budget="sparsity=60%")
    assert plan.graph is not None
    ids = torch.arange(20)
    errors = []
    for some in (texts[:1], texts):
        found = mask(reconstruct(model, plan.graph, plan, Texts(some)), plan)
        errors.append(error(found, model, ids))
    assert errors[1] < 0.5 * min(errors[0], error(mask(model, plan), model, ids))
