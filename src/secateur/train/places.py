"""Which weights of a model training prunes, found without tracing: wrapped and sharded models cannot be traced."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from secateur.graph.types import Weight

_ROWS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_COLUMNS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def weights_of(model: nn.Module) -> dict[str, Weight]:
    """The weights of linear layers, convolutions, recurrent and attention layers by name, tied ones once.

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
