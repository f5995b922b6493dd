"""Layers of torch that remember sizes, or compute their weights: they are refitted to what is left."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from nets import Net, conv, image
from secateur.graph.trace import run
from secateur.testing import check_removing_is_zeroing

X = torch.randn(2, 5, 8)


def refit(kind):
    """Networks whose torch modules remember sizes of tensors that they do not hold themselves."""
    made = {
        "weight_norm": lambda: nn.Sequential(
            parametrizations.weight_norm(conv(3, 12)), nn.ReLU(), parametrizations.weight_norm(conv(12, 12, groups=4)),
            conv(12, 4),
        ),
        "weight_norm without bias": lambda: nn.Sequential(
            parametrizations.weight_norm(conv(3, 12, bias=False)), nn.ReLU(), conv(12, 4)
        ),
        "older weight_norm": lambda: nn.Sequential(weight_norm(conv(3, 12)), nn.ReLU(), conv(12, 4)),
        "spectral_norm": lambda: nn.Sequential(parametrizations.spectral_norm(conv(3, 12)), nn.ReLU(), conv(12, 4)),
        "older spectral_norm": lambda: nn.Sequential(spectral_norm(conv(3, 12)), nn.ReLU(), conv(12, 4)),
    }  # fmt: skip
    return made[kind]().eval()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "kind",
    ["weight_norm", "weight_norm without bias", "older weight_norm", "spectral_norm", "older spectral_norm"],
)
def test_modules_whose_weight_is_computed_are_refitted(kind):
    done = check_removing_is_zeroing(refit(kind), image())
    assert done.form == "module", done.why
    assert done.model[0].out_channels == len(
        done.model[0].bias if done.model[0].bias is not None else done.model[0].weight
    )
    assert done.model[0].out_channels < 12
    for m in done.model:
        if isinstance(m, nn.Conv2d):
            run(done.model, image())
            assert m.weight.shape[:2] == (m.out_channels, m.in_channels // m.groups)


@pytest.mark.parametrize(
    "make_layer",
    [
        lambda: nn.LSTM(6, 16, 2, batch_first=True, bidirectional=True),
        lambda: nn.LSTM(6, 16, batch_first=True, proj_size=8),
        lambda: nn.GRU(6, 16, batch_first=True),
    ],
)
def test_recurrent_layers_are_refitted(make_layer):
    layer = make_layer()
    width = (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)
    model = Net(lambda s, x: s.o(s.rnn(s.i(x))[0]), i=nn.Linear(8, 6), rnn=layer, o=nn.Linear(width, 3)).eval()
    done = check_removing_is_zeroing(model, X)
    assert done.form == "module", done.why
    small = done.model.rnn
    assert small.weight_ih_l0.shape[1] == small.input_size
    assert done.model.o.in_features == (small.proj_size or small.hidden_size) * (2 if small.bidirectional else 1)
    done.model.train()(X).sum().backward()
    assert small.weight_ih_l0.grad is not None
