"""Whole networks on the sparse CPU engine against every dense runtime: one call of ``sc.lower`` each.

    python benchmarks/sparse_models.py                 # resumable: networks of today's results are not run again
    python benchmarks/sparse_models.py resnet50 bert   # only those networks
    python benchmarks/sparse_models.py --threads 1 --quick resnet20   # for an instant; nothing is written

Networks of usual sizes with random weights and random masks of equal sparsity in every layer: ResNet-50 on one image,
a BERT-base-sized encoder on 128 tokens, a Llama-sized decoder (16 layers of 2048) on one token with 128 in its cache.
And trained networks with masks by magnitude, global over the network: ResNet-20 and ResNet-56 (CIFAR-10), MobileNetV2
(ImageNet), an encoder (SST-2), a small Llama (stories), on one real-sized input each.

A lowered network's outputs are compared with those of the masked network in eager torch, on the inputs that it was
tuned for and on others, even where the network stays dense because that is faster. Dense runtimes take as long whatever
the weights are, so they are made once, of the dense network. One runtime and one lowered network at a time take turns,
with torch: nobody runs ten models in turns in a process, and caches that hold one do not hold ten. "others" is how
many processors other programs kept busy.
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._pytree import tree_map

import common
import decoder
import nets
import rivals
import secateur as sc
import texts
from secateur.errors import DataError, PruneError
from secateur.graph import analyze
from secateur.runtime import kernels
from secateur.runtime.crossover import masked
from secateur.targets import cpu_sparse
from secateur.tasks import call

Wish = tuple[str, int]  # pattern, percent of zeros

REAL = tuple((pattern, percent) for pattern in ("unstructured", "block:4x1") for percent in (50, 70, 80, 90, 95))


@dataclass(frozen=True)
class Net:
    """A network, its inputs, and how it is to be masked. random: masks of equal sparsity in every layer."""

    model: nn.Module
    inputs: Any
    wishes: tuple[Wish, ...]
    random: bool = False


def resnet50() -> Net:
    """Batch norms get the statistics of random images, as they would have learned some."""
    common.torchvision()
    import timm

    model = timm.create_model("resnet50")
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = None
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 224, 224))
    wishes = [("unstructured", percent) for percent in (70, 80, 90)]
    return Net(model.eval(), torch.randn(1, 3, 224, 224), (*wishes, ("block:4x1", 90)), True)


class _Hidden(nn.Module):
    """Only the last hidden state of a model of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids)[0]


def bert() -> Net:
    common.torchvision()
    from transformers import BertConfig, BertModel

    model = _Hidden(BertModel(BertConfig(), add_pooling_layer=False))
    wishes = [("block:4x1", percent) for percent in (70, 80, 90)]
    return Net(model.eval(), torch.randint(30000, (1, 128)), (*wishes, ("unstructured", 90)), True)


def llama_sized() -> Net:
    model = decoder.Decoder().eval()
    return Net(model, model.inputs(), (("unstructured", 80), ("block:16x1", 80)), True)


def resnet20() -> Net:
    return Net(nets.resnet20(), torch.randn(1, 3, 32, 32), REAL)


def resnet56() -> Net:
    return Net(nets.resnet56(), torch.randn(1, 3, 32, 32), REAL)


def mobilenetv2() -> Net:
    return Net(nets.mobilenetv2(), torch.randn(1, 3, 128, 128), REAL)


def encoder() -> Net:
    return Net(texts.encoder(), torch.randint(1, 8000, (1, texts.TOKENS)), REAL)


