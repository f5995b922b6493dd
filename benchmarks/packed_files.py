"""What packed weights take on disk, and how soon a saved model gives its first answer.

    python benchmarks/packed_files.py             # resumable: rows of today's results are not run again
    python benchmarks/packed_files.py mobilenetv2 # only rows whose name has that in it

Networks with real weights, and a stack of eight 4096-wide layers with random ones, are masked by magnitude and saved
with and without ``packed``. At TIMED they are also loaded, in three ways that take turns. Each time is the median of
ROUNDS, every one in a process of its own that has imported everything and run nothing, with the files taken out of the
system's page cache before. It begins with the dense model of the user's class at hand, and ends when the model is
loaded, or when it has answered once.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.fx.experimental.symbolic_shapes  # what torch's attention imports when it is called, 0.3 s
from torch import nn

import common
import nets
import texts
from secateur import load, mask, plan, save
from secateur.files import read_json
from secateur.report import Report
from secateur.runtime import attach, kernels  # noqa: F401  imported before any process is timed
from secateur.runtime.disk import read
from secateur.runtime.formats import read_header
from secateur.store import MODEL, WEIGHTS, Result
from secateur.tasks import call

PATTERNS, SPARSITIES, ROUNDS = ("unstructured", "block:4x1"), (50, 70, 80, 90, 95), 7
TIMED = 90
"""The sparsity, in %, at which models are timed."""

PROCESSES = multiprocessing.get_context("forkserver")
WAYS = {"whole": "", "packed": "", "engine": "cpu-sparse"}
"""The dense file, the packed file expanded, and the packed file as the engine runs it."""


def stack() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(m for _ in range(8) for m in (nn.Linear(4096, 4096, bias=False), nn.ReLU()))).eval()


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "resnet20": (nets.resnet20, lambda: torch.randn(1, 3, 32, 32)),
    "resnet56": (nets.resnet56, lambda: torch.randn(1, 3, 32, 32)),
    "mobilenetv2": (nets.mobilenetv2, lambda: torch.randn(1, 3, 128, 128)),
    "encoder": (texts.encoder, lambda: torch.randint(2, 8192, (1, texts.TOKENS))),
    "llama": (texts.llama, lambda: {"input_ids": torch.randint(2, 500, (1, 32))}),
    "stack": (stack, lambda: torch.randn(1, 4096)),
}


def times(folders: dict[str, Path], net: str) -> dict[str, Any]:
    """Seconds until the model is loaded, and until it has answered: the ways take turns, a process each time."""
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way, target in WAYS.items():
            for path in folders[way].iterdir():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            here, there = PROCESSES.Pipe()
            process = PROCESSES.Process(target=once, args=(there, folders[way], net, target))
            process.start()
            there.close()
            found[way].append(here.recv())
            process.join()
    return {
        "load": {way: median(first for first, _ in taken) for way, taken in found.items()},
        "first answer": {way: median(second for _, second in taken) for way, taken in found.items()},
        "system's load": os.getloadavg()[0],
    }


def once(pipe: Connection, folder: Path, net: str, target: str) -> None:
    make, example = NETS[net]
    model, inputs = make(), example()
    start = time.perf_counter()
    loaded = load(folder, model, target)
    middle = time.perf_counter()
    with torch.inference_mode():
        call(loaded, inputs)
    pipe.send((middle - start, time.perf_counter() - start))


def row(net: str, model: nn.Module, pattern: str, sparsity: int) -> dict[str, Any]:
    inputs = NETS[net][1]()
    chosen = plan(model, inputs, pattern=pattern, budget=f"sparsity={sparsity}%")
    result = Result(mask(model, chosen), chosen, Report("packed_files", ()), inputs)
    with tempfile.TemporaryDirectory() as room:
        folders = {way: Path(room) / way for way in ("whole", "packed")}
        for way, folder in folders.items():
            save(result, folder, packed=way == "packed")
        sizes = {way: (folder / WEIGHTS).stat().st_size for way, folder in folders.items()}
        plans = sum((folders["packed"] / f"plan.{end}").stat().st_size for end in ("json", "safetensors"))
        state = read(folders["packed"] / WEIGHTS)
        packed = read_json(folders["packed"] / MODEL)["packed"]
        masked = sum(mask.numel() * 4 for mask in chosen.masks.values())
        stored = sum(state[name].nbytes for name in chosen.masks if name in state)
        forms = Counter(
            str(read_header(state[n]).format) if n in packed else "dense" for n in chosen.masks if n in state
        )
        folders["engine"] = folders["packed"]
        taken = times(folders, net) if sparsity == TIMED else {}
    return {
        "net": net,
        "pattern": pattern,
        "sparsity": sparsity,
        "file": [sizes["whole"], sizes["packed"]],
        "masked weights": [masked, stored],
        "plan": plans,
        "forms": dict(forms.most_common()),
        **taken,
    }


def main() -> None:
    if why := kernels.why_missing():
        sys.exit(why)
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # where the processes' parent finds this file, to import all
    PROCESSES.set_forkserver_preload([Path(__file__).stem])
    rows = common.rows("packed_files", today=True)
    for net, (make, _) in NETS.items():
        model = None
        for pattern in PATTERNS:
            for sparsity in SPARSITIES:
                key = f"{net} {pattern} {sparsity} %"
                if key in rows or not all(word in key for word in sys.argv[1:]):
                    continue
                print(key, flush=True)
                torch.manual_seed(0)
                model = make() if model is None else model
                rows[key] = row(net, model, pattern, sparsity)
                common.save("packed_files", rows)


if __name__ == "__main__":
    main()
