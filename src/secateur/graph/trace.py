"""From a model and example inputs to a flat program of ATen operators, by ``torch.export``."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from secateur.errors import TraceError
from secateur.graph.failure import place, require_capturable
from secateur.graph.inline import inline_
from secateur.graph.opaque import culprits, hidden
from secateur.graph.rephrase import rephrase_
from secateur.graph.shuffle import fuse_shuffles_
from secateur.graph.types import example_args
from secateur.tasks import call, mode


def run(model: nn.Module, inputs: Any) -> Any:
    """The model's output on its inputs, in evaluation mode and without gradients; the model is left as it was.

    Raises TraceError where the model fails on them.
    """
    try:
        with mode(model, training=False), torch.no_grad(), untouched(model):
            return call(model, inputs)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} fails on the example inputs {describe(inputs)}: "
            f"{type(error).__name__}: {first_line(error)}; pass inputs on which model(...) works"
        ) from error


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Buffers that a forward pass writes in evaluation mode, such as observed ranges, get their values back."""
    held = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    try:
        yield
    finally:
        for buffer, value in held:
            if not torch.equal(buffer, value):
                buffer.copy_(value)


def capture(model: nn.Module, inputs: Any, dynamic_batch: bool = False) -> fx.GraphModule:
    """The model as an ``fx.GraphModule`` of ATen operators with parameters under their own names.

    With ``dynamic_batch`` dimension 0 of the inputs, and every dimension of token indices, is left symbolic where the
    model allows it. Raises TraceError where the model cannot be captured, or fails on its own inputs.
    """
    require_capturable(model, inputs)
    if not dynamic_batch:
        return _followed(model, inputs)
    # Export notes on the tensors themselves which sizes are open, so it gets some of its own.
    wide = torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, at_least_two(inputs))
    for tokens in (True, False):  # some models only hold for the example's length, or its batch size
        with contextlib.suppress(Exception):
            return _export(model, wide, tokens)
    return capture(model, inputs)


def _followed(model: nn.Module, inputs: Any) -> fx.GraphModule:
    """The program of the model; modules within that cannot be followed stand in it as one operator each."""
    paths: list[str] = []
    why = refusal = ""
    while True:
        try:
            with hidden(model, paths, why, lambda: run(model, inputs)):
                return _export(model, inputs, None)
        except Exception as error:
            run(model, inputs)  # a model that fails by itself is named as such
            found, where = f"{type(error).__name__}: {first_line(error)}", place(error, model)
            refusal = refusal or (
                f"{type(model).__name__} cannot be captured by torch.export on {describe(inputs)}{where}: {found}; "
                "usual remedies: use_cache=False, no control flow or sizes that depend on tensor values, plain tensors "
                "as inputs and outputs"
            )
            if not (more := culprits(error, model, paths)):
                raise TraceError(refusal) from error
            paths, why = _outermost([*paths, *more]), why or found + where


def _outermost(paths: list[str]) -> list[str]:
    """Paths without those inside of others."""
    return [p for p in paths if not any(p.startswith(f"{other}.") for other in paths)]


def _export(model: nn.Module, inputs: Any, tokens: bool | None) -> fx.GraphModule:
    """The captured program, with sizes left open unless ``tokens`` is None."""
    args, kwargs = example_args(inputs)
    shapes = None if tokens is None else _open_shapes(model, args, kwargs, tokens)
    with mode(model, training=False), torch.no_grad(), _plain_attention(), _quiet():
        program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    inline_(module)
    fuse_shuffles_(module.graph)
    rephrase_(module.graph)
    module.recompile()
    return module


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings, and no tracebacks that torch logs of operators that fail: the error itself says it."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was = log.disabled
    log.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = was


@contextmanager
def _plain_attention() -> Iterator[None]:
    """``nn.MultiheadAttention`` as the operators that it is made of, not as one fused operator for inference."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


def _open_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: bool) -> Any:
    """Dimension 0 of every input tensor left open, except where it is 1: that one is broadcast, or no batch.

    With ``tokens`` all dimensions of whole numbers are, so that a text may have another length.
    """
    shapes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for value in torch.utils._pytree.tree_leaves((args, kwargs)):
        if isinstance(value, Tensor):
            every = tokens and not value.is_floating_point()
            sizes = {d: torch.export.Dim.AUTO for d, n in enumerate(value.shape) if n > 1 and (every or d == 0)}
            shapes[value] = sizes or None
    return shapes.dynamic_shapes(model, args, kwargs)  # type: ignore[no-untyped-call]


def at_least_two(inputs: Any) -> Any:
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
