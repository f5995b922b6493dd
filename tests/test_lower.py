"""Lowering to the sparse engine: the same outputs, honest choices, and nothing changed but what is returned."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import secateur as sc
from secateur.cli import app
from secateur.errors import SpecError, TargetError, TraceError
from secateur.measure import Latency
from secateur.runtime import kernels, tune
from secateur.runtime.layers import SharedLinears, SparseConv, SparseLinear
from secateur.targets import cpu_sparse
from secateur.tasks import clone
from secateur.testing import check_lowering

needs_engine = pytest.mark.skipif(bool(kernels.why_missing()), reason="the sparse engine was not built")
pytestmark = needs_engine


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def sparse_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first sparse form is always taken, and the whole is never too slow."""

    def times(product: Any, formats: dict[str, Any], cold: bool) -> dict[str, float]:
        return {"dense": 1.0, **{name: 0.1 * (i + 1) for i, name in enumerate(formats)}}

    monkeypatch.setattr(tune, "_time", times)
    monkeypatch.setattr(cpu_sparse, "NOISE", float("inf"))


def zeroed(model: nn.Module, part: float = 0.9) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor.copy_(torch.randn(tensor.shape, generator=generator))
                module.running_var.uniform_(0.5, 2, generator=generator)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) >= part)
    return model.eval()


class Residual(nn.Module):
    """Every way in which something can follow a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.bend = nn.BatchNorm2d(16)
        self.down = nn.Conv2d(16, 24, 3, 2, 1, groups=4)
        self.side = nn.Conv2d(16, 24, 1, 2)
        self.deep = nn.Conv2d(24, 24, 5, padding=4, dilation=2, groups=24)
        self.head = nn.Linear(24, 10)
        self.tail = nn.Linear(10, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        y = self.bend(self.body(x))
        y += x
        x = F.relu_(y)
        x = F.silu(self.side(x) + self.down(x))
        x = F.gelu(self.deep(x), approximate="tanh")
        x = F.gelu(self.head(x.mean((2, 3))))
        return x + self.tail(x)


class Overwritten(nn.Module):
    """The input of a layer is overwritten between the layer and what follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.layer(x)
        x.mul_(3)
        return F.relu(y + x)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x)) + self.layer(self.layer(x))


class Texts(nn.Module):
    """One dimension, tied weights, and integers as input."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 32)
        self.mix = nn.Conv1d(32, 32, 3, padding=1)
        self.out = nn.Linear(32, 50, bias=False)
        self.out.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)
        return self.out(F.relu(self.mix(x.transpose(1, 2))).transpose(1, 2))


class Attention(nn.Module):
    """Layers that read the same value, one with an activation, one also with something added."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.gate = (nn.Linear(16, n) for n in (16, 8, 8, 24))
        self.k.bias = None
        self.out = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        keys = self.k(x).repeat(1, 1, 2)
        y = F.scaled_dot_product_attention(self.q(x), keys, self.v(x).repeat(1, 1, 2))
        y = x + self.out(y)
        return F.silu(self.gate(x)).sum(-1, keepdim=True) * y


