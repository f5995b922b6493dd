"""``lstm_cell``, ``gru_cell``, ``rnn_tanh_cell``, ``rnn_relu_cell``: one step of a recurrent layer."""

from __future__ import annotations

from secateur.graph.labels import Dim
from secateur.graph.rules.base import Op, Rewrite, Rule, Value, operator_name

_GATES = {"lstm_cell": 4, "gru_cell": 3, "rnn_tanh_cell": 1, "rnn_relu_cell": 1}


def cell(op: Op) -> Value:
    """Input (batch?, features), states (batch?, hidden), weights (gates x hidden, features | hidden)."""
    name, unite = operator_name(op.node.target), op.labels.unite
    gates, x = _GATES[name], op.dims("input")
    states = [op.of(h) for h in (op.args["hx"] if name == "lstm_cell" else [op.args["hx"]])]
    hidden: Dim = states[0][-1]
    for state in states:
        unite(state[-1], hidden, op.where)
        for mine, other in zip(state[:-1], x[:-1], strict=True):
            unite(mine, other, op.where)
    for name_ in ("w_ih", "w_hh", "b_ih", "b_hh"):
        if op.args[name_] is not None:
            unite(_units(op, op.dims(name_)[0], gates), hidden, op.where)
    unite(op.dims("w_ih")[1], x[-1], op.where)
    unite(op.dims("w_hh")[1], hidden, op.where)
    out = [*x[:-1], hidden]
    return (out, list(out)) if name == "lstm_cell" else out


def _units(op: Op, rows: Dim, gates: int) -> Dim:
    """The hidden units of (gates x hidden) rows; the gates themselves stay."""
    if rows is None or gates == 1:
        return rows
    which, units = op.labels.split(rows, [gates, rows.shape[1] // gates], op.where)
    op.labels.freeze(which, f"gates of {op.where}")
    return units


RULES: dict[str, Rule] = dict.fromkeys(_GATES, cell)
REWRITES: dict[str, Rewrite] = {}
