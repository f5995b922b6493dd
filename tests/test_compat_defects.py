"""What is wrong in ``torch.nn.utils.prune``, each shown to be wrong there and right here.

Every case is what a user expects of either module. ``torch`` raises the exception given with it: once PyTorch mends
one, its test here fails, and the pages that name the defect can be mended too.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from module_state import state, unchanged
from torch import nn
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
