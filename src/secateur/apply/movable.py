"""What a captured program lacks to be an ordinary module: following device and dtype, dropping out in training."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from secateur.apply.blame import modules_of
from secateur.graph.rules import operator_name
from secateur.graph.trace import untouched
from secateur.tasks import call, mode


def follow_(root: nn.Module, graph: fx.Graph) -> None:
    """Devices, and casts to the parameters' dtype, were recorded as constants: read them off a parameter instead."""
    for node in reversed(graph.nodes):
        if operator_name(node.target) == "_assert_tensor_metadata":
            graph.erase_node(node)  # it would hold the program to the recorded device and dtype
    parameters = dict(root.named_parameters(remove_duplicate=False))
    reads = (n for n in graph.nodes if n.op == "get_attr" and n.target in parameters)
    path = next((str(n.target) for n in reads if parameters[str(n.target)].is_floating_point()), None)
    if path is None:
        return
    with graph.inserting_before(next(iter(graph.nodes))):
        parameter = graph.get_attr(path)
        device = graph.call_function(getattr, (parameter, "device"))
        dtype = graph.call_function(getattr, (parameter, "dtype"))

    def following(value: Any) -> Any:
        if isinstance(value, torch.device):
            return device
        return dtype if value is parameters[path].dtype else value

    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            node.args = tuple(following(a) for a in node.args)
            node.kwargs = {k: following(v) for k, v in node.kwargs.items()}
    for node in (dtype, device, parameter):
        if not node.users:
            graph.erase_node(node)


class Dropout(nn.Module):
    """One of torch's functions that drop out: ``feature_dropout``, ``alpha_dropout``, ``feature_alpha_dropout``."""

    def __init__(self, function: str, p: float) -> None:
        super().__init__()
        self.function, self.p = function, p

    def forward(self, x: Tensor) -> Tensor:
        dropped: Tensor = getattr(torch, self.function)(x, self.p, self.training)
        return dropped


class Attention(nn.Module):
    """``scaled_dot_product_attention`` that drops weights out in training."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        options["dropout_p"] = self.p if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, **options)


def attention_dropout_(written: fx.GraphModule, model: nn.Module, inputs: Any) -> None:
    """Give the attention operators of a rewritten program the dropout that ``model`` applies in training, in place.

    The program was captured in evaluation mode, where a class passes a probability of zero; one run of the model in
    training mode says what it passes there. The model is not changed. Where it does not run, the program stays.
    """
    nodes = [n for n in written.graph.nodes if operator_name(n.target) == "scaled_dot_product_attention"]
    passed = _passed(model, inputs) if nodes else {}
    for node in nodes:
        here = passed.get((modules_of(node) or [""])[-1])
        p = here.pop(0) if here else 0.0
        if p > 0:
            path = next(name for i in itertools.count() if not hasattr(written, name := f"attention_{i}"))
            written.add_module(path, Attention(p))
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
            given.pop("dropout_p", None)
            node.op, node.target = "call_module", path
            node.args, node.kwargs = (), given
            stack = node.meta.get("nn_module_stack") or {}
            node.meta["nn_module_stack"] = {**stack, node.target: (node.target, "secateur.apply.movable.Attention")}
    if passed:
        written.recompile()


def _passed(model: nn.Module, inputs: Any) -> dict[str, list[float]]:
    """Per module path the dropout probabilities that it passes to attention in training, in order."""
    found: dict[str, list[float]] = {}
    running: list[str] = []

    class Listen(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is F.scaled_dot_product_attention:
                p = kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)
                found.setdefault(running[-1] if running else "", []).append(float(p))
            return func(*args, **kwargs)

    quiet = contextlib.ExitStack()
    for context in (_follow_calls(model, running), mode(model, training=True), untouched(model), torch.no_grad()):
        quiet.enter_context(context)
    with quiet, torch.random.fork_rng(), Listen():
        try:
            call(model, inputs)
        except Exception:  # some models cannot be trained on their own inputs alone
            return {}
    return found


@contextlib.contextmanager
def _follow_calls(model: nn.Module, running: list[str]) -> Iterator[None]:
    """Keep the paths of the modules that are running in ``running``."""
    handles: list[Any] = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, path=path: running.append(path)))
        handles.append(module.register_forward_hook(lambda *_: running.pop() and None))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
