"""``lstm``, ``gru``, ``rnn_tanh``, ``rnn_relu``: every gate has a row per hidden unit, in all layers and directions."""

from __future__ import annotations

from torch import fx

from secateur.graph.labels import Dim, concatenate
from secateur.graph.rules.base import Dims, Op, Rewrite, Rule, Value, operator_name, sizes_of

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def recurrent(op: Op) -> Value:
    """Input (…, features), weights (gates x hidden, features) and (gates x hidden, state), states (…, hidden).

    The state is the hidden units, or their projection (an LSTM's proj_size). One label per unit serves all layers,
    because their states are one tensor. ``*.data`` forms, of packed sequences, have no batch_first argument.
    """
    if "batch_first" not in op.args:
        return _packed(op)
    x = op.dims("input")
    for dim in x[:-1]:
        op.labels.freeze(dim, f"sequence or batch of {op.where}")
    states = op.args["hx"] if isinstance(op.args["hx"], (list, tuple)) else [op.args["hx"]]
    hidden, state, out = _layers(op, x[-1])
    for node, dim in zip(states, (state, hidden), strict=False):
        h = op.of(node)
        op.labels.unite(h[-1], dim, op.where)
        for other in h[:-1]:
            op.labels.freeze(other, f"layers or batch of {op.where}")
    y: Dims = [*[None] * (len(x) - 1), out]
    last: Dims = [*[None] * (len(x) - 1), state]
    cells: Dims = [*[None] * (len(x) - 1), hidden]
    return (y, last, cells) if len(states) == 2 else (y, last)


def _packed(op: Op) -> Value:
    for node in op.tensors:
        for dim in op.of(node):
            op.labels.freeze(dim, f"packed sequences in {op.where}")
    return tuple([None] * v.dim() for v in op.node.meta["val"])


def per_layer(op: Op) -> list[list[fx.Node]]:
    """The parameters of each layer and direction: w_ih, w_hh, then biases, then an LSTM's projection."""
    params, directions = list(op.args["params"]), 2 if op.args["bidirectional"] else 1
    count = len(params) // (int(op.args["num_layers"]) * directions)
    return [params[i : i + count] for i in range(0, len(params), count)]


def _layers(op: Op, features: Dim) -> tuple[Dim, Dim, Dim]:
    """Labels of the hidden units, of the state, and of the last layer's output."""
    gates, unite = GATES[operator_name(op.node.target)], op.labels.unite
    directions, biases = 2 if op.args["bidirectional"] else 1, 2 if op.args["has_biases"] else 0
    groups = per_layer(op)
    n = sizes_of(groups[0][0])[0] // gates
    hidden = _units(op, op.of(groups[0][0])[0], gates, n)
    op.labels.call(hidden, "hidden")
    projections = [op.of(group[2 + biases]) for group in groups if len(group) > 2 + biases]
    state = projections[0][0] if projections else hidden
    for rows, units in projections:
        unite(rows, state, op.where)
        unite(units, hidden, op.where)
    for layer, group in enumerate(groups):
        w_ih, w_hh = op.of(group[0]), op.of(group[1])
        for rows in (w_ih[0], w_hh[0], *(op.of(b)[0] for b in group[2 : 2 + biases])):
            unite(hidden, _units(op, rows, gates, n), op.where)
        unite(w_hh[1], state, op.where)
        unite(w_ih[1], features, op.where)
        if layer % directions == directions - 1:
            features = concatenate([state] * directions, [sizes_of(group[1])[1]] * directions)
    return hidden, state, features


def _units(op: Op, rows: Dim, gates: int, n: int) -> Dim:
    if gates == 1:
        return rows
    which, units = op.labels.split(rows, [gates, n], op.where)
    op.labels.freeze(which, f"gates of {op.where}")
    return units


RULES: dict[str, Rule] = dict.fromkeys(GATES, recurrent)
REWRITES: dict[str, Rewrite] = {}
