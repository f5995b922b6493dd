"""The rewritten program as an ordinary module: it trains, moves, is copied, captured and pruned again."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nets import Net, build
from secateur.apply.resize import resize_
from secateur.apply.shrink import as_program, relative_error
from secateur.graph import analyze
from secateur.planning import make
from secateur.tasks import clone

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, on copying a program
NETS = [
    "option_a_shortcut", "slices", "linear_to_map", "dropout_and_norm", "attention", "fused_attention",
    "grouped_queries", "two_outputs",
]  # fmt: skip


def program(model, inputs, budget="params=70%"):
    """The rewritten program, whether or not the class could hold the new sizes."""
    plan = make(model, analyze(model, inputs), budget=budget, allocate="uniform")
    small = clone(model)
    resize_(small, plan.slices)
    return as_program(model, plan, small, inputs).eval()


def positions():
    """Tensors made inside, on a device and of a dtype that ``torch.export`` records."""

    def body(s, x):
        b, n, _ = x.shape
        at = torch.arange(n, device=x.device, dtype=x.dtype)[None, :, None] / n
        mask = torch.full((n, n), float("-inf"), device=x.device, dtype=x.dtype).triu(1)
        h = s.a(x) * at + torch.zeros(1, device=x.device).to(x.dtype)
        weights = (h @ h.transpose(1, 2) + mask).softmax(-1, dtype=torch.float32).to(x.dtype)
        return s.b((weights @ h).view(b, n, 12))

    return Net(body, a=nn.Linear(8, 12), b=nn.Linear(12, 4)).eval(), torch.randn(2, 5, 8)


def made(name):
    return positions() if name == "positions" else build(name)


@pytest.mark.parametrize("name", [*NETS, "positions"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_follows_the_dtype_of_its_parameters(name, dtype):
    model, x = made(name)
    small = program(model, x)
    want = small(x)
    moved = copy.deepcopy(small).to(dtype)
    found = moved(x.to(dtype))
    first = torch.utils._pytree.tree_leaves(found)[0]
    assert first.dtype == dtype
    assert relative_error(found, want) < (1e-5 if dtype == torch.float64 else 0.1)


@pytest.mark.parametrize("name", [*NETS, "positions"])
def test_it_follows_the_device_of_its_parameters(name):
    model, x = made(name)
    small = program(model, x)
    out = copy.deepcopy(small).to("meta")(x.to("meta"))
    for a, b in zip(*(torch.utils._pytree.tree_leaves(o) for o in (out, small(x))), strict=True):
        assert a is b is None or (a.shape == b.shape and a.device.type == "meta")


@pytest.mark.parametrize("name", [*NETS, "positions"])
def test_it_is_copied_captured_and_pruned_again(name):
    model, x = made(name)
    small = program(model, x)
    want = small(x)
    for copied in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert relative_error(copied(x), want) == 0
        assert set(copied.state_dict()) >= set(model.state_dict())
    exported = torch.export.export(small, (x,)).module()
    assert relative_error(exported(x), want) < 1e-6
    again = program(small, x)
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in small.parameters())
    moved = again.double()(x.double())
    assert torch.utils._pytree.tree_leaves(moved)[0].dtype == torch.float64


@pytest.mark.parametrize("name", [*NETS, "positions"])
def test_every_parameter_trains(name):
    model, x = made(name)
    small = program(model, x).train()
    out = small(x)
    sum(o.square().sum() for o in torch.utils._pytree.tree_leaves(out) if o is not None and o.requires_grad).backward()
    assert {n for n, p in small.named_parameters() if p.grad is None} == set()


def attention_with_dropout(how):
    def body(s, x):
        b, n, _ = x.shape
        q, k, v = (p(x).view(b, n, 4, 6).transpose(1, 2) for p in (s.q, s.k, s.v))
        p = 0.5 if s.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, None, p) if how == "by position" else (
            F.scaled_dot_product_attention(q, k, v, dropout_p=p, scale=0.3)
        )  # fmt: skip
        return s.o(y.transpose(1, 2).reshape(b, n, 24))

    linear = {"q": nn.Linear(8, 24), "k": nn.Linear(8, 24), "v": nn.Linear(8, 24), "o": nn.Linear(24, 8)}
    return Net(body, **linear).eval(), torch.randn(2, 5, 8)


@pytest.mark.parametrize("how", ["by name", "by position"])
def test_attention_drops_out_in_training_only(how):
    model, x = attention_with_dropout(how)
    once = program(model, x)
    for small in (once, program(once, x)):
        assert torch.equal(small.eval()(x), small(x))
        assert not torch.equal(small.train()(x), small(x))
        assert relative_error(small.eval()(x), copy.deepcopy(small)(x)) == 0
    assert not model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_that_only_evaluates_keeps_its_program():
    model, x = attention_with_dropout("by name")
    body = model.body

    def fails(s, x):
        if s.training:
            raise RuntimeError("needs a target")
        return body(s, x)

    model.body = fails
    small = program(model, x)
    assert torch.equal(small.train()(x), small(x))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Dropout(0.5), (2, 12)),
        (nn.AlphaDropout(0.5), (2, 12)),
        (nn.Dropout1d(0.5), (2, 12, 5)),
        (nn.Dropout2d(0.5), (2, 12, 5, 5)),
        (nn.Dropout3d(0.5), (2, 12, 3, 3, 3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_kind_of_dropout_comes_back(layer, shape):
    def body(s, x):
        return s.b(s.drop(s.a(x.movedim(1, -1)).movedim(-1, 1)).movedim(1, -1))

    model = Net(body, a=nn.Linear(12, 12), drop=layer, b=nn.Linear(12, 4)).eval()
    x = torch.randn(shape)
    small = program(model, x)
    assert torch.equal(small(x), small(x))
    small.train()
    assert any(not torch.equal(small(x), small(x)) for _ in range(3))
