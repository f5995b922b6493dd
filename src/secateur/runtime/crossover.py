"""From which sparsity on pruning pays on this machine: every pattern against torch's fastest dense form.

Layers of one size are filled with random zeros of each pattern and timed in turns with the dense layer. Where weights
lie does not depend on their values, so nothing is trained.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import SpecError, TargetError
from secateur.progress import track
from secateur.runtime import kernels
from secateur.runtime.formats import Format
from secateur.runtime.layers import Window
from secateur.runtime.product import FEW_TOKENS, Product
from secateur.runtime.tune import MARGIN, processor
from secateur.tasks import Interval

SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
"""Parts of the weights that are zero, where layers are timed."""

TOKENS = (1, 128)
"""How many tokens a linear layer is timed on. One is timed with weights that come from memory, as in a large model."""

ROUNDS = 5
"""Rounds of timing at least."""

TOLERANCE = 1e-4
"""What a sparse layer's outputs may differ from the dense one's, relative to the largest."""

_BEYOND_CACHES = 2**26  # bytes; reading as many leaves nothing else in a processor's caches


@dataclass(frozen=True)
class Curve:
    """What a pattern gains in one layer.

    gains: by sparsity how many times faster than dense, the median over paired rounds and its 10th and 90th percentile.
    forms: by sparsity the engine's form that is fastest. wins: the least sparsity at which it is faster by MARGIN, by
    interpolation between those timed; the least timed one where it wins there already, None where it never does.
    """

    layer: str
    pattern: str
    gains: Mapping[float, Interval]
    forms: Mapping[float, str]
    wins: float | None


@dataclass(frozen=True)
class Crossover:
    """Every curve, and the machine they hold for: its processor, the engine's instruction set, threads.

    load: the system's over the minute before; what runs beside makes times of several threads worthless.
    """

    processor: str
    isa: str
    threads: int
    load: float
    curves: tuple[Curve, ...]


def crossover(linear: Sequence[int], conv: Sequence[int], seconds: float = 30.0) -> Crossover:
    """Time every pattern in a Linear layer (outputs, inputs) and a 3x3 convolution (outputs, inputs, height = width).

    seconds: how long to time in all, without making the layers. Raises TargetError where the engine was not built, or
    says something else than torch; SpecError for sizes below 16.
    """
    if why := kernels.why_missing():
        raise TargetError(why)
    if min(*linear, *conv[:2]) < 16 or conv[2] < 1:
        small = " and ".join("x".join(map(str, size)) for size in (linear, conv))
        raise SpecError(f"layers of {small} are too small to time; expected 16 channels and a pixel at least")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    layers = list(_layers(linear, conv))
    places = [(layer, sparsity) for layer in layers for sparsity in SPARSITIES]
    found: dict[tuple[str, str], dict[float, tuple[str, Interval]]] = {}
    for layer, sparsity in track(places, "Timing patterns", len(places)):
        for pattern, best in _fastest(layer, sparsity, seconds / len(places)).items():
            found.setdefault((layer.name, pattern), {})[sparsity] = best
    curves = (
        Curve(
            layer,
            pattern,
            {sparsity: gain for sparsity, (_, gain) in points.items()},
            {sparsity: form for sparsity, (form, _) in points.items()},
            wins({sparsity: gain.value for sparsity, (_, gain) in points.items()}),
        )
        for (layer, pattern), points in found.items()
    )
    return Crossover(processor(), kernels.isa(), torch.get_num_threads(), load, tuple(curves))


def sizes(text: str, number: int) -> tuple[int, ...]:
    """``3072x768`` as numbers. Raises SpecError where there are not as many."""
    found = text.lower().split("x")
    if len(found) != number or not all(part.strip().isdecimal() for part in found):
        expected = {2: "3072x768", 3: "128x128x28"}[number]
        raise SpecError(f"size {text!r} cannot be read; expected {number} numbers such as {expected}")
    return tuple(int(part) for part in found)


def wins(gains: Mapping[float, float]) -> float | None:
    """The least sparsity at which a form is 1 / MARGIN times as fast as dense.

    gains: by sparsity, rising, how many times faster. Between two of them the time is taken to fall in a straight line.
    """
    points = sorted(gains.items())
    below = None
    for sparsity, gain in points:
        if gain * MARGIN >= 1:
            if below is None:
                return sparsity
            slow, fast = 1 / below[1], 1 / gain
            return below[0] + (sparsity - below[0]) * (slow - MARGIN) / (slow - fast)
        below = sparsity, gain
    return None


def masked(weight: Tensor, pattern: str, sparsity: float) -> Tensor:
    """The weight (outputs, …) with random zeros in exactly that part of its units; "2:4" has its own part."""
    generator = torch.Generator().manual_seed(0)
    matrix = weight.flatten(1)
    rows, cols = matrix.shape
    if pattern == "2:4":
        order = torch.rand(rows, -(-cols // 4), 4, generator=generator).argsort(-1)
        return (matrix * (order < 2).flatten(1)[:, :cols]).view_as(weight)
    height = {"unstructured": 1, "block:4x1": 4, "block:16x1": 16}[pattern]
    units = -(-rows // height) * cols
    keep = torch.zeros(units, dtype=torch.bool)
    keep[torch.randperm(units, generator=generator)[: units - round(units * sparsity)]] = True
    return (matrix * keep.view(-1, cols).repeat_interleave(height, 0)[:rows]).view_as(weight)


def _layers(linear: Sequence[int], conv: Sequence[int]) -> Iterator[Product]:
    generator = torch.Generator().manual_seed(0)
    outputs, inputs = linear
    for tokens in TOKENS:
        name = f"Linear {inputs} to {outputs}, {tokens} token{'s' * (tokens > 1)}"
        yield Product(name, torch.randn(outputs, inputs, generator=generator), None, (tokens, inputs))
    outputs, inputs, side = conv
    weight = torch.randn(outputs, inputs, 3, 3, generator=generator)
    window = Window((3, 3), padding=(1, 1))
    name = f"Conv 3x3 {inputs} to {outputs} on {side}x{side}"
    yield Product(name, weight, None, (1, inputs, side, side), window)


def _formats(layer: Product, pattern: str) -> list[Format]:
    if pattern.startswith("block:"):
        return [Format("blocks", int(pattern.removeprefix("block:").removesuffix("x1")))]
    few = layer.window is None and layer.tokens <= FEW_TOKENS
    return [Format("blocks", 1), *([Format("bitmask")] if few else [])]


def _fastest(layer: Product, sparsity: float, seconds: float) -> dict[str, tuple[str, Interval]]:
    """By pattern its fastest form at a sparsity, and how many times faster than dense that is."""
    x = torch.randn(layer.shape, generator=torch.Generator().manual_seed(1))
    runs: dict[tuple[str, str], Callable[[], Tensor]] = {}
    for pattern in ("unstructured", "block:4x1", "block:16x1", *(["2:4"] if sparsity == 0.5 else [])):
        weight = masked(layer.weight, pattern, sparsity)
        pruned = Product(layer.name, weight, None, layer.shape, layer.window)
        wanted = pruned.by_torch(x)
        for format in _formats(layer, pattern):
            module = pruned.sparse(format)
            gap = float((module(x) - wanted).abs().max() / wanted.abs().max())
            if not gap <= TOLERANCE:
                raise TargetError(f"the engine's {format} differs from torch by {gap:.2g} (relative) in {layer.name}")
            runs[pattern, str(format)] = _call(module, x)
    dense = {("dense", str(i)): run for i, run in enumerate(_dense(layer, x))}
    taken = _rounds({**runs, **dense}, seconds, cold=layer.window is None and layer.tokens == 1)
    fastest = np.minimum.reduce([taken[name] for name in dense])
    gains = {name: fastest / taken[name] for name in runs}
    best: dict[str, tuple[str, Interval]] = {}
    for (pattern, form), gain in gains.items():
        low, median, high = np.percentile(gain, (10, 50, 90))
        if pattern not in best or median > best[pattern][1].value:
            best[pattern] = form, Interval(float(median), float(low), float(high))
    return best


def _call(module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return lambda: module(x)


def _dense(layer: Product, x: Tensor) -> list[Callable[[], Tensor]]:
    """Torch's dense forms: the layer as it is; with a weight packed by oneDNN, which can be much faster than what
    ``F.linear`` calls; a convolution with channels last, which other layers must keep.
    """
    if layer.window is None:
        if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            return [lambda: layer.by_torch(x)]
        packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight, len(x))
        return [
            lambda: layer.by_torch(x),
            lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""),
        ]
    weight, last = (value.to(memory_format=torch.channels_last) for value in (layer.weight, x))
    other = Product(layer.name, weight, None, layer.shape, layer.window)
    return [lambda: layer.by_torch(x), lambda: other.by_torch(last)]


def _rounds(
    runs: Mapping[tuple[str, str], Callable[[], Tensor]], seconds: float, cold: bool
) -> dict[tuple[str, str], np.ndarray]:
    """Seconds of each call, one sample a round, in random order. cold: nothing is in the caches before a call."""
    sweep = torch.ones(_BEYOND_CACHES // 4 if cold else 0)
    taken: dict[tuple[str, str], list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    with torch.inference_mode():
        for run in runs.values():
            run()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(taken[order[0]]) < ROUNDS:
            shuffle(order)
            for name in order:
                if cold:
                    sweep.sum()
                start = time.perf_counter()
                runs[name]()
                taken[name].append(time.perf_counter() - start)
    return {name: np.array(samples) for name, samples in taken.items()}
