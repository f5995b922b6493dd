"""What a model really costs: parameters, MACs, bytes, milliseconds, memory. Measured, not estimated."""

from __future__ import annotations

import random
import time
import weakref
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur.errors import DataError, SpecError, TraceError
from secateur.graph import analyze
from secateur.tasks import Interval, call, device_of, mode

WARMUP = 3
"""Calls of each model before the clock runs: allocator, caches, kernels chosen by trial."""

ROUNDS = 10
"""Rounds at least, however slow the models."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds of single calls, one sample per round, taken with ``threads`` threads."""

    samples: tuple[float, ...] = field(repr=False)
    threads: int

    @property
    def runs(self) -> int:
        return len(self.samples)

    @property
    def spread(self) -> Interval:
        """The median and the 10th and 90th percentile, in milliseconds."""
        return _spread(np.asarray(self.samples))

    def ratio(self, baseline: Latency) -> Interval:
        """This time over the baseline's, paired by round: the median, 10th and 90th percentile.

        Pairing cancels what slows a whole round down, such as another program on the machine.
        Raises DataError where the two were not measured in one call of ``latency``.
        """
        if self.runs != baseline.runs:
            raise DataError(
                f"rounds of {self.runs} and {baseline.runs} samples do not pair; "
                "measure both models in one call of latency()"
            )
        return _spread(np.asarray(self.samples) / np.asarray(baseline.samples))


@dataclass(frozen=True)
class Measurement:
    """What one model costs.

    Tied parameters count once. ``macs`` are multiply-adds on the inputs given (None where the model
    cannot be traced), ``bytes`` the size as a safetensors file, ``memory`` the peak of live tensor
    bytes during one call: weights, inputs and activations, without the scratch space inside kernels
    on a CPU. ``against`` holds the latency of each model that was timed in turns with this one.
    """

    params: int
    nonzero: int
    macs: int | None
    bytes: int
    latency: Latency
    memory: int
    against: Mapping[str, Latency] = field(default_factory=dict)


def measure(
    model: nn.Module, inputs: Any, against: Mapping[str, nn.Module] | None = None, seconds: float = 2.0
) -> Measurement:
    """Measure ``model`` on ``inputs`` (Tensor | tuple of positional | dict of keyword arguments).

    Its latency is taken in turns with that of the models of ``against``, for about ``seconds`` in
    all. The model is not changed.
    """
    others = dict(against or {})
    times = latency({**others, "": model}, inputs, seconds)
    return Measurement(
        params=sum(p.numel() for p in model.parameters()),
        nonzero=sum(int(p.count_nonzero()) for p in model.parameters()),
        macs=_macs(model, inputs),
        bytes=file_bytes(model),
        latency=times[""],
        memory=peak_memory(model, inputs),
        against={name: times[name] for name in others},
    )


def latency(models: Mapping[str, nn.Module], inputs: Any, seconds: float = 2.0) -> dict[str, Latency]:
    """Time the models side by side: every round calls each of them once, in random order.

    Runs for about ``seconds`` in all and at least ten rounds, after a warm-up, in evaluation and
    inference mode. Raises SpecError where there is no model.
    """
    if not models:
        raise SpecError("latency needs at least one model to time, found none")
    samples: dict[str, list[float]] = {name: [] for name in models}
    order = list(models)
    shuffle = random.Random(0).shuffle
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        for model in models.values():
            stack.enter_context(mode(model, training=False))
            for _ in range(WARMUP):
                call(model, inputs)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(samples[order[0]]) < ROUNDS:
            shuffle(order)
            for name in order:
                samples[name].append(_time(models[name], inputs))
    threads = torch.get_num_threads()
    return {name: Latency(tuple(taken), threads) for name, taken in samples.items()}


def file_bytes(model: nn.Module) -> int:
    """The size of the model's state as a safetensors file, tied tensors stored once."""
    tensors = {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}
    unique = {(t.data_ptr(), t.shape, t.stride()): (name, t) for name, t in tensors.items()}
    # Cloned, because the format refuses tensors that share memory.
    return len(safetensors.torch.save({n: t.clone(memory_format=torch.contiguous_format) for n, t in unique.values()}))


def peak_memory(model: nn.Module, inputs: Any) -> int:
    """The peak of live tensor bytes during one call: weights, buffers, inputs and activations.

    On a CPU counted over the storages of every tensor that an operator returns, so without the
    scratch space inside kernels; on CUDA taken from the allocator, with it.
    """
    device = device_of(model)
    live = _LiveBytes([*model.parameters(), *model.buffers(), *tree_leaves(inputs)])
    with mode(model, training=False), torch.no_grad():
        if device.type != "cuda":
            with live:
                call(model, inputs)
            return live.peak
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call(model, inputs)
        return live.peak + torch.cuda.max_memory_allocated(device) - before


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, from those of ``held`` on."""

    def __init__(self, held: Iterable[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}
        for value in held:
            self._meet(value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            self._meet(value)
        return result

    def _meet(self, value: Any) -> None:
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, lambda _: self._part(key, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def _part(self, key: int, size: int) -> None:
        del self._alive[key]
        self.live -= size


def _time(model: nn.Module, inputs: Any) -> float:
    """Milliseconds of one call, the device's queue empty before and after."""
    device = device_of(model)
    _wait(device)
    start = time.perf_counter()
    call(model, inputs)
    _wait(device)
    return (time.perf_counter() - start) * 1e3


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _spread(samples: NDArray[np.float64]) -> Interval:
    low, median, high = np.percentile(samples, (10, 50, 90))
    return Interval(float(median), float(low), float(high))


def _macs(model: nn.Module, inputs: Any) -> int | None:
    try:
        graph = analyze(model, inputs)
        return None if graph.program.hidden else graph.cost().macs
    except TraceError:
        return None
