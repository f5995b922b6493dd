"""The captured program with the sizes that a plan leaves.

It is the second oracle, and the result where a class hard-codes sizes.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from secateur.apply.movable import Dropout, follow_
from secateur.errors import DataError
from secateur.graph.program import Program
from secateur.graph.rules import REWRITES, Cut, Op, operator_name
from secateur.graph.rules.base import TARGET, each, schema, sizes_of


def rewrite(program: Program, model: nn.Module, alive: NDArray[np.bool_]) -> fx.GraphModule:
    """A self-contained, trainable module: the program's operators over the tensors of ``model``.

    ``model`` already has its parameters and buffers sliced; they are used, not copied, under their own names.
    ``alive`` has one flag per label. Batch norm and dropout become modules again, so that ``train()`` and
    ``eval()`` work; everything else keeps the behavior of evaluation mode.
    """
    root = nn.Module()
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(program.module.graph, new))
    graph._codegen = program.module.graph._codegen
    writer = _Writer(program, model, alive, root, graph, new)
    for node in program.module.graph.nodes:
        if node.op == "get_attr":
            writer.tensor(node)
        elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            writer.operator(node)
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    follow_(root, graph)
    guard_(root, graph)
    return fx.GraphModule(root, graph).train(model.training)


class Expect(nn.Module):
    """Raises DataError where an input of a rewritten program has other sizes than it was made for; None allows any.

    Without it operators would read out of bounds, or broadcast, without a word.
    """

    def __init__(self, name: str, sizes: tuple[int | None, ...]) -> None:
        super().__init__()
        self.name, self.sizes = name, sizes

    def forward(self, value: torch.Tensor) -> None:
        found = tuple(value.shape)
        fits = len(found) == len(self.sizes)
        if not fits or any(n is not None and n != m for n, m in zip(self.sizes, found, strict=True)):
            wanted = ", ".join("any" if n is None else str(n) for n in self.sizes)
            raise DataError(
                f"input {self.name} has shape {list(found)}, this program was made for [{wanted}]; prune "
                "with example inputs of the shape that you need"
            )


def guard_(root: nn.Module, graph: fx.Graph) -> None:
    """Let the program check its inputs before it computes anything."""
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    for i, node in enumerate(inputs):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            sizes = tuple(n if isinstance(n, int) else None for n in value.shape)
            root.add_module(f"secateur_input_{i}", Expect(str(node.target), sizes))
            with graph.inserting_after(inputs[-1]):
                graph.call_module(f"secateur_input_{i}", (node,))


_DROPOUT = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")


class _Writer:
    def __init__(
        self,
        program: Program,
        model: nn.Module,
        alive: NDArray[np.bool_],
        root: nn.Module,
        graph: fx.Graph,
        new: dict[fx.Node, fx.Node],
    ) -> None:
        self.program, self.model, self.root, self.graph, self.new = program, model, root, graph, new
        self.here: fx.Node | None = None
        self.cut = Cut(program.engine, alive, self._constant, self._scale, self._contiguous)

    def tensor(self, node: fx.Node) -> None:
        """Point a read at the sliced tensor of the model; slice constants that only the program holds."""
        path = self.program.aliases.get(str(node.target), str(node.target))
        known = self.program.tensors.get(path)
        if known is None:  # a subgraph or a script object
            put(self.root, path, _get(self.program.module, str(node.target)))
        elif known.kind == "constant":
            value = _get(self.program.module, str(node.target))
            for d, (dim, size) in enumerate(zip(known.dims, known.shape, strict=True)):
                if dim is not None:
                    value = value.index_select(d, torch.from_numpy(self.cut.kept(dim, size)).to(value.device))
            put(self.root, path, value)
        else:
            put(self.root, path, _get(self.model, path))
        self.new[node].target = path

    def operator(self, node: fx.Node) -> None:
        op = self.program.op(node)
        name = operator_name(node.target)
        self.here = self.new[node]
        change = REWRITES[name](op, self.cut) if name in REWRITES and self._touched(node) else {}
        if change:
            self._call(op, change)
        if name == "batch_norm":
            self._batch_norm(op)
        elif name in _DROPOUT and op.args["p"] > 0:
            self._module(
                self._unused("dropout"),
                nn.Dropout(op.args["p"]) if name == "dropout" else Dropout(name, op.args["p"]),
                op.tensors[0],
            )

    def _touched(self, node: fx.Node) -> bool:
        """Whether a dimension of the operator's inputs or outputs lost something."""
        for value in (self.program.values.get(n) for n in (node, *node.all_input_nodes)):
            for dim in (dim for dims in each(value) for dim in dims):
                atoms = self.program.atoms(dim)
                if atoms is not None and not self.cut.alive[atoms].all():
                    return True
        return False

    def _call(self, op: Op, change: dict[str, Any]) -> None:
        """Replace arguments, by their names, and the operator where the change names another."""
        assert self.here is not None
        target = change.pop(TARGET, op.node.target)
        values = {**op.args, **change}
        args = [values[name] for name, _, keyword in schema(target) if not keyword]
        kwargs = {n: values[n] for n, default, keyword in schema(target) if keyword and values[n] != default}
        self.here.target = target
        self.here.args = fx.node.map_arg(tuple(args), lambda n: self.new.get(n, n))
        self.here.kwargs = fx.node.map_arg(kwargs, lambda n: self.new.get(n, n))

    def _unused(self, prefix: str) -> str:
        """A name that neither the model nor the program has: a program may be rewritten again."""
        names = (f"{prefix}_{k}" for k in itertools.count(1))
        return next(n for n in names if not hasattr(self.model, n) and not hasattr(self.root, n))

    def _constant(self, value: torch.Tensor) -> fx.Node:
        name = self._unused("secateur_index")
        device = next((p.device for p in self.model.parameters()), value.device)
        put(self.root, name, value.to(device))
        assert self.here is not None
        with self.graph.inserting_before(self.here):
            return self.graph.get_attr(name)

    def _contiguous(self, node: fx.Node) -> fx.Node:
        assert self.here is not None
        with self.graph.inserting_before(self.here):
            return self.graph.call_function(torch.ops.aten.contiguous.default, (self.new[node],))

    def _scale(self, size: fx.Node, new: int, old: int) -> fx.Node:
        assert self.here is not None
        with self.graph.inserting_before(self.here):
            product = self.graph.call_function(operator.mul, (self.new[size], new))
            return self.graph.call_function(operator.floordiv, (product, old))

    def _batch_norm(self, op: Op) -> None:
        """A batch norm module in place of the operator, so that training updates its statistics."""
        named = {n: self._path(op.args[n]) for n in ("weight", "bias", "running_mean", "running_var")}
        prefixes = {p.removesuffix(n).removesuffix(".") for n, p in named.items() if p}
        if len(prefixes) != 1 or not named["running_mean"]:
            return  # statistics of the batch, or tensors from several places: the operator stays
        prefix = prefixes.pop()
        rank = len(sizes_of(op.args["input"]))
        kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[rank]
        features = len(_get(self.model, named["running_mean"]))
        norm = kind(features, op.args["eps"], op.args["momentum"], named["weight"] != "")
        original = _get(self.model, prefix) if prefix else None
        if isinstance(original, nn.modules.batchnorm._BatchNorm):
            norm.momentum = original.momentum
        for name in (*named, "num_batches_tracked"):
            value = getattr(original, name, None) if original is not None else _get(self.model, named.get(name, ""))
            if isinstance(value, nn.Parameter):
                setattr(norm, name, value)
            elif isinstance(value, torch.Tensor):
                norm._buffers[name] = value
        self._module(prefix or "batch_norm", norm, op.args["input"])

    def _path(self, node: Any) -> str:
        """The name of a tensor of the model that is read as it is, "" otherwise."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return ""
        path = self.program.aliases.get(str(node.target), str(node.target))
        return path if path in self.program.tensors else ""

    def _module(self, path: str, module: nn.Module, argument: fx.Node) -> None:
        put(self.root, path, module)
        assert self.here is not None
        self.here.op, self.here.target = "call_module", path
        self.here.args, self.here.kwargs = (self.new[argument],), {}


def put(root: nn.Module, path: str, value: Any) -> None:
    """Set ``root.a.b.c`` to a module, parameter or buffer, making plain modules on the way."""
    *parents, leaf = path.split(".")
    for name in parents:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    if isinstance(value, nn.Module):
        root.add_module(leaf, value)
    elif isinstance(value, nn.Parameter):
        root.register_parameter(leaf, value)
    elif isinstance(value, torch.Tensor):
        root.register_buffer(leaf, value)
    else:
        setattr(root, leaf, value)


def _get(root: nn.Module, path: str) -> Any:
    value: Any = root
    for name in path.split("."):
        value = getattr(value, name)
    return value
