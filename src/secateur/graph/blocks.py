"""Residual blocks: parts of the program whose input can stand in for their output, so that they can be left out.

A block is a module, such as ``layers.3``, that adds something to what goes in and gives out a tensor of the same shape,
type and channels. Norms and activations after the sum belong to it: ``norm(x + f(x))`` may go as a whole. In a network
without such modules a block is one branch ``f`` of a sum ``x + f(x)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import fx

from secateur.graph.program import Program
from secateur.graph.rules.base import each, operator_name, sizes_of
from secateur.graph.trace import source_line
from secateur.graph.types import Flags

Nodes = frozenset[fx.Node]

_NAMES = """
alias batch_norm celu clamp clone contiguous detach dropout elu feature_dropout flatten gelu group_norm hardswish
hardtanh instance_norm layer_norm leaky_relu mish permute prelu relu relu6 reshape rms_norm selu silu softplus
squeeze tanh to transpose unflatten unsqueeze view _to_copy _unsafe_view
"""
_THROUGH = frozenset(_NAMES.split())
"""Operators that a residual stream passes through on its way to the end of a block."""

_ALIAS = frozenset({"to", "_to_copy", "contiguous", "detach", "alias", "clone"})


@dataclass(frozen=True, eq=False)
class Span:
    """One run of a block: removing it puts ``entry`` in the place of ``exit``; ``nodes`` go."""

    entry: fx.Node
    exit: fx.Node
    nodes: Nodes = field(repr=False)


@dataclass(frozen=True, eq=False)
class Block:
    """A part of the model that can be left out as a whole, or ``frozen``: why not ("" where it can).

    ``path`` is its module, "" for a branch of a sum that is no module. A module that runs several times has as many
    ``spans``, which go together.
    """

    name: str
    path: str
    spans: tuple[Span, ...] = field(repr=False)
    frozen: str = ""


@dataclass(frozen=True, eq=False)
class _Module:
    path: str
    kind: str
    runs: tuple[Nodes, ...]
    spans: tuple[Span, ...]
    frozen: str
    sums: int

    @property
    def nodes(self) -> Nodes:
        return frozenset().union(*self.runs)


def find(program: Program, free: Flags) -> tuple[Block, ...]:
    """The blocks of a program, in its order. They do not overlap.

    free: one flag per label, whether its unit may be removed.
    """
    weighty = _weighty(program)
    found = {}
    for path, kind, runs in _modules(program.module.graph):
        module = _module(program, free, path, kind, runs, weighty)
        if module is not None:
            found[path] = module
    order = {node: i for i, node in enumerate(program.module.graph.nodes)}
    layers = sorted(_layers(_own(found), weighty), key=lambda m: min(map(order.__getitem__, m.nodes)))
    if layers:
        return tuple(Block(m.path, m.path, m.spans, m.frozen) for m in layers)
    spans = list(_branches(program.module.graph, order, weighty))
    names = [_branch_name(span, order, weighty) for span in spans]
    counted = [f"{name} #{n}" if (n := names[: i + 1].count(name)) > 1 else name for i, name in enumerate(names)]
    return tuple(Block(name, "", (span,)) for name, span in zip(counted, spans, strict=True))


# --- modules ---------------------------------------------------------------------------------------


def _modules(graph: fx.Graph) -> Iterator[tuple[str, str, tuple[Nodes, ...]]]:
    """Every module's path, class, and the nodes of each of its runs."""
    runs: dict[str, dict[str, set[fx.Node]]] = {}
    kinds: dict[str, str] = {}
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") or {} if node.op == "call_function" else {}
        for key, (path, kind) in stack.items():
            if path:
                runs.setdefault(path, {}).setdefault(key, set()).add(node)
                kinds[path] = str(kind)
    for path, keyed in runs.items():
        yield path, kinds[path], tuple(map(frozenset, keyed.values()))


def _module(
    program: Program, free: Flags, path: str, kind: str, runs: tuple[Nodes, ...], weighty: Mapping[fx.Node, str]
) -> _Module | None:
    """The module where it is a residual block, perhaps a frozen one; None where it is nothing of the kind."""
    if not any(node in weighty for nodes in runs for node in nodes):
        return None
    spans, why, sums = [], "", 0
    for nodes in runs:
        outs = _outs(nodes)
        residual = {out: found for out in outs if (found := _entries(out, nodes))[0]}
        if len(residual) != 1:
            return None
        out, (entries, count) = next(iter(residual.items()))
        sums = max(sums, count)
        span = Span(entries[0], out, nodes)
        why = why or _why_not(program, free, span, outs, entries)
        spans.append(span)
    return _Module(path, kind, runs, tuple(spans), why, sums)


