"""Single layers on the sparse CPU engine against every dense runtime of the same precision, from 50 to 95 % zeros.

    python benchmarks/sparse_kernels.py                 # resumable: rows of today's results are not run again
    python benchmarks/sparse_kernels.py "Conv 3x3"      # only layers whose name has that in it
    python benchmarks/sparse_kernels.py --threads 1 --quick   # 90 % only, for an instant; nothing is written

All forms of a layer are timed in turns in one process, each form's outputs are compared with eager torch's on the same
masked weight, and dense runtimes keep their own best layout. A row says how many times faster than eager torch and than
the fastest dense runtime of the same precision (paired by round), and how near the form is to what could be had:

bytes  of one token, whose weights come from memory: the packed bytes over the bandwidth that torch's sum reaches here
rate   otherwise: useful multiply-adds a millisecond, over those of the same form's row without zeros

"others" is how many processors other programs kept busy meanwhile: rows above 0.1 are those of a busy machine.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import common
import rivals
from rivals import Make, Run
from secateur.errors import PruneError
from secateur.runtime import kernels
from secateur.runtime.crossover import masked
from secateur.runtime.formats import Format, quantized
from secateur.runtime.layers import Window
from secateur.runtime.product import Product

SPARSITIES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95)
PATTERNS = {"csr": "unstructured", "bitmask": "unstructured", "4x1": "block:4x1", "16x1": "block:16x1"}
INT8 = "4x1 int8, activations too"
"""The one form whose activations are rounded as well, as those of dense int8 are."""

FORMS = {str(f): f for v in ("float32", "bfloat16", "int8") for h in (1, 4, 16) for f in (Format("blocks", h, v),)}
FORMS |= {str(f): f for v in ("float32", "bfloat16", "int8") for f in (Format("bitmask", 1, v),)}
FORMS[INT8] = Format("blocks", 4, "int8")


@dataclass(frozen=True)
class Place:
    """A layer, the shape of its input, and the engine's forms for it. cold: weights come from memory."""

    name: str
    module: nn.Module
    shape: tuple[int, ...]
    forms: tuple[str, ...]
    cold: bool = False

    @property
    def window(self) -> Window | None:
        conv = self.module
        return Window(conv.kernel_size, padding=conv.padding) if isinstance(conv, nn.Conv2d) else None  # type: ignore[arg-type]


def places() -> list[Place]:
    torch.manual_seed(0)
    blocks = ("csr", "4x1", "16x1")
    many = tuple(f for f in FORMS if f != INT8)
    found = [
        Place("Linear 768 to 3072, 128 tokens", nn.Linear(768, 3072), (128, 768), (*blocks, "4x1 bfloat16", INT8)),
        Place("Linear 4096 to 4096, 1 token", nn.Linear(4096, 4096), (1, 4096), many, cold=True),
        Place("Conv 3x3 128 to 128 on 28x28", nn.Conv2d(128, 128, 3, padding=1), (1, 128, 28, 28), blocks),
        Place("Conv 3x3 64 to 64 on 56x56", nn.Conv2d(64, 64, 3, padding=1), (1, 64, 56, 56), blocks),
        Place("Conv 1x1 512 to 128 on 28x28", nn.Conv2d(512, 128, 1), (1, 512, 28, 28), blocks),
    ]
    for place in found:
        place.module.eval().requires_grad_(False)
    return found


# --- the forms ---------------------------------------------------------------------------------------


def engine(place: Place, form: str, sparsity: float, x: Tensor) -> tuple[Run, int, float]:
    """A form of the engine, its packed bytes, and its difference from eager torch on the same masked weight."""
    weight, bias = place.module.weight, place.module.bias
    pruned = Product(place.name, masked(weight, PATTERNS[form.split()[0]], sparsity), bias, place.shape, place.window)
    module = pruned.sparse(FORMS[form])
    size = module.packed.numel()

    def make() -> Run:
        if form != INT8:
            own = copy.deepcopy(module)
            return lambda: own(x)
        packed = module.packed.clone()
        return lambda: kernels.linear(x, packed, bias, None, "", quantize=True)

    run = rivals.several(make, size, place.cold)
    return run, size, rivals.difference(run(), pruned.by_torch(x))


def dense(place: Place, threads: int, x: Tensor) -> tuple[dict[str, Run], dict[str, str]]:
    """Every dense runtime of the layer, by name, and why some are missing."""
    module = place.module
    forms = rivals.dense(module, x, threads, cold=place.cold)
    if isinstance(module, nn.Conv2d):
        last = x.to(memory_format=torch.channels_last)
        changed = copy.deepcopy(module).to(memory_format=torch.channels_last)
        forms["torch channels last"] = ("float32", lambda: rivals.eager(changed, last))
    else:
        forms |= dict(_linear(module, x, threads))
    return rivals.made(forms, module(x), module.weight.nbytes, cold=place.cold)


def _linear(module: nn.Module, x: Tensor, threads: int) -> Iterator[tuple[str, tuple[str, Make]]]:
    """Dense forms that torch has for Linear layers alone, and those with 8 bits."""
    weight, bias = module.weight, module.bias
    whole, scale = quantized(weight)
    whole = whole.to(torch.int8)

    def onednn() -> Run:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
        return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    def int8() -> Run:
        turned = whole.clone().t()

        def run() -> Tensor:
            step = x.abs().amax(1, keepdim=True) / 127
            y = torch._int_mm((x / step).round().to(torch.int8), turned)
            return y * step * scale.view(1, -1) + bias

        return run

    def int8_weights() -> Run:
        own, half, steps = whole.clone(), x.bfloat16(), scale.flatten().bfloat16()
        return lambda: torch._weight_int8pack_mm(half, own, steps) + bias

    def missing() -> Run:
        raise rivals.Refused("its int8 needs the package nncf, which is not used here")

    yield "torch oneDNN", ("float32", onednn)
    yield "torch int8", ("int8", int8)
    yield "torch int8 weights", ("int8", int8_weights)
    yield "onnxruntime int8", ("int8", lambda: rivals.onnxruntime(module, x, threads, rivals.quantized))
    yield "openvino int8", ("int8", missing)


