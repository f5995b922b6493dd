"""A training as a TOML file says it: read strictly, so that a typing error does not train for a night."""

from __future__ import annotations

import difflib
import inspect
import tomllib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn

from secateur import patterns
from secateur.allocate import resolve as resolve_strategy
from secateur.criteria import resolve as resolve_criterion
from secateur.errors import BudgetError, DataError, PlanError, SpecError
from secateur.recipe import choose, guarded, load_callable
from secateur.recover import Recovery
from secateur.recover.options import SGD
from secateur.recover.schedules import SCHEDULES
from secateur.train import stages
from secateur.train.logs import LOGS
from secateur.train.pruner import Pruner

OURS = ("self", "model", "optimizer", "steps", "graph", "task", "average", "seed")
"""What a method is given by the training, not by the recipe."""

SHARED: dict[str, Callable[[Any], object]] = {
    "pattern": patterns.parse,
    "budget": stages.part,
    "criterion": resolve_criterion,
    "allocate": resolve_strategy,
    "ignore": lambda globs: globs,
}
"""What every method takes, each with what reads it."""

TRAIN = {f.name for f in fields(Recovery)} - {"checkpoint", "patience"} | {"batch", "teacher"}


@dataclass(frozen=True)
class Method:
    """A class of ``secateur.train``, or one's own, and its keyword arguments."""

    kind: type[Pruner]
    arguments: Mapping[str, Any]

    def about(self) -> dict[str, Any]:
        """What tells it from others, as JSON."""
        given = {f"method.{name}": value for name, value in self.arguments.items()}
        return {"method": f"{self.kind.__module__}.{self.kind.__qualname__}", **given}


@dataclass(frozen=True)
class Recipe:
    """What a file says. ``model``, ``dense``, ``input`` and ``data`` are in the command line's notation.

    ``how`` has ``out / "checkpoint"`` as its checkpoint. ``batch`` is the number of examples in one, None leaves it to
    the data; ``teacher`` whether the dense model teaches; ``log`` names of ``LOGS``.
    """

    file: Path
    out: Path
    model: str
    dense: str | None
    input: str | None
    data: str
    method: Method
    how: Recovery
    batch: int | None
    teacher: bool
    log: tuple[str, ...]

    @contextmanager
    def naming(self, where: str) -> Iterator[None]:
        """Errors inside say that the recipe's place ``where`` is what they are about."""
        with _naming(f"{self.file}: {where}"):
            yield


def read(file: Path) -> Recipe:
    """The recipe of a TOML file. Raises DataError where it cannot be read, SpecError naming what is wrong in it."""
    top = _Table(f"{file}:", _parsed(file))
    top.require_known(("out", "log", "model", "data", "method", "train"))
    model, data = top.table("model"), top.table("data")
    model.require_known(("name", "dense", "input"))
    data.require_known(("name",))
    out = Path(top.text("out"))
    how, batch, teacher = _training(top.table("train"), out)
    return Recipe(
        file=file,
        out=out,
        model=model.text("name"),
        dense=model.optional("dense"),
        input=model.optional("input"),
        data=data.text("name"),
        method=_method(top.table("method")),
        how=how,
        batch=batch,
        teacher=teacher,
        log=_logs(top),
    )


def _parsed(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}; expected a recipe in TOML") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is no TOML: {error}") from error


@dataclass(frozen=True)
class _Table:
    """Keys and values, and how a message says where they stand."""

    where: str
    values: Mapping[str, Any]

    def require_known(self, known: Iterable[str]) -> None:
        known = sorted(known)
        for key in self.values:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
                meant = f", did you mean {close[0]!r}?" if close else ","
                raise SpecError(f"{self.where} unknown key {key!r}{meant} expected any of {', '.join(known)}")

    def table(self, key: str) -> _Table:
        found = self.values.get(key)
        if not isinstance(found, dict):
            raise self.wrong(key, f"a table [{key}]")
        return _Table(f"{self.where} [{key}]", found)

    def wrong(self, key: str, expected: str) -> SpecError:
        found = _told(self.values[key]) if key in self.values else "missing"
        return SpecError(f"{self.where} {key} is {found}, expected {expected}")

    def text(self, key: str) -> str:
        found = self.values.get(key)
        if not isinstance(found, str) or not found:
            raise self.wrong(key, _EXPECTED[key])
        return found

    def optional(self, key: str) -> str | None:
        return self.text(key) if key in self.values else None

    def naming(self, key: str) -> Any:
        """Errors inside are about the value of ``key``."""
        return _naming(f"{self.where} {key}")


_EXPECTED = {
    "out": "the folder for the result, such as 'pruned'",
    "name": "a name in quotes",
    "dense": "the dense MODEL of a saved directory, in quotes",
    "input": "the shape of an example, such as '1x3x32x32'",
}


@contextmanager
def _naming(where: str) -> Iterator[None]:
    try:
        yield
    except (SpecError, BudgetError, DataError, PlanError) as error:
        raise type(error)(f"{where}: {error}") from error