def _outs(nodes: Nodes) -> dict[fx.Node, fx.Node]:
    """The nodes whose values are read outside, and a reader; aliases count as what they are aliases of."""
    outs: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        base = _base(node, nodes)
        for user in node.users:
            if user not in nodes and base in nodes:
                outs.setdefault(base, user)
    return outs


def _entries(out: fx.Node, nodes: Nodes) -> tuple[list[fx.Node], int]:
    """The tensors that reach ``out`` from outside along sums, norms and pointwise operators; and how many sums."""
    found: dict[fx.Node, None] = {}
    sums: set[fx.Node] = set()
    seen: set[tuple[fx.Node, bool]] = set()
    todo = [(out, False)]
    while todo:
        node, added = todo.pop()
        if (node, added) in seen:
            continue
        seen.add((node, added))
        if node not in nodes:
            if added and node.op != "get_attr" and _floating(node):
                found[node] = None
            continue
        name = operator_name(node.target)
        full = [n for n in operands(node) if n.op != "get_attr" and _full(n, node)]
        if name in ("add", "sub") and len(full) > 1:
            sums.add(node)
            todo += [(n, True) for n in (full if name == "add" else full[:1])]
        elif name in ("add", "sub", "mul", "div") and len(full) == 1:
            todo.append((full[0], added))
        elif name in _THROUGH:
            todo.append((operands(node)[0], added))
    return list(found), len(sums)


def _why_not(program: Program, free: Flags, span: Span, outs: Mapping[fx.Node, fx.Node], entries: list[fx.Node]) -> str:
    """Why a module that has a residual path cannot be left out; "" where it can."""
    entry, out = span.entry, span.exit
    if len(entries) > 1:
        return f"{len(entries)} tensors reach its output by residual paths; expected one"
    if sizes_of(entry) != sizes_of(out) or entry.meta["val"].dtype != out.meta["val"].dtype:
        was, now = ((list(sizes_of(n)), n.meta["val"].dtype) for n in (entry, out))
        return f"it changes its input from {was[0]} of {was[1]} to {now[0]} of {now[1]}"
    for node, user in outs.items():
        if node is not out:
            reader = "the model's output" if user.op == "output" else source_line(user)
            return f"{source_line(node)} in it is also used by {reader}"
    if _returned(out) and (_returned(entry) or any(user.op != "output" for user in _readers(out))):
        return "its output is an internal feature that the model returns"
    if not _same_channels(program, free, entry, out):
        return "the channels of its output are not those of its input"
    return ""


def _same_channels(program: Program, free: Flags, entry: fx.Node, out: fx.Node) -> bool:
    """Whether every unit that may be removed is at the same place in both."""
    before, after = (each(program.values.get(n)) for n in (entry, out))
    for first, second in zip(before, after, strict=False):
        for a, b in zip(first, second, strict=False):
            one, two = program.atoms(a), program.atoms(b)
            if one is None or two is None or not (free[one].any() or free[two].any()):
                continue
            if not np.array_equal(one * free[one], two * free[two]):
                return False
    return True


def _own(found: Mapping[str, _Module]) -> dict[str, _Module]:
    """Without modules that stand alone and add several times: such a module is the body of a network."""

    def alone(module: _Module) -> bool:
        parent, _, leaf = module.path.rpartition(".")
        alike = (m for m in found.values() if m.kind == module.kind and m.path.rpartition(".")[0] == parent)
        return not leaf.isdigit() and sum(1 for _ in alike) == 1

    return {path: m for path, m in found.items() if m.sums == 1 or not alone(m)}


