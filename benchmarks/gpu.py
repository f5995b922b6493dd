"""Everything that needs a CUDA card, checked and timed in one run of less than 8 minutes.

    PYTHONPATH=src python benchmarks/gpu.py OUT.json          # on a machine with torch, transformers and triton
    PYTHONPATH=src python benchmarks/gpu.py OUT.json --dry    # tiny sizes on the CPU: only that the script runs

kernels  2:4 by cuSPARSELt and CUTLASS says what the masked dense layer says, for every dtype and awkward token counts
layers   milliseconds of dense, CUTLASS, cuSPARSELt and cuSPARSELt's best algorithm, over tokens, shapes and dtypes;
         each call reads its weight from memory: a buffer larger than the card's cache is written before it
models   sc.lower(target="cuda-2:4") of a ViT- or BERT-like and a Llama-like network, with torch.compile and without
road     sc.prune on the card: the law holds for channels, masks keep their count, recovery runs; latency before, after

The file is written anew after every section and every minute of the longest, so that a run that is cut off leaves what
it has. Sections share the time: what does not fit is named under "skipped", never silently left out.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gpu_kernels
import secateur as sc
from gpu_kernels import sparse_24
from gpu_run import Run, first, quantiles
from secateur.apply.blame import relative_error
from secateur.measure import Latency, latency

# --- models ------------------------------------------------------------------------------------------


def models(run: Run) -> None:
    for name, make, inputs in networks(run):
        if not run.fits(name):
            continue
        try:
            _one_model(name, make, inputs, run)
        except Exception as error:  # a row says what went wrong; the next network runs
            run.keep(name, failed=first(error), trace=traceback.format_exc().splitlines()[-3:])
        if run.device.type == "cuda":
            torch.cuda.empty_cache()


def networks(run: Run) -> Iterator[tuple[str, Callable[[], nn.Module], Any]]:
    """Transformers' own classes with random weights, of few layers: what counts is the time of a block."""
    with suppress(ImportError, RuntimeError):  # a torchvision of another torch is in transformers' way
        import common

        common.torchvision()
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

    dry, dtype = run.dry, torch.bfloat16
    bert = {"hidden_size": 64 if dry else 1024, "num_hidden_layers": 1 if dry else 2, "vocab_size": 1000}
    bert |= {"intermediate_size": 128 if dry else 4096, "num_attention_heads": 4 if dry else 16}
    llama = {"hidden_size": 64 if dry else 4096, "num_hidden_layers": 1 if dry else 2, "vocab_size": 1000}
    llama |= {"intermediate_size": 128 if dry else 11008, "num_attention_heads": 4 if dry else 32}
    llama |= {"num_key_value_heads": 2 if dry else 8, "use_cache": False}

    def make(kind: Any, config: Any) -> Callable[[], nn.Module]:
        return lambda: Only(kind(config)).to(run.device, dtype).eval()

    many, few = ((2, 16), (1, 16)) if dry else ((32, 512), (4, 512))
    ids = lambda shape: torch.randint(1000, shape, device=run.device)
    yield "BERT-like, 16384 tokens", make(BertModel, BertConfig(**bert)), ids(many)
    yield "Llama-like, 2048 tokens", make(LlamaModel, LlamaConfig(**llama)), ids(few)
    yield "Llama-like, 1 token", make(LlamaModel, LlamaConfig(**llama)), ids((1, 1))


