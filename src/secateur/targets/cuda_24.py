"""Lowering for CUDA: Linear layers with 2:4 zeros run on sparse tensor cores, wherever that is measured to be faster.

Which layers gain depends on their shape, on how many tokens they see and on the card, so every layer is measured.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.apply.blame import relative_error
from secateur.errors import SpecError, TargetError
from secateur.measure import latency
from secateur.progress import track
from secateur.runtime.tune import Choice
from secateur.targets.semi_structured import BACKENDS, Linear24, Packing, is_24, packings, short, why_not
from secateur.tasks import call, clone, device_of, mode, plain

GAIN = 1.05
"""A layer is taken where it is at least that many times as fast as dense."""

ROUNDS = 10
"""Rounds of timing at least."""

LAYER, MODEL = 4, 16
"""What a layer's outputs, and the whole model's, may differ from dense, in epsilons of the weights' dtype."""

Calls = Counter[tuple[torch.Size, torch.dtype]]
Timed = dict[Any, tuple[dict[str, float], Packing]]


def lower_24(model: nn.Module, inputs: Any, seconds: float = 0.1) -> tuple[nn.Module, tuple[Choice, ...]]:
    """A copy of the model for inference whose Linear layers run as 2:4 where that is faster, and a choice for each.

    inputs: example inputs on the model's device, a Tensor | tuple (positional) | dict (keyword). They say how many
    tokens each layer sees; ``seconds`` is how long each shape of layer is timed. A layer becomes "2:4" where its weight
    has such zeros, torch has a kernel for its dtype and shape, its outputs are those of the dense one, and it is GAIN
    times as fast; else it stays "dense". Where the whole model then is no faster, or says something else, all of it
    stays dense, and every choice says why.

    Raises TargetError without a CUDA device of compute capability 8.0, or with a model elsewhere; SpecError without
    inputs.
    """
    if inputs is None:
        raise SpecError("target 'cuda-2:4' times every layer on the tokens it sees; give example inputs")
    require_cuda(model)
    lowered = clone(plain(model)).requires_grad_(False)
    with suppress(NotImplementedError):  # an exported program keeps the mode it was captured in
        lowered.eval()
    layers = {name: m for name, m in lowered.named_modules() if isinstance(m, nn.Linear)}
    calls = _calls(lowered, inputs, layers)
    choices: list[Choice] = []
    taken: dict[nn.Module, nn.Module] = {}
    timed: Timed = {}
    for name, layer in track(layers.items(), "Timing layers as 2:4", len(layers)):
        choice, new = _decided(name, layer, calls[name], seconds, timed)
        choices.append(choice)
        if new is not None:
            taken[layer] = new
    if taken:
        _replace(lowered, taken)
        coarsest = max(torch.finfo(layer.weight.dtype).eps for layer in layers.values() if layer in taken)
        if why := _why_no_gain(plain(model), lowered, inputs, MODEL * coarsest, seconds):
            _replace(lowered, {new: layer for layer, new in taken.items()})
            choices = [Choice(c.layer, "dense", why if c.form == "2:4" else c.why, c.milliseconds) for c in choices]
    return lowered, tuple(choices)


def require_cuda(model: nn.Module) -> None:
    """Raises TargetError where the model is not on a CUDA device with sparse tensor cores."""
    if not torch.cuda.is_available():
        raise TargetError(
            "target 'cuda-2:4' needs a CUDA device, and torch finds none here; target 'cpu-sparse' is for this machine"
        )
    device = device_of(model)
    if device.type != "cuda":
        raise TargetError(f"target 'cuda-2:4' needs the model on a CUDA device, found it on {device}; use model.cuda()")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        found = f"{torch.cuda.get_device_name(device)} with {capability[0]}.{capability[1]}"
        raise TargetError(f"target 'cuda-2:4' needs compute capability 8.0 (Ampere) or later, found {found}")


def choose(milliseconds: Mapping[str, float], packing: object) -> tuple[str, str]:
    """ "2:4" or "dense" by their milliseconds, and why."""
    gain = milliseconds["dense"] / milliseconds["2:4"]
    if gain >= GAIN:
        return "2:4", f"{gain:.2f} times as fast as dense by {packing}"
    return "dense", f"2:4 by {packing} is {gain:.2f} times as fast as dense, expected at least {GAIN}"


def _why_dense(layer: nn.Linear, calls: Calls) -> str:
    """Why a layer stays dense, however fast a kernel may be."""
    if not calls and "forward" not in vars(layer):
        return "is not called on the inputs, or only its weight is read"
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        return f"is a {type(layer).__name__} with a forward of its own, expected a plain Linear"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "has hooks"
    weight = layer.weight
    if other := next((dtype for _, dtype in calls if dtype != weight.dtype), None):
        return f"has a weight of {short(weight.dtype)} and is called with {short(other)}"
    if weight.dtype == torch.int8:
        return "is int8 without scales; torch has no dense layer to compare it with"
    refused = [why_not(weight, layer.bias, backend) for backend in BACKENDS]
    if all(refused):
        return refused[0]
    return "" if is_24(weight) else "has more than 2 of 4 consecutive inputs that are not zero"