class _Logits(nn.Module):
    """Only the logits of a model of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids).logits


def llama() -> Net:
    return Net(_Logits(texts.llama()).eval(), torch.randint(3, 500, (1, 64)), REAL)


NETS: tuple[Callable[[], Net], ...] = (resnet50, bert, llama_sized, resnet20, resnet56, mobilenetv2, encoder, llama)


# --- masking and lowering ----------------------------------------------------------------------------


def mask(net: Net, wish: Wish) -> nn.Module:
    pattern, percent = wish
    if not net.random:
        graph = analyze(net.model, net.inputs)
        plan = sc.plan(net.model, graph, pattern=pattern, budget=f"sparsity={percent}%", criterion="magnitude")
        return sc.mask(net.model, plan)
    model = copy.deepcopy(net.model)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.weight.copy_(masked(layer.weight, pattern, percent / 100))
    return model


def lowered(net: Net, wish: Wish) -> tuple[nn.Module, common.Row]:
    """The network on the engine, and what is known of it before it is timed."""
    model = mask(net, wish).eval().requires_grad_(False)
    start = time.perf_counter()
    found = sc.lower(model, net.inputs)
    seconds = time.perf_counter() - start
    done = found.lowering
    with mock.patch.object(cpu_sparse, "NOISE", math.inf):  # compared even where it is not used, being slower
        checked = sc.lower(model, net.inputs) if done.form == "dense" else found
    with torch.inference_mode():
        both = (net.inputs, tree_map(_another, net.inputs))
        errors = [rivals.difference(call(checked, x), call(model, x)) for x in both]
    return found, {
        "pattern": wish[0],
        "sparsity": wish[1] / 100,
        "zeros": 1 - _nonzero(model) / sum(p.numel() for p in model.parameters()),
        "error": max(errors),
        "seconds_to_lower": round(seconds, 1),
        "form": done.form,
        "forms": {"dense": len(done.choices)} if done.form == "dense" else dict(Counter(c.form for c in done.choices)),
        "bytes": sum(v.nbytes for v in found.state_dict().values() if isinstance(v, torch.Tensor)),
        "dense_bytes": sum(v.nbytes for v in model.state_dict().values()),
    }


def _another(value: torch.Tensor) -> torch.Tensor:
    return value.flip(-1) if value.dtype.is_floating_point else value.roll(1, -1)


def _nonzero(model: nn.Module) -> int:
    return sum(int(p.count_nonzero()) for p in model.parameters())


# --- rows --------------------------------------------------------------------------------------------


def measured(net: Net, threads: int, seconds: float, keep: Callable[[dict[Wish, common.Row]], None]) -> None:
    """A row for each wish; ``keep`` is given all of them after every runtime."""
    forms = rivals.dense(net.model, net.inputs, threads)
    models: dict[Wish, nn.Module] = {}
    rows: dict[Wish, common.Row] = {}
    for wish in net.wishes:
        try:
            models[wish], rows[wish] = lowered(net, wish)
        except PruneError as error:
            rows[wish] = {"pattern": wish[0], "sparsity": wish[1] / 100, "refused": str(error)}
        rows[wish] |= {"threads": threads, "dense": {}, "times_as_fast": {}, "missing": {}, "others": []}
    runs = {str(wish): rivals.eager(model, net.inputs) for wish, model in models.items()}
    if net.random:  # of the others there are too many
        runs |= {_compiled(wish): rivals.compiled(model, net.inputs, False) for wish, model in models.items()}
    runs["torch"] = rivals.eager(net.model, net.inputs)
    size = sum(p.nbytes for p in net.model.parameters())
    if size > 2**30:  # frozen weights are a copy
        forms["torch.compile"] = ("float32", lambda: rivals.compiled(net.model, net.inputs, freezing=False))
    with torch.inference_mode():
        wanted = call(net.model, net.inputs)
    for name, form in forms.items():
        made, missing = ({}, {}) if name == "torch" else rivals.made({name: form}, wanted, size)
        for wish, row in rows.items():
            row["missing"] |= missing
            if wish in models and not missing:
                turns = {n: runs[n] for n in (str(wish), _compiled(wish), "torch") if n in runs} | made
                with rivals.others() as load:
                    taken = rivals.rounds(turns, seconds / len(models))
                row.setdefault("ms", rivals.spread(taken[str(wish)]))
                if (compiled := taken.get(_compiled(wish))) is not None:
                    row.setdefault("compiled_ms", rivals.spread(compiled))
                    row.setdefault("compiled_times_as_fast", {})[name] = rivals.ratio(compiled, taken[name])
                row["dense"][name] = rivals.spread(taken[name])
                row["times_as_fast"][name] = rivals.ratio(taken[str(wish)], taken[name])
                row["others"].append(load["others"])
        del made
        gc.collect()
        keep(rows)


def _compiled(wish: Wish) -> str:
    return f"{wish} compiled"


def run(words: list[str], counts: list[int], quick: bool, seconds: float) -> None:
    rows = {} if quick else common.rows("sparse_models", today=True)
    for load in NETS:
        if words and load.__name__ not in words:
            continue
        for threads in counts:
            start = f"{load.__name__} | {threads} | "
            if any(key.startswith(start) for key in rows):
                continue
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            try:
                net = load()
            except DataError as error:
                print(f"{load.__name__}: {error}")
                break

            def keep(found: dict[Wish, common.Row], start: str = start, name: str = load.__name__) -> None:
                for (pattern, percent), row in found.items():
                    rows[f"{start}{pattern} | {percent}%"] = {"net": name, **row, "commit": common.commit()}
                if not quick:
                    common.save("sparse_models", rows)

            measured(net, threads, 0.5 if quick else seconds, keep)
            for key, row in rows.items():
                if key.startswith(start):
                    told(key, row)


def told(key: str, row: common.Row) -> None:
    if "ms" not in row:
        print(key, row.get("refused"), flush=True)
        return
    gains = ", ".join(f"{gain[0]:.2f}x {name}" for name, gain in row["times_as_fast"].items())
    print(f"{key}: {row['ms'][0]:.2f} ms, {gains}; error {row['error']:.1e}, {row['forms']}, others {row['others']}")
    print("  dense", {name: ms[0] for name, ms in row["dense"].items()}, row["missing"], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Whole networks on the sparse engine against dense runtimes.")
    parser.add_argument("nets", nargs="*", help=f"only these of {', '.join(load.__name__ for load in NETS)}")
    parser.add_argument("--threads", type=int, action="append", help="1 and 2 unless told; repeatable")
    parser.add_argument(
        "--seconds", type=float, default=12.0, help="how long all forms of a network are timed with a runtime"
    )
    parser.add_argument("--quick", action="store_true", help="for an instant; nothing is written")
    wish = parser.parse_args()
    if why := kernels.why_missing():
        sys.exit(why)
    run(wish.nets, wish.threads or [1, 2], wish.quick, wish.seconds)


if __name__ == "__main__":
    main()