def torch_csr(place: Place, sparsity: float, x: Tensor) -> Run:
    """Torch's own sparse layout, of one weight, for comparison."""
    weight = masked(place.module.weight, "unstructured", sparsity).to_sparse_csr()
    bias, turned = place.module.bias[:, None], x.t().contiguous()
    return lambda: weight @ turned + bias


# --- rows --------------------------------------------------------------------------------------------


def key(place: Place, form: str, sparsity: float, threads: int) -> str:
    return f"{place.name} | {form} | {100 * sparsity:.0f}% | {threads}"


def measured(place: Place, sparsity: float, threads: int, seconds: float, baselines: Any) -> common.Row:
    """A row for each form of the engine at one sparsity, by form. baselines: what ``dense`` made."""
    found, missing = baselines
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(place.shape, generator=generator)
    runs, about = dict(found), dict[str, common.Row]()
    for form in place.forms:
        try:
            run, size, gap = engine(place, form, sparsity, x)
        except PruneError as error:
            about[form] = {"refused": str(error)}
            continue
        runs[form], about[form] = run, {"bytes": size, "error": gap}
    if isinstance(place.module, nn.Linear) and sparsity > 0:
        runs["torch csr"] = torch_csr(place, sparsity, x)
    if place.cold:
        runs["memory"] = rivals.read()
    with rivals.others() as load:
        taken = rivals.rounds(runs, seconds)
    times = {name: rivals.spread(latency) for name, latency in taken.items() if name not in place.forms}
    macs, read = _macs(place), times.pop("memory", None)
    for form, row in about.items():
        if form not in taken:
            continue
        values = FORMS[form].values
        rivalling = [name for name in found if _values(name) == values]
        best = min(rivalling, key=lambda name: times[name][0], default="torch")
        ms = rivals.spread(taken[form])
        rate = macs * (1 - sparsity) / ms[0]
        row |= {"layer": place.name, "form": form, "values": values, "sparsity": sparsity, "threads": threads, "ms": ms}
        row |= {"gflops": round(2 * rate / 1e6, 2), "best": best}
        row |= {"vs_torch": rivals.ratio(taken[form], taken["torch"])}
        row |= {"vs_best": rivals.ratio(taken[form], taken[best]), "dense": times, "missing": missing, **load}
        row["macs_per_ms"] = round(rate)
        if read is not None:  # the tenth of the rounds that was least disturbed says what memory can do
            row |= {"of_bytes": round(row["bytes"] / (rivals.READ / read[1]) / ms[0], 3)}
            row |= {"bandwidth": round(rivals.READ / read[1] / 1e6, 2)}
    return about


def _values(name: str) -> str:
    return "bfloat16" if "bfloat16" in name else "int8" if "int8" in name else "float32"


def _macs(place: Place) -> int:
    """Of the dense layer: every weight once for each token or pixel, those at the edge included."""
    return place.module.weight.numel() * place.shape[0] * torch.Size(place.shape[2:]).numel()


def run(words: list[str], counts: list[int], quick: bool, seconds: float) -> None:
    rows = {} if quick else common.rows("sparse_kernels", today=True)
    for threads in counts:
        torch.set_num_threads(threads)
        for place in places():
            if not all(word in place.name for word in words):
                continue
            baselines = None
            for sparsity in (0.9,) if quick else SPARSITIES:
                if all(key(place, form, sparsity, threads) in rows for form in place.forms):
                    continue
                x = torch.randn(place.shape, generator=torch.Generator().manual_seed(1))
                baselines = baselines or dense(place, threads, x)
                found = measured(place, sparsity, threads, 0.5 if quick else seconds, baselines)
                commit = {"commit": common.commit()}
                rows |= {key(place, form, sparsity, threads): row | commit for form, row in found.items()}
                if not quick:
                    common.save("sparse_kernels", rows)
                told(place, sparsity, threads, found)


def told(place: Place, sparsity: float, threads: int, found: common.Row) -> None:
    print(f"{place.name}, {sparsity:.0%}, {threads} threads", flush=True)
    for form, row in found.items():
        if "ms" in row:
            of = f"{row['of_bytes']:.0%} of the bytes" if "of_bytes" in row else f"{row['gflops']} GFLOP/s"
            print(
                f"  {form:26} {row['ms'][0]:8.3f} ms {row['vs_torch'][0]:6.2f}x torch {row['vs_best'][0]:6.2f}x "
                f"{row['best']}, {of}, error {row['error']:.1e}, others {row['others']}",
                flush=True,
            )
        else:
            print(f"  {form:26} {row['refused']}")
    last = next((row for row in found.values() if "dense" in row), None)
    if last:
        print("  dense", {name: ms[0] for name, ms in last["dense"].items()}, last["missing"], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Single layers on the sparse engine against dense runtimes.")
    parser.add_argument("words", nargs="*", help="only layers whose name has all of these in it")
    parser.add_argument("--threads", type=int, action="append", help="1 and 2 unless told; repeatable")
    parser.add_argument("--seconds", type=float, default=4.0, help="how long all forms at one sparsity are timed")
    parser.add_argument("--quick", action="store_true", help="90 %% only, for an instant; nothing is written")
    wish = parser.parse_args()
    if why := kernels.why_missing():
        sys.exit(why)
    run(wish.words, wish.threads or [1, 2], wish.quick, wish.seconds)


if __name__ == "__main__":
    main()
