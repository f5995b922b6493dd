"""What only the user knows about a model: places that must keep the same units, outputs whose shape is not promised."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx

from secateur.errors import SpecError
from secateur.graph.labels import Dim
from secateur.graph.program import Program, outputs
from secateur.graph.types import Axis


def freed(module: fx.GraphModule, wish: bool | int | Iterable[int]) -> tuple[int, ...]:
    """Numbers of the output tensors that a wish means, True for all. Raises SpecError for one that is not there."""
    count = len(outputs(next(iter(reversed(module.graph.nodes)))))
    if isinstance(wish, bool):
        return tuple(range(count)) if wish else ()
    chosen = sorted({wish} if isinstance(wish, int) else set(wish))
    for i in chosen:
        if not (isinstance(i, int) and 0 <= i < count):
            raise SpecError(f"free_outputs names output {i!r}; the model returns {count} tensors, counted from 0")
    return tuple(chosen)


def tie(program: Program, axes: Sequence[Axis], ties: Iterable[tuple[str, str]]) -> None:
    """Unite the units of each pair: two axes by name, or dimensions of tensors, ``layer.weight:0``.

    Raises SpecError for a place that is not there, and for two of different size.
    """
    named = {axis.name: axis for axis in axes}

    def find(place: str) -> tuple[Dim, int]:
        if place in named:
            return named[place].atoms[None], named[place].units
        name, _, number = place.rpartition(":")
        tensor = program.tensors.get(program.aliases.get(name, name))
        if tensor is None or not number.isdecimal() or int(number) >= len(tensor.shape):
            raise SpecError(
                f"ties name {place!r}, which is neither an axis nor a dimension of a parameter; "
                "expected a name that `secateur inspect` lists, or such as 'layer.weight:0'"
            )
        return tensor.dims[int(number)], tensor.shape[int(number)]

    for pair in ties:
        if len(pair) != 2 or not all(isinstance(place, str) for place in pair):
            raise SpecError(f"a tie is a pair of names, found {pair!r}; expected such as ('a.weight:0', 'b.weight:0')")
        (a, size), (b, other) = map(find, pair)
        if size != other:
            raise SpecError(f"{pair[0]!r} has {size} units and {pair[1]!r} has {other}; only equal numbers can be tied")
        program.engine.unite(a, b, f"the tie of {pair[0]} and {pair[1]}")
