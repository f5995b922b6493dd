"""Layers in a captured program, with what follows each of them: what one pass over the output can do."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from secateur.apply.rewrite import put
from secateur.runtime.layers import SharedLinears, SparseLinear
from secateur.runtime.product import Product, window_of

aten = torch.ops.aten

_ACTIVATIONS: dict[Any, str] = {
    aten.relu.default: "relu",
    aten.relu_.default: "relu",
    aten.gelu.default: "gelu",
    aten.gelu_.default: "gelu",
    aten.silu.default: "silu",
    aten.silu_.default: "silu",
}
_CONVOLUTIONS: dict[Any, int] = {aten.conv1d.default: 1, aten.conv2d.default: 2}
_ADDITIONS = (aten.add.Tensor, aten.add_.Tensor)
_COPIES = (aten.dropout.default, aten.dropout_.default, aten.alias.default)  # nothing, in evaluation mode

MOST_SHARED = 16
"""How many layers the engine runs in one call."""


@dataclass(frozen=True, eq=False)
class Found:
    """A product in a program: the nodes that it takes the place of, and those it reads."""

    product: Product
    nodes: tuple[fx.Node, ...]
    input: fx.Node
    residual: fx.Node | None = None
    folded: bool = False  # whether a batch norm went into the weights

    @property
    def last(self) -> fx.Node:
        """The node whose value the product gives."""
        return self.nodes[-1]


def find(module: fx.GraphModule, shapes: Mapping[fx.Node, tuple[int, ...]]) -> list[Found]:
    """Every layer with constant weights, in order. ``shapes``: of the value of every node, where it is a tensor."""
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    found, taken = [], set[fx.Node]()
    for node in module.graph.nodes:
        if node.op == "call_function" and (layer := _layer(module, node, shapes)) is not None:
            whole = _with_followers(module, layer, taken)
            if any(writes(u, layer.input) and order[node] < order[u] < order[whole.last] for u in layer.input.users):
                whole = layer  # what it reads is overwritten before the last follower runs
            taken.update(whole.nodes)
            found.append(whole)
    return found


def _layer(module: fx.GraphModule, node: fx.Node, shapes: Mapping[fx.Node, tuple[int, ...]]) -> Found | None:
    dims = _CONVOLUTIONS.get(node.target)
    transposed = node.target is aten.addmm.default and not node.kwargs  # bias + x @ weight, as GPT-2 does
    if dims is None and node.target is not aten.linear.default and not transposed:
        return None
    bias, x, weight = node.args[:3] if transposed else ((*node.args, None)[2], *node.args[:2])
    values, biases = constant(module, weight), constant(module, bias)
    if values is None or (bias is not None and biases is None) or not isinstance(x, fx.Node) or x not in shapes:
        return None
    if not values.dtype.is_floating_point or (biases is not None and biases.ndim != 1):
        return None
    assert isinstance(weight, fx.Node)
    name, shape = str(weight.target).removesuffix(".weight"), shapes[x]
    if dims is None:
        return Found(Product(name, values.t().contiguous() if transposed else values, biases, shape), (node,), x)
    if len(shape) != dims + 2:  # without a batch
        return None
    given: list[Any] = [*node.args[3:], *([1], [0], [1], 1)[len(node.args[3:]) :]]
    stride, padding, dilation = (tuple(v) * (dims if len(v) == 1 else 1) for v in given[:3])
    window = window_of(tuple(values.shape[2:]), stride, padding, dilation)
    return Found(Product(name, values, biases, shape, window, given[3], dims == 1), (node,), x)


def _with_followers(module: fx.GraphModule, found: Found, taken: set[fx.Node]) -> Found:
    """The layer with the batch norm, addition and activation that follow it, each its only reader."""
    while len(found.last.users) == 1:
        follower = next(iter(found.last.users))
        more = follower.op == "call_function" and follower not in taken and _absorbed(module, found, follower)
        if not more:
            break
        found = more
    return found


def _absorbed(module: fx.GraphModule, found: Found, follower: fx.Node) -> Found | None:
    product, nodes = found.product, (*found.nodes, follower)
    if product.activation:
        return None
    if follower.target in _COPIES and follower.args[0] is found.last:
        return replace(found, nodes=nodes)
    if follower.target is aten.batch_norm.default and product.window is not None and found.residual is None:
        folded = _folded(module, product, follower)
        return None if folded is None else replace(found, product=folded, nodes=nodes, folded=True)
    if follower.target in _ADDITIONS and found.residual is None and not follower.kwargs:
        return _added(found, follower)
    if (activation := _ACTIVATIONS.get(follower.target)) is not None:
        if follower.kwargs.get("approximate") == "tanh":
            activation = "gelu_tanh"
        return replace(found, product=replace(product, activation=activation), nodes=nodes)
    return None


def _added(found: Found, addition: fx.Node) -> Found | None:
    """With another tensor of the same shape added, unless that one is written to."""
    first, second = addition.args[:2]
    other = second if first is found.last else first
    if not isinstance(other, fx.Node) or other is found.last or _kind(other) != _kind(found.last):
        return None
    if addition.target is aten.add_.Tensor and other is first:
        return None
    product = replace(found.product, residual=True)
    return replace(found, product=product, nodes=(*found.nodes, addition), residual=other)


def _folded(module: fx.GraphModule, product: Product, norm: fx.Node) -> Product | None:
    """The convolution with the batch norm after it in its weights. Rows are scaled, so zeros stay."""
    weight, bias, mean, var = (constant(module, a) if a is not None else None for a in norm.args[1:5])
    if norm.args[5] or mean is None or var is None or (weight is None) != (norm.args[1] is None):
        return None
    scale = (var.double() + float(norm.args[7])).rsqrt()  # type: ignore[arg-type]
    scale = scale if weight is None else scale * weight.double()
    shift = -mean.double() * scale if bias is None else bias.double() - mean.double() * scale
    shift = shift if product.bias is None else shift + product.bias.double() * scale
    folded = product.weight.double() * scale.view(-1, *[1] * (product.weight.ndim - 1))
    if not (folded.isfinite().all() and shift.isfinite().all()):
        return None
    dtype = product.weight.dtype
    return replace(product, weight=folded.to(dtype), bias=shift.to(dtype))


def constant(module: fx.GraphModule, node: Any) -> Tensor | None:
    """The tensor that a node stands for, where it is a parameter or buffer."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value.detach() if isinstance(value, Tensor) else None