class Only(nn.Module):
    """The last hidden state of a model of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids)[0]


def _one_model(name: str, make: Callable[[], nn.Module], inputs: Tensor, run: Run) -> None:
    torch.manual_seed(0)
    dense = make().requires_grad_(False)
    for layer in (m for m in dense.modules() if isinstance(m, nn.Linear)):
        layer.weight.data *= sparse_24(*layer.weight.shape, torch.float32, run.device).ne(0)
    start = time.perf_counter()
    lowered = sc.lower(dense, inputs, target="cuda-2:4")
    choices = lowered.lowering.choices
    about = {"seconds_to_lower": round(time.perf_counter() - start, 1)}
    about |= {"taken": sum(c.form == "2:4" for c in choices), "layers": len(choices)}
    about |= {"reasons": sorted({c.why for c in choices})[:12]}
    forms: dict[str, nn.Module] = {"dense": dense, "2:4": lowered}
    with torch.inference_mode():
        wanted = dense(inputs)
    for way in ("eager", "compiled"):
        if not run.fits(f"{name}, {way}"):
            continue
        if way == "compiled":
            torch._dynamo.reset()
            forms = {form: torch.compile(model) for form, model in forms.items()}
        with torch.inference_mode():
            error = relative_error(forms["2:4"](inputs), wanted)
        times = latency(forms, inputs, 0.2 if run.dry else 3.0)
        run.keep(f"{name}, {way}", **compared(times, "2:4"), error=error, **about)


def compared(times: dict[str, Latency], form: str) -> dict[str, Any]:
    """Milliseconds, and how many times as fast as dense: median and 10th and 90th percentile of both."""
    ratio = times[form].ratio(times["dense"])
    return {
        "ms": {name: quantiles(list(found.samples)) for name, found in times.items()},
        "times_as_fast": [round(1 / ratio.value, 3), round(1 / ratio.high, 3), round(1 / ratio.low, 3)],
    }


# --- the road ----------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.short = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.short(x))


def resnet(width: int, blocks: int) -> nn.Module:
    sizes = [(width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)]
    rest = [Residual(o if i else n, o, s if not i else 1) for n, o, s in sizes for i in range(blocks)]
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), *rest, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4 * width, 10),
    )  # fmt: skip


def road(run: Run) -> None:
    torch.manual_seed(0)
    net = resnet(16 if run.dry else 64, 1 if run.dry else 3).to(run.device)
    x = torch.randn(32 if run.dry else 256, 3, 32, 32, device=run.device)
    y = (x.mean((1, 2, 3)) * 100).long().remainder(10)
    half = len(x) // 2
    cpu, labels = x.cpu(), y.cpu()
    split = (cpu[:half], labels[:half])
    task = sc.Classification(train=split, validation=split, test=(cpu[half:], labels[half:]), batch_size=32)
    wishes: dict[str, dict[str, Any]] = {
        "channels, recovered": {"budget": "macs=50%", "task": task, "epochs": 1},
        "channels": {"budget": "macs=50%"},
        "unstructured": {"pattern": "unstructured", "budget": "sparsity=90%"},
        "2:4": {"pattern": "2:4", "budget": None},
        "block:4x1": {"pattern": "block:4x1", "budget": "sparsity=80%"},
        "blockwise": {
            "pattern": "unstructured",
            "budget": "sparsity=80%",
            "task": task,
            "reconstruct": "least_squares",
        },
    }
    for name, wish in wishes.items():
        if not run.fits(name):
            continue
        try:
            run.keep(name, **pruned(net, x[:half], wish, run))
        except Exception as error:
            run.keep(name, failed=first(error), trace=traceback.format_exc().splitlines()[-3:])


def pruned(net: nn.Module, x: Tensor, wish: dict[str, Any], run: Run) -> dict[str, Any]:
    start = time.perf_counter()
    result = sc.prune(net, x, **wish)
    seconds = time.perf_counter() - start
    small = result.model
    where = {p.device.type for p in small.parameters()}
    assert where == {run.device.type}, f"the result is on {where}"
    left = sum(int(p.count_nonzero()) for p in small.parameters()) / sum(p.numel() for p in net.parameters())
    law, times = result.report.law, latency({"dense": net, "pruned": small}, x, 0.5)
    about = {"seconds": round(seconds, 2), "law": None if law is None else law.error, "left": round(left, 4)}
    return about | compared(times, "pruned")


# --- all of it ---------------------------------------------------------------------------------------


SECTIONS: dict[str, Callable[[Run], None]] = {
    "kernels": gpu_kernels.kernels,
    "layers": gpu_kernels.layers,
    "models": models,
    "road": road,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Check and time everything that needs a CUDA card.")
    parser.add_argument("out", type=Path, help="the JSON file")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU: only that the script runs")
    parser.add_argument("--sections", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    wish = parser.parse_args()
    if not wish.dry and not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device; --dry runs tiny sizes on the CPU")
    if wish.dry:
        gpu_kernels.emulate()
    run = Run(wish.out, wish.dry)
    for name in wish.sections:
        run.begin(name)
        start = time.monotonic()
        try:
            SECTIONS[name](run)
        except Exception as error:  # the next section runs
            run.keep("failed", error=first(error), trace=traceback.format_exc().splitlines()[-6:])
        run.keep("seconds", value=round(time.monotonic() - start, 1))
        run.save()
    failed = [key for key, row in run.rows.items() if "failed" in row or key.endswith("| failed")]
    print(f"{len(run.rows)} rows in {run.path}; {len(failed)} failed: {failed}")


if __name__ == "__main__":
    main()
