"""Taking whole blocks out of a user's model, so that its class keeps running."""

from __future__ import annotations

import contextlib
import copy
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.apply.blame import relative_error
from secateur.errors import PlanError, TraceError
from secateur.graph.trace import first_line, run
from secateur.tasks import device_of

Taken = Mapping[str, int]
"""Block -> how it is taken out: ``DELETED`` from the list that holds it, or replaced by a ``Skip`` of so many items."""

DELETED = -1

_COUNT = re.compile(r"layer|block|depth")
_NUMBER = re.compile(r"(layer|block)_?(idx|index|id|num|number)$")


class Skip(nn.Module):
    """In the place of a block: hands its first argument on, alone or as the first of ``items`` outputs."""

    def __init__(self, items: int) -> None:
        super().__init__()
        self.items = items

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        return (x, *[None] * (self.items - 1)) if self.items else x


@dataclass(frozen=True, eq=False)
class Dropped:
    """A model of the same class without some blocks, and how they were ``taken``; or ``why`` there is none.

    ``unsaved`` says why ``save_pretrained`` of a Hugging Face model would not be loadable, "" where it is.
    """

    model: nn.Module
    taken: Taken = field(default_factory=dict)
    why: str = ""
    unsaved: str = ""


def drop(
    model: nn.Module, names: Sequence[str], given: Mapping[str, int], inputs: Any, oracle: Any, tolerance: float
) -> Dropped:
    """The model, which is not changed, without these blocks; tensors are shared with it.

    given: see ``handed``. The result gives the oracle's outputs on ``inputs``.
    """
    if branches := [name for name in names if name not in given]:
        return Dropped(model, why=f"{branches[0]!r} is no module that could be taken out")
    why = ""
    for taken in (dict.fromkeys(names, DELETED), {name: given[name] for name in names}):
        attempt = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
        try:
            drop_(attempt, taken)
            error = relative_error(run(attempt, inputs), oracle)
        except PlanError as failure:
            why = first_line(failure)
        except TraceError as failure:
            why = f"its code needs the blocks that go ({first_line(failure.__cause__)})"
        else:
            if error <= tolerance:
                unsaved = _unsaved(attempt, inputs, oracle, tolerance) if hasattr(model, "save_pretrained") else ""
                return Dropped(attempt, taken, "", unsaved)
            why = f"its code computes otherwise without the blocks that go (outputs differ by {error:.2g})"
    return Dropped(model, why=why)


def _unsaved(model: nn.Module, inputs: Any, oracle: Any, tolerance: float) -> str:
    """Why the class, made from the model's configuration, is not the model; "" where it is."""
    try:
        fresh = type(model)(copy.deepcopy(model.config))
        fresh.load_state_dict(model.state_dict())
        error = relative_error(run(fresh.to(device_of(model)), inputs), oracle)
    except Exception as failure:  # a class may refuse in any way
        return f"no number of its configuration counts the blocks that are left ({first_line(failure)})"
    return "" if error <= tolerance else f"its class computes something else (outputs differ by {error:.2g})"


def drop_(model: nn.Module, taken: Taken) -> None:
    """Take blocks out. Raises PlanError, before anything changes, where that is not possible in this way."""
    modules = dict(model.named_modules())
    if missing := [name for name in taken if name not in modules]:
        raise PlanError(f"block {missing[0]!r} is no module of {type(model).__name__}; use the model that was pruned")
    _delete_(model, [name for name, items in taken.items() if items == DELETED])
    for name, items in taken.items():
        if items != DELETED:
            parent, _, leaf = name.rpartition(".")
            setattr(modules[parent], leaf, Skip(items))


