"""Which module of a resized model is the first to compute something else than the rewritten program."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from secateur.errors import TraceError
from secateur.graph.trace import first_line, run, untouched
from secateur.graph.types import example_args

Outputs = Mapping[str, list[Tensor]]  # module path -> the tensors that leave it


@dataclass(frozen=True, eq=False)
class Wrong:
    """The first module that failed or differed and those that called it, innermost first; why; how many were right."""

    chain: tuple[nn.Module, ...]
    why: str
    right: int


def outputs_of(program: fx.GraphModule, inputs: Any) -> Outputs:
    """What leaves every module of the original model, computed by its program on ``inputs``."""
    found: dict[str, list[Tensor]] = {}
    leaving = {node: _leaves(node) for node in program.graph.nodes}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor) and value.is_floating_point():
                kept = value.detach().clone() if leaving[n] else value
                for path in leaving[n]:
                    found.setdefault(path, []).append(kept)
            return value

    with torch.no_grad(), untouched(program):
        Recorder(program).run(*flat(inputs), enable_io_processing=False)
    return found


def flat(inputs: Any) -> list[Any]:
    """Example inputs as a captured program takes them."""
    return tree_leaves(example_args(inputs))


def modules_of(node: fx.Node) -> list[str]:
    """Paths of the modules that ran the operator, outermost first."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return [str(path).partition("@")[0] for path, _ in stack]


def _leaves(node: fx.Node) -> list[str]:
    """The modules that the node's value is handed out of."""
    if node.op not in ("call_function", "call_module"):
        return []
    inside = modules_of(node)
    return [path for path in inside if any(path not in modules_of(user) for user in node.users)]


def first_wrong(model: nn.Module, inputs: Any, oracle: Any, expected: Outputs, tolerance: float) -> Wrong | None:
    """None where the model runs and gives the oracle's outputs; otherwise the first module that does not fit."""
    watch = _Watch(model, expected, tolerance)
    with watch.hooks():
        try:
            error = relative_error(run(model, inputs), oracle)
        except TraceError as failure:
            chain = watch.first or tuple(reversed(watch.running)) or (model,)
            return Wrong(chain, f"its code holds on to the old sizes ({first_line(failure.__cause__)})", watch.right)
    if error <= tolerance:
        return None
    why = f"its code computes with the old sizes (outputs differ by {error:.2g})"
    return Wrong(watch.first or (model,), why, watch.right)


class _Watch:
    """Hooks that follow one run and compare what each module returns."""

    def __init__(self, model: nn.Module, expected: Outputs, tolerance: float) -> None:
        self.model, self.tolerance = model, tolerance
        self.expected: dict[nn.Module, list[Tensor]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self.expected.setdefault(module, []).extend(expected.get(path, []))
        self.running: list[nn.Module] = []
        self.first: tuple[nn.Module, ...] = ()
        self.right = 0

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        handles: list[Any] = []
        for module in self.model.modules():
            handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
            handles.append(module.register_forward_hook(self._leave, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.running.append(module)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        chain = tuple(reversed(self.running))
        self.running.pop()
        if self.first:
            return
        passed = {id(x) for x in tree_leaves((args, kwargs))}
        made = [x for x in _floats(output) if id(x) not in passed]
        if self._fits(made, self.expected[module]):
            self.right += 1
        else:
            self.first = chain

    def _fits(self, made: list[Tensor], expected: list[Tensor]) -> bool:
        """Whether at least one tensor is as expected, and none is of an expected shape only."""
        known = not (made and expected)
        for tensor in made:
            alike = [e for e in expected if e.shape == tensor.shape]
            if alike and not any(relative_error(tensor, e) <= self.tolerance for e in alike):
                return False
            known = known or bool(alike)
        return known


def _floats(value: Any) -> Iterator[Tensor]:
    return (x for x in tree_leaves(value) if isinstance(x, Tensor) and x.is_floating_point())


def relative_error(found: Any, expected: Any) -> float:
    """Largest absolute difference of floating-point outputs over the largest absolute output, per tensor; the worst.

    Infinite where shapes differ or one is not finite where the other is. Tensors without values (device meta) have
    only shapes to differ in.
    """
    floats = [[x.detach().double() for x in _floats(o)] for o in (found, expected)]
    if len(floats[0]) != len(floats[1]):
        return float("inf")
    worst = 0.0
    for a, b in zip(*floats, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.numel() and not (a.is_meta or b.is_meta):
            gap = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, a - b).abs().max()
            scale = b[b.isfinite()].abs().max() if b.isfinite().any() else torch.tensor(1.0)
            worst = max(worst, float((gap / scale.clamp_min(1e-12)).nan_to_num(float("inf"))))
    return worst
