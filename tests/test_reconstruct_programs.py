"""Compensation, whatever a program does with its memory, its shapes and its inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parts import Net
from torch import Tensor, nn

from secateur.api import plan as make_plan
from secateur.apply.mask import mask
from secateur.apply.shrink import carry_out
from secateur.graph import analyze
from secateur.graph.trace import run
from secateur.recover import reconstruct


class Given:
    """A task of these batches of inputs."""

    def __init__(self, inputs: list[Any]) -> None:
        self.inputs = inputs

    def batches(self, split: str) -> Any:
        return ((inputs, None) for inputs in self.inputs)

    def loss(self, output: Any, target: Any) -> Tensor:
        raise AssertionError("labels are not needed")

    scores = loss


def error(model: nn.Module, other: nn.Module, batches: list[Any]) -> float:
    """Of the outputs, on copies of the inputs."""
    outputs = [[run(m, copy.deepcopy(x)) for x in batches] for m in (model, other)]
    found, wanted = (torch.cat([y.flatten() for y in some]) for some in outputs)
    return float((found - wanted).square().mean() / wanted.square().mean())


def _stream(s: Any, x: Tensor) -> Tensor:
    x = s.a(x)
    x += s.c(torch.relu(s.b(x)))
    x += s.e(torch.relu(s.d(x)))
    return s.f(x)  # type: ignore[no-any-return]


def _halves(s: Any, x: Tensor) -> Tensor:
    first, second = s.a(x).chunk(2, 1)
    return s.b(first * second.sigmoid_())  # type: ignore[no-any-return]


def _assigned(s: Any, x: Tensor) -> Tensor:
    x = s.a(x)
    out = torch.zeros(len(x), 16)
    out[:, :8] = x
    out[:, 8:] = s.b(x)
    return s.c(torch.relu(out))  # type: ignore[no-any-return]


def _counted(s: Any, x: Tensor) -> Tensor:
    x = s.a(x)
    s.most.copy_(torch.maximum(s.most, x.detach().amax(0)))
    return s.b(torch.relu(x))  # type: ignore[no-any-return]


def _linears(**sizes: tuple[int, int]) -> dict[str, nn.Module]:
    return {name: nn.Linear(*size) for name, size in sizes.items()}


ODD: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "added into the stream": lambda: (
        Net(_stream, **_linears(a=(6, 8), b=(8, 12), c=(12, 8), d=(8, 12), e=(12, 8), f=(8, 4))),
        (32, 6),
    ),
    "written into a half": lambda: (Net(_halves, **_linears(a=(6, 16), b=(8, 4))), (32, 6)),
    "written into zeros": lambda: (Net(_assigned, **_linears(a=(6, 8), b=(8, 8), c=(16, 4))), (32, 6)),
    "written into the input": lambda: (
        Net(lambda s, x: s.b(torch.relu(s.a(x.mul_(1.5)))), **_linears(a=(6, 12), b=(12, 4))),
        (32, 6),
    ),
    "written into a buffer": lambda: (Net(_counted, **_linears(a=(6, 12), b=(12, 4)), most=torch.zeros(12)), (32, 6)),
    "statistics of the batch": lambda: (
        Net(
            lambda s, x: s.b(torch.relu(nn.functional.batch_norm(s.a(x), s.mean, s.var, training=True))),
            **_linears(a=(6, 12), b=(12, 4)),
            mean=torch.zeros(12),
            var=torch.ones(12),
        ),
        (32, 6),
    ),
    "detached": lambda: (
        Net(lambda s, x: s.c(s.b(torch.relu(s.a(x))).detach()), **_linears(a=(6, 12), b=(12, 8), c=(8, 4))),
        (32, 6),
    ),
    "another dimension's norm": lambda: (
        Net(lambda s, x: s.b(torch.relu(s.norm(s.a(x)))), **_linears(a=(6, 12), b=(12, 4)), norm=nn.BatchNorm1d(5)),
        (32, 5, 6),
    ),
    "a matrix added": lambda: (
        Net(
            lambda s, x: s.b(torch.relu(torch.addmm(s.c(x), torch.relu(s.a(x)), s.w))),
            **_linears(a=(6, 12), b=(8, 4), c=(6, 8)),
            w=nn.Parameter(torch.randn(12, 8)),
        ),
        (32, 6),
    ),
    "one image": lambda: (
        Net(
            lambda s, x: s.b(torch.relu(s.a(x))),
            a=nn.Conv2d(3, 8, 3, padding=1),
            b=nn.Conv2d(8, 4, 3),
        ),
        (3, 8, 8),
    ),
    "one vector": lambda: (Net(lambda s, x: s.b(torch.relu(s.a(x))), **_linears(a=(6, 12), b=(12, 4))), (6,)),
}


@pytest.mark.parametrize("name", ODD)
def test_whatever_a_program_does_it_comes_closer(name: str) -> None:
    torch.manual_seed(0)
    model, shape = ODD[name]()
    model = model.eval()
    batches = [torch.randn(shape) for _ in range(40)]
    graph = analyze(model, batches[0].clone())
    plan = make_plan(model, graph, pattern="unstructured", budget="sparsity=50%", criterion="random")
    state, inputs = copy.deepcopy(model.state_dict()), copy.deepcopy(batches)
    fresh = [torch.randn(shape) for _ in range(10)]

    errors = [error(mask(model, plan), model, fresh)]
    for method in ("bias", "least_squares", "blockwise"):
        found = mask(reconstruct(model, graph, plan, Given(batches), method), plan)
        errors.append(error(found, model, fresh))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(map(torch.equal, batches, inputs))
    assert errors[1] < errors[0]
    assert max(errors[2:]) < 0.75 * errors[0]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        out: Tensor = self.c(torch.relu(self.a(first) - 2 * self.b(second)))
        return out


def test_keywords_are_told_by_name_not_by_place() -> None:
    torch.manual_seed(0)
    model = Two().eval()
    batches = [{"first": torch.randn(32, 6), "second": torch.randn(32, 6) + 3} for _ in range(20)]
    turned = [dict(reversed(x.items())) for x in batches]
    graph = analyze(model, batches[0])
    for wishes in ({"pattern": "unstructured", "budget": "sparsity=50%"}, {"budget": "params=60%"}):
        plans = [
            make_plan(model, graph, criterion="activation", task=Given(some), **wishes) for some in (batches, turned)
        ]
        assert all(torch.equal(plans[0].keep(name), plans[1].keep(name)) for name in plans[0].tensors)
        found = [reconstruct(model, graph, plans[0], Given(some)) for some in (batches, turned)]
        for name, value in found[0].state_dict().items():
            assert torch.equal(value, found[1].state_dict()[name]), name


def test_the_values_are_those_of_the_model_not_of_the_graph() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4)).eval()
    graph = analyze(model, torch.randn(32, 6))
    trained = copy.deepcopy(model)
    with torch.no_grad():
        for p in trained.parameters():
            p.add_(torch.randn_like(p))
    plan = make_plan(trained, graph, pattern="unstructured", budget="sparsity=50%")
    batches = [torch.randn(32, 6) for _ in range(20)]  # of the example's shape, so that the graph serves as it is
    for method in ("least_squares", "blockwise"):
        found = reconstruct(trained, graph, plan, Given(batches), method)
        anew = reconstruct(trained, analyze(trained, batches[0]), plan, Given(batches), method)
        for name, value in found.state_dict().items():
            torch.testing.assert_close(value, anew.state_dict()[name])


class Branching(nn.Module):
    """Cannot be followed by torch.export."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.detach().sum()) > 1e9 else self.inside(x)


