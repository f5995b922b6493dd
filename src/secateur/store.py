"""Saving a pruned model as a directory, and loading it back without pickle. The format is docs/format.md."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from secateur import patterns
from secateur.apply.attributes import Changes, Value
from secateur.apply.depth import DELETED, Taken
from secateur.apply.resize import resize_
from secateur.apply.shrink import as_program, refit_
from secateur.errors import DataError, MissingExtra, PlanError, SpecError, TargetError
from secateur.files import read_json, replace_dir, write_atomic
from secateur.graph.types import example_args
from secateur.patterns import Pattern
from secateur.plan import Plan
from secateur.recipe import PUBLIC, load_model
from secateur.report import Report
from secateur.runtime import disk, kernels
from secateur.runtime.disk import Unpacked
from secateur.tasks import clone

VERSION = 1
MODEL, WEIGHTS, INPUTS = "model.json", "model.safetensors", "inputs.safetensors"


@dataclass(frozen=True, eq=False)
class Result:
    """A pruned model and everything known about it.

    ``form`` is "module" where ``model`` is of the user's class, "program" where it is its rewritten program.
    ``inputs`` are the example inputs, ``source`` says where the dense model comes from, in the command line's
    notation; "" where only the user knows. ``attributes`` are the numbers that modules of the user's class had to be
    given besides their tensors: module path -> attribute -> value. ``taken`` says how blocks were taken out of the
    class: block -> -1 where it was deleted from its list, else the number of outputs of what is in its place.
    """

    model: nn.Module
    plan: Plan
    report: Report
    inputs: Any
    form: str = "module"
    source: str = ""
    attributes: Changes = field(default_factory=dict)
    taken: Taken = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class About:
    """What a directory says about its model."""

    form: str
    source: str
    aliases: dict[str, str]
    attributes: Changes
    taken: Taken
    inputs: Any
    packed: dict[str, Unpacked]


def save(result: Result, folder: Path | str, packed: bool = False) -> Path:
    """Write a pruned model as a directory: weights, plan, example inputs, report; returns its path.

    packed: store weights that the plan masks without their zeros, where that takes fewer bytes (docs/format.md).
    ``load`` gives them back bit by bit, but for -0.0 and denormals, which become 0.0; or hands them to the sparse
    engine as they are. Raises SpecError where the plan masks no weights, as it removes units.

    An older directory of that name is replaced as a whole. The page report.html is written where its packages are
    installed. ``load`` reads it back.
    """
    state, aliases = _unique(result.model)
    small, was = _packed(result, state, aliases) if packed else ({}, {})
    shapes, tensors = _pack(result.inputs)
    kind = type(result.model)
    about = {
        "version": VERSION,
        "secateur": metadata.version("secateur"),
        "torch": torch.__version__,
        "class": f"{kind.__module__}.{kind.__qualname__}" if result.form == "module" else "",
        "form": result.form,
        "source": result.source,
        "aliases": aliases,
        "attributes": result.attributes,
        "taken": result.taken,
        "inputs": shapes,
    }
    if packed:
        about["packed"] = {name: of.to_json() for name, of in was.items()}
    with replace_dir(Path(folder)) as new:
        write_atomic(new / MODEL, json.dumps(about, indent=1))
        disk.write(new / WEIGHTS, small, {name: tensor for name, tensor in state.items() if name not in small})
        write_atomic(new / INPUTS, to_safetensors(tensors))
        write_atomic(new / "report.json", result.report.to_json())
        with contextlib.suppress(MissingExtra):
            result.report.save_html(new / "report.html")
        result.plan.save(new)
    return Path(folder)


def require_masks(pattern: str) -> Pattern:
    """The pattern, parsed. Raises SpecError for one that masks no weights: there is nothing to pack then."""
    found = patterns.parse(pattern)
    if not isinstance(found, patterns.Unstructured | patterns.NM | patterns.Block):
        raise SpecError(
            f"packed stores masked weights without their zeros; the pattern {pattern!r} removes units instead, and "
            "what is left is stored whole: save without packed"
        )
    return found


def load(folder: Path | str, model: nn.Module | None = None, target: str = "") -> nn.Module:
    """The pruned model of a directory, in evaluation mode.

    model: the dense model of the original class (its weights do not matter; it is not changed). It may be left
    out where the directory names a public source (``timm:…``, ``torchvision:…``, ``hf:…``); code that a
    directory names is never run.
    target: "cpu-sparse" for a model whose layers run on the sparse engine wherever their weights are packed. Those
    stay in the file, mapped into memory, and are never expanded; the file must not be changed meanwhile.

    Raises DataError for a missing, damaged or foreign directory, PlanError where ``model`` is not the model that
    was pruned, SpecError for an unknown target, TargetError where the engine is not there or has nothing to run.
    """
    folder = Path(folder)
    if target not in ("", "cpu-sparse"):
        raise SpecError(f"target {target!r} is unknown; expected 'cpu-sparse', or none")
    saved, plan = _about(folder), Plan.load(folder)
    dense = model if model is not None else _dense(folder, saved)
    plan.check_fits(dense)
    state = disk.read(folder / WEIGHTS)
    engine = _for_engine(folder, saved, dense, state) if target else {}
    small = _refitted(dense, plan, saved, list(engine))
    _fill_(small, folder, saved, state, set(engine))
    if engine:
        from secateur.runtime.attach import attach_

        attach_(small.requires_grad_(False), engine)
    return small.eval()


def saved_inputs(folder: Path | str) -> Any:
    """The example inputs that the directory keeps. Raises DataError for a missing or damaged one."""
    return _about(Path(folder)).inputs


def saved_source(folder: Path | str) -> str:
    """What names the dense model on the command line; "" where only the user knows. Raises as ``saved_inputs``."""
    return _about(Path(folder)).source


def _refitted(dense: nn.Module, plan: Plan, saved: About, shared: list[str]) -> nn.Module:
    """A copy of the dense model in the form that was saved; weights in ``shared`` are not copied."""
    parameters = dict(dense.named_parameters())
    small = clone(dense, [parameters[name] for name in shared])
    if saved.form == "program":
        resize_(small, plan.cuts)
        return as_program(dense, plan, small, saved.inputs)
    refit_(small, plan, saved.attributes, saved.taken)
    return small


def _fill_(model: nn.Module, folder: Path, saved: About, state: dict[str, Tensor], engine: set[str]) -> None:
    """Give the model the state of the directory, every tensor of which must fit; the engine's are only looked at."""
    expected = model.state_dict()
    for name, of in saved.packed.items():
        _require(folder, name, expected.get(name), (of.shape, getattr(torch, of.dtype)))
    given = {name: _unpacked(folder, name, state, saved) for name in state if name not in engine}
    for alias, name in saved.aliases.items():
        if name not in state or alias in state:
            raise DataError(f"{folder / MODEL} ties {alias!r} to {name!r}, which {WEIGHTS} does not hold")
        if name in engine:
            expected.pop(alias, None)
        else:
            given[alias] = given[name]
    for name, tensor in expected.items():
        if name not in engine:
            found = given.get(name)
            _require(folder, name, tensor, None if found is None else (tuple(found.shape), found.dtype))
    for name in sorted(given.keys() - expected.keys()):
        _require(folder, name, None, None)
    model.load_state_dict(given, strict=False)


