"""What ``secateur.compat.prune`` does in its own right: errors, exchange with PyTorch, the class of pruned modules."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from module_state import state, unchanged
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as theirs

from secateur.compat import prune as ours


@pytest.mark.parametrize(
    ("module", "name", "error", "match"),
    [
        (
            nn.Linear(2, 2),
            "wieght",
            AttributeError,
            "Linear has no parameter 'wieght'; its parameters are: weight, bias",
        ),
        (nn.Linear(2, 2, bias=False), "bias", TypeError, "Linear.bias is None; its parameters are: weight"),
        (nn.BatchNorm1d(2), "running_mean", TypeError, "BatchNorm1d.running_mean is no parameter"),
        (nn.LazyLinear(2), "weight", ValueError, "LazyLinear.weight has no shape yet; run the model once"),
        (theirs.identity(nn.Linear(2, 2), "weight"), "weight", TypeError, "computed by another tool"),
        ("model", "weight", TypeError, "expected a module and the name of its parameter, found str"),
    ],
    ids=["typo", "none", "buffer", "lazy", "pruned by torch", "no module"],
)
def test_what_cannot_be_pruned_is_named(module: Any, name: str, error: type[Exception], match: str | None) -> None:
    other = nn.Linear(2, 2)
    for call in (
        lambda: ours.l1_unstructured(module, name, 1),
        lambda: ours.global_unstructured([(other, "weight"), (module, name)], ours.L1Unstructured, amount=1),
    ):
        with pytest.raises(error, match=match):
            call()
    assert not ours.is_pruned(other)


def test_taken_names_are_said() -> None:
    module = nn.Linear(2, 2)
    module.weight_mask = None
    with pytest.raises(ValueError, match="has an attribute 'weight_mask' already"):
        ours.identity(module, "weight")


def test_no_parameters_are_an_error() -> None:
    with pytest.raises(ValueError, match="parameters is empty"):
        ours.global_unstructured([], ours.L1Unstructured, amount=0.5)


@pytest.mark.parametrize(
    ("parameters", "scores", "error", "match"),
    [
        (3, None, TypeError, "not an Iterable"),
        ("weight", [1], TypeError, "must be of type dict"),
        (None, {"wrong": 2}, AssertionError, "have shape"),
    ],
)
def test_global_pruning_refuses(parameters: Any, scores: Any, error: type[Exception], match: str | None) -> None:
    module = nn.Linear(3, 2)
    place = (module, "weight")
    if scores == {"wrong": 2}:
        parameters, scores = [place], {place: torch.ones(3, 2)}
    with pytest.raises(error, match=match):
        ours.global_unstructured(parameters, ours.L1Unstructured, importance_scores=scores, amount=1)
    assert not ours.is_pruned(module)


@pytest.mark.parametrize("wrong", [None, [[1, 0], [0, 1]], "mask"])
def test_what_is_no_tensor_or_dimension_is_named(wrong: Any) -> None:
    module, kind = nn.Linear(2, 2), type(wrong).__name__
    with pytest.raises(AttributeError, match=f"the mask is a {kind}, expected a tensor"):
        ours.custom_from_mask(module, "weight", wrong)
    with pytest.raises(TypeError, match=r"dim=.* has an invalid type; give the number of a dimension"):
        ours.ln_structured(module, "weight", amount=1, n=2, dim=wrong)
    if wrong is not None:
        with pytest.raises(AttributeError, match=f"parameter weight of Linear is a {kind}, expected a tensor"):
            ours.l1_unstructured(module, "weight", amount=1, importance_scores=wrong)
    assert not ours.is_pruned(module)


def test_methods_that_would_be_ignored_are_refused() -> None:
    class Soft(ours.Identity):
        def apply_mask(self, module: nn.Module) -> Tensor:
            return module.weight_orig * 0.5

    with pytest.raises(TypeError, match="Soft overrides apply_mask"):
        Soft.apply(nn.Linear(2, 2), "weight")


def test_a_pruned_weight_cannot_be_assigned_but_its_original_can() -> None:
    module = ours.custom_from_mask(nn.Linear(2, 1), "weight", torch.tensor([[0, 1]]))
    with pytest.raises(AttributeError, match="computed from weight_orig and weight_mask"):
        module.weight = torch.ones(1, 2)
    module.weight_orig = nn.Parameter(torch.ones(1, 2))
    assert module.weight.tolist() == [[0, 1]]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("source", "target"), [(theirs, ours), (ours, theirs)], ids=["from torch", "to torch"])
def test_states_go_both_ways(source: Any, target: Any, assign: bool) -> None:
    inputs = torch.randn(2, 4)
    module = source.l1_unstructured(nn.Linear(4, 3), "weight", 0.5)
    again = target.identity(nn.Linear(4, 3), "weight")
    again.load_state_dict(copy.deepcopy(module.state_dict()), assign=assign)
    assert torch.equal(again(inputs), module(inputs))
    target.l1_unstructured(again, "weight", 2)
    assert int(again.weight_mask.sum()) == 4


def test_masks_are_bools_and_stay_bools() -> None:
    module = ours.l1_unstructured(nn.Linear(4, 3), "weight", 0.5)
    for _ in range(2):
        assert module.weight_mask.dtype == torch.bool
        module.half()
        ours.ln_structured(module, "weight", 1, n=2, dim=0)


def test_masked_originals_move_with_weight_decay_and_the_weight_does_not() -> None:
    module = ours.l1_unstructured(nn.Linear(4, 3), "weight", 0.5)
    before, gone = module.weight_orig.detach().clone(), ~module.weight_mask
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.5)
    module(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    assert (module.weight_orig.grad[gone] == 0).all()
    assert (module.weight_orig[gone] != before[gone]).all()
    assert (module.weight[gone] == 0).all()


def test_the_class_is_a_subclass_of_the_same_name_shared_and_given_back() -> None:
    first, second = (ours.identity(nn.Linear(4, 3), "weight") for _ in range(2))
    assert type(first) is type(second)
    assert isinstance(first, nn.Linear)
    assert repr(first) == repr(nn.Linear(4, 3))
    ours.identity(first, "bias")
    assert not isinstance(second.bias, property)
    for name in ("weight", "bias"):
        ours.remove(first, name)
    assert type(first) is nn.Linear
    assert isinstance(second.bias, nn.Parameter)


def test_pruned_modules_of_all_kinds_are_pickled() -> None:
    module = nn.LSTM(3, 4)
    for name in ("weight_ih_l0", "bias_hh_l0"):
        ours.l1_unstructured(module, name, 0.5)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(module, protocol))
        inputs = torch.randn(2, 1, 3)
        assert torch.equal(again(inputs)[0], module(inputs)[0])
    ours.remove(again, "weight_ih_l0")
    ours.remove(again, "bias_hh_l0")
    assert type(again) is nn.LSTM
    assert all(isinstance(weight, nn.Parameter) for weight in again._flat_weights)


def test_parametrizations_come_and_go_around_a_pruned_tensor() -> None:
    module = nn.Linear(4, 4)
    inputs = torch.randn(2, 4)
    parametrize.register_parametrization(module, "bias", nn.Identity())
    ours.l1_unstructured(module, "weight", 0.5)
    twin = copy.deepcopy(module)
    output = module(inputs)
    ours.remove(twin, "weight")  # of the same class as the module
    assert isinstance(twin.weight, nn.Parameter)
    assert torch.equal(twin(inputs), output)
    parametrize.remove_parametrizations(module, "bias")
    parametrize.register_parametrization(module, "weight_orig", nn.Identity())
    assert torch.equal(module(inputs), output)
    with pytest.raises(ValueError, match="weight_orig is no parameter any more"):
        ours.remove(module, "weight")
    parametrize.remove_parametrizations(module, "weight_orig")
    ours.remove(module, "weight")
    assert torch.equal(module(inputs), output)


def test_a_parametrization_takes_the_zeros_or_nothing_changes() -> None:
    normed = parametrizations.weight_norm(nn.Linear(4, 3))
    ours.l1_unstructured(normed, "weight", 2)
    value = normed.weight.detach().clone()
    ours.remove(normed, "weight")
    assert torch.allclose(normed.weight, value)
    assert torch.equal(normed.weight == 0, value == 0)
    assert len(normed.parametrizations.weight) == 1

    ours.ln_structured(normed, "weight", 1, n=2, dim=0)  # a row of zeros has no direction
    value, before = normed.weight.detach().clone(), state(normed)
    with pytest.raises(ValueError, match="cannot be given these zeros"):
        ours.remove(normed, "weight")
    assert unchanged(normed, before)
    assert torch.equal(normed.weight, value)


@pytest.mark.parametrize("make", [nn.Linear, nn.LSTM])
def test_pruned_modules_are_compiled_exported_and_traced(make: Any) -> None:
    module, inputs = make(3, 4), torch.randn(2, 3)
    name = "weight" if make is nn.Linear else "weight_ih_l0"
    ours.l1_unstructured(module, name, 0.5)
    first = (lambda y: y) if make is nn.Linear else (lambda y: y[0])
    expected = first(module(inputs))
    program = torch.export.export(module, (inputs,), strict=False)
    assert torch.equal(first(program.module()(inputs)), expected)
    assert {f"{name}_orig", f"{name}_mask"} <= program.state_dict.keys()
    if make is nn.Linear:
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        assert torch.equal(compiled(inputs), expected)
        ours.l1_unstructured(module, name, 2)
        assert torch.equal(compiled(inputs), module(inputs))


def test_meta_and_frozen_parameters_can_be_pruned() -> None:
    meta = ours.l1_unstructured(nn.Linear(4, 3, device="meta"), "weight", 1)
    assert meta.weight.is_meta
    frozen = nn.Linear(4, 3).requires_grad_(False)
    ours.l1_unstructured(frozen, "weight", 0.5)
    ours.remove(frozen, "weight")
    assert not frozen.weight.requires_grad
