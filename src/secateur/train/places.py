"""Which weights of a model training prunes, found without tracing: wrapped and sharded models cannot be traced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from secateur import patterns
from secateur.errors import PlanError, SpecError
from secateur.graph.graph import Graph
from secateur.graph.types import Weight
from secateur.names import Choice, chosen
from secateur.patterns import Pattern

_ROWS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_COLUMNS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def to_prune(
    model: nn.Module, graph: Graph | None, pattern: Pattern, ignore: Choice | Sequence[Choice]
) -> Mapping[str, Weight]:
    """The weights that the pattern fits and nobody ignores, by name.

    Raises SpecError where there are none, PlanError for one that is not trained, or has no values yet.
    """
    known = dict(graph.weights) if graph is not None else weights_of(model)
    axes = [axis.name for axis in graph.axes] if graph is not None else []
    ignored = chosen(ignore, [*known, *axes], model, "ignore")
    fit = {n: w for n, w in known.items() if n not in ignored and not patterns.why_not(pattern, w)}
    if not fit:
        raise SpecError(
            f"pattern {pattern} applies to none of the {len(known)} weights of linear, convolution, recurrent and "
            f"attention layers that {type(model).__name__} has; choose another, or give graph=analyze(model, inputs)"
        )
    for name in fit:
        weight = model.get_parameter(name)
        if weight.is_meta:
            raise PlanError(f"{name!r} has no values yet (device meta); load the model first, then make the method")
        if not weight.requires_grad:
            raise PlanError(f"{name!r} is not trained (requires_grad is False); put it into ignore=, or train it")
    return fit


def weights_of(model: nn.Module) -> dict[str, Weight]:
    """The weights of linear layers, convolutions, recurrent and attention layers by name, tied ones once.

    One that an embedding shares is the embedding's, and not among them.
    Their multiply-adds are not known (0). A matrix that a module of one's own multiplies by is not among them: give
    ``graph=analyze(model, inputs)`` for those.
    """
    named = dict(model.named_parameters())
    found: dict[str, Weight] = {}
    for path, module in model.named_modules():
        for short, out_dim in _own(module):
            name = f"{path}.{short}" if path else short
            if name in named and named[name].ndim > 1:
                found[name] = Weight(name, tuple(named[name].shape), "module", out_dim, 1 - out_dim, 0)
    return found


def _own(module: nn.Module) -> Iterator[tuple[str, int]]:
    """The module's own weights, with the dimension of their outputs."""
    if isinstance(module, _ROWS):
        yield "weight", 0
    elif isinstance(module, _COLUMNS) or type(module).__name__ == "Conv1D":  # transformers': (inputs, outputs)
        yield "weight", 1
    elif isinstance(module, nn.MultiheadAttention):
        yield from ((name, 0) for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"))
    elif isinstance(module, nn.RNNBase):
        yield from ((name, 0) for name, _ in module.named_parameters() if name.startswith("weight_"))
