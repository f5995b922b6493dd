"""2:4 on CUDA. Without a card: what is refused, what is chosen by which times, and how packed layers are put in."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import SpecError, TargetError
from secateur.measure import Latency
from secateur.targets import cuda_24, semi_structured
from secateur.targets.cuda_24 import lower_24
from secateur.targets.semi_structured import BACKENDS, Linear24, Packing, is_24, multiply, pack, why_not

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def masked(weight: Tensor) -> Tensor:
    """The first two of every four inputs are kept."""
    mask = torch.tensor([1, 1, 0, 0], device=weight.device).repeat(weight.shape[1] // 4)
    return weight * mask.to(weight.dtype)


def linear(outputs: int = 64, inputs: int = 64, dtype: torch.dtype = torch.bfloat16, **wishes: Any) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, **wishes)
    layer.weight.data = masked(layer.weight.data)
    return layer.to(dtype)


class Net(nn.Module):
    """Two layers with 2:4 zeros, one without, one that is not called; the first is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), linear(bias=False)
        self.full, self.unused = nn.Linear(64, 64).bfloat16(), linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.full(self.b(self.a(self.a(x)).relu()))


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A card that is not there: packing keeps the weight, and times are what the returned dict says."""
    seen: dict[str, Any] = {"2:4": 1.0, "dense": 2.0, "whole": 0.8, "packed": [], "timed": 0}

    def from_dense(weight: Tensor) -> SimpleNamespace:
        seen["packed"].append(weight)
        return SimpleNamespace(packed=weight, meta=None)

    def times(forms: Any, x: Tensor, seconds: float) -> dict[Any, float]:
        seen["timed"] += 1
        return {way: seen["dense" if way is None else "2:4"] + 0.1 * i for i, way in enumerate(forms)}

    def latency(models: Any, inputs: Any, seconds: float) -> dict[str, Latency]:
        return {"dense": Latency((1.0,) * 3, 1), "2:4": Latency((seen["whole"],) * 3, 1)}

    def product(x: Tensor, packed: Tensor, meta: None, bias: Tensor | None, algorithm: int) -> Tensor:
        assert len(x) % 8 == 0
        return nn.functional.linear(x, packed * seen.get("scale", 1), bias)

    fakes = {
        name: SimpleNamespace(_DTYPE_SHAPE_CONSTRAINTS=torn._DTYPE_SHAPE_CONSTRAINTS, from_dense=from_dense)
        for name, torn in BACKENDS.items()
    }
    monkeypatch.setattr(semi_structured, "BACKENDS", fakes)
    monkeypatch.setattr(semi_structured, "multiply", product)
    monkeypatch.setattr(cuda_24, "require_cuda", lambda model: None)
    monkeypatch.setattr(cuda_24, "times", times)
    monkeypatch.setattr(cuda_24, "latency", latency)
    return seen


def test_without_a_card_the_target_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    with pytest.raises(TargetError, match=r"needs a CUDA device.*cpu-sparse"):
        lower_24(Net(), torch.randn(8, 64).bfloat16())


def test_a_model_elsewhere_and_an_old_card_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(TargetError, match=r"found it on cpu; use model\.cuda\(\)"):
        lower_24(Net(), torch.randn(8, 64).bfloat16())
    monkeypatch.setattr(cuda_24, "device_of", lambda model: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Turing")
    with pytest.raises(TargetError, match=r"8\.0 \(Ampere\) or later, found Turing with 7\.5"):
        lower_24(Net(), torch.randn(8, 64).bfloat16())


def test_inputs_are_needed() -> None:
    with pytest.raises(SpecError, match="give example inputs"):
        lower_24(Net(), None)


@pytest.mark.parametrize(
    ("shape", "dtype", "bias", "backend", "why"),
    [
        ((32, 64), torch.float32, None, "CUTLASS", "is float32, for which torch has no 2:4 kernel"),
        ((32, 64), torch.float64, None, "CUTLASS", "is float64, expected bfloat16 or float16"),
        ((32, 32), torch.float8_e4m3fn, None, "cuSPARSELt", "is float8_e4m3fn, expected bfloat16 or float16"),
        ((32, 32), torch.bfloat16, None, "CUTLASS", "32 outputs and 32 inputs, expected multiples of 32 and 64"),
        ((48, 64), torch.float16, None, "CUTLASS", "48 outputs and 64 inputs, expected multiples of 32 and 64"),
        ((24, 16), torch.float16, None, "cuSPARSELt", "multiples of 16 and 16 for cuSPARSELt"),
        ((0, 16), torch.float16, None, "cuSPARSELt", "has 0 outputs"),
        ((16, 64), torch.int8, None, "CUTLASS", "16 outputs and 64 inputs, expected multiples of 16 and 128"),
        ((16, 16), torch.float16, torch.float32, "cuSPARSELt", "has a bias of float32 and a weight of float16"),
        ((16, 16), torch.float16, torch.float16, "cuSPARSELt", ""),
        ((32, 64), torch.bfloat16, None, "CUTLASS", ""),
        ((16, 128), torch.int8, None, "CUTLASS", ""),
    ],
)
def test_what_a_kernel_cannot_take_is_named(
    shape: tuple[int, int], dtype: torch.dtype, bias: torch.dtype | None, backend: str, why: str
) -> None:
    weight = torch.empty(shape, dtype=dtype, device="meta")
    found = why_not(weight, None if bias is None else torch.empty(shape[0], dtype=bias, device="meta"), backend)
    assert why in found
    assert bool(found) == bool(why)


def test_two_of_four_are_counted_along_the_inputs() -> None:
    weight = torch.zeros(4, 8)
    weight[:, 1:3] = 1
    assert is_24(weight)
    assert not is_24(weight.t().contiguous())
    weight[2, 0] = -0.0
    assert is_24(weight)
    weight[2, 0] = 1e-30
    assert not is_24(weight)
    assert not is_24(torch.zeros(4, 6))


def test_negative_zeros_are_packed_as_zeros(card: dict[str, Any]) -> None:
    weight = masked(torch.randn(32, 64)).half()
    assert torch.signbit(weight[weight == 0]).any()
    packed, _ = pack(weight, "CUTLASS")
    assert torch.equal(packed, weight)
    assert not torch.signbit(packed[packed == 0]).any()


def test_faster_layers_are_taken_and_say_the_same(card: dict[str, Any]) -> None:
    model, x = Net(), torch.randn(2, 5, 64).bfloat16()
    before = copy.deepcopy(model.state_dict())
    lowered, choices = lower_24(model, x)
    found = {choice.layer: choice for choice in choices}
    assert {name: choice.form for name, choice in found.items()} == {
        "a": "2:4", "b": "2:4", "full": "dense", "unused": "dense",
    }  # fmt: skip
    assert "times as fast as dense by cuSPARSELt" in found["a"].why
    assert found["full"].why == "has more than 2 of 4 consecutive inputs that are not zero"
    assert found["unused"].why == "is not called on the inputs, or only its weight is read"
    assert found["a"].milliseconds == {"dense": 4.0, "2:4": 2.2}, "both calls count"
    assert isinstance(lowered.a, Linear24)
    assert isinstance(lowered.b, Linear24)
    for batch in (x, torch.randn(64).bfloat16(), torch.randn(0, 64).bfloat16(), torch.randn(64, 3).bfloat16().t()):
        torch.testing.assert_close(lowered(batch), model.eval()(batch))
    assert type(model.a) is nn.Linear
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.a.weight.requires_grad


@pytest.mark.parametrize(("dense", "form"), [(1.04, "dense"), (1.06, "2:4")])
def test_a_layer_must_be_a_twentieth_faster(dense: float, form: str) -> None:
    chosen, why = cuda_24.choose({"dense": dense, "2:4": 1.0}, "CUTLASS")
    assert chosen == form
    assert f"{dense:.2f} times as fast as dense" in why


def test_slower_layers_stay_dense(card: dict[str, Any]) -> None:
    card["2:4"] = 3.0
    lowered, choices = lower_24(Net(), torch.randn(8, 64).bfloat16())
    assert {choice.form for choice in choices} == {"dense"}
    assert "expected at least 1.05" in choices[0].why
    assert not any(isinstance(m, Linear24) for m in lowered.modules())


def test_a_model_that_is_slower_as_a_whole_stays_dense(card: dict[str, Any]) -> None:
    card["whole"] = 1.1
    model, x = Net(), torch.randn(8, 64).bfloat16()
    lowered, choices = lower_24(model, x)
    assert {choice.form for choice in choices} == {"dense"}
    assert choices[0].why == "the whole model in 2:4 takes 1.10 of the time of dense"
    assert choices[0].milliseconds
    assert torch.equal(lowered(x), model(x))


def test_outputs_that_differ_are_not_taken(card: dict[str, Any]) -> None:
    card["scale"] = 1.2
    lowered, choices = lower_24(Net(), torch.randn(8, 64).bfloat16())
    assert "differs from dense by 0." in choices[0].why
    assert not any(isinstance(m, Linear24) for m in lowered.modules())


def test_a_whole_that_differs_is_not_taken(card: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_24, "LAYER", 1e9)
    card["scale"] = 2.0
    lowered, choices = lower_24(Net(), torch.randn(8, 64).bfloat16())
    assert "the whole model in 2:4 differs by" in choices[0].why
    assert not any(isinstance(m, Linear24) for m in lowered.modules())


def test_layers_of_one_shape_are_timed_once(card: dict[str, Any]) -> None:
    model = nn.Sequential(*(linear() for _ in range(5)), linear(32, 64))
    _, choices = lower_24(model, torch.randn(8, 64).bfloat16())
    assert {choice.form for choice in choices} == {"2:4"}
    assert card["timed"] == 2


def test_a_layer_that_is_used_in_two_places_is_replaced_in_both(card: dict[str, Any]) -> None:
    shared = linear()
    model = nn.Sequential(shared, nn.Sequential(nn.ReLU(), shared))
    lowered, choices = lower_24(model, torch.randn(8, 64).bfloat16())
    assert len(choices) == 1
    assert lowered[0] is lowered[1][1]
    assert isinstance(lowered[0], Linear24)


def test_layers_that_are_more_than_linear_stay(card: dict[str, Any]) -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    hooked, scaled, mixed = linear(), Scaled(64, 64).bfloat16(), linear()
    scaled.weight.data = masked(scaled.weight.data)
    hooked.register_forward_hook(lambda module, args, output: output + 1)
    mixed.bias.data = mixed.bias.data.float()
    whole = linear(dtype=torch.float32)
    model = nn.ModuleList([hooked, scaled, mixed, whole])

    class All(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, x: Tensor) -> Tensor:
            y = self.layers[1](self.layers[0](x))
            y = y + self.layers[3](x.float())
            with torch.autocast("cpu", torch.bfloat16):
                return self.layers[2](y)

    _, choices = lower_24(All(), torch.randn(8, 64).bfloat16())
    assert [choice.form for choice in choices] == ["dense"] * 4
    assert choices[0].why == "has hooks"
    assert choices[1].why == "is a Scaled with a forward of its own, expected a plain Linear"
    assert choices[2].why == "has a weight of bfloat16 and is called with float32"
    assert "is float32" in choices[3].why


def test_torchs_encoder_layer_reads_weights_and_keeps_them(card: dict[str, Any]) -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 64, batch_first=True).eval().bfloat16()
    for module in (layer.linear1, layer.linear2):
        module.weight.data = masked(module.weight.data)
    x = torch.randn(2, 8, 64).bfloat16()
    lowered, choices = lower_24(layer, x)
    assert {c.why for c in choices} == {"is not called on the inputs, or only its weight is read"}
    with torch.inference_mode():
        assert torch.equal(lowered(x), layer(x))


def test_what_torch_says_is_the_reason(card: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Tensor:
        raise RuntimeError("no such kernel on this card\nstack")

    monkeypatch.setattr(semi_structured, "multiply", refuse)
    _, choices = lower_24(nn.Sequential(linear()), torch.randn(8, 64).bfloat16())
    (choice,) = choices
    assert choice.why == "cuSPARSELt: no such kernel on this card; CUTLASS: no such kernel on this card"


def test_gradients_are_refused_where_they_would_be_lost(card: dict[str, Any]) -> None:
    lowered, _ = lower_24(nn.Sequential(linear()), torch.randn(8, 64).bfloat16())
    x = torch.randn(8, 64).bfloat16().requires_grad_()
    with pytest.raises(TargetError, match="is for inference"):
        lowered(x)
    with torch.no_grad():
        lowered(x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("backend", "meta"), [("cuSPARSELt", False), ("CUTLASS", True)])
def test_torchs_operators_are_called_as_they_are_declared(backend: str, meta: bool, bias: bool) -> None:
    """On tensors without values, which go through the operators' own shape checks."""
    x = torch.empty(16, 128, device="meta", dtype=torch.float16)
    packed = x.new_empty(32, 64)
    places = torch.empty(32, 8, device="meta", dtype=torch.int16) if meta else None
    y = multiply(x, packed, places, x.new_empty(32) if bias else None)
    assert y.shape == (16, 32)
    assert y.dtype == torch.float16
    assert y.is_contiguous()
    whole = torch.empty(16, 128, device="meta", dtype=torch.int8)
    assert multiply(whole, packed.to(torch.int8), places, out_dtype=torch.int32).dtype == torch.int32