@pytest.mark.parametrize("method", ["bias", "least_squares", "blockwise"])
def test_a_part_that_cannot_be_followed_is_passed_through(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), Branching(), nn.Linear(8, 3)).eval()
    batches = [torch.randn(32, 6) for _ in range(20)]
    graph = analyze(model, batches[0][:4])  # other batches than the example's
    plan = make_plan(model, graph, budget="params=60%", criterion="random")
    small = carry_out(reconstruct(model, graph, plan, Given(batches), method), plan, graph.inputs).model
    fresh = [torch.randn(32, 6) for _ in range(5)]
    assert error(small, model, fresh) < 0.9 * error(carry_out(model, plan).model, model, fresh)


@pytest.mark.parametrize("budget", ["params=60%", None])
def test_few_examples_do_no_harm(budget: str | None) -> None:
    """A layer with four times as many inputs as there are examples would fit their noise."""
    torch.manual_seed(0)
    model = Net(lambda s, x: s.b(torch.relu(s.a(x)).flatten(1)), a=nn.Conv2d(3, 6, 3, padding=1), b=nn.Linear(384, 4))
    model = model.eval()
    batches = [torch.randn(16, 3, 8, 8) for _ in range(6)]
    graph = analyze(model, batches[0])
    wishes = {"budget": budget} if budget else {"budget": "sparsity=50%", "pattern": "unstructured"}
    plan = make_plan(model, graph, criterion="random", **wishes)
    fresh = [torch.randn(16, 3, 8, 8) for _ in range(10)]
    errors = []
    for some in (model, reconstruct(model, graph, plan, Given(batches))):
        small = carry_out(some, plan, graph.inputs).model if budget else mask(some, plan)
        errors.append(error(small, model, fresh))
    assert errors[1] < 0.8 * errors[0]


def test_classes_alone_say_nothing_to_steps_along_gradients() -> None:
    torch.manual_seed(0)
    model = Net(lambda s, x: s.b(torch.relu(s.a(x))).argmax(1), **_linears(a=(6, 12), b=(12, 4))).eval()
    batches = [torch.randn(32, 6) for _ in range(20)]
    graph = analyze(model, batches[0])
    plan = make_plan(model, graph, pattern="unstructured", budget="sparsity=60%", criterion="random")
    same = [float((run(mask(m, plan), batches[0]) == run(model, batches[0])).double().mean()) for m in (
        model, reconstruct(model, graph, plan, Given(batches), "blockwise"),
    )]  # fmt: skip
    assert same[1] > same[0]