def _kind(node: fx.Node) -> tuple[str, ...] | None:
    """Dtype and sizes of a node's value; sizes that are open by name."""
    value = node.meta.get("val")
    return (str(value.dtype), *map(str, value.shape)) if isinstance(value, Tensor) else None


def writes(node: fx.Node, value: fx.Node) -> bool:
    """Whether an operator writes to a value that it reads."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable) and node.args[:1] == (value,)


def share_(module: fx.GraphModule) -> None:
    """Let engine layers that read the same value, and nothing else, do so in one call."""
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in module.graph.nodes:
        alone = node.op == "call_module" and len(node.args) == 1
        if alone and isinstance(module.get_submodule(str(node.target)), SparseLinear):
            readers.setdefault(node.args[0], []).append(node)
    for x, nodes in readers.items():
        first, last = nodes[0], nodes[-1]
        overwritten = any(writes(user, x) and order[first] < order[user] < order[last] for user in x.users)
        if len(nodes) == 1 or len(nodes) > MOST_SHARED or overwritten:
            continue
        layers = [module.get_submodule(str(node.target)) for node in nodes]
        path = f"{first.target}_and_{len(nodes) - 1}_more"
        put(module, path, SharedLinears(layer for layer in layers if isinstance(layer, SparseLinear)))
        with module.graph.inserting_before(first):
            together = module.graph.call_module(path, (x,))
            parts = [module.graph.call_function(operator.getitem, (together, i)) for i in range(len(nodes))]
        for node, part in zip(nodes, parts, strict=True):
            node.replace_all_uses_with(part)
            module.graph.erase_node(node)


def pool_(module: fx.GraphModule) -> None:
    """Let the engine pool images: torch's max pooling of one image takes longer than several convolutions."""
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not aten.max_pool2d.default or node.kwargs:
            continue
        given: list[Any] = [*node.args, *([], [0], [1], False)[len(node.args) - 2 :]]
        x, kernel, stride, padding, dilation, ceil = given
        value = node.meta.get("val")
        images = isinstance(value, Tensor) and value.ndim == 4 and value.dtype == torch.float32
        if not images or any(d != 1 for d in dilation) or ceil:
            continue
        pairs = [list(v) * (2 // len(v)) for v in (kernel, stride or kernel, padding)]
        with module.graph.inserting_before(node):
            pooled = module.graph.call_function(torch.ops.secateur.max_pool2d.default, (x, *pairs))
        pooled.meta = dict(node.meta)
        node.replace_all_uses_with(pooled)
        module.graph.erase_node(node)
