"""Saving a pruned model as a directory, and loading it back without pickle. The format is docs/format.md."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from secateur.apply.attributes import Changes, Value
from secateur.apply.depth import DELETED, Taken
from secateur.apply.resize import resize_
from secateur.apply.shrink import as_program, refit_
from secateur.errors import DataError, MissingExtra, PlanError
from secateur.files import read_json, replace_dir, write_atomic
from secateur.graph.types import example_args
from secateur.plan import Plan
from secateur.recipe import PUBLIC, load_model
from secateur.report import Report
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


def save(result: Result, folder: Path | str) -> Path:
    """Write a pruned model as a directory: weights, plan, example inputs, report; returns its path.

    An older directory of that name is replaced as a whole. The page report.html is written where its packages are
    installed. ``load`` reads it back.
    """
    state, aliases = _unique(result.model)
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
    with replace_dir(Path(folder)) as new:
        write_atomic(new / MODEL, json.dumps(about, indent=1))
        write_atomic(new / WEIGHTS, to_safetensors(state))
        write_atomic(new / INPUTS, to_safetensors(tensors))
        write_atomic(new / "report.json", result.report.to_json())
        with contextlib.suppress(MissingExtra):
            result.report.save_html(new / "report.html")
        result.plan.save(new)
    return Path(folder)


def load(folder: Path | str, model: nn.Module | None = None) -> nn.Module:
    """The pruned model of a directory, in evaluation mode.

    model: the dense model of the original class (its weights do not matter; it is not changed). It may be left
    out where the directory names a public source (``timm:…``, ``torchvision:…``, ``hf:…``); code that a
    directory names is never run.

    Raises DataError for a missing, damaged or foreign directory, PlanError where ``model`` is not the model that
    was pruned.
    """
    folder = Path(folder)
    saved, plan = _about(folder), Plan.load(folder)
    dense = model if model is not None else _dense(folder, saved)
    plan.check_fits(dense)
    small = clone(dense)
    if saved.form == "program":
        resize_(small, plan.cuts)
        small = as_program(dense, plan, small, saved.inputs)
    else:
        refit_(small, plan, saved.attributes, saved.taken)
    state = _read(folder / WEIGHTS)
    for alias, name in saved.aliases.items():
        if name not in state or alias in state:
            raise DataError(f"{folder / MODEL} ties {alias!r} to {name!r}, which {WEIGHTS} does not hold")
        state[alias] = state[name]
    expected = small.state_dict()
    for name, tensor in expected.items():
        found = state.get(name)
        if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
            what = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise PlanError(
                f"{folder / WEIGHTS}: expected {name} of {tensor.dtype} {list(tensor.shape)}, found {what}; "
                "load onto the model that was pruned"
            )
    if extra := sorted(state.keys() - expected.keys()):
        raise PlanError(f"{folder / WEIGHTS} holds {extra[0]!r}, which the model does not have")
    small.load_state_dict(state)
    return small.eval()


def saved_inputs(folder: Path | str) -> Any:
    """The example inputs that the directory keeps. Raises DataError for a missing or damaged one."""
    return _about(Path(folder)).inputs


def saved_source(folder: Path | str) -> str:
    """What names the dense model on the command line; "" where only the user knows. Raises as ``saved_inputs``."""
    return _about(Path(folder)).source


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
        _unpack(about["inputs"], _read(folder / INPUTS), folder / MODEL),
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


def _taken(found: Any, path: Path) -> Taken:
    if not isinstance(found, dict) or not all(type(n) is int and n >= DELETED for n in found.values()):
        raise DataError(f"{path}: expected 'taken' to give a number for each block, found {found!r}")
    return found


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is missing or no whole safetensors file: {error}") from error


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
