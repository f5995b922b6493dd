"""Integers that a user's modules remember, such as ``num_heads``: found from the program, never from a table.

The program knows the old and the new size of every tensor, and which module made it. An attribute that holds an old
size is given the new one where that makes the module compute what the program computes; nothing else decides.
"""

from __future__ import annotations

import dataclasses
import heapq
import inspect
import itertools
import types
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.apply.blame import Outputs, Wrong, first_wrong, modules_of
from secateur.errors import PlanError
from secateur.graph.graph import Graph
from secateur.graph.rules.base import each, sizes_of
from secateur.graph.trace import source_line
from secateur.graph.types import Flags

Value = int | float | tuple[int, ...]
Changes = Mapping[str, Mapping[str, Value]]  # module path -> attribute -> new value

Place = tuple[str, int, int]  # what made or holds a tensor; which of its tensors; dimension
Sizes = dict[Place, dict[int, set[int]]]  # place -> old size -> new sizes

TRIES = 16
"""How many readings of one class's attributes are tried."""


def sizes(graph: Graph, alive: Flags) -> dict[str, Sizes]:
    """Per module path the sizes, old and new, of every tensor that it or its children made or own."""
    program, found = graph.program, {}  # type: ignore[var-annotated]

    def note(paths: Sequence[str], place: Place, old: int, new: int) -> None:
        for path in paths:
            found.setdefault(path, {}).setdefault(place, {}).setdefault(old, set()).add(new)

    for node in program.module.graph.nodes:
        values = each(program.values.get(node)) if node.op == "call_function" else ()
        made = node.meta.get("val")
        if not any(values) or made is None:
            continue
        shapes = [sizes_of(node)] if not isinstance(made, (list, tuple)) else [tuple(v.shape) for v in made]
        for k, (dims, shape) in enumerate(zip(values, shapes, strict=False)):
            for d, (dim, old) in enumerate(zip(dims, shape, strict=False)):
                if isinstance(old, int):
                    note(modules_of(node), (source_line(node), k, d), old, program.count(dim, old, alive))
    for name, tensor in program.tensors.items():
        for d, (dim, old) in enumerate(zip(tensor.dims, tensor.shape, strict=True)):
            for path, inner in _owners(name):
                note([path], (inner, -1, d), old, program.count(dim, old, alive))
    axes_in: Counter[tuple[str, int]] = Counter()
    for axis in graph.axes:
        for member in axis.members:
            axes_in[member.tensor, member.dim] += 1
            which = -1 - axes_in[member.tensor, member.dim]  # the first, second … axis in this dimension
            for path, inner in _owners(member.tensor):
                note([path], (inner, which, member.dim), axis.units, int(alive[axis.atoms].sum()))
    return found


def _owners(tensor: str) -> Iterator[tuple[str, str]]:
    """The modules that a tensor belongs to, outermost first, and its name within each."""
    parts = tensor.split(".")
    return ((".".join(parts[:i]), ".".join(parts[i:])) for i in range(len(parts)))


@dataclass(frozen=True)
class Slot:
    """One attribute of all modules of a class; each option gives every module path a new value, most likely first.

    ``contested`` where the program alone does not say which option it is, or whether the attribute changes at all.
    """

    name: str
    old: Mapping[str, Value]
    options: tuple[Mapping[str, Value], ...]
    contested: bool

    @property
    def shared(self) -> bool:
        """Whether it belongs to an object that the modules hold, and not to each module itself."""
        return "." in self.name


def slots(model: nn.Module, kind: type[nn.Module], known: Mapping[str, Sizes]) -> list[Slot]:
    """The attributes of the modules of one class that hold sizes which changed."""
    modules = {path: module for path, module in model.named_modules() if type(module) is kind}
    places = {path: known.get(path, {}) for path in modules}
    found = []
    mentioned = _mentioned(kind)
    for name in _names(next(iter(modules.values()))):
        if "." in name and name.rpartition(".")[2] not in mentioned:
            continue
        old = {path: read(module, name) for path, module in modules.items()}
        if not all(_sized(v) for v in old.values()):
            continue
        options = _options(old, places)
        changed = [o for o in options if o != old]
        if "." in name:  # several modules may hold the same object: one value for all
            changed = [o for o in changed if len(set(o.values())) == len(set(map(str, old.values())))]
        if changed:
            sure = len(options) == 1 and all(type(v) is int for v in old.values())
            found.append(Slot(name, old, tuple(changed[:3]), not sure))
    return found


def _names(module: nn.Module) -> Iterator[str]:
    """Attributes that hold integers, those of the plain objects that the module holds (a configuration) included."""
    for name, value in vars(module).items():
        if _sized(value) and name not in ("_version", "call_super_init"):
            yield name
        elif name == "config" or (_is_record(value) and not name.startswith("_")):
            for inner, part in getattr(value, "__dict__", {}).items():
                if _sized(part) and not inner.startswith("_"):
                    yield f"{name}.{inner}"


def _is_record(value: Any) -> bool:
    """A dataclass instance whose fields can be set."""
    return dataclasses.is_dataclass(value) and not getattr(type(value), "__dataclass_params__").frozen  # noqa: B009


