"""Saving a pruned model as a directory, and loading it back without pickle. The format is docs/format.md."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from secateur.apply.resize import resize_
from secateur.apply.shrink import as_program
from secateur.errors import DataError, PlanError
from secateur.files import read_json, replace_dir, write_atomic
from secateur.graph.types import example_args
from secateur.plan import Plan
from secateur.recipe import TRUSTED, load_model

VERSION = 1
MODEL, WEIGHTS, INPUTS = "model.json", "model.safetensors", "inputs.safetensors"


@dataclass(frozen=True, eq=False)
class Saved:
    """What a directory holds besides tensors: how the model was made, and its example inputs."""

    form: str
    source: str
    inputs: Any


def save_model(
    folder: Path | str, model: nn.Module, plan: Plan, inputs: Any, form: str = "module", source: str = ""
) -> None:
    """Write ``model``, pruned by ``plan``, into ``folder``; an older directory of that name is replaced whole.

    form: "module" or "program", as ``shrink`` left it. inputs: the example inputs (dense model's).
    source: where the dense model comes from, in the command line's notation; "" where only the user knows.
    """
    state, aliases = _unique(model)
    shapes, tensors = _pack(inputs)
    about = {
        "version": VERSION,
        "secateur": metadata.version("secateur"),
        "torch": torch.__version__,
        "class": f"{type(model).__module__}.{type(model).__qualname__}" if form == "module" else "",
        "form": form,
        "source": source,
        "aliases": aliases,
        "inputs": shapes,
    }
    with replace_dir(Path(folder)) as new:
        write_atomic(new / MODEL, json.dumps(about, indent=1))
        write_atomic(new / WEIGHTS, save(state))
        write_atomic(new / INPUTS, save(tensors))
        plan.save(new)


def load(folder: Path | str, model: nn.Module | None = None) -> nn.Module:
    """The pruned model of a directory, in evaluation mode.

    model: the dense model of the original class (its weights do not matter; it is not changed). It may be left
    out where the directory names a public source (``timm:…``, ``torchvision:…``, ``hf:…``); code that a
    directory names is never run.

    Raises DataError for a missing, damaged or foreign directory, PlanError where ``model`` is not the model that
    was pruned.
    """
    folder = Path(folder)
    saved, about = _about(folder), read_json(folder / MODEL)
    plan = Plan.load(folder)
    dense = model if model is not None else _dense(folder, saved)
    plan.check_fits(dense)
    small = copy.deepcopy(dense)
    resize_(small, plan.slices)
    if saved.form == "program":
        small = as_program(dense, plan, small, saved.inputs)
    state = _read(folder / WEIGHTS)
    for alias, name in about["aliases"].items():
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


def _dense(folder: Path, saved: Saved) -> nn.Module:
    if saved.source.startswith(TRUSTED):
        return load_model(saved.source)
    where = f"made from {saved.source!r}, and code is not run on a directory's word" if saved.source else "unnamed"
    raise PlanError(f"{folder} holds a pruned model whose class is {where}; give it: load(dir, model=dense_model)")


def _about(folder: Path) -> Saved:
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
    return Saved(about["form"], about["source"], _unpack(about["inputs"], _read(folder / INPUTS), folder / MODEL))


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
