"""Names of axes that a person understands: where the units are, and what they are.

``layers.3.attn heads``, ``layers.3.mlp hidden``, ``residual stream``; a layer's own name where it alone makes them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from secateur.graph.types import Member, Weight


@dataclass(frozen=True)
class Place:
    """What is known about an axis before it has a name; ``word`` is what its rule called it, "" for plain channels."""

    members: Sequence[Member]
    word: str


def name(places: Sequence[Place], weights: Mapping[str, Weight]) -> list[str]:
    """One name per axis, in order: unique, and the same for the same architecture."""
    streams = [i for i, place in enumerate(places) if not place.word and _is_stream(place, weights)]
    places = _queries(places, weights)
    names = [_stream(p, weights, len(streams)) if i in streams else _name(p, weights) for i, p in enumerate(places)]
    taken: Counter[str] = Counter()
    unique = []
    for base in names:
        taken[base] += 1
        unique.append(base if taken[base] == 1 else f"{base} #{taken[base]}")
    return unique


def _queries(places: Sequence[Place], weights: Mapping[str, Weight]) -> list[Place]:
    """Of heads that are products, those of keys and values are kv heads, and the others are queries per kv head."""
    heads = [(i, set(_producers(p, weights))) for i, p in enumerate(places) if p.word == "heads"]
    words = {}
    owners: dict[str, list[tuple[int, set[str]]]] = {}
    for i, layers in heads:
        for layer in layers:
            owners.setdefault(layer, []).append((i, layers))
    for i, layers in heads:
        for j, others in owners[next(iter(layers))] if len(layers) == 1 else ():
            if layers < others:
                words[i], words[j] = "queries per kv head", "kv heads"
    return [replace(place, word=words.get(i, place.word)) for i, place in enumerate(places)]


def _producers(place: Place, weights: Mapping[str, Weight]) -> list[str]:
    """The layers whose outputs the units are."""
    return _layers(m for m in place.members if m.tensor in weights and m.dim == weights[m.tensor].out_dim)


def _consumers(place: Place, weights: Mapping[str, Weight]) -> list[str]:
    return _layers(m for m in place.members if m.tensor in weights and m.dim == weights[m.tensor].in_dim)


def _layers(members: Iterable[Member]) -> list[str]:
    return list(dict.fromkeys(m.tensor.removesuffix(".weight") for m in members))


def _is_stream(place: Place, weights: Mapping[str, Weight]) -> bool:
    """Several layers of different modules add up to the same units."""
    return len({_parent(layer) for layer in _producers(place, weights)}) > 1


def _stream(place: Place, weights: Mapping[str, Weight], count: int) -> str:
    """The stream of a whole network, or of the modules that hold more than half of what adds to it."""
    if count == 1:
        return "residual stream"
    layers = _producers(place, weights)
    best = ""
    for depth in range(1, max(layer.count(".") for layer in layers) + 1):
        scopes = Counter(".".join(layer.split(".")[:depth]) for layer in layers if layer.count(".") >= depth)
        scope, held = scopes.most_common(1)[0] if scopes else ("", 0)
        if 2 * held > len(layers):
            best = scope
    return f"{best} stream" if best else "residual stream"


def _name(place: Place, weights: Mapping[str, Weight]) -> str:
    producers, consumers = _producers(place, weights), _consumers(place, weights)
    first = place.members[0]
    if place.word:
        return f"{_common(_layers(place.members))} {place.word}".strip()
    if not producers:
        name = first.tensor.removesuffix(".weight")
        return f"{name} inputs" if first.tensor in weights else name
    scope = _parent(producers[0])
    inner = consumers and scope and {_parent(layer) for layer in producers + consumers} == {scope}
    linear = not any(weights[m.tensor].op.startswith("conv") for m in place.members if m.tensor in weights)
    return f"{scope} hidden" if inner and linear else producers[0]


def _parent(layer: str) -> str:
    return layer.rpartition(".")[0]


def _common(layers: Sequence[str]) -> str:
    """The innermost module that holds all of the layers; a single layer itself."""
    if len(layers) == 1:
        return layers[0]
    parts = [layer.split(".") for layer in layers]
    shared = 0
    while parts and all(len(p) > shared and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return ".".join(parts[0][:shared]) if parts else ""
