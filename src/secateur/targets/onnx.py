"""Export to ONNX, checked in ONNX Runtime before it is handed out."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from secateur.errors import DataError, MissingExtra, TargetError
from secateur.files import replace_dir
from secateur.graph.trace import describe, first_line, source_line
from secateur.graph.types import example_args
from secateur.tasks import call, mode

INLINE_BYTES = 2**30
"""Weights up to this size go into the model file itself (protobuf ends at 2 GiB), larger ones beside it."""


def export_onnx(
    model: nn.Module,
    inputs: Any,
    folder: Path | str,
    name: str = "model.onnx",
    dynamic_batch: bool = True,
    tolerance: float = 1e-4,
) -> Path:
    """Write ``folder/name`` and return its path; the model is not changed.

    inputs: example inputs, a Tensor | tuple (positional) | dict (keyword). With ``dynamic_batch``
    dimension 0 of every input as long as the first one's is left open.
    tolerance: the largest difference from eager PyTorch, relative to the largest output. It is
    checked on the example inputs and on a random batch, of another size where that is open.

    Raises TargetError, and leaves the folder as it was, where the model cannot be captured, an
    operator has no ONNX form, or ONNX Runtime disagrees; MissingExtra without onnx, onnxscript
    and onnxruntime.
    """
    size = _batch_size(inputs)
    open_batch = dynamic_batch and size > 0
    with mode(model, training=False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about itself
        _require_packages()
        # A batch of one would be taken for a constant.
        example = _drawn(inputs, 2) if open_batch and size == 1 else inputs
        program = _capture(model, example, open_batch)
        translated = _translate(program)
        with replace_dir(Path(folder)) as new:
            weights = sum(v.nbytes for v in tree_leaves(program.state_dict))
            translated.save(new / name, external_data=weights > INLINE_BYTES)
            names = [str(n) for n in program.graph_signature.user_inputs]
            other = _drawn(inputs, (3 if size == 1 else 1) if open_batch else size)
            for batch, what in ((inputs, "the example inputs"), (other, "a random batch")):
                _compare(model, new / name, names, batch, what, tolerance)
    return Path(folder) / name


def _require_packages() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(package)
        except ImportError as error:
            raise MissingExtra(package, "onnx", "export to ONNX") from error


def _capture(model: nn.Module, inputs: Any, open_batch: bool) -> ExportedProgram:
    size, batch = _batch_size(inputs), Dim("batch")

    def shape(value: Any) -> Any:
        return {0: batch} if _batched(value, size) else None

    args, kwargs = example_args(inputs)
    shapes: Any = (tree_map(shape, kwargs) or tree_map(shape, args)) if open_batch else None
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:
        hint = "; a model that fixes its batch size needs dynamic_batch=False" if open_batch else ""
        raise TargetError(
            f"{type(model).__name__} cannot be captured by torch.export on {describe(inputs)}: "
            f"{type(error).__name__}: {first_line(error)}{hint}"
        ) from error


def _translate(program: ExportedProgram) -> torch.onnx.ONNXProgram:
    try:
        translated = torch.onnx.export(program, dynamo=True, verbose=False)
    except torch.onnx.OnnxExporterError as error:
        raise TargetError(f"ONNX cannot express {_culprit(program, error)}; replace it in the model") from error
    assert translated is not None
    return translated


def _culprit(program: ExportedProgram, error: Exception) -> str:
    """The operator that the exporter stumbled over, with its layer and source line where known."""
    named = re.search(r"node %(\w+)", str(error))
    for node in program.run_decompositions().graph.nodes:
        if named and node.name == named[1]:
            layers = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
            return f"{source_line(node)} in layer {layers[-1]!r}" if layers else source_line(node)
    operator = re.search(r"OpOverload\(op='([\w.]+)'", str(error))
    return operator[1] if operator else f"the model ({first_line(error)})"


def _compare(model: nn.Module, path: Path, names: list[str], inputs: Any, what: str, tolerance: float) -> None:
    import onnxruntime

    values = dict(zip(names, tree_leaves(inputs), strict=True))
    expected = [v for v in tree_leaves(call(model, inputs)) if isinstance(v, Tensor)]
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found = session.run(None, {i.name: values[i.name].numpy(force=True) for i in session.get_inputs()})
    except Exception as error:
        raise TargetError(f"ONNX Runtime fails on {what}: {first_line(error)}") from error
    for index, (wanted, got) in enumerate(zip(expected, found, strict=True)):
        gap = _difference(wanted, got)
        if gap > tolerance:
            raise TargetError(
                f"ONNX Runtime differs from eager PyTorch by {gap:.2g} (relative) in output {index} "
                f"on {what}, expected at most {tolerance:.2g}; nothing was written"
            )


def _difference(wanted: Tensor, got: Any) -> float:
    """The largest difference relative to the largest value; NaN counts as equal to NaN only."""
    reference, found = wanted.double().numpy(force=True), np.asarray(got, np.float64)
    if reference.shape != found.shape:
        return float("inf")
    same = (reference == found) | (np.isnan(reference) & np.isnan(found))
    gaps = np.abs(reference[~same] - found[~same])
    if not np.isfinite(gaps).all():
        return float("inf")
    return float(gaps.max(initial=0.0) / np.abs(reference[np.isfinite(reference)]).max(initial=1e-12))


def _batch_size(inputs: Any) -> int:
    """The length of the first input's dimension 0; 0 where it has none."""
    tensors = [v for v in tree_leaves(inputs) if isinstance(v, Tensor)]
    if not tensors:
        raise DataError(f"ONNX export needs at least one tensor as input, found {describe(inputs)}")
    return tensors[0].shape[0] if tensors[0].ndim else 0


def _batched(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size


def _drawn(inputs: Any, size: int) -> Any:
    """A random batch of ``size``; every value is drawn from the example's, so indices stay valid."""
    generator = torch.Generator().manual_seed(0)

    def draw(value: Any) -> Any:
        if not _batched(value, batch):
            return value
        shape = (size, *value.shape[1:])
        index = torch.randint(max(value.numel(), 1), shape, generator=generator)
        return value.flatten()[index.to(value.device)]

    batch = _batch_size(inputs)
    return tree_map(draw, inputs)
