"""Why a model cannot be captured, told so that its owner can act on it."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from secateur.errors import TraceError

OURS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
"""Folders whose code is never the user's."""


def require_capturable(model: Any, inputs: Any) -> None:
    """Raise TraceError for what cannot be captured whatever its code does."""
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        what = "the model that it was exported from" if kind == "ExportedProgram" else "the model itself"
        raise TraceError(f"expected a torch.nn.Module, found {kind}; pass {what}")
    for path, module in model.named_modules():
        where = f"{path} ({type(module).__name__})" if path else kind
        if isinstance(module, torch.jit.ScriptModule):
            raise TraceError(f"{where} is TorchScript, which has no Python code to follow; pass what it came from")
        if type(module).__module__.startswith("torch.ao.nn.") and "quantized" in type(module).__module__:
            raise TraceError(f"{where} is quantized: its weights are packed integers; prune first, quantize afterwards")
    for name, tensor in model.named_parameters():
        if is_lazy(tensor):
            raise TraceError(f"parameter {name!r} has no shape yet; call the model once on its inputs before")
        if type(tensor).__name__ == "DTensor":
            raise TraceError(f"parameter {name!r} is sharded over processes; prune before sharding, on one process")
    devices = {str(tensor.device) for tensor in (*model.parameters(), *model.buffers())}
    given = {str(value.device) for value in tree_leaves(inputs) if isinstance(value, Tensor)}
    if len(devices) == 1 and given and not given & devices:
        raise TraceError(f"{kind} is on {devices.pop()}, the example inputs on {given.pop()}; move one to the other")


def place(error: BaseException, model: nn.Module) -> str:
    """The user's line that an error came from, and the module it belongs to; "" where there is none."""
    own = [frame for frame in frames(error) if not frame[0].f_code.co_filename.startswith((*OURS, "<"))]
    if not own:
        return ""
    frame, line = own[-1]
    file = frame.f_code.co_filename
    code = linecache.getline(file, line).strip()
    owner = frame.f_locals.get(frame.f_code.co_varnames[0]) if frame.f_code.co_argcount else None
    paths = [path for path, module in model.named_modules() if module is owner and path]
    within = f" in {paths[0]} ({type(owner).__name__})" if paths else ""
    return f" at {Path(file).name}:{line} '{code}'{within}"


def frames(error: BaseException | None) -> Iterator[tuple[FrameType, int]]:
    """Every frame of the error, those of the errors that caused it first."""
    if error is not None:
        yield from frames(error.__cause__ or error.__context__)
        yield from traceback.walk_tb(error.__traceback__)
