"""From a model and example inputs to a flat program of ATen operators, by ``torch.export``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from secateur.errors import TraceError
from secateur.graph.inline import inline_
from secateur.graph.types import example_args
from secateur.tasks import call, mode


def run(model: nn.Module, inputs: Any) -> Any:
    """The model's output on its inputs, in evaluation mode and without gradients.

    Raises TraceError where the model fails on them.
    """
    try:
        with mode(model, training=False), torch.no_grad():
            return call(model, inputs)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} fails on the example inputs {describe(inputs)}: "
            f"{type(error).__name__}: {first_line(error)}; pass inputs on which model(...) works"
        ) from error


def capture(model: nn.Module, inputs: Any, dynamic_batch: bool = False) -> fx.GraphModule:
    """The model as an ``fx.GraphModule`` of ATen operators with parameters under their own names.

    With ``dynamic_batch`` dimension 0 of the inputs is left symbolic where the model allows it.
    Raises TraceError where the model cannot be captured, or fails on its own inputs.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"expected a torch.nn.Module, found {type(model).__name__}; pass the model itself")
    args, kwargs = example_args(_at_least_two(inputs) if dynamic_batch else inputs)
    shapes = _batch_shapes(model, args, kwargs) if dynamic_batch else None
    with mode(model, training=False), torch.no_grad(), _plain_attention(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            if shapes is not None:  # some models only hold for the example's batch size
                return capture(model, inputs)
            run(model, inputs)  # a model that fails by itself is named as such
            raise TraceError(
                f"{type(model).__name__} cannot be captured by torch.export on {describe(inputs)}: "
                f"{type(error).__name__}: {first_line(error)}; usual remedies: use_cache=False, no control flow "
                "that depends on tensor values, plain tensors as inputs and outputs"
            ) from error
        module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    inline_(module)
    return module


@contextmanager
def _plain_attention() -> Iterator[None]:
    """``nn.MultiheadAttention`` as the operators that it is made of, not as one fused operator for inference."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


def _batch_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Dimension 0 of every input tensor left open, except where it is 1: that one is broadcast, or no batch."""
    shapes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for value in torch.utils._pytree.tree_leaves((args, kwargs)):
        if isinstance(value, Tensor) and value.dim() and value.shape[0] > 1:
            shapes[value] = {0: torch.export.Dim.AUTO}
    return shapes.dynamic_shapes(model, args, kwargs)  # type: ignore[no-untyped-call]


def _at_least_two(inputs: Any) -> Any:
    """Inputs that are all batches of one are doubled: export takes a size of 1 for a constant."""
    tensors = [v for v in torch.utils._pytree.tree_leaves(inputs) if isinstance(v, Tensor)]
    if any(v.dim() == 0 or v.shape[0] != 1 for v in tensors):
        return inputs
    return torch.utils._pytree.tree_map(lambda v: torch.cat([v, v]) if isinstance(v, Tensor) else v, inputs)


def describe(inputs: Any) -> str:
    """Shapes of the inputs, for messages."""
    args, kwargs = example_args(inputs)
    named = [_shape(a) for a in args] + [f"{k}={_shape(v)}" for k, v in kwargs.items()]
    return f"({', '.join(named)})"


def _shape(x: Any) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def first_line(error: BaseException | None) -> str:
    """The first line of an error's message, for messages of our own."""
    return next(iter(str(error).strip().splitlines()), "no message")


def source_line(node: fx.Node) -> str:
    """``operator at file.py:12 'code'``: the user's line that called the operator."""
    frames = [f for f in (node.meta.get("stack_trace") or "").split('File "') if "\n" in f]
    own = [f for f in frames if "/torch/nn/" not in f.split("\n")[0].replace("\\", "/")]
    if not (own or frames):
        return str(node.target)
    head, *code = (own or frames)[-1].split("\n")
    path, _, rest = head.partition('"')
    line = rest.partition("line ")[2].partition(",")[0]
    name = path.replace("\\", "/").rsplit("/", 1)[-1]
    return f"{node.target} at {name}:{line} '{code[0].strip()}'"