def _require(
    folder: Path, name: str, expected: Tensor | None, found: tuple[tuple[int, ...], torch.dtype] | None
) -> None:
    if expected is None:
        raise PlanError(f"{folder / WEIGHTS} holds {name!r}, which the model does not have")
    if found != (tuple(expected.shape), expected.dtype):
        what = "nothing" if found is None else f"{found[1]} {list(found[0])}"
        raise PlanError(
            f"{folder / WEIGHTS}: expected {name} of {expected.dtype} {list(expected.shape)}, found {what}; "
            "load onto the model that was pruned"
        )


# --- packed weights ----------------------------------------------------------------------------------


def _packed(
    result: Result, state: Mapping[str, Tensor], aliases: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, Unpacked]]:
    """The masked weights that take fewer bytes packed, and what they were."""
    pattern = require_masks(result.plan.pattern)
    small, was = dict[str, Tensor](), dict[str, Unpacked]()
    for name in dict.fromkeys(aliases.get(name, name) for name in result.plan.masks):
        weight = state[name]
        module = result.model.get_submodule(name.rpartition(".")[0])
        groups = module.groups if isinstance(module, nn.Conv1d | nn.Conv2d) else 1
        found = disk.packed(weight, pattern, groups)
        if found is not None:
            small[name] = found
            was[name] = Unpacked(tuple(weight.shape), str(weight.dtype).removeprefix("torch."), groups)
    return small, was


