"""The 34 cases of PyTorch's own test/nn/test_pruning.py (TestPruningNN), by their names, held against the drop-in.

The one difference: masks are kept as bools, so they are compared by value.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from secateur.compat import prune

MODULES = pytest.mark.parametrize(
    "make", [lambda: nn.Linear(5, 7), lambda: nn.Conv3d(2, 2, 2)], ids=["linear", "conv3d"]
)
NAMES = pytest.mark.parametrize("name", ["weight", "bias"])
RANDOM_MASK = "secateur.compat.prune.RandomUnstructured.compute_mask"
Make = Callable[[], nn.Module]


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.to(torch.float32), b.to(torch.float32))


def by_hand() -> nn.Linear:
    module = nn.Linear(4, 2)
    module.weight = nn.Parameter(torch.tensor([[1.0, 2, 3, 4], [-4, -3, -2, -1]]))
    return module


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 1))


def with_mask(mask: Tensor) -> nn.Linear:
    """A Linear(5, 2) whose "random" mask is this one."""
    module = nn.Linear(5, 2)
    with mock.patch(RANDOM_MASK, return_value=mask):
        return prune.random_unstructured(module, name="weight", amount=0.9)


def two_gone() -> Tensor:
    mask = torch.ones(2, 5)
    mask[1, 0] = mask[0, 3] = 0
    return mask


@pytest.mark.parametrize(
    ("amount", "error"), [("a string", TypeError), (1.1, ValueError), (20.0, ValueError), (-10, ValueError)]
)
def test_validate_pruning_amount_init_refuses(amount: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        prune._validate_pruning_amount_init(amount=amount)


@pytest.mark.parametrize("amount", [0.34, 1500, 0, 0.0, 1, 1.0])
def test_validate_pruning_amount_init(amount: float) -> None:
    assert prune._validate_pruning_amount_init(amount=amount) is None


def test_validate_pruning_amount() -> None:
    with pytest.raises(ValueError, match="amount=20 should be smaller"):
        prune._validate_pruning_amount(amount=20, tensor_size=19)
    for amount, size in ((0.3, 0), (19, 20), (0, 0), (1, 1)):
        prune._validate_pruning_amount(amount=amount, tensor_size=size)


@pytest.mark.parametrize(
    ("amount", "size", "count"), [(0, 15, 0), (10, 15, 10), (1, 15, 1), (1.0, 15, 15), (0.4, 17, 7)]
)
def test_compute_nparams_to_prune(amount: float, size: int, count: int) -> None:
    assert prune._compute_nparams_toprune(amount=amount, tensor_size=size) == count


@MODULES
@NAMES
def test_random_pruning_sizes(make: Make, name: str) -> None:
    module = make()
    size = getattr(module, name).size()
    prune.random_unstructured(module, name=name, amount=0.1)
    assert size == getattr(module, f"{name}_mask").size()
    assert size == getattr(module, f"{name}_orig").size()
    assert size == getattr(module, name).size()


@MODULES
@NAMES
def test_random_pruning_orig(make: Make, name: str) -> None:
    module = make()
    original = getattr(module, name)
    values = original.detach().clone()
    prune.random_unstructured(module, name=name, amount=0.1)
    assert getattr(module, f"{name}_orig") is original
    assert torch.equal(original, values)


@MODULES
@NAMES
def test_random_pruning_new_weight(make: Make, name: str) -> None:
    module = make()
    prune.random_unstructured(module, name=name, amount=0.1)
    product = getattr(module, f"{name}_orig") * getattr(module, f"{name}_mask")
    assert torch.equal(getattr(module, name), product)


@pytest.mark.parametrize("how", ["identity", "random"])
def test_identity_pruning_and_random_pruning_0perc(how: str) -> None:
    inputs, module = torch.ones(1, 5), nn.Linear(5, 2)
    before = module(inputs)
    before.sum().backward()
    weight_grad, bias_grad = module.weight.grad.clone(), module.bias.grad.clone()
    assert torch.equal(weight_grad, torch.ones(2, 5))
    assert torch.equal(bias_grad, torch.ones(2))
    module.zero_grad()
    if how == "identity":
        prune.identity(module, name="weight")
    else:
        with mock.patch(RANDOM_MASK, return_value=torch.ones(2, 5)):
            prune.random_unstructured(module, name="weight", amount=0.9)
    after = module(inputs)
    assert torch.equal(before, after)
    after.sum().backward()
    assert torch.equal(weight_grad, module.weight_orig.grad)
    assert torch.equal(bias_grad, module.bias.grad)
    assert torch.equal(module(inputs), module(inputs))


def test_random_pruning() -> None:
    module = with_mask(two_gone())
    module(torch.ones(1, 5)).sum().backward()
    assert torch.equal(module.weight_orig.grad, two_gone())
    assert torch.equal(module.bias.grad, torch.ones(2))
    before = module.weight_orig.detach().clone()
    for parameter in module.parameters():
        parameter.data.sub_(parameter.grad.data)
    assert torch.equal(before == module.weight_orig, two_gone() == 0)


def test_random_pruning_forward() -> None:
    module = with_mask(1 - two_gone())
    output = module(torch.ones(1, 5))
    assert output[0, 0] == module.weight_orig[0, 3] + module.bias[0]
    assert output[0, 1] == module.weight_orig[1, 0] + module.bias[1]


def test_remove_pruning_forward() -> None:
    module = with_mask(two_gone())
    pruned = module(torch.ones(1, 5))
    prune.remove(module, "weight")
    assert torch.equal(pruned, module(torch.ones(1, 5)))


def test_pruning_id_consistency() -> None:
    module = nn.Linear(5, 2, bias=False)
    identity = id(next(module.parameters()))
    prune.random_unstructured(module, name="weight", amount=0.9)
    assert identity == id(next(module.parameters()))
    prune.remove(module, "weight")
    assert identity == id(next(module.parameters()))


@MODULES
@NAMES
def test_random_pruning_pickle(make: Make, name: str) -> None:
    module = prune.random_unstructured(make(), name=name, amount=0.1)
    again = pickle.loads(pickle.dumps(module))
    assert isinstance(again, type(module))
    assert torch.equal(getattr(again, name), getattr(module, name))


def test_multiple_pruning_calls() -> None:
    module = nn.Conv3d(2, 2, 2)
    prune.l1_unstructured(module, name="weight", amount=0.1)
    first = module.weight_mask
    prune.ln_structured(module, name="weight", amount=0.3, n=2, dim=0)
    hook = next(iter(module._forward_pre_hooks.values()))
    assert isinstance(hook, prune.PruningContainer)
    assert hook._tensor_name == "weight"
    assert len(hook) == 2
    assert isinstance(hook[0], prune.L1Unstructured)
    assert isinstance(hook[1], prune.LnStructured)
    assert torch.all(module.weight_mask[first == 0] == 0)
    prune.ln_structured(module, name="weight", amount=0.1, n=float("inf"), dim=1)
    assert next(iter(module._forward_pre_hooks.values()))._tensor_name == "weight"


def test_pruning_container() -> None:
    container = prune.PruningContainer()
    container._tensor_name = "test"
    assert len(container) == 0
    method, other = prune.L1Unstructured(amount=2), prune.L1Unstructured(amount=2)
    method._tensor_name, other._tensor_name = "test", "another_test"
    container.add_pruning_method(method)
    with pytest.raises(ValueError, match="another_test"):
        container.add_pruning_method(other)
    for wrong in (10, "ugh"):
        with pytest.raises(TypeError, match="is not a BasePruningMethod subclass"):
            container.add_pruning_method(wrong)
    assert list(container) == [method]


def test_pruning_container_compute_mask() -> None:
    container = prune.PruningContainer()
    container._tensor_name = "test"
    t = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    default = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 1]])
    for method, expected in (
        (prune.L1Unstructured(amount=2), [[0.0, 0, 1, 0], [1, 1, 0, 1]]),
        (prune.LnStructured(amount=1, n=2, dim=0), [[0.0, 0, 0, 0], [1, 1, 0, 1]]),
        (prune.LnStructured(amount=1, n=2, dim=1), [[0.0, 1, 1, 0], [0, 1, 0, 1]]),
    ):
        method._tensor_name = "test"
        container.add_pruning_method(method)
        assert torch.equal(container.compute_mask(t, default), torch.tensor(expected))


def test_l1_unstructured_pruning() -> None:
    module = by_hand()
    prune.l1_unstructured(module, "weight", amount=2)
    assert module.weight.tolist() == [[0, 2, 3, 4], [-4, -3, -2, 0]]
    prune.l1_unstructured(module, "weight", amount=2)
    assert module.weight.tolist() == [[0, 0, 3, 4], [-4, -3, 0, 0]]


def test_l1_unstructured_pruning_with_importance_scores() -> None:
    module, scores = by_hand(), torch.tensor([[4.0, 2, 1, 3], [-3, -1, -2, -4]])
    prune.l1_unstructured(module, "weight", amount=2, importance_scores=scores)
    assert module.weight.tolist() == [[1, 2, 0, 4], [-4, 0, -2, -1]]
    prune.l1_unstructured(module, "weight", amount=2, importance_scores=scores)
    assert module.weight.tolist() == [[1, 0, 0, 4], [-4, 0, 0, -1]]


def test_unstructured_pruning_same_magnitude() -> None:
    t = 2 * torch.randint(low=-1, high=2, size=(10, 7))
    mask = prune.L1Unstructured(amount=0.2).compute_mask(t, default_mask=torch.ones_like(t))
    assert int((mask == 0).sum()) == prune._compute_nparams_toprune(0.2, t.nelement())


def test_random_structured_pruning_amount() -> None:
    t = 2.0 * torch.randint(low=-1, high=2, size=(5, 4, 2))
    mask = prune.RandomStructured(amount=0.6, dim=2).compute_mask(t, default_mask=torch.ones_like(t))
    assert sorted((mask == 0).sum(dim=(0, 1)).tolist()) == [0, 20]


@pytest.mark.parametrize(
    ("scores", "channel", "column"),
    [(None, 1, 0), ([[[10.0, 1], [10, 1]], [[30, 3], [30, 3]], [[-20, -2], [-20, -2]]], 0, 1)],
    ids=["test_ln_structured_pruning", "test_ln_structured_pruning_importance_scores"],
)
def test_ln_structured_pruning(scores: list | None, channel: int, column: int) -> None:
    module = nn.Conv2d(3, 1, 2)
    module.weight.data = torch.tensor([[[[1.0, 2], [1, 2.5]], [[0.5, 1], [0.1, 0.1]], [[-3, -5], [0.1, -1]]]])
    importance = None if scores is None else torch.tensor([scores])
    expected = torch.ones(1, 3, 2, 2)
    expected[:, channel] = 0
    prune.ln_structured(module, "weight", amount=1, n=2, dim=1, importance_scores=importance)
    assert same(expected, module.weight_mask)
    expected[:, :, :, column] = 0
    prune.ln_structured(module, "weight", amount=1, n=1, dim=-1, importance_scores=importance)
    assert same(expected, module.weight_mask)


@MODULES
@NAMES
def test_remove_pruning(make: Make, name: str) -> None:
    module = make()
    prune.random_unstructured(module, name, amount=0.5)
    assert f"{name}_orig" in dict(module.named_parameters())
    assert f"{name}_mask" in dict(module.named_buffers())
    assert name not in dict(module.named_parameters())
    assert hasattr(module, name)
    pruned = getattr(module, name)
    prune.remove(module, name)
    assert name in dict(module.named_parameters())
    assert f"{name}_orig" not in dict(module.named_parameters())
    assert f"{name}_mask" not in dict(module.named_buffers())
    assert torch.equal(pruned, getattr(module, name))


@MODULES
@NAMES
def test_remove_pruning_exception(make: Make, name: str) -> None:
    module = make()
    assert not prune.is_pruned(module)
    with pytest.raises(ValueError, match=f"'{name}' of module .* has to be pruned before"):
        prune.remove(module, name)


@pytest.mark.parametrize(
    ("scores", "weights"),
    [
        (None, ([[0, 2, 3, 4], [-4, -3, -2, 0]], [[0, 0, -2]])),
        (
            ([[4.0, 2, 1, 3], [-3, -1, -2, -4]], [[0, 10.0, -0.2]]),
            ([[1, 2, 0, 4], [-4, 0, -2, -1]], [[0, 0.125, 0]]),
        ),
    ],
    ids=["test_global_pruning", "test_global_pruning_importance_scores"],
)
def test_global_pruning(scores: tuple | None, weights: tuple) -> None:
    first, second = by_hand(), nn.Linear(3, 1)
    second.weight = nn.Parameter(torch.tensor([[0, 0.125, -2]]))
    places = ((first, "weight"), (second, "weight"))
    given = scores and {place: torch.tensor(values) for place, values in zip(places, scores, strict=True)}
    prune.global_unstructured(places, pruning_method=prune.L1Unstructured, amount=4, importance_scores=given)
    assert (first.weight.tolist(), second.weight.tolist()) == weights


def test_custom_from_mask_pruning() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]])
    default = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])
    computed = prune.CustomFromMask(mask=mask).compute_mask(torch.rand(2, 4), default)
    assert computed.tolist() == [[0, 0, 0, 0], [0, 0, 1, 1]]


@MODULES
@NAMES
def test_pruning_rollback(make: Make, name: str) -> None:
    module = make()
    with mock.patch("secateur.compat.prune.L1Unstructured.compute_mask", side_effect=Exception("HA!")):
        with pytest.raises(Exception, match="HA!"):
            prune.l1_unstructured(module, name=name, amount=0.9)
        assert name in dict(module.named_parameters())
        assert f"{name}_mask" not in dict(module.named_buffers())
        assert f"{name}_orig" not in dict(module.named_parameters())


def test_pruning_serialization_model(tmp_path: Path) -> None:
    model = small_net()
    assert {"0.weight_orig", "0.weight_mask"}.isdisjoint(model.state_dict())
    prune.l1_unstructured(module=model[0], name="weight", amount=0.9)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    for net in (model, again):
        assert {"0.weight_orig", "0.weight_mask"} <= net.state_dict().keys()
        assert "0.weight" not in net.state_dict()
        assert hasattr(net[0], "weight")
    assert torch.equal(model[0].weight, again[0].weight)


def test_pruning_serialization_state_dict(tmp_path: Path) -> None:
    model = small_net()
    prune.l1_unstructured(module=model[0], name="weight", amount=0.9)
    pruned = model[0].weight
    prune.remove(module=model[0], name="weight")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    again = small_net()
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    for net in (model, again):
        assert {"0.weight_orig", "0.weight_mask"}.isdisjoint(net.state_dict())
        assert "0.weight" in net.state_dict()
    assert torch.equal(pruned, again[0].weight)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (None, [[0, 0, 1, 0], [1, 1, 0, 1]]),
        ([[1, 2, 3, 4], [1.5, 1.6, 1.7, 1.8]], [[0, 1, 1, 0], [0, 1, 0, 1]]),
        ([[1.0, 2, 3, 4], [5, 6, 7, 8]], [[0, 0, 1, 0], [1, 1, 0, 1]]),
    ],
    ids=["test_prune", "test_prune_importance_scores", "test_prune_importance_scores_mimic_default"],
)
def test_prune(scores: list | None, expected: list) -> None:
    t = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    default = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 1]])
    importance = None if scores is None else torch.tensor(scores)
    pruned = prune.L1Unstructured(amount=2).prune(t, default, importance_scores=importance)
    assert torch.equal(t * torch.tensor(expected), pruned)


def test_rnn_pruning() -> None:
    rnn = nn.LSTM(32, 32)
    prune.l1_unstructured(rnn, "weight_ih_l0", 0.5)
    assert sum(isinstance(p, nn.Parameter) for p in rnn._flat_weights) == 3
    prune.remove(rnn, "weight_ih_l0")
    assert sum(isinstance(p, nn.Parameter) for p in rnn._flat_weights) == 4
    assert rnn._parameters["weight_ih_l0"] is not None
    assert "weight_ih_l0_orig" not in rnn._parameters
    assert dict(rnn.named_parameters())["weight_ih_l0"] is not None
    assert "weight_ih_l0_orig" not in dict(rnn.named_parameters())
