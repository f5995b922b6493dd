"""Models that are frozen, half precision, wrapped, on another device or not capturable: right, or refused and why."""

import re
import warnings

import pytest
import torch
from torch import nn

from secateur import api
from secateur.apply.mask import keep_zeros, mask, mask_
from secateur.apply.shrink import carry_out, shrink_
from secateur.errors import PlanError, PruneError, TraceError
from secateur.graph import analyze
from secateur.planning import make
from secateur.tasks import Classification
from secateur.testing import check_removing_is_zeroing


class Net(nn.Module):
    """Two widths that may shrink, 16 and 12."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x):
        return self.head(self.b(self.a(x).relu()).relu())


X = torch.randn(3, 8)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- frozen, half precision ------------------------------------------------------------------------


def test_a_frozen_model_is_pruned_and_stays_frozen():
    model = Net().eval().requires_grad_(False)
    small = check_removing_is_zeroing(model, X).model
    assert not any(p.requires_grad for p in small.parameters())
    split = (torch.randn(32, 8), torch.arange(32) % 4)
    task = Classification(split, split, split)
    chosen = api.plan(model, X, criterion="taylor", task=task)  # gradients are taken all the same
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert carry_out(model, chosen).law.error < 1e-5


def test_a_partly_frozen_model_keeps_what_each_part_was():
    model = Net().eval()
    model.a.requires_grad_(False)
    small = check_removing_is_zeroing(model, X).model
    assert {n: p.requires_grad for n, p in small.named_parameters()} == {
        n: not n.startswith("a.") for n, _ in model.named_parameters()
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_keep_the_law_and_their_type(dtype):
    result = check_removing_is_zeroing(Net().eval().to(dtype), X.to(dtype))
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert result.law.error <= result.law.tolerance


# --- devices ---------------------------------------------------------------------------------------


def test_inputs_on_another_device_are_named():
    with pytest.raises(TraceError, match="Net is on meta, the example inputs on cpu; move one to the other"):
        analyze(Net().to("meta"), X)


# --- compiled, wrapped -----------------------------------------------------------------------------


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel, lambda m: compiled(nn.DataParallel(m))])
def test_what_only_runs_a_model_is_looked_through(wrap):
    model = Net().eval()
    before = state(model)
    wrapped = wrap(model)
    graph = analyze(wrapped, X)
    assert {axis.name for axis in graph.free} == {axis.name for axis in analyze(model, X).free}
    chosen = make(wrapped, graph, budget="params=50%")
    done = carry_out(wrapped, chosen)
    assert type(done.model) is Net
    assert done.law.error < 1e-5
    assert same(model, before)
    thin = api.plan(wrapped, X, pattern="unstructured", budget="sparsity=50%")
    assert int((mask(wrapped, thin).a.weight == 0).sum()) >= int((~thin.masks["a.weight"]).sum())
    assert same(model, before)


def test_a_compiled_model_can_be_masked_and_shrunk_in_place():
    model = Net().eval()
    wrapped = compiled(model)
    thin = api.plan(wrapped, X, pattern="unstructured", budget="sparsity=50%")
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    with keep_zeros(wrapped, thin, optimizer):
        wrapped(X).sum().backward()
        optimizer.step()
    assert bool((model.a.weight[~thin.masks["a.weight"]] == 0).all())
    assert mask_(wrapped, thin) is wrapped
    chosen = api.plan(wrapped, X, budget="params=50%")
    expected = carry_out(wrapped, chosen).model(X)
    assert shrink_(wrapped, chosen) is wrapped
    assert torch.allclose(wrapped(X), expected, atol=1e-6)
    assert model.a.out_features < 16


def test_a_model_in_several_places_is_not_shrunk_in_place():
    wrapped = nn.DataParallel(Net().eval())
    before = state(wrapped)
    chosen = api.plan(wrapped, X, budget="params=50%")
    with pytest.raises(PlanError, match=r"DataParallel cannot be shrunk in place.*wrap it again"):
        shrink_(wrapped, chosen)
    assert same(wrapped, before)


def test_distributed_data_parallel_is_looked_through(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(Net().eval())
        assert {axis.name for axis in analyze(wrapped, X).free} == {axis.name for axis in analyze(Net(), X).free}
        assert type(carry_out(wrapped, api.plan(wrapped, X)).model) is Net
    finally:
        torch.distributed.destroy_process_group()


def test_compiled_in_place_and_in_part_keep_the_law():
    model = Net().eval()
    model.compile(backend="eager")
    model(X)
    assert check_removing_is_zeroing(model, X).law.error < 1e-5
    model = Net().eval()
    model.b = compiled(model.b)
    assert check_removing_is_zeroing(model, X).law.error < 1e-5


# --- no Python to follow ---------------------------------------------------------------------------


def test_torchscript_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, that both are on their way out
        scripted = torch.jit.script(Net().eval())
    with pytest.raises(TraceError, match="is TorchScript, which has no Python code to follow"):
        analyze(scripted, X)
    outer = nn.Sequential(nn.Linear(8, 8), scripted)
    with pytest.raises(TraceError, match=re.escape("1 (RecursiveScriptModule) is TorchScript")):
        analyze(outer, X)


def test_an_exported_program_is_named_as_such_and_its_module_is_pruned():
    program = torch.export.export(Net().eval(), (X,))
    with pytest.raises(TraceError, match="found ExportedProgram; pass the model that it was exported from"):
        analyze(program, X)
    assert check_removing_is_zeroing(program.module(), X).law.error < 1e-5


def test_quantized_layers_are_refused_by_name():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(Net().eval(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(TraceError, match=r"a \(Linear\) is quantized.*prune first, quantize afterwards"):
        analyze(model, X)


def test_layers_without_shapes_are_refused_by_name():
    with pytest.raises(TraceError, match=r"'0\.weight' has no shape yet; call the model once"):
        analyze(nn.Sequential(nn.LazyLinear(4)), X)


@pytest.mark.parametrize("thing", [None, "resnet18", Net, lambda x: x])
def test_what_is_no_model_is_refused(thing):
    with pytest.raises(TraceError, match=r"expected a torch\.nn\.Module, found"):
        analyze(thing, X)


# --- exports that fail -----------------------------------------------------------------------------


class Gate(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            x = x * 2
        return x


class Gated(Net):
    """Control flow that depends on values, in a part of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()

    def forward(self, x):
        return self.head(self.b(self.gate(self.a(x))))