def handed(model: nn.Module, names: Sequence[str], inputs: Any) -> dict[str, int]:
    """How many outputs each of these modules gives: 0 where it is a single tensor. Branches are left out."""
    modules = dict(model.named_modules())
    found = {name: 0 for name in names if name in modules}
    with contextlib.ExitStack() as stack:
        for name in found:

            def note(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                found[name] = 0 if isinstance(output, Tensor) else len(output)

            stack.callback(modules[name].register_forward_hook(note).remove)
        if found:
            with contextlib.suppress(TraceError):  # some classes do not run without values, on device meta
                run(model, inputs)
    return found


# --- lists of blocks -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _List:
    """A list of blocks, by the path of its module: how many it had, and which of those stay."""

    path: str
    total: int
    kept: tuple[int, ...]


def _delete_(model: nn.Module, names: Sequence[str]) -> None:
    gone: dict[str, set[str]] = {}
    for name in names:
        path, _, key = name.rpartition(".")
        if not isinstance(model.get_submodule(path), (nn.Sequential, nn.ModuleList)):
            raise PlanError(f"block {name!r} is in no ModuleList or Sequential, from which it could be deleted")
        gone.setdefault(path, set()).add(key)
    lists = []
    for path, keys in gone.items():
        holder = model.get_submodule(path)
        before = list(holder._modules)
        found = _List(path, len(before), tuple(i for i, key in enumerate(before) if key not in keys))
        numbered = before == [str(i) for i in range(len(before))]
        stay = {before[i]: holder._modules[before[i]] for i in found.kept}
        holder._modules = dict(zip(map(str, range(len(stay))), stay.values(), strict=True)) if numbered else stay
        _renumber_(model, holder, found)
        lists.append(found)
    if lists:
        _configure_(model, lists)


def _renumber_(model: nn.Module, holder: nn.Module, found: _List) -> None:
    """The numbers that blocks remember of themselves, and the count that the owner of the list does."""
    for new, (old, block) in enumerate(zip(found.kept, holder.children(), strict=True)):
        for module in block.modules():
            for key, value in vars(module).items():
                if type(value) is int and value == old and _NUMBER.search(key):
                    setattr(module, key, new)
    owner = model.get_submodule(found.path.rpartition(".")[0])
    for key, value in vars(owner).items():
        if type(value) is int and value == found.total and _COUNT.search(key):
            setattr(owner, key, len(found.kept))


def _configure_(model: nn.Module, lists: Sequence[_List]) -> None:
    """Give the model a configuration from which its class makes a model of as many blocks, where there is one.

    Which number of the configuration counts a list is not known by name: what makes the same tensors is right.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "__dict__"):
        return
    expected = model.state_dict().keys()
    for counts in itertools.product(*(list(_counts(config, found.total)) for found in lists)):
        changed = copy.deepcopy(config)
        for place, found in zip(counts, lists, strict=True):
            _set_(changed, place, found)
        try:
            with torch.device("meta"):
                fresh = type(model)(copy.deepcopy(changed))
        except Exception:  # a class may refuse a number in any way
            continue
        if fresh.state_dict().keys() == expected:
            made = dict(fresh.named_modules())
            for path, module in model.named_modules():
                if "config" in vars(module) and "config" in vars(made.get(path, fresh)):
                    module.config = made[path].config
            return


_Place = tuple[tuple[str, ...], str, int]  # the objects on the way, the attribute, and of a list of counts which one


def _counts(config: Any, total: int, way: tuple[str, ...] = ()) -> Iterator[_Place]:
    """Where a configuration counts something of that number."""
    for key, value in vars(config).items():
        if _COUNT.search(key) and type(value) is int and value == total:
            yield way, key, -1
        elif _COUNT.search(key) and isinstance(value, (list, tuple)):
            yield from ((way, key, i) for i, v in enumerate(value) if type(v) is int and v == total)
        elif key.endswith("_config") and hasattr(value, "__dict__"):
            yield from _counts(value, total, (*way, key))


def _set_(config: Any, place: _Place, found: _List) -> None:
    """Write the new count, and shorten what the same object lists for each block."""
    way, key, index = place
    for name in way:
        config = getattr(config, name)
    count: Any = len(found.kept)
    if index >= 0:
        old = getattr(config, key)
        count = type(old)((*old[:index], count, *old[index + 1 :]))
    for name, value in list(vars(config).items()):
        if name != key and isinstance(value, (list, tuple)) and len(value) == found.total and _COUNT.search(name):
            setattr(config, name, type(value)(value[i] for i in found.kept))
    setattr(config, key, count)
