"""All 59 structures of ``structures``: what is free, the law, other batch sizes, training."""

import importlib
import re

import pytest
import torch
from structures import CASES
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from nets import enliven_
from secateur.apply.shrink import TOLERANCE, carry_out
from secateur.errors import TraceError
from secateur.graph import analyze
from secateur.planning import make
from secateur.tasks import call, clone, plain
from secateur.testing import check_removing_is_zeroing

for topic in "attention convolutions forms heads joins layouts mixing norms program recurrent vision".split():  # noqa: SIM905
    importlib.import_module(f"structures.{topic}")
CASES.sort(key=lambda c: c.id)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # torch's own, on copying a program
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),  # reentrant checkpoints in evaluation
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # torch.compile
]


WHOLE = {
    37: "how many steps packed sequences have depends on the values of a tensor",
    42: "a feature that the model returns keeps its shape",
    46: "values written in steps into a tensor lie between others, and no range of what stays holds them",
    54: "a decision that Python takes on values is not part of any program",
    57: "TorchScript has no Python code to follow, and quantized weights are packed integers",
}
"""Rows in which a network is refused or can lose nothing, and why that has to be so."""


def test_every_row_has_networks_and_few_must_stay_whole():
    rows = [case.row for case in CASES]
    assert all(rows.count(row) >= 2 for row in range(1, 60))
    assert len({case.id for case in CASES}) == len(CASES) >= 150
    assert {case.row for case in CASES if not case.free} == set(WHOLE)
    assert len(WHOLE) <= 5


class Carried:
    """One case: the dense network, what was found in it, and what came out of removing random units."""

    def __init__(self, case):
        torch.manual_seed(0)
        self.case = case
        self.model = in_mode(enliven_(case.build()), training=False)
        self.inputs = case.inputs(2)
        self.graph = analyze(self.model, self.inputs)
        self.model = plain(self.model)  # the result is a plain model, out of what only ran it
        self.before = {name: value.clone() for name, value in self.model.state_dict().items()}
        self._plan = self._done = None

    @property
    def plan(self):
        if self._plan is None:
            wish = {"pattern": "channel", "budget": self.case.budget, "criterion": "random", "allocate": "uniform"}
            self._plan = make(self.model, self.graph, seed=1, **wish)
        return self._plan

    @property
    def done(self):
        if self._done is None:
            self._done = carry_out(self.model, self.plan)
        return self._done


@pytest.fixture(scope="module", params=[c for c in CASES if c.free], ids=lambda c: c.id)
def carried(request):
    return Carried(request.param)


def in_mode(model, training):
    """What ``train()`` and ``eval()`` do, for exported programs too, which refuse both."""
    for module in model.modules():
        module.training = training
    return model


def zeroed(model, plan):
    """The dense network with zeros in place of all parameters that are gone.

    Knows nothing of the engine but the plan's indices.
    """
    model = clone(model)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, dims in plan.slices.items():
            for dim, keep in dims.items() if name in parameters else ():
                parameters[name].index_fill_(dim, (~keep).nonzero()[:, 0], 0)
    return model


def floats(out):
    return [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def close(found, expected, tolerance):
    for a, b in zip(floats(found), floats(expected), strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-6)


def test_what_is_free_and_what_is_not(carried):
    assert tuple(sorted(a.units for a in carried.graph.free)) == carried.case.free
    assert all(a.exact for a in carried.graph.free) != carried.case.inexact
    reasons = [a.frozen for a in carried.graph.axes]
    assert all(re.search(r"aten\.\S+ at \S+:\d+ '", reason) for reason in reasons if "aten." in reason)
    if carried.case.frozen:
        assert any(re.search(carried.case.frozen, reason) for reason in reasons)


def test_removing_is_zeroing(carried):
    law = carried.done.law
    assert law.error <= law.tolerance
    for name, value in carried.model.state_dict().items():
        assert torch.equal(value, carried.before[name])
    size = sum(p.numel() for p in carried.done.model.parameters())
    assert size < sum(p.numel() for p in carried.model.parameters())


def test_other_inputs_of_other_batch_sizes(carried):
    small, dense = carried.done.model, zeroed(carried.model, carried.plan)
    tolerance = max(TOLERANCE[p.dtype] for p in dense.parameters() if p.dtype in TOLERANCE)
    for batch in carried.case.batches or (2,):
        inputs = carried.case.inputs(batch)
        with torch.no_grad():
            found, expected = call(small, inputs), call(dense, inputs)
        assert [t.shape for t in floats(found)] == [t.shape for t in floats(expected)]
        assert all(t.isfinite().all() for t in floats(found))
        if not carried.case.inexact:
            close(found, expected, tolerance)
        elif batch > 1:  # the first example by itself
            with torch.no_grad():
                alone = call(small, tree_map(lambda t: t[:1] if isinstance(t, torch.Tensor) else t, inputs))
            several = [(a, b[: len(a)]) for a, b in zip(floats(alone), floats(found), strict=True) if b.dim()]
            assert several
            for a, b in several:
                close(a, b, tolerance)


def test_the_result_trains(carried):
    dense, small = (in_mode(clone(m), training=True) for m in (carried.model, carried.done.model))
    for model in (dense, small):
        loss(call(model, carried.inputs), model)
    trained = {n for n, p in dense.named_parameters() if p.grad is not None}
    found = {n for n, p in small.named_parameters() if p.grad is not None}
    assert found == trained
    named = dict(small.named_parameters())
    assert all(named[n].grad.isfinite().all() for n in trained)
    if trained:
        before = {n: v.clone() for n, v in small.state_dict().items()}
        torch.optim.SGD(small.parameters(), lr=0.01).step()
        assert any(not torch.equal(v, before[n]) for n, v in small.state_dict().items())


def loss(out, model: nn.Module):
    if any(p.requires_grad for p in model.parameters()):
        sum(t.float().square().mean() for t in floats(out) if t.requires_grad).backward()


@pytest.mark.parametrize("case", [c for c in CASES if not c.free], ids=lambda c: c.id)
def test_frozen_or_refused_with_the_reason(case):
    torch.manual_seed(0)
    model = case.build()
    if case.refused:
        with pytest.raises(TraceError, match=case.refused):
            analyze(model, case.inputs(2))
    else:
        graph = analyze(model, case.inputs(2))
        assert not graph.free
        assert any(re.search(case.frozen, a.frozen) for a in graph.axes)


@pytest.mark.parametrize("name", ["14-shufflenet_units", "24-attention_by-einsum", "26-grouped_queries", "51-repeated"])
def test_a_rewritten_program_can_be_pruned_again(name):
    once = Carried(next(case for case in CASES if case.id == name))
    assert once.done.form == "program"
    twice = check_removing_is_zeroing(once.done.model, once.inputs, budget="params=80%")
    assert len(floats(call(twice.model, once.case.inputs(5)))[0]) == 5
