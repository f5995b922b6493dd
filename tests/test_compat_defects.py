"""What is wrong in ``torch.nn.utils.prune``, each shown to be wrong there and right here.

Every case is what a user expects of either module. ``torch`` raises the exception given with it: once PyTorch mends
one, its test here fails, and the pages that name the defect can be mended too.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as theirs

from secateur.compat import prune as ours

CASES: list[Any] = []
DEPRECATED = "ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"


def torch_raises(error: type[Exception], match: str | None = None) -> Callable[[Callable[[Any], None]], None]:
    def add(case: Callable[[Any], None]) -> None:
        CASES.append(pytest.param(case, error, match, id=case.__name__))

    return add


def size(thing: object) -> int:
    file = io.BytesIO()
    torch.save(thing, file)
    return file.tell()


def state(module: nn.Module) -> dict[str, Any]:
    """Everything that a failed call could have changed."""
    hooks = {k: len(h) if hasattr(h, "__len__") else h for k, h in module._forward_pre_hooks.items()}
    return {name: value.clone() for name, value in module.state_dict().items()} | {"hooks": hooks}


def unchanged(module: nn.Module, before: dict[str, Any]) -> bool:
    after = state(module)
    same = before.keys() == after.keys()
    return same and all(
        torch.equal(before[name], after[name]) if isinstance(before[name], Tensor) else before[name] == after[name]
        for name in before
    )


@torch_raises(RuntimeError, "backward through the graph a second time")
def attention_is_trained_on(prune: Any) -> None:
    """pytorch#69353: the parent reads ``out_proj.weight`` and never calls ``out_proj``."""
    attention, inputs = nn.MultiheadAttention(4, 2), torch.randn(3, 1, 4)
    prune.l1_unstructured(attention.out_proj, "weight", 0.5)
    optimizer = torch.optim.SGD(attention.parameters(), lr=0.1)
    outputs = []
    for _ in range(3):
        output = attention(inputs, inputs, inputs)[0]
        optimizer.zero_grad()
        output.square().sum().backward()
        optimizer.step()
        outputs.append(output)
    assert not torch.equal(outputs[1], outputs[2])
    assert int((attention.out_proj.weight == 0).sum()) == 8


@torch_raises(RuntimeError, "Only Tensors created explicitly by the user")
def a_pruned_module_can_be_copied(prune: Any) -> None:
    """pytorch#37322."""
    module = prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.5)
    again = copy.deepcopy(module)
    assert torch.equal(again.weight, module.weight)
    assert again.weight_orig is not module.weight_orig


@torch_raises(RuntimeError, "Only Tensors created explicitly by the user")
def a_pruned_module_can_be_copied_after_forward(prune: Any) -> None:
    module = prune.l1_unstructured(nn.LSTM(3, 4), "weight_hh_l0", 0.5)
    with torch.no_grad():
        module(torch.randn(2, 1, 3))
    copy.deepcopy(module)
    module(torch.randn(2, 1, 3))
    again = copy.deepcopy(module)
    nn.init.ones_(again.weight_hh_l0_orig)
    assert not torch.equal(again._flat_weights[1], module._flat_weights[1])


@torch_raises(RuntimeError, "Only Tensors created explicitly by the user")
def a_moving_average_can_be_kept(prune: Any) -> None:
    module = prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.5)
    average = torch.optim.swa_utils.AveragedModel(module)
    average.update_parameters(module)
    assert torch.equal(average.module.weight, module.weight)


@torch_raises(AssertionError)
def rounds_of_global_pruning_need_no_more_memory(prune: Any) -> None:
    """pytorch#49332, #34257."""
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100))
    dense = size(model)
    for _ in range(5):
        prune.global_unstructured([(layer, "weight") for layer in model], prune.L1Unstructured, amount=0.2)
    assert size(model) < 1.5 * dense


@torch_raises(AssertionError)
def masks_take_a_byte_per_weight(prune: Any) -> None:
    module = nn.Linear(100, 100)
    dense = size(module.state_dict())
    prune.identity(module, "weight")
    assert size(module.state_dict()) < 1.3 * dense