def _decided(
    name: str, layer: nn.Linear, calls: Calls, seconds: float, timed: Timed
) -> tuple[Choice, nn.Module | None]:
    """What becomes of a layer, and its 2:4 form where it has one. Layers of one shape share their times."""
    if why := _why_dense(layer, calls):
        return Choice(name, "dense", why, {}), None
    weight, most = layer.weight, max(shape.numel() // layer.in_features for shape, _ in calls)
    key = (weight.shape, weight.dtype, weight.device, layer.bias is None, frozenset(calls.items()))
    if key not in timed:
        ways, failed = packings(weight, layer.bias, most)
        if not ways:
            return Choice(name, "dense", "; ".join(failed), {}), None
        timed[key] = _fastest(layer, ways, calls, seconds)
    milliseconds, packing = timed[key]
    form, why = choose(milliseconds, packing)
    if form == "dense":
        return Choice(name, form, why, milliseconds), None
    new = Linear24(weight, layer.bias, packing)
    x = torch.randn(most, layer.in_features, device=weight.device).to(weight.dtype)
    with torch.inference_mode():
        error, allowed = relative_error(new(x), layer(x)), LAYER * torch.finfo(weight.dtype).eps
    if error > allowed:
        why = f"2:4 by {packing} differs from dense by {error:.2g} (relative), expected at most {allowed:.2g}"
        return Choice(name, "dense", why, milliseconds), None
    return Choice(name, form, why, milliseconds), new


def _fastest(
    layer: nn.Linear, ways: list[Packing], calls: Calls, seconds: float
) -> tuple[dict[str, float], Packing]:  # fmt: skip
    """Milliseconds of all calls of a layer, dense and by the fastest packing."""
    forms: dict[Packing | None, nn.Module] = {None: layer}
    forms |= {way: Linear24(layer.weight, layer.bias, way) for way in ways}
    total = dict.fromkeys(forms, 0.0)
    for (shape, dtype), count in calls.items():
        x = torch.randn(shape, device=layer.weight.device).to(dtype)
        for way, taken in times(forms, x, seconds).items():
            total[way] += count * taken
    dense = total.pop(None)
    best = min(ways, key=lambda way: total[way])
    return {"dense": dense, "2:4": total[best]}, best


def times(forms: Mapping[Any, Callable[[Tensor], Tensor]], x: Tensor, seconds: float) -> dict[Any, float]:
    """Milliseconds of each form on ``x``: medians over rounds in random order.

    Within a sample calls are queued one after the other, as a network queues its layers, so that what it costs to
    start a kernel counts only where it is longer than the kernel.
    """

    def sample(form: Callable[[Tensor], Tensor], number: int) -> float:
        _wait(x.device)
        start = time.perf_counter()
        for _ in range(number):
            form(x)
        _wait(x.device)
        return (time.perf_counter() - start) * 1e3 / number

    with torch.inference_mode():
        slowest = max(min(sample(form, 3) for _ in range(2)) for form in forms.values())
        number = max(1, min(50, round(1 / max(slowest, 1e-3))))
        samples: dict[Any, list[float]] = {name: [] for name in forms}
        order, shuffle = list(forms), random.Random(0).shuffle
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(samples[order[0]]) < ROUNDS:
            shuffle(order)
            for name in order:
                samples[name].append(sample(forms[name], number))
    return {name: float(np.median(taken)) for name, taken in samples.items()}


def _why_no_gain(dense: nn.Module, lowered: nn.Module, inputs: Any, allowed: float, seconds: float) -> str:
    """Why the whole model stays dense; "" where it is faster and says the same."""
    with mode(dense, training=False), torch.inference_mode():
        error = relative_error(call(lowered, inputs), call(dense, inputs))
    if error > allowed:
        return f"the whole model in 2:4 differs by {error:.2g} (relative), expected at most {allowed:.2g}"
    taken = latency({"dense": dense, "2:4": lowered}, inputs, 10 * seconds)
    ratio = taken["2:4"].ratio(taken["dense"]).value
    return "" if ratio < 1 else f"the whole model in 2:4 takes {ratio:.2f} of the time of dense"


def _calls(model: nn.Module, inputs: Any, layers: Mapping[str, nn.Linear]) -> dict[str, Calls]:
    """Shapes and dtypes that each layer is called with. Not by hooks: torch's encoder layers run otherwise then."""
    seen: dict[str, Calls] = {name: Counter() for name in layers}
    watched = {name: layer for name, layer in layers.items() if "forward" not in vars(layer)}

    def watch(name: str, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def noted(input: Tensor) -> Tensor:
            if input.numel():
                seen[name][input.shape, input.dtype] += 1
            return forward(input)

        return noted

    try:
        for name, layer in watched.items():
            layer.forward = watch(name, layer.forward)  # type: ignore[assignment, method-assign]
        with torch.inference_mode():
            call(model, inputs)
    finally:
        for layer in watched.values():
            vars(layer).pop("forward", None)
    return seen


def _replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in the place of others, wherever those are used."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in new:
                setattr(parent, name, new[child])


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
