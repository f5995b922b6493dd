"""Torch's 2:4 kernels by themselves: what they compute, and how long they take. A part of gpu.py."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from gpu_run import Run, first, quantiles, short
from secateur.apply.blame import relative_error
from secateur.errors import PruneError
from secateur.targets import cuda_24
from secateur.targets import semi_structured as semi
from secateur.targets.semi_structured import BACKENDS, Packing

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (768, 3072))
TOKENS = (1, 16, 64, 512, 4096)
DTYPES = (torch.bfloat16, torch.float16, torch.int8)

FLUSH = 2**28
"""Bytes written between calls, more than any card's cache."""


def sparse_24(outputs: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A random weight of which two of every four consecutive inputs are kept, at random places."""
    keep = torch.rand(outputs, inputs // 4, 4, device=device).argsort(-1).lt(2).flatten(1)
    if dtype == torch.int8:
        return torch.randint(-5, 6, (outputs, inputs), device=device, dtype=torch.int32).mul(keep).to(dtype)
    return (torch.randn(outputs, inputs, device=device) * keep).to(dtype)


def activations(tokens: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if dtype == torch.int8:
        return torch.randint(-5, 6, (tokens, inputs), device=device, dtype=torch.int32).to(dtype)
    return torch.randn(tokens, inputs, device=device).to(dtype)


def padded(x: Tensor, backend: str) -> Tensor:
    return F.pad(x, (0, 0, 0, -len(x) % semi.padding(x.dtype, backend)))


def kernels(run: Run) -> None:
    sizes = ((64, 128), (256, 512), (768, 3072), (4096, 4096))
    for dtype in DTYPES:
        for backend in BACKENDS:
            for outputs, inputs in sizes[: 2 if run.dry else None]:
                name = f"{backend} {short(dtype)} {inputs} to {outputs}"
                if not run.fits(name):
                    continue
                weight = sparse_24(outputs, inputs, dtype, run.device)
                if why := semi.why_not(weight, None, backend):
                    run.keep(name, refused=why)
                    continue
                try:
                    run.keep(name, error=worst_error(weight, backend))
                except RuntimeError as error:
                    run.keep(name, failed=first(error))
    _cuda_layers(run)


def worst_error(weight: Tensor, backend: str) -> float:
    """Of several token counts, with a bias and without, against the dense product in float64."""
    packed, meta = semi.pack(weight, backend)
    bias = None if weight.dtype == torch.int8 else torch.randn(len(weight), device=weight.device).to(weight.dtype)
    out = torch.int32 if weight.dtype == torch.int8 else None
    worst = 0.0
    for tokens in (1, 7, 16, 129):
        for offset in (None, bias) if bias is not None else (None,):
            x = activations(tokens, weight.shape[1], weight.dtype, weight.device)
            wanted = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
            found = semi.multiply(padded(x, backend), packed, meta, offset, out_dtype=out)[:tokens]
            worst = max(worst, relative_error(found.double(), wanted))
    return worst


def _cuda_layers(run: Run) -> None:
    """What a user meets: layers that are lowered, whatever their shape."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        layer = nn.Linear(128, 64, device=run.device, dtype=dtype)
        layer.weight.data = sparse_24(64, 128, dtype, run.device)
        x = activations(33, 128, dtype, run.device)
        try:
            lowered = sc.lower(nn.Sequential(layer), x, target="cuda-2:4")
            choice = lowered.lowering.choices[0]
            error = relative_error(lowered(x), layer(x))
            run.keep(f"lower {short(dtype)}", form=choice.form, why=choice.why, error=error)
        except PruneError as error:
            run.keep(f"lower {short(dtype)}", refused=str(error))


# --- layers ------------------------------------------------------------------------------------------


def layers(run: Run) -> None:
    """Large token counts first, where 2:4 may win, so that a short run says the most."""
    shapes, tokens = (((64, 128),), (1, 16)) if run.dry else (SHAPES, TOKENS)
    for number in sorted(tokens, reverse=True):
        for outputs, inputs in shapes:
            for dtype in DTYPES:
                name = f"{short(dtype)} {inputs} to {outputs}, {number} tokens"
                if run.fits(name):
                    try:
                        run.keep(name, **one_layer(outputs, inputs, number, dtype, run))
                    except RuntimeError as error:
                        run.keep(name, failed=first(error))


def one_layer(outputs: int, inputs: int, tokens: int, dtype: torch.dtype, run: Run) -> dict[str, Any]:
    weight = sparse_24(outputs, inputs, dtype, run.device)
    x = activations(tokens, inputs, dtype, run.device)
    forms, failed = dict[str, Callable[[], Tensor]](), dict[str, str]()
    forms["dense"] = (lambda: int_mm(x, weight)) if dtype == torch.int8 else (lambda: F.linear(x, weight))
    out = torch.int32 if dtype == torch.int8 else None
    for backend in BACKENDS:
        try:
            packed, meta = semi.pack(weight, backend)
            many = padded(x, backend)

            def product(
                packed: Tensor = packed, meta: Tensor | None = meta, many: Tensor = many, way: int = 0
            ) -> Tensor:
                return semi.multiply(many, packed, meta, None, way, out)

            product()
            forms[backend] = product
            for best in semi.searched(weight, None, tokens, backend):
                forms[f"{backend} best"] = lambda product=product, best=best: product(way=best.algorithm)
                failed["algorithm"] = str(best.algorithm)
        except RuntimeError as error:
            failed[backend] = first(error)
    times = kernel_times(forms, run.device)
    fastest = min((name for name in times if name != "dense"), key=lambda name: times[name][0], default="dense")
    gain = times["dense"][0] / times[fastest][0]
    return {"ms": times, "best": fastest, "times_as_fast": round(gain, 3), "notes": failed}


def int_mm(x: Tensor, weight: Tensor) -> Tensor:
    """Dense int8: torch asks for more than 16 tokens."""
    missing = max(0, 32 - len(x)) if x.is_cuda else 0
    return torch._int_mm(F.pad(x, (0, 0, 0, missing)), weight.t())


def kernel_times(forms: dict[str, Callable[[], Tensor]], device: torch.device) -> dict[str, list[float]]:
    """Milliseconds on the card of single calls with cold caches: median, 10th and 90th percentile, in random order."""
    taken: dict[str, list[float]] = {name: [] for name in forms}
    order, shuffle = list(forms), random.Random(0).shuffle
    flush = torch.empty(FLUSH if device.type == "cuda" else 0, dtype=torch.int8, device=device)
    with torch.inference_mode():
        for form in forms.values():
            for _ in range(3):
                form()
        pairs: list[tuple[str, Any, Any]] = []
        for _ in range(30):
            shuffle(order)
            for name in order:
                flush.zero_()
                before, after = mark(device), None
                forms[name]()
                after = mark(device)
                pairs.append((name, before, after))
        if device.type == "cuda":
            torch.cuda.synchronize()
    for name, before, after in pairs:
        ms = before.elapsed_time(after) if device.type == "cuda" else (after - before) * 1e3
        taken[name].append(ms)
    return {name: quantiles(samples) for name, samples in taken.items()}


def mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def emulate() -> None:
    """For a dry run: 2:4 by dense products on the CPU, so that everything round the kernels runs."""

    def multiply(
        x: Tensor, packed: Tensor, meta: Any, bias: Tensor | None = None, algorithm: int = 0, out_dtype: Any = None
    ) -> Tensor:
        return F.linear(x.float(), packed.float(), None if bias is None else bias.float()).to(out_dtype or x.dtype)

    semi.pack = lambda weight, backend: (weight, None)
    semi.multiply = multiply
    semi.searched = lambda weight, bias, tokens, backend="cuSPARSELt": (
        [Packing(backend, 1, tokens)] if backend == "cuSPARSELt" else []
    )
    cuda_24.require_cuda = lambda model: None
