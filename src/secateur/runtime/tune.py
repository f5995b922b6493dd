"""Which form of a layer is fastest here: tried out on this machine, and remembered.

Nothing is predicted. The forms that could pay are timed in turns with torch's dense layer, on activations of the shape
that the layer saw; what was found is kept in a file, under the layer's shape, its sparsity, the threads and the
processor.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from secateur.errors import DataError
from secateur.files import read_json, write_atomic
from secateur.runtime import kernels
from secateur.runtime.formats import Format
from secateur.runtime.product import FEW_TOKENS, Product

MARGIN = 0.95
"""A sparse form is taken where it needs less than this part of the dense time."""

ROUNDS, SECONDS = 7, 0.15
"""A layer is timed for that many rounds at least, and for about so long."""

_CACHE = "SECATEUR_CACHE"  # environment: another folder for what was found
_BEYOND_CACHES = 2**26  # bytes; reading as many leaves nothing else in a processor's caches


@dataclass(frozen=True)
class Choice:
    """What a layer runs as, and why. ``milliseconds``: of every form that was tried, "dense" among them."""

    layer: str
    form: str
    why: str
    milliseconds: dict[str, float]

    @property
    def gain(self) -> float:
        """How many times faster than dense; 1 for dense."""
        return self.milliseconds["dense"] / self.milliseconds[self.form] if self.form in self.milliseconds else 1.0


def choose(product: Product, values: str, cold: bool) -> tuple[Choice, Format | None]:
    """The fastest form of a layer; None for torch's dense one.

    values: "float32", "bfloat16" or "int8", how the sparse forms store weights. cold: whether weights come from memory
    and not from a cache, as they do in a large model.
    """
    formats = {str(f): f for f in candidates(product, values)}
    known = _known()
    key = _key(product, values, cold)
    times = known.get(key, {})
    if set(times) != {"dense", *formats}:
        times = _time(product, formats, cold)
        known[key] = times
        _remember(known)
    best = min(formats, key=times.__getitem__, default="dense")
    gain = times["dense"] / times[best]
    what = f"{product.density:.0%} of the weights are left"
    if times[best] < MARGIN * times["dense"]:
        why = f"{gain:.1f}x faster than dense on {product.tokens} tokens; {what}"
        return Choice(product.name, best, why, times), formats[best]
    why = f"{best} is {gain:.2f}x as fast on {product.tokens} tokens; {what}" if formats else f"no form pays; {what}"
    return Choice(product.name, "dense", why, times), None


def candidates(product: Product, values: str) -> list[Format]:
    """The forms worth trying: single weights where most are zero, blocks always, and for few tokens a bitmask, which
    spends work on zeros to save bytes."""
    density = product.density
    found = [Format("blocks", height, values) for height in (4, 16) if len(product.weight) >= height]
    if density <= 0.6:
        found.append(Format("blocks", 1, values))
    if density <= 0.7 and product.tokens <= FEW_TOKENS and product.window is None:
        found.append(Format("bitmask", 1, values))
    return found


def processor() -> str:
    """The processor's name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _time(product: Product, formats: dict[str, Format], cold: bool) -> dict[str, float]:
    """Milliseconds by form: the least over rounds in which each is called once. Other programs only add to it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(product.shape, generator=generator).to(product.weight.dtype)
    with torch.inference_mode():
        residual = torch.randn_like(product.by_torch(x)) if product.residual else None
        forms: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {"dense": product.dense}
        forms |= {name: product.sparse(format) for name, format in formats.items()}
        for form in forms.values():
            form(x, residual)
        taken: dict[str, list[float]] = {name: [] for name in forms}
        end = time.perf_counter() + SECONDS
        while time.perf_counter() < end or len(taken["dense"]) < ROUNDS:
            for name, form in forms.items():
                if cold:
                    _sweep().sum()
                start = time.perf_counter()
                form(x, residual)
                taken[name].append((time.perf_counter() - start) * 1e3)
    return {name: min(samples) for name, samples in taken.items()}


@functools.cache
def _sweep() -> Tensor:
    return torch.ones(_BEYOND_CACHES // 4)


def _key(product: Product, values: str, cold: bool) -> str:
    window = product.window
    walk = "" if window is None else f" {window.kernel}{window.stride}{window.padding}{window.dilation}"
    parts = [f"{list(product.weight.shape)} on {list(product.shape)}{walk}/{product.groups}"]
    parts += [" ".join(f"{product.fill(height):.2f}" for height in (1, 4, 16))]  # blocks decide, not weights alone
    parts += [product.activation, "residual" * product.residual, values, "cold" * cold]
    return " | ".join([*parts, f"{torch.get_num_threads()} threads"])


def _file() -> Path:
    """What was found on this processor with this engine and this torch."""
    base = os.environ.get(_CACHE) or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "secateur"
    name = f"{processor()} {kernels.isa()} {kernels.VERSION} torch {torch.__version__}"
    return Path(base) / f"layers-{re.sub(r'[^a-z0-9.]+', '-', name.lower())}.json"


def _known() -> dict[str, dict[str, float]]:
    """What the file holds; nothing where it is missing or damaged, for then it is made again."""
    try:
        found = read_json(_file())
    except DataError:
        return {}
    good = isinstance(found, dict) and all(
        isinstance(times, dict) and all(isinstance(v, float) and v > 0 for v in times.values())
        for times in found.values()
    )
    return found if good else {}


def _remember(known: dict[str, dict[str, float]]) -> None:
    """Written where that is possible; a folder that cannot be written only costs time."""
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_atomic(_file(), json.dumps(known, indent=1))
    except (OSError, DataError):
        return
