"""What analysis and planning cost for models of many layers and widths, beyond the ``torch.export`` that they contain.

    python benchmarks/scale.py              # every size in a process of its own
    python benchmarks/scale.py llama-80     # only those whose name has that in it

The Llamas have the sizes of Llama 3 70B (hidden 8192, 64 heads, 8 kv heads, feed-forward 28672, vocabulary 128256), 2
to 80 layers, on device meta: no weight is ever held. The Qwen3-like model (36 layers, hidden 1024) has random weights,
and is shrunk besides. Memory is the most that the whole process held: Python, torch, transformers, the export and all.
"""

from __future__ import annotations

import importlib
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import common
from secateur.apply.shrink import carry_out
from secateur.graph import trace
from secateur.planning import make

BUDGET, TOKENS = "params=70%", 16
SIZES = ("llama-2", "llama-8", "llama-32", "llama-80", "qwen3-36")


def build(size: str) -> nn.Module:
    """The model named ``size``, such as "llama-8" of 8 layers."""
    transformers = importlib.import_module("transformers")
    kind, _, layers = size.partition("-")
    shared = {"num_hidden_layers": int(layers), "num_key_value_heads": 8, "use_cache": False}
    if kind == "llama":
        sizes = {"vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
        with torch.device("meta"):
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **shared)).eval()
    sizes = {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16}
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, **shared, head_dim=128)).eval()


def once(size: str) -> dict[str, Any]:
    """One size in this process: seconds of each step, and the most memory held."""
    common.torchvision()
    analysis = importlib.import_module("secateur.graph.analyze")
    model = build(size)
    device = next(model.parameters()).device
    inputs = {"input_ids": torch.ones(1, TOKENS, dtype=torch.long, device=device)}
    seconds = {"export": 0.0}

    def export(*arguments: Any) -> Any:
        start = time.perf_counter()
        module = trace.capture(*arguments)
        seconds["export"] += time.perf_counter() - start
        return module

    analysis.capture = export  # type: ignore[attr-defined]
    start = time.perf_counter()
    graph = analysis.analyze(model, inputs)
    seconds["analysis"] = time.perf_counter() - start - seconds["export"]
    start = time.perf_counter()
    plan = make(model, graph, budget=BUDGET, allocate="uniform")
    seconds["plan"] = time.perf_counter() - start
    if device.type != "meta":
        before, start = seconds["export"], time.perf_counter()
        done = carry_out(model, plan, verify=False, evenly=True)
        if not done.form:  # the class remembers one width for several axes
            plan = make(model, graph, budget=BUDGET, allocate="uniform", equal=done.equal)
            done = carry_out(model, plan, verify=False)
        assert done.form == "module", done.why
        seconds["shrink"] = time.perf_counter() - start - (seconds["export"] - before)
    cost = graph.cost()
    return {
        "params": cost.params,
        "axes": len(graph.axes),
        "free": len(graph.free),
        "left": graph.cost({name: flags.numpy() for name, flags in plan.units.items()}).params / cost.params,
        "seconds": seconds,
        "memory": peak(),
    }


def peak() -> int:
    """The most bytes of memory this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    rows = common.rows("scale", today=True)
    for size in SIZES:
        if not all(word in size for word in sys.argv[1:]):
            continue
        command = [sys.executable, str(Path(__file__)), "--once", size]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        rows[size] = json.loads(output.splitlines()[-1])
        print(size, rows[size], flush=True)
        common.save("scale", rows)


if __name__ == "__main__":
    if "--once" in sys.argv:
        print(json.dumps(once(sys.argv[-1])))
    else:
        main()
