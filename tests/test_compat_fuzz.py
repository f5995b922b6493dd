"""The same random calls through ``torch.nn.utils.prune`` and ``secateur.compat.prune``, compared after each.

Where both raise, ours must raise a subclass of what torch raises; ours then goes on as it is, which a failed call must
not have changed, and torch's network is made anew from the calls that succeeded.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune as theirs

from secateur.compat import prune as ours

SEQUENCES, NIGHTLY, BATCH, CALLS = 300, 6000, 50, 9


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4, bidirectional=True)
        self.head = nn.Linear(8, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0])


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "no bias": (lambda: nn.Linear(4, 3, bias=False), (2, 4)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), (2, 3, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 2, groups=2), (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 2, 3), (1, 3, 4, 4)),
    "lstm": (Lstm, (5, 2, 3)),
    "gru": (lambda: nn.Sequential(nn.GRU(3, 4, num_layers=2), First()), (4, 2, 3)),
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.ReLU(), nn.Linear(7, 3)), (4, 5)),
    "cnn": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)),
        (3, 2, 5, 5),
    ),
}


class First(nn.Module):
    def forward(self, pair: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return pair[0]


Call = Callable[["Side"], object]


@dataclass
class Side:
    """One of the two: the module of functions, and the network that they are called on."""

    prune: Any
    net: str
    seed: int
    done: list[tuple[Call, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        make, shape = NETS[self.net]
        self.model, self.inputs = make(), torch.randn(shape)
        self.optimizer = self.fresh_optimizer()
        self.methods = custom_methods(self.prune)

    def fresh_optimizer(self) -> torch.optim.Optimizer:
        if self.seed % 2:
            return torch.optim.AdamW(self.model.parameters(), lr=0.05)
        return torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)

    def run(self, call: Call, seed: int) -> Exception | None:
        torch.manual_seed(seed)
        try:
            call(self)
        except Exception as error:  # whatever it is, the other side is compared with it
            return error
        self.done.append((call, seed))
        return None

    def again(self) -> Side:
        """The same side, made from the calls that succeeded."""
        other = Side(self.prune, self.net, self.seed)
        for call, seed in self.done:
            assert other.run(call, seed) is None
        return other

    def module(self, path: str) -> nn.Module:
        return self.model.get_submodule(path)

    def forward(self) -> torch.Tensor:
        self.model.eval()
        with torch.no_grad():
            output = self.model(self.inputs.to(next(self.model.parameters()).dtype))
        self.model.train()
        return output


def custom_methods(prune: Any) -> dict[str, Any]:
    """Methods as users write them."""

    class EveryOther(prune.BasePruningMethod):
        PRUNING_TYPE = "unstructured"

        def compute_mask(self, t, default_mask):
            mask = default_mask.clone()
            mask.view(-1)[::2] = 0
            return mask

    class Threshold(prune.BasePruningMethod):
        PRUNING_TYPE = "unstructured"

        def __init__(self, threshold):
            self.threshold = threshold

        def compute_mask(self, t, default_mask):
            return default_mask * (t.abs() > self.threshold)

    class FirstChannel(prune.BasePruningMethod):
        PRUNING_TYPE = "structured"

        def __init__(self, dim):
            self.dim = dim

        def compute_mask(self, t, default_mask):
            mask = default_mask.clone()
            mask.select(self.dim, 0).zero_()
            return mask

    class NoDim(EveryOther):
        PRUNING_TYPE = "structured"

    class Whole(prune.BasePruningMethod):
        PRUNING_TYPE = "global"

        def compute_mask(self, t, default_mask):
            return default_mask * (t > t.mean())

    class Odd(EveryOther):
        PRUNING_TYPE = "odd"

    class Fails(EveryOther):
        def compute_mask(self, t, default_mask):
            raise KeyError("no mask")

    made = (EveryOther, Threshold, FirstChannel, NoDim, Whole, Odd, Fails)
    return {method.__name__: method for method in made}


@dataclass(frozen=True)
class Draw:
    """A call, and where the two are known to differ, what torch's side runs in its place ("raises": only ours runs)."""

    text: str
    call: Call
    instead: Call | str | None = None


