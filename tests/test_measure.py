import pytest
import safetensors.torch
import torch
from torch import nn

from secateur.errors import DataError, SpecError
from secateur.measure import Latency, file_bytes, latency, measure, peak_memory


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8, bias=False)
        self.b = nn.Linear(8, 8, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x))


def test_a_measurement_counts_what_is_there():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    with torch.no_grad():
        model[0].weight[0] = 0
    found = measure(model, torch.randn(2, 3, 6, 6), seconds=0.0)
    assert found.params == 4 * 27 + 4 + 144 * 5 + 5
    assert found.nonzero == found.params - 27
    assert found.macs == 2 * (4 * 27 * 36 + 144 * 5)
    assert found.bytes == len(safetensors.torch.save(model.state_dict()))
    assert found.latency.runs >= 10
    assert found.latency.threads == torch.get_num_threads()
    assert found.against == {}


def test_measuring_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4).eval(), nn.Dropout())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    measure(model, torch.randn(3, 4), against={"other": nn.Linear(4, 4)}, seconds=0.0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes


def test_a_model_that_cannot_be_traced_has_no_macs():
    class Branch(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    found = measure(Branch(4, 4), torch.ones(1, 4), seconds=0.0)
    assert found.macs is None
    assert found.params == 20


def test_tied_parameters_count_once():
    model = Tied()
    found = measure(model, torch.randn(1, 8), seconds=0.0)
    assert found.params == 64
    assert found.bytes == len(safetensors.torch.save({"a.weight": model.a.weight.detach()}))


def test_file_bytes_take_views_and_overlaps():
    model = nn.Module()
    whole = torch.randn(4, 4)
    model.register_buffer("whole", whole)
    model.register_buffer("row", whole[1])
    model.register_buffer("turned", whole.T)
    model.register_buffer("empty", torch.zeros(0))
    assert file_bytes(model) >= 4 * (16 + 4 + 16)


def test_models_are_timed_in_turns_and_in_random_order():
    calls = []

    class Spy(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            assert not self.training
            assert torch.is_inference_mode_enabled()
            calls.append(self.name)
            return x

    times = latency({"a": Spy("a"), "b": Spy("b")}, torch.ones(1), seconds=0.01)
    rounds = calls[6:]
    pairs = {tuple(rounds[i : i + 2]) for i in range(0, len(rounds), 2)}
    assert pairs == {("a", "b"), ("b", "a")}
    assert times["a"].runs == times["b"].runs == len(rounds) // 2


def test_latency_takes_tuples_and_dicts():
    class Add(nn.Module):
        def forward(self, a, b):
            return a + b

    one = torch.ones(1)
    assert latency({"": Add()}, (one, one), seconds=0.0)[""].runs == 10
    assert latency({"": Add()}, {"a": one, "b": one}, seconds=0.0)[""].runs == 10
    with pytest.raises(SpecError, match="at least one model"):
        latency({}, one)


def test_spread_and_ratio_are_percentiles_paired_by_round():
    slow_rounds = tuple(float(10 ** (i % 3)) for i in range(30))
    base = Latency(slow_rounds, threads=1)
    half = Latency(tuple(s / 2 for s in slow_rounds), threads=1)
    assert base.spread == (10.0, 1.0, 100.0)
    assert half.ratio(base) == (0.5, 0.5, 0.5)
    with pytest.raises(DataError, match="30 and 2 samples do not pair"):
        base.ratio(Latency((1.0, 2.0), threads=1))


def test_measure_reports_a_ratio_per_rival():
    model = nn.Linear(8, 8)
    found = measure(model, torch.randn(1, 8), against={"x": nn.Linear(8, 8), "y": model}, seconds=0.0)
    assert set(found.against) == {"x", "y"}
    assert all(0 < r.low <= r.value <= r.high for r in map(found.latency.ratio, found.against.values()))


class Chain(nn.Module):
    """Four activations of which two are alive at a time."""

    def forward(self, x):
        for _ in range(4):
            x = x.relu()
        return x


class Hoard(nn.Module):
    def forward(self, x):
        return torch.stack([x.relu() for _ in range(4)])


class Reuse(nn.Module):
    def forward(self, x):
        return x.relu_().view(10, 100).T.relu_()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Chain(), 3 * 4000),
        (Hoard(), 9 * 4000),
        (Reuse(), 4000),
        (nn.Linear(1000, 10), 4000 + 40000 + 40 + 40),
    ],
)
def test_peak_memory_is_that_of_live_tensors(model, expected):
    assert peak_memory(model, torch.zeros(1000)) == expected


def test_peak_memory_counts_shared_tensors_once():
    assert peak_memory(Tied(), torch.zeros(1, 8)) == 256 + 3 * 32
    x = torch.zeros(1000)
    assert peak_memory(Hoard(), {"x": x}) == peak_memory(Hoard(), (x,)) == 9 * 4000
