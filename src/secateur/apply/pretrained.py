"""Classes that are made from a configuration: one that makes the shrunk model, found by making it.

Hugging Face models are saved as weights and a configuration, and loaded by making the class anew from the latter.
Integers of the configuration that hold old sizes are given new ones until the class, made on the meta device, has
exactly the shrunk model's tensors and attributes. It is then made for good and held to the oracle.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.apply.attributes import MISSING, Changes, Sizes, Value, alike, read
from secateur.apply.blame import relative_error
from secateur.errors import TraceError
from secateur.graph.trace import first_line, run

OTHERS = "its configuration makes other tensors"
CANDIDATES, MAKES = 3, 96
"""How many new values of one field are tried, and how often the class is made."""

Setting = Mapping[str, int]  # field -> value; "hidden_sizes.1" is an element, "text_config.hidden_size" is nested


@dataclass(frozen=True)
class Made:
    """The attributes in which the class, made from a new configuration, differs; or why no configuration serves."""

    changes: Changes
    why: str


def is_pretrained(model: nn.Module) -> bool:
    """Whether the model is of a class that is made from its ``config``, as ``from_pretrained`` makes it."""
    return hasattr(model, "save_pretrained") and hasattr(getattr(model, "config", None), "to_dict")


def configure(
    small: nn.Module,
    config: Any,
    known: Mapping[str, Sizes],
    changed: Changes,
    inputs: Any,
    oracle: Any,
    tolerance: float,
    fold: Callable[[], bool],
) -> Made:
    """Find the configuration that makes ``small``, which is not changed.

    config: that of the dense model. changed: the attributes that ``small`` was given. fold: called at most once, where
    only the scale of attention may be wrong; it moves that scale into the weights of ``small`` and says whether it did.
    """
    search = _Search(small, config, changed)
    setting, why = search.best(_candidates(config, known))
    if why:
        return Made({}, why)
    fresh = search.make(setting, small)
    if isinstance(fresh, str):
        return Made({}, fresh)
    lost = next(
        (n for n, b in small.named_buffers() if not _equal(b, fresh.get_buffer(n)) and n not in search.shapes), ""
    )
    if lost:
        return Made({}, f"{lost} is not saved but made from the configuration, which cannot say what is left of it")
    try:
        fresh.load_state_dict(small.state_dict())
        error = relative_error(run(fresh, inputs), oracle)
        if not error <= tolerance and fold():
            fresh.load_state_dict(small.state_dict())
            error = relative_error(run(fresh, inputs), oracle)
    except TraceError as failure:
        return Made({}, f"made from its configuration, it fails ({first_line(failure.__cause__)})")
    if not error <= tolerance:
        return Made({}, f"made from its configuration, it computes something else (outputs differ by {error:.2g})")
    return Made(_differences(small, fresh), "")


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a == b).all())


class _Search:
    def __init__(self, small: nn.Module, config: Any, changed: Changes) -> None:
        self.kind, self.config = type(small), config
        self.shapes = {name: tuple(t.shape) for name, t in small.state_dict().items()}
        self.attributes = {(p, n): v for p, vs in changed.items() for n, v in vs.items() if "." not in n}
        self.known: dict[tuple[tuple[str, int], ...], tuple[float, str]] = {}

    def best(self, candidates: Mapping[str, tuple[tuple[int, ...], bool]]) -> tuple[Setting, str]:
        """The setting that makes the wanted shapes and attributes, and "" or why there is none."""
        dense = self.far({})
        moving, alone = {}, {}  # fields that change something, and those of them that do no harm by themselves
        for name, (values, optional) in candidates.items():
            distance, why = self.far({name: values[0]})
            if distance != dense[0] and not (optional and distance == math.inf):
                moving[name] = values
                if why != OTHERS:
                    alone[name] = values
        starts = [{name: values[0] for name, values in some.items()} for some in (moving, alone)]
        setting: dict[str, int] = min(starts, key=lambda s: self.far(s)[0])
        distance, why = self.far(setting)
        while distance > 0 and moving and len(self.known) < MAKES:
            moves = [_moved(setting, n, v) for n, values in moving.items() for v in (None, *values)]
            better, found, reason = min(((self.far(s)[0], i, self.far(s)[1]) for i, s in enumerate(moves)))
            if better >= distance:
                break
            setting, distance, why = moves[found], better, reason
        return setting, "" if distance == 0 else why

    def far(self, setting: Setting) -> tuple[float, str]:
        """How far the class, so made, is from the wanted one, in logarithms of ratios; and the first difference."""
        key = tuple(sorted(setting.items()))
        if key not in self.known:
            self.known[key] = self._far(setting)
        return self.known[key]

    def _far(self, setting: Setting) -> tuple[float, str]:
        made = self.make(setting, None)
        if isinstance(made, str):
            return math.inf, made
        state = {name: tuple(t.shape) for name, t in made.state_dict().items()}
        if state.keys() != self.shapes.keys() or any(len(s) != len(state[n]) for n, s in self.shapes.items()):
            return math.inf, OTHERS
        total, why = 0.0, ""
        for name, shape in self.shapes.items():
            if shape != state[name]:
                total += sum(abs(math.log(max(a, 0.5) / max(b, 0.5))) for a, b in zip(shape, state[name], strict=True))
                why = why or f"its configuration makes {name} of {list(state[name])}, not of {list(shape)}"
        for (path, name), value in self.attributes.items():
            found = read(made.get_submodule(path), name)
            if type(found) is type(value) is int and found != value:
                total += abs(math.log(max(found, 0.5) / max(value, 0.5)))
                why = why or f"its configuration makes {path}.{name} {found}, not {value}"
        return total, why

    def make(self, setting: Setting, like: nn.Module | None) -> nn.Module | str:
        """The class made from the configuration, on the meta device or ``like`` another model; or what it said."""
        try:
            with warnings.catch_warnings(), torch.random.fork_rng(devices=()):
                warnings.simplefilter("ignore")
                config = _with(copy.deepcopy(self.config), setting)
                if like is None:
                    with torch.device("meta"):
                        return self.kind(config)
                first = next(like.parameters())
                return self.kind(config).to(first.device, first.dtype).train(like.training)
        except Exception as error:  # whatever a class has against a configuration
            return f"{self.kind.__name__} cannot be made with these widths ({first_line(error)})"


def _with(config: Any, setting: Setting) -> Any:
    """The configuration with new values, in place, and checked as it would be on loading."""
    for name, value in setting.items():
        *through, leaf = name.split(".")
        owner = config
        for part in through:
            owner = getattr(owner, part)
        if leaf.isdigit():
            owner[int(leaf)] = value
        else:
            setattr(owner, leaf, value)
    if hasattr(config, "validate"):
        config.validate()
    return config


def _moved(setting: Setting, name: str, value: int | None) -> dict[str, int]:
    moved = {n: v for n, v in setting.items() if n != name}
    return moved if value is None else moved | {name: value}


def _candidates(config: Any, known: Mapping[str, Sizes]) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Fields that hold a size which changed somewhere, with the sizes that it became, the most frequent first.

    A field that holds nothing may stand for the size of any tensor; those are marked True.
    """
    became: dict[int, Counter[int]] = {}
    anything: Counter[int] = Counter()
    for (_, which, _), here in known.get("", {}).items():
        for old, news in here.items():
            became.setdefault(old, Counter()).update(new for new in news if new != old)
            anything.update(news if which == -1 else ())
    return {
        name: (tuple(n for n, _ in votes.most_common(CANDIDATES * (1 if value else 2))), value is None)
        for name, value in _fields(config)
        if (votes := anything if value is None else became.get(value))
    }