class Author:
    """Draws calls that make sense now and then."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)

    def amount(self) -> Any:
        good = [0, 1, 2, 3, 0.0, 0.1, 0.25, 0.5, 0.2, 1 / 3, 0.75, np.int64(2), np.float64(0.4)]
        odd = [10**6, -1, 1.0, 1.5, -0.25, math.inf, "half", None, 11]
        return self.dice.choice(good if self.dice.random() < 0.85 else odd)

    def place(self, side: Side) -> tuple[str, str, torch.Tensor | None]:
        """A module, a name in it and its tensor; at times a name that it does not have."""
        if self.dice.random() < 0.04:
            name = self.dice.choice(["wieght", "training", "running_mean", "weight_orig_mask"])
            return self.dice.choice(places(side.model))[0], name, None
        path, name = self.dice.choice(places(side.model))
        return path, name, getattr(side.module(path), name)

    def scores(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None or self.dice.random() < 0.6:
            return None
        generator = torch.Generator().manual_seed(self.dice.randrange(10**6))
        wrong = self.dice.random() < 0.1
        dtype = self.dice.choice([torch.float32, torch.float64])
        return torch.randn((*tensor.shape, 2) if wrong else tensor.shape, generator=generator, dtype=dtype)

    def draw(self, side: Side) -> Draw:
        kinds = [
            self.local,
            self.structured,
            self.mask,
            self.custom,
            self.globally,
            self.remove,
            self.train,
            self.other,
        ]
        return self.dice.choices(kinds, [4, 4, 2, 3, 4, 2, 2, 2])[0](side)

    def local(self, side: Side) -> Draw:
        path, name, tensor = self.place(side)
        amount, scores = self.amount(), self.scores(tensor)
        kind = self.dice.choice(["identity", "random_unstructured", "l1_unstructured", "l1_unstructured"])
        arguments = {"identity": {}, "random_unstructured": {"amount": amount}}.get(
            kind, {"amount": amount, "importance_scores": scores}
        )
        return Draw(
            f"{kind} {path}.{name} {amount}", lambda s: getattr(s.prune, kind)(s.module(path), name, **arguments)
        )

    def structured(self, side: Side) -> Draw:
        path, name, tensor = self.place(side)
        amount, scores = self.amount(), self.scores(tensor)
        dims = tensor.dim() if tensor is not None else 2
        dim = self.dice.choice([*range(-dims, dims), *range(-dims, dims), dims + 1, -dims - 1])
        n = self.dice.choice([1, 2, 2.0, 3, 0, math.inf, -math.inf, "fro", "nuc"])
        kind = self.dice.choice(["random_structured", "ln_structured", "ln_structured"])
        more = {} if kind == "random_structured" else {"n": n, "importance_scores": scores}

        def call(s: Side, **other: object) -> object:
            return getattr(s.prune, kind)(s.module(path), name, **({"amount": amount, "dim": dim} | more | other))

        instead: Any = None
        if n == "fro" and dims > 3 and kind == "ln_structured":
            instead = lambda s: call(s, n=2)  # torch's fails in more than three dimensions
        if tensor is not None and dims == 1 and f"{name}_mask" in dict(side.module(path).named_buffers()):
            instead = "raises"  # torch's takes a vector for one row, if it is pruned already
        return Draw(f"{kind} {path}.{name} {amount} n={n} dim={dim}", call, instead)

    def mask(self, side: Side) -> Draw:
        path, name, tensor = self.place(side)
        generator = torch.Generator().manual_seed(self.dice.randrange(10**6))
        shape = tuple(tensor.shape) if tensor is not None else (2, 2)
        shape = (*shape, 2) if self.dice.random() < 0.1 else shape
        mask = (torch.rand(shape, generator=generator) > 0.3).to(
            self.dice.choice([torch.float32, torch.bool, torch.int8])
        )
        return Draw(
            f"custom_from_mask {path}.{name} {shape}", lambda s: s.prune.custom_from_mask(s.module(path), name, mask)
        )

    def custom(self, side: Side) -> Draw:
        path, name, tensor = self.place(side)
        kind = self.dice.choice(list(side.methods))
        dims = tensor.dim() if tensor is not None else 2
        arguments = {"Threshold": (0.1,), "FirstChannel": (self.dice.randrange(-dims, dims),)}.get(kind, ())
        scores = self.scores(tensor)
        pruned = tensor is not None and f"{name}_mask" in dict(side.module(path).named_buffers())
        instead = "raises" if kind == "FirstChannel" and dims == 1 and pruned else None

        def call(s: Side) -> None:
            s.methods[kind].apply(s.module(path), name, *arguments, importance_scores=scores)

        return Draw(f"{kind}{arguments} {path}.{name}", call, instead)

    def globally(self, side: Side) -> Draw:
        found = places(side.model)
        chosen = self.dice.sample(found, self.dice.randrange(1, len(found) + 1))
        kind = self.dice.choice(["L1Unstructured", "L1Unstructured", "RandomUnstructured", "Threshold", "LnStructured"])
        amount = self.amount()
        arguments = {
            "Threshold": {"threshold": 0.15},
            "LnStructured": {"amount": amount, "n": 2},
        }.get(kind, {"amount": amount})
        tensors = {(path, name): getattr(side.module(path), name) for path, name in chosen}
        scores = {place: self.scores(tensor) for place, tensor in tensors.items()}
        given = {place: value for place, value in scores.items() if value is not None}
        misfits = [place for place, value in given.items() if value.shape != tensors[place].shape]
        instead = "raises" if misfits or any(tensor is None for tensor in tensors.values()) else None

        def call(s: Side) -> None:
            method = s.methods[kind] if kind in s.methods else getattr(s.prune, kind)
            s.prune.global_unstructured(
                tuple((s.module(path), name) for path, name in chosen),
                pruning_method=method,
                importance_scores={(s.module(path), name): value for (path, name), value in given.items()},
                **arguments,
            )

        return Draw(f"global {kind} {arguments} {chosen} scores of {list(given)}", call, instead)

    def remove(self, side: Side) -> Draw:
        path, name, _ = self.place(side)
        return Draw(f"remove {path}.{name}", lambda s: s.prune.remove(s.module(path), name))

    def train(self, side: Side) -> Draw:
        def call(s: Side) -> None:
            s.optimizer.zero_grad()
            s.model(s.inputs.to(next(s.model.parameters()).dtype)).square().sum().backward()
            s.optimizer.step()
            s.forward()  # torch's weights are stale until then

        return Draw("train", call)

    def other(self, side: Side) -> Draw:
        def double(s: Side) -> None:
            s.model.double()
            s.optimizer = s.fresh_optimizer()  # the old one's state is float
            s.forward()

        def reload(s: Side) -> None:
            s.model.load_state_dict({name: value.clone() for name, value in s.model.state_dict().items()})
            s.forward()

        chosen = self.dice.choice([double, reload, lambda s: s.prune.is_pruned(s.model)])
        return Draw(chosen.__name__, chosen)


def places(model: nn.Module) -> list[tuple[str, str]]:
    """(path of a module, name) of every parameter, pruned or not, and of biases that are None."""
    return sorted(
        {(path, name.removesuffix("_orig")) for path, module in model.named_modules() for name in module._parameters}
    )


def compare(mine: Side, other: Side) -> None:
    assert ours.is_pruned(mine.model) == theirs.is_pruned(other.model)
    assert mine.model.state_dict().keys() == other.model.state_dict().keys()
    assert [n for n, _ in mine.model.named_parameters()] == [n for n, _ in other.model.named_parameters()]
    for name, value in other.model.state_dict().items():
        assert torch.equal(mine.model.state_dict()[name].to(value.dtype), value), name
    for path, name in places(other.model):
        a, b = getattr(mine.module(path), name), getattr(other.module(path), name)
        assert (a is None) == (b is None)
        assert a is None or (torch.equal(a, b) and a.dtype == b.dtype)
    for a, b in zip(mine.model.parameters(), other.model.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)
    assert torch.equal(mine.forward(), other.forward())


def fuzz(seed: int) -> int:
    """One sequence; how many of its calls succeeded."""
    author = Author(seed)
    net = author.dice.choice(list(NETS))
    mine, other, history = Side(ours, net, seed), Side(theirs, net, seed), [net]
    for step in range(CALLS):
        draw = author.draw(mine)
        history.append(draw.text)
        try:
            error = mine.run(draw.call, step)
            if draw.instead == "raises":
                assert isinstance(error, ValueError | AssertionError | TypeError | AttributeError), error
            else:
                expected = other.run(draw.instead or draw.call, step)  # type: ignore[arg-type]
                assert type(expected) in type(error).__mro__, (error, expected)
                if expected is not None:
                    other = other.again()
            compare(mine, other)
        except AssertionError as failure:
            raise AssertionError(f"sequence {seed}: {'; '.join(history)}: {failure}") from failure
    return len(mine.done)


@pytest.mark.parametrize("start", range(0, SEQUENCES, BATCH))
def test_both_do_the_same(start: int) -> None:
    succeeded = sum(fuzz(seed) for seed in range(start, start + BATCH))
    assert succeeded > BATCH * CALLS / 2


@pytest.mark.nightly
@pytest.mark.parametrize("start", range(SEQUENCES, SEQUENCES + NIGHTLY, BATCH))
def test_both_do_the_same_at_length(start: int) -> None:
    for seed in range(start, start + BATCH):
        fuzz(seed)
