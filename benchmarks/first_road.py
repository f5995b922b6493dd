"""The whole road on real networks, through the command line: one row a network, pattern and criterion.

    python benchmarks/first_road.py             # resumable: rows of today's results are not run again
    python benchmarks/first_road.py resnet56    # only rows whose name has that in it

Every method stands beside the same road with random choices. Fine-tuning runs in bfloat16 (--amp), at a learning rate
of 0.001 for the network without batch norms, which diverges at the default 0.01. Channels are kept in multiples of 8:
widths such as 11 or 13 make every step slower than the dense network's on this processor.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

NETS = "benchmarks/nets.py"
CIFAR, IMAGENET = f"{NETS}:cifar10", f"{NETS}:imagenet"
EPOCHS = 2

ROADS = [
    ("resnet20", CIFAR, "channel/8", "macs=50%"),
    *[("mobilenetv2", IMAGENET, "unstructured", f"sparsity={s}%") for s in (50, 70, 90)],
    ("mobilenetv2", IMAGENET, "2:4", None),
    *[("mobilenetv2", IMAGENET, "block:4x1", f"sparsity={s}%") for s in (50, 70, 90)],
    ("resnet56", CIFAR, "channel/8", "macs=50%"),
]


def main() -> None:
    rows = common.rows("first_road", today=True)
    for net, data, pattern, budget in ROADS:
        for criterion in ("magnitude", "random"):
            key = " ".join(filter(None, (net, pattern, budget, criterion)))
            if key in rows or not all(word in key for word in sys.argv[1:]):
                continue
            print(key, flush=True)
            rows[key] = walk(net, data, pattern, budget, criterion)
            common.save("first_road", rows)


def walk(net: str, data: str, pattern: str, budget: str | None, criterion: str) -> dict[str, Any]:
    """One run of the command line, and what its report says."""
    with tempfile.TemporaryDirectory() as folder:
        words = [
            *("prune", f"{NETS}:{net}", "--data", data, "--pattern", pattern, "--criterion", criterion),
            *(
                "--epochs",
                str(EPOCHS),
                "--lr",
                "0.001" if net == "mobilenetv2" else "0.01",
                "--amp",
                "--out",
                str(Path(folder) / "out"),
                "--json",
            ),
            *(("--budget", budget) if budget else ()),
        ]
        run = subprocess.run(
            [sys.executable, "-m", "secateur.cli", *words],
            cwd=common.ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    report = json.loads(run.stdout)
    stages = {row["stage"]: row for row in report["rows"]}
    last = report["rows"][-1]
    return {
        "net": net,
        "pattern": pattern,
        "budget": budget,
        "criterion": criterion,
        "epochs": EPOCHS,
        "accuracy": {stage: row["accuracy"] for stage, row in stages.items()},
        "drop": {stage: row["drop"] for stage, row in stages.items()},
        **{what: [report["rows"][0][what], last[what]] for what in ("params", "nonzero", "macs", "bytes", "memory")},
        "latency_ms": [report["rows"][0]["latency"], last["latency"]],
        "latency_ratio": report["meta"]["latency ratio"],
        "law": report["law"],
        "form": report["meta"]["form"],
        "command": "secateur " + " ".join(words[: words.index("--out")]),
    }


if __name__ == "__main__":
    main()
