"""Stretches of a network, each tuned by gradient steps to give what the dense network gives at its end.

A stretch ends where everything that pruning changes passes through one tensor: after a residual block, after a layer of
a plain network. Nothing but calibration inputs is needed, and no more than one stretch is differentiated at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from secateur.apply.oracle import Zeroing
from secateur.graph.aliases import memory, writes
from secateur.graph.program import Program
from secateur.graph.types import Flags

PASSES, RATE = 8, 1e-3
"""Over the calibration data, for every stretch; the rate of Adam, which falls to zero along a line."""

Values = dict[fx.Node, Any]


class Small(Zeroing):
    """The pruned program at full size; parameters and buffers are read from ``tensors``."""

    def __init__(self, program: Program, model: nn.Module, alive: Flags, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(program, model, alive)
        self.tensors = tensors

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = self.program.aliases.get(str(target), str(target))
        return self.tensors[name] if name in self.tensors else super().get_attr(target, args, kwargs)


@dataclass(frozen=True, eq=False)
class Stretch:
    """``nodes`` in order, the last of which is ``exit``; they read ``outside``, and parameters through ``reads``."""

    nodes: tuple[fx.Node, ...] = field(repr=False)
    outside: frozenset[fx.Node] = field(repr=False)
    reads: tuple[fx.Node, ...] = field(repr=False)

    @property
    def exit(self) -> fx.Node:
        return self.nodes[-1]


def differing(program: Program, small: Small, touched: Collection[str]) -> set[fx.Node]:
    """The nodes whose values pruning changes: what reads a touched tensor, loses a unit, or follows such a node.

    Where such a value is written into the memory of others, those change too.
    """
    found: set[fx.Node] = set()
    at, last = memory(program.module.graph), writes(program.module.graph)
    sharing: dict[fx.Node, list[fx.Node]] = {}
    for node in program.module.graph.nodes:
        sharing.setdefault(at[node], []).append(node)
        own = node.op == "get_attr" and program.aliases.get(str(node.target), str(node.target)) in touched
        if own or small.loses(node) or not found.isdisjoint(node.all_input_nodes):
            found.update(sharing[at[node]] if at[node] in last else [node])
    return found


def stretches(nodes: Sequence[fx.Node], differs: Collection[fx.Node]) -> list[Stretch]:
    """Cut what differs where all of it passes through one tensor, last before the next weight is used.

    That tensor is not written into afterwards: it is still what it was when its stretch is tuned.
    """
    order = {node: i for i, node in enumerate(nodes)}
    at, last = memory(nodes[0].graph), writes(nodes[0].graph)
    changing = [n for n in nodes if n in differs and n.op == "call_function"]
    found: list[Stretch] = []
    alive: dict[fx.Node, int] = {}
    here: list[fx.Node] = []
    cut = weights = 0
    for node in changing:
        if _reads_weight(node):
            if cut and weights:
                found.append(_stretch(here[:cut]))
                here, cut, weights = here[cut:], 0, 0
            weights += 1
        here.append(node)
        alive = {n: end for n, end in alive.items() if end > order[node]}
        alive[node] = max((order[user] for user in node.users), default=order[node])
        final = order[last.get(at[node], node)] <= order[node]
        value = node.meta.get("val")
        if set(alive) == {node} and final and isinstance(value, Tensor) and value.is_floating_point():
            cut = len(here)
    if cut and weights:
        found.append(_stretch(here[:cut]))
    return found


def _reads_weight(node: fx.Node) -> bool:
    return any(n.op == "get_attr" and n.meta["val"].dim() > 1 for n in node.all_input_nodes if "val" in n.meta)


def _stretch(nodes: list[fx.Node]) -> Stretch:
    read = {source for node in nodes for source in node.all_input_nodes} - set(nodes)
    constants = tuple(n for n in read if n.op == "get_attr")
    return Stretch(tuple(nodes), frozenset(read), constants)


def _own(stretch: Stretch, names: Mapping[fx.Node, str], named: Mapping[str, Tensor]) -> list[fx.Node]:
    """The reads of parameters that nothing outside the stretch reads."""
    return [
        node
        for node, name in names.items()
        if name in named and isinstance(named[name], nn.Parameter) and named[name].is_floating_point()
        if all(user in stretch.nodes for user in node.users) and list(names.values()).count(name) == 1
    ]


def tune(
    stretch: Stretch,
    small: Small,
    named: Mapping[str, Tensor],
    before: Sequence[Values],
    after: Sequence[Values],
    masks: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Better values of the parameters that only this stretch reads, by name; ``after`` gets the end's new values.

    before, after: the values of both networks, per batch, with everything that the stretch reads.
    """
    names = {n: small.program.aliases.get(str(n.target), str(n.target)) for n in stretch.reads}
    own = {n: small.tensors[names[n]].detach().clone() for n in _own(stretch, names, named)}
    if not own:
        return {}
    keep = {node: masks[names[node]].to(value.device) for node, value in own.items() if names[node] in masks}
    wanted = [small.zeroed(env[stretch.exit], small.dims_of(stretch.exit)) for env in before]
    size = float(sum(w.double().square().sum() for w in wanted)) / sum(w.numel() for w in wanted)

    def ran(env: Values, values: Values) -> Tensor:
        """The end of the stretch with these parameters."""
        held = {n: env[n].clone() if n in small.written else env[n] for n in stretch.outside}
        held |= {n: small.zeroed(v, small.dims_of(n)) for n, v in values.items()}
        small.env = held
        for node in stretch.nodes:
            held[node] = small.run_node(node)
        end: Tensor = held[stretch.exit]
        return end

    def error(values: Values) -> float:
        return sum(float((ran(env, values) - w).double().square().sum()) for env, w in zip(after, wanted, strict=True))

    tuned = {node: value.clone().requires_grad_() for node, value in own.items()}
    optimizer = torch.optim.Adam(tuned.values(), RATE)
    steps = PASSES * len(after)
    for step in range(steps):
        env, target = after[step % len(after)], wanted[step % len(after)]
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
        try:
            with torch.enable_grad():
                loss = (ran(env, tuned) - target).float().square().mean() / max(size, 1e-30)
            grads = torch.autograd.grad(loss, list(tuned.values()), allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # detached, or written over what gradients need: the model cannot be trained here either
            return {}
        for (node, value), grad in zip(tuned.items(), grads, strict=True):
            value.grad = None if grad is None else torch.where(keep[node], grad, 0) if node in keep else grad
        optimizer.step()
    better = {node: value.detach() for node, value in tuned.items()}
    if not error(better) < error(own):  # NaN is no improvement either
        return {}
    for env in after:
        env[stretch.exit] = ran(env, better)
    return {names[node]: value for node, value in better.items()}