def _for_engine(folder: Path, saved: About, dense: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The packed weights that layers can run on, each checked to its last index."""
    if why := kernels.why_missing():
        raise TargetError(why)
    from secateur.runtime.attach import products_of

    found = {}
    products = products_of(dense) if saved.form == "module" else {}
    for name, of in saved.packed.items():
        product = products.get(name)
        if product is not None and product.groups == of.groups:
            _require(folder, name, product.weight, (of.shape, getattr(torch, of.dtype)))
            with _naming(folder, name, state):
                found[name] = disk.runnable(state[name], of)
    if not found:
        raise TargetError(
            f"{folder} holds no packed weight of a layer that the engine can run; save it with packed=True, or let "
            "lower(model, inputs) pack what it can"
        )
    return found


def _unpacked(folder: Path, name: str, state: Mapping[str, Tensor], saved: About) -> Tensor:
    """The tensor, expanded where it is packed."""
    if name not in saved.packed:
        return state[name]
    with _naming(folder, name, state):
        return disk.unpacked(state[name], saved.packed[name])


@contextlib.contextmanager
def _naming(folder: Path, name: str, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Errors of a packed weight say which one and where it is."""
    if name not in state:
        raise DataError(f"{folder / MODEL} packs {name!r}, which {WEIGHTS} does not hold")
    try:
        yield
    except DataError as error:
        raise DataError(f"{folder / WEIGHTS}: {name}: {error}") from error


def _dense(folder: Path, saved: About) -> nn.Module:
    if saved.source.startswith(PUBLIC):
        return load_model(saved.source)
    where = f"made from {saved.source!r}, and code is not run on a directory's word" if saved.source else "unnamed"
    raise PlanError(
        f"{folder} holds a pruned model whose class is {where}; give it: load(dir, model=dense_model), "
        "--dense MODEL on the command line, --against MODEL to bench"
    )


def _about(folder: Path) -> About:
    if not folder.is_dir():
        raise DataError(f"{folder} is no directory; expected one that save() wrote, with {MODEL} and {WEIGHTS}")
    about = read_json(folder / MODEL)
    kinds = {"version": int, "form": str, "source": str, "aliases": dict, "inputs": dict}
    for key, kind in kinds.items():
        if not isinstance(about, dict) or not isinstance(about.get(key), kind):
            raise DataError(f"{folder / MODEL}: expected {key!r} to be a {kind.__name__}; the file is not of save()")
    if about["version"] > VERSION:
        raise DataError(f"{folder / MODEL} has format version {about['version']}, this Secateur reads {VERSION}")
    if about["form"] not in ("module", "program"):
        raise DataError(f"{folder / MODEL}: form is {about['form']!r}, expected 'module' or 'program'")
    return About(
        about["form"],
        about["source"],
        about["aliases"],
        _attributes(about.get("attributes", {}), folder / MODEL),
        _taken(about.get("taken", {}), folder / MODEL),
        _unpack(about["inputs"], disk.read(folder / INPUTS), folder / MODEL),
        _was(about.get("packed", {}), folder / MODEL),
    )


def _attributes(found: Any, path: Path) -> Changes:
    """Numbers by module path and attribute; anything else is refused."""

    def number(value: Any) -> Value:
        if isinstance(value, list) and all(type(v) is int for v in value):
            return tuple(value)
        if type(value) in (int, float):
            return value  # type: ignore[no-any-return]
        raise TypeError(f"{value!r} is no number")

    try:
        return {str(path): {str(n): number(v) for n, v in values.items()} for path, values in found.items()}
    except (TypeError, AttributeError) as error:
        raise DataError(f"{path}: attributes are damaged ({error}); the file is not of save()") from error


def _was(found: Any, path: Path) -> dict[str, Unpacked]:
    try:
        return {name: Unpacked.from_json(of) for name, of in found.items()}
    except (AttributeError, DataError) as error:
        raise DataError(f"{path}: 'packed' is damaged ({error}); the file is not of save()") from error


def _taken(found: Any, path: Path) -> Taken:
    if not isinstance(found, dict) or not all(type(n) is int and n >= DELETED for n in found.values()):
        raise DataError(f"{path}: expected 'taken' to give a number for each block, found {found!r}")
    return found


def _unique(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state with tied tensors stored once, and the other names of those."""
    first: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    state: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            state[name] = tensor.detach().cpu().contiguous().clone()
    return state, aliases


def _pack(inputs: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Inputs as JSON with tensors replaced by ``{"tensor": number}``, and the tensors."""
    tensors: dict[str, Tensor] = {}

    def pack(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[str(len(tensors))] = value.detach().cpu().contiguous().clone()
            return {"tensor": len(tensors) - 1}
        if isinstance(value, (list, tuple)):
            return [pack(v) for v in value]
        if isinstance(value, Mapping):
            return {"dict": {str(k): pack(v) for k, v in value.items()}}
        if value is None or isinstance(value, (bool, int, float, str)):
            return {"value": value}
        raise DataError(f"example inputs hold a {type(value).__name__}, which a directory cannot keep; use tensors")

    args, kwargs = example_args(inputs)
    return {"args": pack(args), "kwargs": {k: pack(v) for k, v in kwargs.items()}}, tensors


def _unpack(packed: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> Any:
    def unpack(value: Any) -> Any:
        match value:
            case {"tensor": int(number)}:
                return tensors[str(number)]
            case {"dict": dict(items)}:
                return {k: unpack(v) for k, v in items.items()}
            case {"value": plain}:
                return plain
            case list(items):
                return tuple(unpack(v) for v in items)
        raise DataError(f"{path}: unreadable example input {value!r}")

    try:
        args = unpack(packed["args"])
        return {k: unpack(v) for k, v in packed["kwargs"].items()} if packed["kwargs"] else args
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: example inputs are damaged ({error!r})") from error