def test_the_timer_returns_the_median_of_every_form() -> None:
    found = cuda_24.times({"a": torch.relu, "b": torch.sigmoid}, torch.randn(4, 4), 0.01)
    assert set(found) == {"a", "b"}
    assert min(found.values()) > 0


@CUDA
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("bias", [True, False])
def test_a_card_multiplies_as_dense(dtype: torch.dtype, backend: str, bias: bool) -> None:
    layer = linear(256, 512, dtype, bias=bias).cuda().requires_grad_(False)
    try:
        packed = Linear24(layer.weight, layer.bias, Packing(backend))
        packed(torch.zeros(1, 512, device="cuda", dtype=dtype))
    except RuntimeError as error:
        pytest.skip(f"{backend} is not for this card: {error}")
    for shape in ((1,), (8,), (3, 7), (513,)):
        x = torch.randn(*shape, 512, device="cuda").to(dtype)
        torch.testing.assert_close(packed(x), layer(x), rtol=0.02, atol=0.02)


@CUDA
def test_a_card_lowers_a_model() -> None:
    model, x = Net().cuda(), torch.randn(64, 64, device="cuda").bfloat16()
    lowered, choices = lower_24(model, x)
    assert {choice.form for choice in choices} <= {"2:4", "dense"}
    with torch.inference_mode():
        torch.testing.assert_close(lowered(x), model(x), rtol=0.05, atol=0.05)
