"""Lowering for CPUs: layers with zeros run on the sparse engine, wherever that is measured to be faster."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import torch
from torch import Tensor, fx, nn

from secateur.apply.blame import relative_error
from secateur.apply.rewrite import guard_, put
from secateur.errors import SpecError, TargetError, TraceError
from secateur.graph.program import flat_inputs
from secateur.graph.trace import capture
from secateur.graph.types import example_args
from secateur.measure import latency
from secateur.progress import track
from secateur.runtime import kernels, tune
from secateur.runtime.attach import replace_
from secateur.runtime.formats import VALUES
from secateur.runtime.lowering import Lowering
from secateur.runtime.product import DenseLayer, of_module
from secateur.runtime.tune import Choice
from secateur.targets.fusion import Found, find, pool_, share_
from secateur.tasks import call, clone, plain

TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2, "int8": 0.2}
"""The largest difference from the model given, relative to its largest output, by how weights are stored."""

CACHES = 2**24
"""Models with more bytes of weights are tuned with weights that come from memory, not from a cache."""

NOISE = 1.02
"""A lowered model may need this part of the dense time; what is slower than that is given up."""

SECONDS = 1.0
"""How long both models are timed at the end."""


def lower(model: nn.Module, inputs: Any, values: str = "float32", form: str = "") -> nn.Module:
    """A model for inference on this CPU, never slower than the one given; that one is not changed.

    inputs: example inputs, a Tensor | tuple (positional) | dict (keyword); layers are tuned for their shapes, and work
        on others too.
    values: how sparse layers store weights: "float32", "bfloat16" or "int8".
    form: "program" fuses what follows layers into them, "module" keeps the user's class, with layers replaced; by
        default the first where the model can be captured.

    The result has an attribute ``lowering``, a ``Lowering``: what was chosen for each layer and why. Raises SpecError
    for unknown wishes, TargetError where the engine was not built, or the lowered model's outputs differ from the
    model's on the inputs; TraceError where ``form="program"`` and the model cannot be captured.
    """
    if values not in VALUES or form not in ("", "program", "module"):
        raise SpecError(f"values={values!r}, form={form!r}: expected values of {list(VALUES)}, form program or module")
    if why := kernels.why_missing():
        raise TargetError(why)
    dense = clone(plain(model)).requires_grad_(False)
    with contextlib.suppress(NotImplementedError):  # an exported program keeps the mode it was captured in
        dense.eval()
    _require_cpu(dense)
    with torch.no_grad():
        form, lowered, choices = _lowered(dense, inputs, values, form)
        gap = relative_error(call(lowered, inputs), call(dense, inputs))
    if not gap <= TOLERANCES[values]:
        raise TargetError(
            f"the lowered model differs from the dense one by {gap:.2g} (relative) on the inputs, expected at most "
            f"{TOLERANCES[values]:g} for {values} values; this is a defect of Secateur where values are float32"
        )
    times = latency({"dense": dense, "lowered": lowered}, inputs, SECONDS)
    done = Lowering(form, choices, times["dense"], times["lowered"], gap)
    if times["lowered"].ratio(times["dense"]).value > NOISE:
        note = f"the lowered model was slower ({done.gain:.2f}x), so this is the dense one"
        lowered, done = dense, Lowering("dense", choices, note=note)
    lowered.lowering = done  # type: ignore[assignment]
    return lowered


def _lowered(dense: nn.Module, inputs: Any, values: str, form: str) -> tuple[str, nn.Module, tuple[Choice, ...]]:
    cold = sum(p.nbytes for p in dense.parameters()) > CACHES
    if form != "module":
        try:
            module = capture(dense, inputs, dynamic_batch=True)
        except TraceError:
            if form == "program":
                raise
        else:
            return "program", *_program(module, inputs, values, cold)
    return "module", *_modules(dense, inputs, values, cold)


def layers(module: fx.GraphModule, inputs: Any) -> list[Found]:
    """Every layer of a captured program that the engine could run, with what follows it."""
    shapes = _Shapes(module)
    shapes.run(*flat_inputs(module.graph, *example_args(inputs)))
    return find(module, shapes.found)


def _program(module: fx.GraphModule, inputs: Any, values: str, cold: bool) -> tuple[nn.Module, tuple[Choice, ...]]:
    """The captured program with its layers and what follows them replaced."""
    choices, new = [], dict[fx.Node, fx.Node]()
    for found in track(layers(module, inputs), "choosing how layers run"):
        choice, format = tune.choose(found.product, values, cold)
        choices.append(choice)
        if format is None and not found.folded:
            continue
        path = _free_path(module, f"engine.{found.product.name}")
        put(module, path, DenseLayer(found.product) if format is None else found.product.sparse(format))
        arguments = [new.get(node, node) for node in (found.input, found.residual) if node is not None]
        with module.graph.inserting_before(found.last):
            new[found.last] = module.graph.call_module(path, tuple(arguments))
        found.last.replace_all_uses_with(new[found.last])
        for node in reversed(found.nodes):
            module.graph.erase_node(node)
    share_(module)
    pool_(module)
    module.graph.eliminate_dead_code()
    guard_(module, module.graph)
    module.graph.lint()
    return fx.GraphModule(module, module.graph).eval(), tuple(choices)


def _modules(dense: nn.Module, inputs: Any, values: str, cold: bool) -> tuple[nn.Module, tuple[Choice, ...]]:
    """The user's own class with layers replaced."""
    lowered, choices = clone(dense, shared=[*dense.parameters(), *dense.buffers()]), []
    shapes = _input_shapes(lowered, inputs)
    for name, module in track(list(lowered.named_modules()), "choosing how layers run"):
        if module not in shapes:
            continue
        product = of_module(name, module, shapes[module])
        if isinstance(product, str):
            choices.append(Choice(name, "dense", product, {}))
            continue
        choice, format = tune.choose(product, values, cold)
        choices.append(choice)
        if format is not None:
            replace_(lowered, module, product.sparse(format))
    return lowered, tuple(choices)


class _Shapes(fx.Interpreter):
    """Runs a program and keeps the shape of every tensor in it."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.found[n] = tuple(value.shape)
        return value


def _input_shapes(model: nn.Module, inputs: Any) -> dict[nn.Module, tuple[int, ...]]:
    """The shape of the input of every layer that might be replaced, and that the inputs reach."""
    shapes: dict[nn.Module, tuple[int, ...]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args, *kwargs.values()]
        if given and isinstance(given[0], Tensor):
            shapes[module] = tuple(given[0].shape)

    layers = (nn.Linear, nn.Conv1d, nn.Conv2d)
    handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in model.modules() if isinstance(m, layers)]
    try:
        call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _free_path(module: nn.Module, path: str) -> str:
    """The path, or with a number behind it where it is taken: a layer may be called more than once."""
    taken = {name for name, _ in module.named_modules()}
    numbered = (f"{path}_{i}" for i in itertools.count(2))
    return path if path not in taken else next(p for p in numbered if p not in taken)


def _require_cpu(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type != "cpu":
            raise TargetError(
                f"target cpu-sparse runs on the CPU, found {name} on {tensor.device}; move the model first"
            )