def _layers(found: dict[str, _Module], weighty: Mapping[fx.Node, str]) -> list[_Module]:
    """Of modules within modules those that people call layers: a stack gives way to what is stacked in it.

    A stack is what consists of blocks inside it, all of its weights, among them several of one class, or a single one.
    The parts of one layer (attention, feed-forward) are each of a class of their own, and give way to the layer.
    """
    chosen: dict[str, _Module] = {}
    for path in sorted(found, key=lambda p: -p.count(".")):
        module = found[path]
        inner = [p for p in chosen if p.startswith(f"{path}.")]
        within = frozenset[fx.Node]().union(*(chosen[p].nodes for p in inner))
        covered = bool(inner) and all(node in within for node in module.nodes if node in weighty)
        kinds = [chosen[p].kind for p in inner]
        plain = module.kind.endswith((".Sequential", ".ModuleList"))
        if not (covered and (plain or len(kinds) == 1 or len(set(kinds)) < len(kinds))):
            chosen = {p: m for p, m in chosen.items() if p not in inner}
            chosen[path] = module
    return list(chosen.values())


# --- branches --------------------------------------------------------------------------------------


def _branches(graph: fx.Graph, order: Mapping[fx.Node, int], weighty: Mapping[fx.Node, str]) -> Iterator[Span]:
    """Sums ``x + f(x)``; of sums within sums the inner ones."""
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        if node in taken or operator_name(node.target) != "add":
            continue
        summed = sorted((n for n in operands(node) if n.op != "get_attr"), key=order.__getitem__)
        if len(summed) != 2 or not all(_full(n, node) and _floating(n) for n in summed):
            continue
        entry, last = summed
        nodes = _between(entry, last, order) | {node}
        loose = any(user not in nodes for n in nodes if n is not node for user in n.users)
        alike = entry.meta["val"].dtype == node.meta["val"].dtype
        if last in nodes and alike and not loose and not nodes & taken and any(n in weighty for n in nodes):
            taken |= nodes
            yield Span(entry, node, nodes)


def _between(entry: fx.Node, last: fx.Node, order: Mapping[fx.Node, int]) -> Nodes:
    """The nodes on all paths from ``entry`` to ``last``, without the first."""
    before, todo = {last}, [last]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in before and order[source] > order[entry]:
                before.add(source)
                todo.append(source)
    nodes: set[fx.Node] = set()
    for node in sorted(before, key=order.__getitem__):
        if any(source is entry or source in nodes for source in node.all_input_nodes):
            nodes.add(node)
    return frozenset(nodes)


def _branch_name(span: Span, order: Mapping[fx.Node, int], weighty: Mapping[fx.Node, str]) -> str:
    names = [weighty[n].removesuffix(".weight") for n in sorted(span.nodes, key=order.__getitem__) if n in weighty]
    return f"branch {names[0]}" if names[0] == names[-1] else f"branch {names[0]}..{names[-1]}"


# --- nodes -----------------------------------------------------------------------------------------


def _weighty(program: Program) -> dict[fx.Node, str]:
    """Nodes that read a parameter of two dimensions or more, and which."""
    found: dict[fx.Node, str] = {}
    for node in program.module.graph.nodes:
        for read in node.all_input_nodes:
            path = str(read.target)
            tensor = program.tensors.get(program.aliases.get(path, path)) if read.op == "get_attr" else None
            if tensor is not None and tensor.kind == "parameter" and len(tensor.shape) > 1:
                found.setdefault(node, tensor.name)
    return found


def operands(node: fx.Node) -> list[fx.Node]:
    """The tensors that the operator is given as positional arguments of their own."""
    return [a for a in node.args if isinstance(a, fx.Node) and isinstance(a.meta.get("val"), torch.Tensor)]


def _full(operand: fx.Node, node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor) and sizes_of(operand) == sizes_of(node)


def _floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def is_alias(node: fx.Node) -> bool:
    """Whether the node's value is that of its input."""
    if node.op != "call_function" or operator_name(node.target) not in _ALIAS or not operands(node):
        return False
    source = operands(node)[0]
    return _full(source, node) and source.meta["val"].dtype == node.meta["val"].dtype


def _base(node: fx.Node, nodes: Nodes) -> fx.Node:
    """What a node within ``nodes`` is an alias of; outside of them where it came in so."""
    while node in nodes and is_alias(node):
        node = operands(node)[0]
    return node


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """The users of a value, through aliases."""
    for user in node.users:
        if is_alias(user):
            yield from _readers(user)
        else:
            yield user


def _returned(node: fx.Node) -> bool:
    return any(user.op == "output" for user in _readers(node))