def _told(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _logs(top: _Table) -> tuple[str, ...]:
    found = top.values.get("log", [])
    names = [found] if isinstance(found, str) else found
    if not isinstance(names, list) or not all(isinstance(name, str) and name in LOGS for name in names):
        raise top.wrong("log", f"any of {', '.join(LOGS)}, such as ['{next(iter(LOGS))}']")
    return tuple(names)


# --- [train] ---------------------------------------------------------------------------------------


def _training(table: _Table, out: Path) -> tuple[Recovery, int | None, bool]:
    """The loop's options, the batch's size, whether the dense model teaches."""
    table.require_known(TRAIN)
    values = dict(table.values)
    batch, teacher = values.pop("batch", None), values.pop("teacher", False)
    if "batch" in table.values and (type(batch) is not int or batch < 1):
        raise table.wrong("batch", "a whole number of examples, 1 or more")
    if type(teacher) is not bool:
        raise table.wrong("teacher", "true or false: whether the dense model teaches")
    if type(values.get("epochs")) is not int or values["epochs"] < 1:
        raise table.wrong("epochs", "a whole number, 1 or more")
    if not teacher and (lone := {"temperature", "alpha"} & values.keys()):
        raise table.wrong(min(lone), "teacher = true besides: it is for distillation")
    if "schedule" in values:
        with table.naming("schedule"):
            choose(values["schedule"], SCHEDULES, "schedule")
    if "optimizer" in values:
        with table.naming("optimizer"):
            values["optimizer"] = _optimizer(values["optimizer"])
    with _naming(table.where):
        return Recovery(**values, checkpoint=out / "checkpoint"), batch, teacher


def _optimizer(wish: Any) -> Callable[..., torch.optim.Optimizer]:
    """What makes the optimizer, of a name, or of a table with a name and its further arguments."""
    given = dict(wish) if isinstance(wish, dict) else {"name": wish}
    name = given.pop("name", None)
    if not isinstance(name, str):
        raise SpecError(f"found {_told(wish)}, expected a name, or {{ name = 'sgd', weight_decay = 1e-4 }}")
    found: Callable[..., torch.optim.Optimizer] = partial(choose(name, {"sgd": SGD}, "optimizer"), **given)
    made = guarded(name, lambda: found([nn.Parameter(torch.zeros(1))], lr=0.1))
    if not isinstance(made, torch.optim.Optimizer):
        raise SpecError(f"{name} gave a {type(made).__name__}, expected a torch.optim.Optimizer")
    return found


# --- [method] --------------------------------------------------------------------------------------


def methods() -> dict[str, type[Pruner]]:
    """The methods by their names in lower case."""
    from secateur import train

    found = {name.lower(): getattr(train, name) for name in train.__all__}
    return {n: c for n, c in found.items() if inspect.isclass(c) and issubclass(c, Pruner) and c is not Pruner}


def _method(table: _Table) -> Method:
    """The class and its arguments. Raises SpecError for keys and kinds of values that it does not take."""
    name, known = table.text("name"), methods()
    if name in known:
        kind: Any = known[name]
    elif ":" in name:
        with table.naming("name"):
            kind = load_callable(name)
        if not (inspect.isclass(kind) and issubclass(kind, Pruner)):
            raise table.wrong("name", "a class made from secateur.train.Pruner")
    else:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        meant = f"{close[0]!r}, or another of " if close else "one of "
        raise table.wrong("name", f"{meant}{', '.join(known)}, or module:Class")
    own = inspect.signature(kind).parameters
    takes = {n for n, p in own.items() if p.kind is not p.VAR_KEYWORD} | set(SHARED)
    table.require_known({"name", *takes.difference(OURS)})
    arguments = {key: value for key, value in table.values.items() if key != "name"}
    hints = _hints(kind)
    for key, value in arguments.items():
        if key in hints and not _fits(hints[key], value):
            raise table.wrong(key, _said(hints[key]))
        if key in SHARED:
            if key != "ignore" and not isinstance(value, str):
                raise table.wrong(key, "a text in quotes")
            if key == "ignore" and not _fits(str | Sequence[str], value):
                raise table.wrong(key, "names or globs of what to leave alone")
            with table.naming(key):
                SHARED[key](value)
    return Method(kind, arguments)


def _hints(kind: type) -> dict[str, Any]:
    """The annotations of what makes it; none where they cannot be read."""
    try:
        return get_type_hints(inspect.getattr_static(kind, "__init__"))
    except (NameError, TypeError):
        return {}


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value of TOML is of a kind of argument."""
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(option, value) for option in inner)
    if origin is Literal:
        return value in inner
    if origin is float:
        return type(value) in (int, float)
    if origin in (bool, int, str):
        return type(value) is origin
    if origin is Any:
        return True
    if isinstance(value, list) and inspect.isclass(origin) and issubclass(list, origin):
        return not inner or all(_fits(inner[0], item) for item in value)
    if isinstance(value, list) and origin is tuple:
        fixed = inner[-1:] != (...,)
        kinds = inner if fixed else inner[:1] * len(value)
        return len(kinds) == len(value) and all(map(_fits, kinds, value))
    if isinstance(value, dict) and inspect.isclass(origin) and issubclass(dict, origin):
        return not inner or all(_fits(inner[1], item) for item in value.values())
    return False


def _said(hint: Any) -> str:
    """A kind of argument in words."""
    several = get_origin(hint) in (Union, types.UnionType)
    options = [o for o in get_args(hint) if o is not type(None)] if several else [hint]
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text in quotes"}
    said: list[str] = []
    for option in options:
        if get_origin(option) is Literal:
            said += [repr(value) for value in get_args(option)]
        else:
            said.append(words.get(option, f"what fits {str(option).replace('collections.abc.', '')}"))
    return " or ".join(said)
