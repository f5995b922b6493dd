"""Bytes on disk over five rounds of global pruning: ``torch.nn.utils.prune`` and ``secateur.compat.prune``.

    python benchmarks/compat_memory.py

Every round prunes 20 % of the weights left, of four layers of a million weights each. A row is what ``torch.save``
writes of the whole module or of its state_dict, as a multiple of what it writes of the dense one.
"""

from __future__ import annotations

import io
from types import ModuleType

import torch
from torch import nn
from torch.nn.utils import prune as theirs

import common
from secateur.compat import prune as ours

LAYERS, WIDTH, ROUNDS = 4, 1024, 5


def size(thing: object) -> int:
    file = io.BytesIO()
    torch.save(thing, file)
    return file.tell()


def sizes(model: nn.Module) -> dict[str, int]:
    return {"the module": size(model), "its state_dict": size(model.state_dict())}


def rounds(prune: ModuleType) -> list[dict[str, int]]:
    """The sizes of the dense model, and after every round."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    found = [sizes(model)]
    for _ in range(ROUNDS):
        prune.global_unstructured([(layer, "weight") for layer in model], prune.L1Unstructured, amount=0.2)
        found.append(sizes(model))
    return found


def main() -> None:
    rows = {}
    for prune in (theirs, ours):
        dense, *pruned = rounds(prune)
        for what in dense:
            after = {f"round_{number}": found[what] / dense[what] for number, found in enumerate(pruned, 1)}
            rows[f"{prune.__name__}, {what}"] = after
            print(f"{prune.__name__:22} {what:15}", *(f"{ratio:.3f}" for ratio in after.values()))
    print(common.save("compat_memory", rows))


if __name__ == "__main__":
    main()