class Transposed(nn.Module):
    """A linear layer as GPT-2 writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 24))
        self.bias = nn.Parameter(torch.randn(24))
        self.layer = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, 16), self.weight)
        return self.layer(F.gelu(y, approximate="tanh"))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "residual": (Residual, lambda n: torch.randn(n, 3, 13, 11)),
    "overwritten": (Overwritten, lambda n: torch.randn(n, 5, 16)),
    "attention": (Attention, lambda n: torch.randn(n, 5, 16)),
    "transposed": (Transposed, lambda n: torch.randn(n, 3, 16)),
    "twice": (Twice, lambda n: torch.randn(n, 16)),
    "texts": (Texts, lambda n: {"words": torch.randint(0, 50, (n, 9))}),
}


def outputs(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        found = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("form", ["program", "module"])
@pytest.mark.parametrize("name", MODELS)
def test_a_lowered_model_gives_the_same_outputs(name: str, form: str, sparse_wins: None) -> None:
    make, draw = MODELS[name]
    torch.manual_seed(0)
    model, inputs = zeroed(make()), draw(2)
    before = copy.deepcopy(model.state_dict())
    lowered = sc.lower(model, inputs, form=form)
    for size in (2, 3):
        other = draw(size)
        wanted = outputs(model, other)
        torch.testing.assert_close(outputs(lowered, other), wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert lowered.lowering.form == form
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]
    engine = [m for m in lowered.modules() if isinstance(m, SparseLinear | SparseConv)]
    assert len(engine) >= len(layers)
    assert all(choice.form != "dense" for choice in lowered.lowering.choices)


@pytest.mark.parametrize("name", MODELS)
def test_the_law_of_lowering_holds(name: str) -> None:
    make, draw = MODELS[name]
    for part in (0.0, 0.5, 0.95, 1.0):
        check_lowering(zeroed(make(), part), draw(2))


def test_the_law_of_lowering_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.linears
    monkeypatch.setattr(kernels, "linears", lambda *arguments: [y + 0.01 for y in right(*arguments)])
    with pytest.raises(AssertionError, match="layer as csr differs by"):
        check_lowering(zeroed(Twice()), torch.randn(2, 16))


def test_what_follows_a_layer_is_done_with_it(sparse_wins: None) -> None:
    lowered = sc.lower(zeroed(Residual()), torch.randn(2, 3, 13, 11))
    layers = {name.removeprefix("engine."): layer for name, layer in lowered.named_modules()}
    activations = {name: m.activation for name, m in layers.items() if isinstance(m, SparseLinear | SparseConv)}
    assert activations == {
        "stem": "relu", "body": "relu", "side": "silu", "down": "", "deep": "gelu_tanh", "head": "gelu", "tail": "",
    }  # fmt: skip
    calls = [str(node.target) for node in lowered.graph.nodes if node.op == "call_function"]
    assert not [call for call in calls if "relu" in call or "batch_norm" in call or "conv" in call or "add" in call]


def test_the_engine_pools_what_it_can(sparse_wins: None) -> None:
    taken = nn.MaxPool2d(3, 2, 1), nn.MaxPool2d((2, 1))
    left = nn.MaxPool2d(2, 1, ceil_mode=True), nn.MaxPool2d(2, 1, dilation=2)
    model, x = zeroed(nn.Sequential(nn.Conv2d(3, 16, 3), *taken, *left)), torch.randn(1, 3, 33, 21)
    lowered = sc.lower(model, x)
    targets = [str(node.target) for node in lowered.graph.nodes]
    assert (targets.count("secateur.max_pool2d.default"), targets.count("aten.max_pool2d.default")) == (2, 2)
    torch.testing.assert_close(outputs(lowered, x), outputs(model, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pooled_networks_take_other_floats_too(dtype: torch.dtype, sparse_wins: None) -> None:
    model = zeroed(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 8, 3)))
    lowered = sc.lower(model, torch.randn(1, 3, 20, 18))
    x = torch.randn(2, 3, 20, 18, dtype=dtype)
    found = outputs(lowered, x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), outputs(model, x.float()), rtol=3e-2, atol=3e-2)


def test_layers_that_read_the_same_share_a_call(sparse_wins: None) -> None:
    lowered = sc.lower(zeroed(Attention()), torch.randn(2, 5, 16))
    (shared,) = [m for m in lowered.modules() if isinstance(m, SharedLinears)]
    assert sorted((m.outputs, m.activation) for m in shared.layers) == [(8, ""), (8, ""), (16, ""), (24, "silu")]


def test_a_layer_whose_input_is_overwritten_stays_before_that(sparse_wins: None) -> None:
    lowered = sc.lower(zeroed(Overwritten()), torch.randn(2, 5, 16))
    assert lowered.engine.layer.activation == ""


def test_the_users_class_keeps_running(sparse_wins: None) -> None:
    model = zeroed(Twice())
    lowered = sc.lower(model, torch.randn(2, 16), form="module")
    assert type(lowered) is Twice
    assert isinstance(lowered.layer, SparseLinear)
    assert isinstance(model.layer, nn.Linear)


def test_a_model_that_cannot_be_captured_keeps_its_class(sparse_wins: None) -> None:
    class Branching(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else self.layer(x)

    model = zeroed(Branching())
    lowered = sc.lower(model, torch.ones(2, 16))
    assert lowered.lowering.form == "module"
    torch.testing.assert_close(outputs(lowered, torch.ones(2, 16)), outputs(model, torch.ones(2, 16)))
    with pytest.raises(TraceError, match="Branching cannot be captured"):
        sc.lower(model, torch.ones(2, 16), form="program")


def test_a_result_brings_its_own_inputs(sparse_wins: None) -> None:
    result = sc.prune(zeroed(Twice(), 0.0), torch.randn(2, 16), pattern="unstructured", budget="sparsity=75%")
    lowered = sc.lower(result)
    torch.testing.assert_close(outputs(lowered, result.inputs), outputs(result.model, result.inputs))


@pytest.mark.parametrize("form", ["program", "module"])
def test_a_lowered_model_can_be_copied_saved_exported_and_compiled(form: str, sparse_wins: None) -> None:
    model, x = zeroed(Residual()), torch.randn(2, 3, 13, 11)
    lowered = sc.lower(model, x, form=form)
    wanted = outputs(lowered, x)
    again = clone(lowered)
    again.load_state_dict(lowered.state_dict())
    assert torch.equal(outputs(again, x), wanted)
    with torch.no_grad():
        assert torch.equal(torch.export.export(lowered, (x,)).module()(x), wanted)
    compiled = torch.compile(lowered, fullgraph=True, backend="aot_eager")
    assert torch.equal(outputs(compiled, x), wanted)


@pytest.mark.parametrize(("values", "gap"), [("bfloat16", 3e-2), ("int8", 0.1)])
def test_other_values_come_close(values: str, gap: float, sparse_wins: None) -> None:
    model, x = zeroed(Residual()), torch.randn(4, 3, 13, 11)
    lowered = sc.lower(model, x, values=values)
    assert 0 < lowered.lowering.gap < gap


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_half_precision_are_lowered(dtype: torch.dtype, sparse_wins: None) -> None:
    model = zeroed(Twice()).to(dtype)
    x = torch.randn(2, 16, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cpu_sparse.TOLERANCES, "float32", 3e-2)
        lowered = sc.lower(model, x)
    assert outputs(lowered, x).dtype == dtype


def test_dense_is_kept_where_nothing_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_time", lambda product, formats, cold: {"dense": 1.0, **dict.fromkeys(formats, 0.99)})
    lowered = sc.lower(zeroed(Residual()), torch.randn(2, 3, 13, 11))
    assert {choice.form for choice in lowered.lowering.choices} == {"dense"}
    assert all("1.01x as fast on" in choice.why for choice in lowered.lowering.choices)
    assert not [m for m in lowered.modules() if isinstance(m, SparseLinear | SparseConv)]


def test_a_whole_that_is_slower_is_given_up(sparse_wins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def slower(models: dict[str, nn.Module], *_: Any) -> dict[str, Latency]:
        return {name: Latency((1.0 if name == "dense" else 2.0,) * 10, 1) for name in models}

    monkeypatch.setattr(cpu_sparse, "NOISE", 1.02)
    monkeypatch.setattr(cpu_sparse, "latency", slower)
    lowered = sc.lower(zeroed(Twice()), torch.randn(2, 16))
    assert type(lowered) is Twice
    assert not [m for m in lowered.modules() if isinstance(m, SparseLinear)]
    assert lowered.lowering.form == "dense"
    assert "slower (0.50x), so this is the dense one" in lowered.lowering.note


def test_a_wrong_kernel_is_caught(sparse_wins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.linear
    monkeypatch.setattr(kernels, "linear", lambda *arguments: right(*arguments) * 1.01)
    with pytest.raises(TargetError, match=r"differs from the dense one by .* expected at most 0.0001"):
        sc.lower(zeroed(Twice()), torch.randn(2, 16))


def test_what_was_found_is_remembered_and_a_damaged_memory_is_made_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = zeroed(Twice()), torch.randn(2, 16)
    first = sc.lower(model, x).lowering.choices
    (file,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(tune, "_time", lambda *_: pytest.fail("timed again"))
        assert sc.lower(model, x).lowering.choices == first
    for damaged in ("{", '{"a": 1}', '{"a": {"dense": "fast"}}', "[]"):
        file.write_text(damaged)
        assert {c.layer for c in sc.lower(model, x).lowering.choices} == {"layer"}
        assert file.read_text() != damaged


def test_blocks_and_single_weights_of_one_sparsity_are_not_confused(cache: Path) -> None:
    single, blocks = nn.Linear(64, 64), nn.Linear(64, 64)
    with torch.no_grad():
        single.weight.mul_(torch.arange(64 * 64).view(64, 64) % 63 % 4 == 0)
        blocks.weight.mul_(torch.arange(64) % 4 == 0)
    for model in (single, blocks):
        sc.lower(model, torch.randn(2, 64))
    (file,) = cache.iterdir()
    assert len(json.loads(file.read_text())) == 2


def test_a_folder_that_cannot_be_written_only_costs_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "file" / "below"))
    assert sc.lower(zeroed(Twice()), torch.randn(2, 16)).lowering.choices


def test_layers_have_no_gradients_and_say_so(sparse_wins: None) -> None:
    lowered = sc.lower(zeroed(Twice()), torch.randn(2, 16))
    assert not any(p.requires_grad for p in lowered.parameters())
    with pytest.raises(TargetError, match=r"no gradients; run the model under torch.inference_mode"):
        lowered(torch.randn(2, 16, requires_grad=True))


def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, x = Twice(), torch.randn(2, 16)
    with pytest.raises(SpecError, match="target 'tpu' is unknown; expected 'cpu-sparse' or 'cuda-2:4'"):
        sc.lower(model, x, target="tpu")
    with pytest.raises(SpecError, match=r"lower needs example inputs.* lower\(model, inputs\)"):
        sc.lower(model)
    with pytest.raises(SpecError, match="values='float8'"):
        sc.lower(model, x, values="float8")
    with pytest.raises(TargetError, match=r"runs on the CPU, found layer.weight on meta"):
        sc.lower(copy.deepcopy(model).to("meta"), x)
    kernels._library.cache_clear()
    monkeypatch.setenv("SECATEUR_KERNELS", str(tmp_path / "none.so"))
    with pytest.raises(TargetError, match=r"none.so cannot be loaded"):
        sc.lower(model, x)
    kernels._library.cache_clear()


def test_the_command_line_says_what_a_target_gains(tmp_path: Path) -> None:
    result = sc.prune(
        nn.Sequential(nn.Linear(16, 32)), torch.randn(2, 16), pattern="unstructured", budget="sparsity=75%"
    )
    sc.save(result, tmp_path / "pruned")
    (tmp_path / "made.py").write_text("from torch import nn\ndef make(): return nn.Sequential(nn.Linear(16, 32))\n")
    command = ["bench", str(tmp_path / "pruned"), "--against", f"{tmp_path / 'made.py'}:make", "--seconds", "0.1"]
    shown = CliRunner().invoke(app, [*command, "--target", "cpu-sparse", "--json"])
    assert shown.exit_code == 0, shown.output
    notes = json.loads(shown.stdout)["notes"]
    assert any("as fast" in note or "slower" in note for note in notes)
    assert any(note.startswith("0: ") for note in notes)
    wrong = CliRunner().invoke(app, [*command, "--target", "tpu"])
    assert wrong.exit_code == 2
    assert "target 'tpu' is unknown" in wrong.stderr