@torch_raises(AssertionError)
def a_failed_second_call_changes_nothing(prune: Any) -> None:
    """In no thread: torch takes the hook off before it knows the amount."""
    module = prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.5)
    before = state(module)
    for amount in (1.5, 100, "half"):
        with pytest.raises((ValueError, TypeError)):
            prune.l1_unstructured(module, "weight", amount)
        assert unchanged(module, before)
    assert prune.is_pruned(module)
    prune.remove(module, "weight")


@torch_raises(AssertionError)
def a_failed_third_call_changes_nothing(prune: Any) -> None:
    module = nn.Linear(4, 3)
    for _ in range(2):
        prune.l1_unstructured(module, "weight", 0.25)
    before = state(module)
    with pytest.raises(IndexError):
        prune.ln_structured(module, "weight", 1, n=2, dim=5)
    assert unchanged(module, before)


@torch_raises(AssertionError)
def global_pruning_that_fails_half_way_changes_nothing(prune: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    before = state(model[0])
    with pytest.raises(TypeError):
        prune.global_unstructured([(model[0], "weight"), (model[1], "running_mean")], prune.L1Unstructured, amount=2)
    assert unchanged(model[0], before)


@torch_raises(AssertionError)
def the_weight_is_fresh_after_a_step(prune: Any) -> None:
    module = prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.5)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(torch.randn(2, 4)).square().sum().backward()
    optimizer.step()
    assert torch.equal(module.weight, module.weight_orig * module.weight_mask)


@torch_raises(AssertionError)
def the_weight_is_fresh_after_loading(prune: Any) -> None:
    source = prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.5)
    module = prune.identity(nn.Linear(4, 3), "weight")
    module.load_state_dict(source.state_dict())
    assert torch.equal(module.weight, source.weight)


@torch_raises(AssertionError)
def the_weight_has_the_new_dtype(prune: Any) -> None:
    module = prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.5).half()
    assert module.weight.dtype == torch.float16


@torch_raises(AssertionError)
def the_weight_can_be_penalized_after_evaluation(prune: Any) -> None:
    """A forward without gradients must not leave a weight without gradients."""
    module = prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.5)
    with torch.no_grad():
        module(torch.randn(2, 4))
    assert module.weight.requires_grad


@torch_raises(AssertionError)
def masked_nan_and_infinity_are_zero(prune: Any) -> None:
    module = nn.Linear(2, 2)
    module.weight.data = torch.tensor([[float("nan"), 1.0], [float("inf"), 2.0]])
    prune.custom_from_mask(module, "weight", torch.tensor([[0, 1], [0, 1]]))
    assert module.weight.tolist() == [[0, 1], [0, 2]]
    module(torch.ones(1, 2)).sum().backward()
    assert module.weight_orig.grad.tolist() == [[0, 1], [0, 1]]