def _mentioned(kind: type[nn.Module]) -> set[str]:
    """Names that the methods of a class use: what it reads from an object that it shares is among them."""
    functions = [f for base in kind.__mro__ for n, f in vars(base).items() if n != "__init__" and callable(f)]
    codes = [getattr(inspect.unwrap(f), "__code__", None) for f in functions]
    names: set[str] = set()
    while codes:
        code = codes.pop()
        if isinstance(code, types.CodeType):
            names.update(code.co_names)
            codes += code.co_consts  # functions and comprehensions inside
    return names


def _sized(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return bool(value) and all(type(v) is int for v in value)
    return type(value) is int and value > 0


def _options(old: Mapping[str, Any], places: Mapping[str, Sizes]) -> list[dict[str, Value]]:
    """New values for all modules at once, read off one place of the code each; the most frequent come first."""
    if any(type(v) is not int for v in old.values()):
        return _sequences(old, places)
    usual = {path: _usual(value, places[path]) for path, value in old.items()}
    votes: Counter[tuple[int, ...]] = Counter()
    for place in dict.fromkeys(place for found in places.values() for place in found):
        new = []
        for path, value in old.items():
            here = places[path].get(place)
            if here is None or value == 1:
                new.append(usual[path])  # this module did not come by here, or there is nothing to lose
            elif len(here.get(value, ())) == 1:
                new += here[value]
        if len(new) == len(old):
            votes[tuple(new)] += 1
    return [dict(zip(old, new, strict=True)) for new, _ in votes.most_common()]


def _usual(value: int, places: Sizes) -> int:
    """What most places make of a size, those first that change it; a size of one cannot change."""
    if value == 1:
        return 1
    votes = Counter(new for here in places.values() for new in here.get(value, ()))
    return max(votes, key=lambda new: (new != value, votes[new]), default=value)


def _sequences(old: Mapping[str, Any], places: Mapping[str, Sizes]) -> list[dict[str, Value]]:
    """Element by element, each the most frequent new size."""
    lengths = {len(v) for v in old.values() if isinstance(v, (tuple, list))}
    if len(lengths) != 1 or not all(isinstance(v, (tuple, list)) for v in old.values()):
        return []
    new = {path: tuple(_usual(v, places[path]) for v in value) for path, value in old.items()}
    return [{**new}] if any(tuple(old[p]) != new[p] for p in old) else []


MISSING = object()


def read(owner: Any, name: str) -> Any:
    """The attribute's value, MISSING where it is not there; ``name`` may lead through objects by dots."""
    for part in name.split("."):
        if part not in getattr(owner, "__dict__", {}):
            return MISSING
        owner = vars(owner)[part]
    return owner


def put_(model: nn.Module, values: Mapping[str, Mapping[str, Any]]) -> None:
    """Set attributes of modules, or of the objects that they hold, in place."""
    for path, named in values.items():
        for name, value in named.items():
            through, _, leaf = name.rpartition(".")
            owner = model.get_submodule(path)
            owner = read(owner, through) if through else owner
            setattr(owner, leaf, list(value) if isinstance(read(owner, leaf), list) else value)


def write_(model: nn.Module, changes: Changes) -> None:
    """Set attributes that exist to numbers of their own kind, in place; a configuration's None may become a number.

    Raises PlanError, before anything changes, for a module or attribute that the model does not have.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, values in changes.items():
        for name, value in values.items():
            old = read(modules[path], name) if path in modules else MISSING
            if not alike(old, value, name):
                where = f"{path}.{name}".lstrip(".")
                raise PlanError(
                    f"expected {where} of {type(model).__name__} to hold a value like {value!r}, found "
                    f"{'no such attribute' if old is MISSING else repr(old)}; use the dense model that was pruned"
                )
    put_(model, changes)


def alike(old: Any, new: Any, name: str) -> bool:
    """Whether ``new`` may take the place of ``old``: both plain numbers of one type, or as many integers.

    A field of an object that a module holds, with a dot in its ``name``, may hold nothing before.
    """
    if isinstance(new, (tuple, list)):
        return isinstance(old, (tuple, list)) and len(old) == len(new) and all(type(v) is int for v in (*old, *new))
    return type(new) in (int, float) and (type(old) is type(new) or (old is None and "." in name))


@dataclass(frozen=True)
class Found:
    """The attributes that make the class compute what the program computes; or why none do, and whom to blame."""

    changes: Changes
    why: str
    blamed: tuple[type[nn.Module], ...] = ()


def search_(
    model: nn.Module, known: Mapping[str, Sizes], inputs: Any, oracle: Any, expected: Outputs, tolerance: float
) -> Found:
    """Give ``model`` the attributes that its new sizes ask for, in place; on failure it is left as it was.

    Starts from no change at all. The first module that differs from the program has the attributes of its class
    set, in at most ``TRIES`` ways; then the classes of those that call it.
    """
    readings = _Readings(model, known)
    wrong = first_wrong(model, inputs, oracle, expected, tolerance)
    while wrong is not None and readings.next_(wrong):
        wrong = first_wrong(model, inputs, oracle, expected, tolerance)
    if wrong is not None:
        readings.undo_()
        return Found({}, readings.why(), tuple(kind for kind, slots in readings.slots.items() if slots))
    for kind, index in readings.contested():
        chosen = readings.now[kind]
        readings.read_(kind, (*chosen[:index], KEEP, *chosen[index + 1 :]))
        if first_wrong(model, inputs, oracle, expected, tolerance) is not None:
            readings.read_(kind, chosen)
    return Found(readings.changes(), "")


KEEP = -1
Reading = tuple[int, ...]  # per slot of a class: the number of the option, or KEEP


class _Readings:
    """How the attributes of each class are read at the moment, and what else they could mean."""

    def __init__(self, model: nn.Module, known: Mapping[str, Sizes]) -> None:
        self.model, self.known = model, known
        self.slots: dict[type[nn.Module], list[Slot]] = {}
        self.waiting: dict[type[nn.Module], Iterator[Reading]] = {}
        self.now: dict[type[nn.Module], Reading] = {}
        self.best: dict[type[nn.Module], tuple[int, Reading]] = {}  # modules right with it
        self.seen: dict[tuple[int, str], None] = {}  # how many modules were right, and what was wrong then
        self.before: dict[type[nn.Module], int] = {}  # modules right without it
        self.last: type[nn.Module] | None = None  # whose attributes were set last
        self.outer = False  # whether those were set for the first time, after an inner class was of no help

    def next_(self, wrong: Wrong) -> bool:
        """Read the attributes of the innermost class to blame in the next way; False where none is left."""
        self._note(wrong)
        self.outer = inner = False
        for kind in (type(module) for module in wrong.chain):
            if kind not in self.slots:
                own = not kind.__module__.startswith("torch.") or kind is nn.Unflatten  # others follow their tensors
                self.slots[kind] = slots(self.model, kind, self.known) if own else []
                self.waiting[kind] = itertools.islice(_readings(self.slots[kind]), TRIES)
                self.before[kind] = wrong.right
                self.outer = inner
            inner = inner or bool(self.slots[kind])
            reading = next(self.waiting[kind], None)
            if reading is not None:
                self.read_(kind, reading)
                self.last = kind
                return True
            right, best = self.best.get(kind, (0, ()))
            self.read_(kind, best if right > self.before[kind] else (KEEP,) * len(self.slots[kind]))
        return False

    def _note(self, wrong: Wrong) -> None:
        """Remember how far the last reading came; a class that makes no difference is not read in other ways."""
        if self.last is not None:
            if wrong.right > self.best.get(self.last, (-1, ()))[0]:
                self.best[self.last] = (wrong.right, self.now[self.last])
            if self.outer and (wrong.right, wrong.why) in self.seen:
                self.waiting[self.last] = iter(())
        self.seen[wrong.right, wrong.why] = None

    def why(self) -> str:
        """What kept the class from its furthest."""
        return max(self.seen, key=lambda seen: seen[0])[1]

    def read_(self, kind: type[nn.Module], reading: Reading) -> None:
        self.now[kind] = reading
        for slot, choice in zip(self.slots[kind], reading, strict=True):
            values = slot.old if choice == KEEP else slot.options[choice]
            put_(self.model, {path: {slot.name: value} for path, value in values.items()})

    def undo_(self) -> None:
        for kind, found in self.slots.items():
            self.read_(kind, (KEEP,) * len(found))

    def contested(self) -> list[tuple[type[nn.Module], int]]:
        """Changed attributes that may have been changed for nothing."""
        return [
            (kind, i)
            for kind, reading in self.now.items()
            for i, (slot, choice) in enumerate(zip(self.slots[kind], reading, strict=True))
            if choice != KEEP and (slot.contested or slot.shared)
        ]

    def changes(self) -> Changes:
        found: dict[str, dict[str, Value]] = {}
        for kind, reading in self.now.items():
            for slot, choice in zip(self.slots[kind], reading, strict=True):
                for path, value in slot.options[choice].items() if choice != KEEP else ():
                    if value != slot.old[path]:
                        found.setdefault(path, {})[slot.name] = value
        return found


def _readings(found: Sequence[Slot]) -> Iterator[Reading]:
    """All ways to read the attributes of a class, likely ones first. What modules share is changed last."""
    ranked = [(KEEP, *range(len(s.options))) if s.shared else (*range(len(s.options)), KEEP) for s in found]
    heap: list[tuple[int, Reading]] = [(0, (0,) * len(found))] if found else []
    seen = {ranks for _, ranks in heap}
    while heap:
        cost, ranks = heapq.heappop(heap)
        reading = tuple(choices[r] for choices, r in zip(ranked, ranks, strict=True))
        if any(choice != KEEP for choice in reading):
            yield reading
        for i, rank in enumerate(ranks):
            after = (*ranks[:i], rank + 1, *ranks[i + 1 :])
            if rank + 1 < len(ranked[i]) and after not in seen:
                seen.add(after)
                heapq.heappush(heap, (cost + 1, after))