def _fields(config: Any, prefix: str = "") -> Iterator[tuple[str, int | None]]:
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if type(value) is int or value is None:
            yield prefix + name, value
        elif isinstance(value, list):
            yield from ((f"{prefix}{name}.{i}", v) for i, v in enumerate(value) if type(v) is int)
        elif hasattr(value, "to_dict"):
            yield from _fields(value, f"{prefix}{name}.")


def _differences(small: nn.Module, fresh: nn.Module) -> dict[str, dict[str, Value]]:
    """Numbers that modules of ``fresh``, or the configurations they hold, have different from those of ``small``."""
    found: dict[str, dict[str, Value]] = {}
    seen: set[int] = set()
    for (path, mine), theirs in zip(small.named_modules(), fresh.modules(), strict=True):
        owners: list[tuple[str, Any, Any]] = [("", mine, theirs)]
        if hasattr(getattr(mine, "config", None), "to_dict") and "config" in vars(mine):
            owners.append(("config.", mine.config, getattr(theirs, "config", None)))
        for prefix, own, new in owners:
            if id(own) not in seen:
                seen.add(id(own))
                for name, value in vars(new).items():
                    old = vars(own).get(name, MISSING)
                    if name != "training" and alike(old, value, prefix + name) and value != old:
                        found.setdefault(path, {})[prefix + name] = tuple(value) if isinstance(value, list) else value
    return found