@torch_raises(ValueError, "expected a non-empty list of Tensors")
def parameters_may_come_from_a_generator(prune: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    prune.global_unstructured(((layer, "weight") for layer in model), prune.L1Unstructured, amount=0.5)
    assert sum(int((layer.weight == 0).sum()) for layer in model) == 9


@torch_raises(AssertionError)
def tied_weights_count_once_and_get_one_mask(prune: Any) -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    prune.global_unstructured([(layer, "weight") for layer in model], prune.RandomUnstructured, amount=7)
    assert torch.equal(model[0].weight, model[1].weight)
    assert int((model[0].weight == 0).sum()) == 7


@torch_raises(TypeError, "to parameter 'weight_orig'")
def parametrized_weights_can_be_pruned(prune: Any) -> None:
    module = parametrizations.weight_norm(nn.Linear(4, 3))
    dense, bias = module.weight.detach().clone(), module.bias
    for _ in range(2):
        prune.l1_unstructured(module, "weight", 3)
    prune.l1_unstructured(module, "bias", 1)
    assert prune.is_pruned(module)
    assert int((module.weight == 0).sum()) == 6
    assert torch.equal(module.weight[module.weight != 0], dense[module.weight != 0])
    module(torch.randn(2, 4)).sum().backward()
    pruned = copy.deepcopy(module).weight
    parametrize.remove_parametrizations(module, "weight")
    assert torch.equal(module.weight, pruned)
    prune.remove(module, "bias")
    assert module.bias is bias
    prune.remove(module, "weight")
    assert not prune.is_pruned(module)


@torch_raises(AssertionError)
def what_a_hook_computes_from_a_pruned_tensor_is_fresh(prune: Any) -> None:
    """The hooks of weight_norm run before torch's mask, and see the one of the last step."""
    module = nn.utils.weight_norm(nn.Linear(4, 3))
    prune.l1_unstructured(module, "weight_v", 0.5)
    nn.init.normal_(module.weight_v_orig)
    module(torch.randn(2, 4))
    assert torch.allclose(
        module.weight, torch._weight_norm(module.weight_v_orig * module.weight_v_mask, module.weight_g, 0)
    )


@torch_raises(AssertionError)
def pruning_again_keeps_the_order_of_hooks(prune: Any) -> None:
    """pytorch#37138."""
    module = prune.identity(nn.Linear(4, 3), "weight")
    prune.identity(module, "bias")
    prune.identity(module, "weight")
    assert [hook._tensor_name for hook in module._forward_pre_hooks.values()] == ["weight", "bias"]


@torch_raises(RuntimeError, "view size is not compatible")
def channels_last_weights_can_be_pruned_and_stay_so(prune: Any) -> None:
    module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    for _ in range(2):
        prune.l1_unstructured(module, "weight", 10)
        prune.random_unstructured(module, "weight", 10)
    assert int((module.weight == 0).sum()) == 40
    assert module.weight.is_contiguous(memory_format=torch.channels_last)


@torch_raises(RuntimeError, "dim must be a 2-tuple")
def the_frobenius_norm_is_for_convolutions_too(prune: Any) -> None:
    module = prune.ln_structured(nn.Conv2d(3, 4, 3), "weight", 1, n="fro", dim=0)
    assert int(module.weight.abs().sum(dim=(1, 2, 3)).count_nonzero()) == 3


@torch_raises(pytest.fail.Exception, "DID NOT RAISE")
def a_pruned_vector_has_no_channels(prune: Any) -> None:
    """The first structured call says so; the second wipes the vector."""
    module = prune.identity(nn.Linear(4, 3), "bias")
    with pytest.raises(ValueError, match="multidimensional"):
        prune.ln_structured(module, "bias", 1, n=2, dim=0)


@torch_raises(pytest.fail.Exception, "DID NOT RAISE")
def masks_are_zeros_and_ones(prune: Any) -> None:
    """With other factors torch's later calls find nothing left to prune, and say nothing."""
    with pytest.raises(ValueError, match="zeros and ones only"):
        prune.custom_from_mask(nn.Linear(2, 1), "weight", torch.tensor([[0.5, 1]]))


@torch_raises(AttributeError, "_tensor_name")
def a_container_can_be_made_of_methods(prune: Any) -> None:
    """pytorch#187847."""
    methods = [prune.L1Unstructured(1), prune.L1Unstructured(2)]
    for method in methods:
        method._tensor_name = "weight"
    assert list(prune.PruningContainer(*methods)) == methods


@torch_raises(AssertionError)
def a_container_leaves_the_given_mask_alone(prune: Any) -> None:
    container = prune.PruningContainer()
    container._tensor_name, method = "weight", prune.L1Unstructured(1)
    method._tensor_name = "weight"
    container.add_pruning_method(method)
    mask = torch.ones(2, 2)
    container.compute_mask(torch.rand(2, 2), mask)
    assert torch.equal(mask, torch.ones(2, 2))


@pytest.mark.filterwarnings(DEPRECATED)
@pytest.mark.parametrize(("case", "error", "match"), CASES)
def test_torch_has_the_defect(case: Callable[[Any], None], error: type[Exception], match: str | None) -> None:
    with pytest.raises(error, match=match):
        case(theirs)


@pytest.mark.filterwarnings(DEPRECATED)
@pytest.mark.parametrize(("case", "error", "match"), CASES)
def test_here_it_is_mended(case: Callable[[Any], None], error: type[Exception], match: str | None) -> None:
    case(ours)


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