class Branching(Net):
    """The same in the model's own code."""

    def forward(self, x):
        y = self.a(x)
        if y.sum() > 0:
            y = y * 2
        return self.head(self.b(y))


class Lengths(Net):
    def forward(self, x):
        count = int(x.abs().sum().item())
        return self.head(self.b(self.a(x)))[:count]


class Thing:
    def __init__(self, value) -> None:
        self.value = value


class Opaque(Net):
    def forward(self, x):
        return Thing(super().forward(x))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Branching, r"at test_bad_models.py:\d+ 'if y.sum\(\) > 0:': GuardOnDataDependent"),
        (Lengths, r"at test_bad_models.py:\d+ 'count = int\(x.abs\(\).sum\(\).item\(\)\)'"),
        (Opaque, r"Found <class '.*Thing'> in output"),
    ],
)
def test_an_export_that_fails_names_the_line_and_the_remedies_and_changes_nothing(kind, words):
    model = kind().train()
    before, modes = state(model), [m.training for m in model.modules()]
    with pytest.raises(TraceError, match=words) as found:
        analyze(model, X)
    assert "use_cache=False, no control flow" in str(found.value)
    assert same(model, before)
    assert [m.training for m in model.modules()] == modes
    assert not any(p.grad is not None for p in model.parameters())


def test_the_rest_of_a_model_is_pruned_around_a_part_that_fails_and_the_reason_names_the_line():
    model = Gated().train()
    before, modes = state(model), [m.training for m in model.modules()]
    why = analyze(model, X).axis("a").frozen
    assert re.search(r"gate \(Gate\).* at test_bad_models.py:\d+ 'if x.sum\(\) > 0:' in gate \(Gate\)", why)
    small = check_removing_is_zeroing(model, X, "params=80%").model
    assert small.b.out_features < 12
    assert small.a.out_features == 16
    assert same(model, before)
    assert [m.training for m in model.modules()] == modes


# --- odd, but right --------------------------------------------------------------------------------


class Rows(Net):
    """How many rows go on depends on their values."""

    def forward(self, x):
        y = self.a(x).relu()
        return self.head(self.b(y[y.sum(1) > -1]))


class Features(Net):
    def forward(self, x):
        y = self.b(self.a(x).relu())
        return self.head(y.relu()), y


class Twice(Net):
    """The same module at two depths."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(12, 12)

    def forward(self, x):
        y = self.b(self.a(x).relu())
        return self.head(self.again(self.again(y).relu()).relu())


def test_shapes_that_depend_on_data_are_followed():
    assert check_removing_is_zeroing(Rows().eval(), X).law.error < 1e-5


def test_an_output_that_is_an_internal_feature_keeps_its_shape_and_says_why():
    model = Features().eval()
    assert analyze(model, X).axis("b").frozen.startswith("model output 1: its shape is promised")
    small = check_removing_is_zeroing(model, X).model
    assert small(X)[1].shape == (3, 12)
    assert small.a.out_features < 16


def test_a_module_used_twice_keeps_one_width():
    result = check_removing_is_zeroing(Twice().eval(), X, "params=50%")
    assert result.form == "module"
    assert result.law.error < 1e-5


@torch.library.custom_op("secateur_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@twice.register_fake
def _(x):
    return torch.empty_like(x)


@torch.library.custom_op("secateur_tests::thrice", mutates_args=())
def thrice(x: torch.Tensor) -> torch.Tensor:
    return x * 3


class Custom(Net):
    def forward(self, x):
        return self.head(self.b(twice(self.a(x))).relu())


class Untraceable(Net):
    def forward(self, x):
        return self.head(self.b(thrice(self.a(x))).relu())


def test_an_operator_nobody_has_heard_of_freezes_what_reaches_it_and_the_rest_is_pruned():
    model = Custom().eval()
    graph = analyze(model, X)
    where = r"no rule for secateur_tests.twice.default at test_bad_models.py:\d+ 'return self.head"
    assert re.search(where, graph.axis("a").frozen)
    assert not graph.axis("b").frozen
    small = check_removing_is_zeroing(model, X, "params=90%").model
    assert small.a.out_features == 16
    assert small.b.out_features < 12


def test_an_operator_that_cannot_be_traced_says_what_it_lacks():
    with pytest.raises(TraceError, match=r"'return self.head\(.*no fake impl registered.*thrice"):
        analyze(Untraceable().eval(), X)


# --- whatever happens, the model is as it was ------------------------------------------------------


@pytest.mark.parametrize("kind", [Branching, Lengths, Opaque, Untraceable])
@pytest.mark.parametrize("pattern", ["channel", "unstructured"])
def test_a_failed_prune_changes_nothing(kind, pattern):
    model = kind()
    before, whole = state(model), list(dict(model.named_modules()))
    with pytest.raises(PruneError):
        api.prune(model, X, pattern=pattern, budget="sparsity=50%", inplace=True)
    assert same(model, before)
    assert list(dict(model.named_modules())) == whole
    assert model.training
