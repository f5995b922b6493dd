"""The laws of the house as functions, so that tests of your own models, criteria and patterns can hold them too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur.apply.blame import relative_error
from secateur.apply.shrink import Shrunk, carry_out
from secateur.criteria import Criterion, score
from secateur.graph import analyze
from secateur.graph.trace import capture
from secateur.patterns import NM
from secateur.patterns import parse as parse_pattern
from secateur.planning import make
from secateur.runtime.formats import Format
from secateur.targets.cpu_sparse import TOLERANCES, layers, lower
from secateur.tasks import Task


def check_removing_is_zeroing(model: nn.Module, inputs: Any, budget: str = "params=60%", seed: int = 0) -> Shrunk:
    """Remove random units of every free axis and hold the result to the law. Raises LawError, or returns the result.

    The dense model must come out as it went in, bit by bit.
    """
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = analyze(model, inputs)
    plan = make(model, graph, pattern="channel", budget=budget, criterion="random", allocate="uniform", seed=seed)
    result = carry_out(model, plan)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} of the dense model changed"
    expected = graph.cost({name: flags.numpy() for name, flags in plan.units.items()}).params
    assert sum(p.numel() for p in result.model.parameters()) <= expected
    return result


def check_criterion(criterion: str | Criterion, model: nn.Module, inputs: Any, task: Task | None = None) -> None:
    """A criterion gives finite scores of the weights' shapes, the same every time, and works with every pattern."""
    graph = analyze(model, inputs)
    once, again = (score(model, graph, criterion, task) for _ in range(2))
    assert once.keys() == graph.weights.keys()
    for name, found in once.items():
        assert torch.equal(found, again[name]), f"scores of {name} differ from call to call"
    for pattern, budget in (
        ("unstructured", "sparsity=50%"),
        ("block:4x1", "sparsity=50%"),
        ("channel", "params=70%"),
    ):
        make(model, graph, pattern=pattern, budget=budget, criterion=criterion, task=task)
    if any(w.shape[w.in_dim] >= 4 for w in graph.weights.values()):
        make(model, graph, pattern="2:4", budget=None, criterion=criterion, task=task)


def check_lowering(model: nn.Module, inputs: Any) -> None:
    """Every layer gives the same outputs in every form of the sparse engine as by torch, and so does the lowered model.

    model: one in evaluation mode that can be captured, of float32 on the CPU. Raises TargetError where the engine was
    not built.
    """
    with torch.no_grad():
        for found in layers(capture(model, inputs), inputs):
            product = found.product
            x = torch.randn(product.shape)
            residual = torch.randn_like(product.by_torch(x)) if product.residual else None
            wanted = product.dense(x, residual)
            forms = [Format("blocks", height) for height in (1, 4, 16)]
            forms += [Format("bitmask")] if product.window is None else []
            for form in forms:
                gap = relative_error(product.sparse(form)(x, residual), wanted)
                assert gap <= TOLERANCES["float32"], f"{product.name} as {form} differs by {gap:.2g} (relative)"
    lower(model, inputs)  # compares by itself


def check_groups(mask: Tensor, pattern: str, in_dim: int) -> None:
    """Each N:M group along ``in_dim`` keeps exactly N; a tail of fewer than M keeps everything."""
    shape = parse_pattern(pattern)
    assert isinstance(shape, NM), f"{pattern} is no N:M pattern"
    along = mask.movedim(in_dim, -1)
    whole = along.shape[-1] // shape.m * shape.m
    assert bool((along[..., :whole].reshape(-1, shape.m).sum(-1) == shape.n).all())
    assert bool(along[..., whole:].all())
