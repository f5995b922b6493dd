"""What analysis says about real structures: axes, what freezes them, MACs, weights."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nets import Net, build, conv, image
from secateur.errors import SpecError, TraceError
from secateur.graph import analyze


def axes(model, inputs):
    return {a.name: a for a in analyze(model, inputs).axes}


def test_a_residual_stream_is_one_axis_and_inner_widths_their_own():
    found = axes(*build("residual"))
    free = {name: a.units for name, a in found.items() if not a.frozen}
    assert free == {"stem": 8, "a": 6, "c": 10}
    stream = {(m.tensor, m.dim) for m in found["stem"].members}
    assert {
        ("stem.weight", 0),
        ("b.weight", 0),
        ("c.weight", 1),
        ("d.bias", 0),
        ("tail.2.weight", 1),
    } <= stream


def test_what_the_caller_sees_is_frozen_and_says_so():
    found = axes(*build("plain"))
    assert found["5.2"].frozen.startswith("model output 0")
    assert "nothing can be removed from" in found["0 inputs"].frozen


def test_the_padded_shortcut_splits_the_wide_stage():
    """Option A pads 4 + 4 channels around the 8 of the stage before: those 8 are one axis, the padding another."""
    found = {n: a.units for n, a in axes(*build("option_a_shortcut")).items() if not a.frozen}
    assert sorted(found.values()) == [8, 8, 16]


def test_groups_are_products():
    found = {n: (a.units, bool(a.frozen)) for n, a in axes(*build("grouped")).items()}
    assert (4, False) in found.values()


def test_heads_head_width_and_value_width_are_axes_of_their_own():
    sizes = sorted(a.units for a in axes(*build("attention")).values() if not a.frozen)
    assert sizes == [4, 6, 6]


def test_grouped_queries_tie_key_heads_to_their_queries():
    found = axes(*build("grouped_queries"))
    free = {n: a for n, a in found.items() if not a.frozen}
    assert sorted(a.units for a in free.values()) == [2, 3, 4, 4]
    kv = next(a for a in free.values() if a.units == 2)
    assert {m.tensor for m in kv.members} >= {"q.weight", "k.weight", "v.weight", "o.weight"}


def test_an_operator_without_a_rule_freezes_and_names_itself_and_the_line():
    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(3, 8), conv(8, 4)

        def forward(self, x):
            return self.b(torch.cummax(self.a(x), 1).values)

    frozen = axes(Running(), image())["a"].frozen
    assert frozen.startswith("no rule for aten.cummax.default at test_graph.py:")
    assert "torch.cummax" in frozen


def test_a_channel_that_meets_the_raw_input_is_frozen():
    assert not [a for a in axes(*build("residual_with_the_input")).values() if not a.frozen and a.name != "a"]


def test_only_the_gate_channel_is_frozen():
    found = axes(*build("fixed_index_gate"))
    assert {a.units for a in found.values() if not a.frozen} == {8}
    assert any("picked out by a fixed index" in a.frozen for a in found.values())


def test_norms_over_channels_make_an_axis_inexact():
    found = axes(*build("layer_norms"))
    assert not any(a.exact for a in found.values() if not a.frozen)
    assert all(a.exact for a in axes(*build("plain")).values())


def test_tied_weights_appear_once():
    model, inputs = build("tied_linear")
    graph = analyze(model, inputs)
    assert "head.weight" not in graph.weights
    assert graph.cost().params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("model", "inputs", "macs"),
    [
        (nn.Conv2d(4, 8, 3, padding=1), torch.randn(2, 4, 5, 6), 2 * 8 * 30 * 4 * 9),
        (nn.Conv2d(4, 8, 3, groups=2), torch.randn(1, 4, 5, 5), 8 * 9 * 2 * 9),
        (nn.ConvTranspose2d(4, 6, 2, 2), torch.randn(1, 4, 5, 5), 4 * 25 * 6 * 4),
        (nn.Linear(7, 3), torch.randn(2, 5, 7), 2 * 5 * 7 * 3),
    ],
)
def test_macs_of_one_layer(model, inputs, macs):
    assert analyze(model, inputs).cost().macs == macs


def test_attention_counts_its_products():
    model, tokens = build("attention")
    b, n, e, h = 2, 5, 24, 4
    products = 2 * b * h * n * n * (e // h)
    assert analyze(model, tokens).cost().macs == 4 * b * n * 8 * e + products


def test_cost_after_removal_is_the_cost_of_the_smaller_network():
    model, inputs = build("plain")
    graph = analyze(model, inputs)
    flags = torch.ones(8, dtype=torch.bool).numpy()
    flags[:3] = False
    small = nn.Sequential(
        conv(3, 5),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        conv(5, 12),
        nn.PReLU(12),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )
    expected = analyze(small, inputs).cost()
    found = graph.cost({"0": flags})
    assert (found.params, found.macs) == (expected.params, expected.macs)


def test_a_batch_norm_is_found_behind_its_convolution():
    weights = analyze(*build("plain")).weights
    assert weights["0.weight"].norm == "1.weight"
    assert weights["3.weight"].norm == ""


def test_analysis_leaves_modes_and_weights_alone():
    model, inputs = build("dropout_and_norm")
    model.train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    analyze(model, inputs)
    assert model.training
    assert not model[1].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_inputs_may_be_a_tensor_a_tuple_or_keywords():
    def body(s, x, scale=None):
        return s.b(F.relu(s.a(x)) * (1 if scale is None else scale))

    net = Net(body, a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    x = torch.randn(3, 4)
    for inputs in (x, (x,), {"x": x}, (x, torch.ones(1)), {"x": x, "scale": torch.ones(3, 1)}):
        assert [a.units for a in analyze(net, inputs).free] == [8]


def test_a_model_that_fails_on_its_inputs_is_told_so():
    with pytest.raises(TraceError, match=r"Linear fails on the example inputs \(float32\[2, 5\]\).*pass inputs"):
        analyze(nn.Linear(4, 2), torch.randn(2, 5))


def test_a_model_that_cannot_be_captured_is_told_so():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else x

    with pytest.raises(TraceError, match=r"cannot be captured by torch.export.*usual remedies"):
        analyze(Branch(), torch.randn(2, 4))


def test_something_else_than_a_module_is_refused():
    with pytest.raises(TraceError, match=r"expected a torch.nn.Module, found function"):
        analyze(lambda x: x, torch.randn(2))


def test_a_model_without_parameters_is_refused():
    with pytest.raises(TraceError, match="no parameters"):
        analyze(nn.ReLU(), torch.randn(2))


def test_an_unknown_axis_names_known_ones():
    graph = analyze(*build("plain"))
    with pytest.raises(SpecError, match="'nope' is not in this graph"):
        graph.axis("nope")


def test_the_same_model_gives_the_same_names():
    assert list(axes(*build("shuffled"))) == list(axes(*build("shuffled", seed=3)))
