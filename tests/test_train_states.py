"""The state of a training method: what it is made of, and what it refuses to go on from."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from train_nets import gradual, mlp, same, train, zeros

import secateur as sc
from secateur.errors import DataError
from secateur.train.bits import unpack


def test_a_state_is_of_plain_things() -> None:
    model, optimizer, pruner = gradual(criterion="taylor")
    train(model, optimizer, pruner, range(3))
    file = io.BytesIO()
    torch.save(pruner.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state["masks"]["0.weight"].numel() == 24  # a bit for each of 12 x 16
    assert set(state["state"]["0.weight"]) == {"grad_abs"}
    state["masks"]["0.weight"].zero_()  # a copy
    assert zeros(pruner)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda s: s.pop("about"), "no state of a training method"),
        (lambda s: s.update(version=9), "format 9"),
        (lambda s: s["about"].update(method="RigL"), "method was RigL, is now Gradual"),
        (lambda s: s["about"].update(steps=9), "steps was 9, is now 8"),
        (lambda s: s["about"]["weights"].pop("2.weight"), "weights was"),
        (lambda s: s["masks"].update({"0.weight": torch.zeros(3, dtype=torch.uint8)}), "has 3 bytes"),
        (lambda s: s["masks"].update({"0.weight": "text"}), "no state of a training method"),
        (lambda s: s["masks"].update({"9.weight": torch.zeros(3, dtype=torch.uint8)}), "9.weight"),
        (lambda s: s["state"].pop("0.weight"), "damaged"),
        (lambda s: s.update(done=99), "damaged"),
        (lambda s: s.update(applied="x"), "no state of a training method"),
    ],
)
def test_a_state_of_something_else_changes_nothing(spoil, says: str) -> None:
    model, optimizer, pruner = gradual(criterion="taylor")
    train(model, optimizer, pruner, range(5))
    state, before = pruner.state_dict(), copy.deepcopy((model, pruner.state_dict()))
    spoil(state)
    with pytest.raises(DataError, match=says):
        pruner.load_state_dict(state)
    assert same(model, before[0])
    now = pruner.state_dict()
    assert (now["applied"], now["done"]) == (before[1]["applied"], before[1]["done"])
    assert all(torch.equal(bits, now["masks"][name]) for name, bits in before[1]["masks"].items())
    train(model, optimizer, pruner, range(5, 8))
    pruner.finish()


def test_a_state_without_units_brings_units_back() -> None:
    model = mlp()
    graph = sc.analyze(model, torch.zeros(2, 12))
    _, optimizer, pruner = gradual(model, budget="params=50%", pattern="channel", graph=graph)
    early, weights = pruner.state_dict(), copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, pruner, range(3))
    late = pruner.state_dict()
    assert not bool(unpack(late["units"]["0"], (16,)).all())
    late["units"] = {"other": torch.zeros(2, dtype=torch.uint8)}
    kept = pruner.wish.kept
    with pytest.raises(DataError, match="no state of a training method"):
        pruner.load_state_dict(late)
    assert pruner.wish.kept is kept
    model.load_state_dict(weights[0])
    optimizer.load_state_dict(weights[1])
    pruner.load_state_dict(early)
    assert pruner.wish.kept is None
    assert not pruner.bits
    train(model, optimizer, pruner, range(8))
    assert len(sc.shrink(model, pruner.finish())[0].weight) < 16
