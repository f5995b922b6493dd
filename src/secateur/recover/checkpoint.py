"""A run on disk: one safetensors file that holds a tree of tensors, with the rest of the tree as JSON in its header.

One file, replaced as a whole: whenever the process dies, the last whole state is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor
from torch.utils._pytree import tree_leaves

from secateur.errors import DataError
from secateur.files import write_atomic

VERSION = 1
FILE, HEADER = "recover.safetensors", "recover"

Tree = Any
"""Tensors, NumPy arrays, numbers, strings and None in dicts, lists and tuples."""


def write(folder: Path, run: dict[str, Any], state: Tree) -> None:
    """Put ``state`` of the run that ``run`` describes in the place of an older one."""
    tensors: dict[str, Tensor] = {}
    header = {"version": VERSION, "run": run, "state": _pack(state, "", tensors)}
    write_atomic(folder / FILE, to_safetensors(tensors, {HEADER: json.dumps(header)}))


def read(folder: Path, run: dict[str, Any]) -> Tree | None:
    """The last state of this run; None where the folder has none yet.

    Raises DataError for a damaged checkpoint, and for one of another run, naming what differs.
    """
    for torn in folder.glob(f".{FILE}.*"):  # what a process that died while writing has left
        torn.unlink(missing_ok=True)
    if not (folder / FILE).exists():
        return None
    try:
        with safe_open(folder / FILE, framework="pt") as file:
            header = json.loads((file.metadata() or {})[HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        if header["version"] != VERSION:
            raise DataError(f"{folder} is of format {header['version']}, this Secateur continues {VERSION}; delete it")
        _require_same(folder, header["run"], run)
        return _unpack(header["state"], tensors)
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{folder / FILE} is damaged, or no checkpoint of recover ({error!r}); delete it") from error


def _require_same(folder: Path, saved: dict[str, Any], run: dict[str, Any]) -> None:
    now = json.loads(json.dumps(run))
    differences = [
        f"{key} was {_brief(saved.get(key))}, is now {_brief(now.get(key))}"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key)
    ]
    if differences:
        raise DataError(
            f"{folder} holds the checkpoint of another run: {'; '.join(differences)}. "
            "Use the same arguments, another folder, or delete it to start anew"
        )


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def digest(tree: Tree) -> str:
    """Twelve letters that tell trees of tensors apart; leaves that are no plain values count by their type."""
    sha = hashlib.sha256()
    for leaf in tree_leaves(tree):
        if isinstance(leaf, np.ndarray) and leaf.dtype != object:
            leaf = torch.from_numpy(leaf.copy())
        if isinstance(leaf, Tensor):
            sha.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            sha.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            sha.update(repr(leaf if isinstance(leaf, (bool, int, float, str)) else type(leaf)).encode())
    return sha.hexdigest()[:12]


def _pack(value: Tree, path: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON; its tensors go into ``tensors``, under their paths."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": path}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {"dict": [[key, _pack(v, f"{path}/{key}", tensors)] for key, v in value.items()]}
    if isinstance(value, (list, tuple)):
        items = _packed(value, path, tensors)
        return {"tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise DataError(f"the run holds a {type(value).__name__} at {path}, which a checkpoint cannot keep")


def _packed(values: Iterable[Tree], path: str, tensors: dict[str, Tensor]) -> list[Any]:
    return [_pack(v, f"{path}/{i}", tensors) for i, v in enumerate(values)]


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Tree:
    match value:
        case {"tensor": str(path)}:
            return tensors[path]
        case {"dict": list(items)}:
            return {key: _unpack(v, tensors) for key, v in items}
        case {"tuple": list(items)}:
            return tuple(_unpack(v, tensors) for v in items)
        case list(items):
            return [_unpack(v, tensors) for v in items]
    return value
