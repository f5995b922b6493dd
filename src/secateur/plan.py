"""``Plan``: which units stay. The pivot of the library: made once, read, saved, compared, carried out anywhere."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from secateur import patterns
from secateur.allocate import Allocation
from secateur.errors import DataError, PlanError
from secateur.files import read_json, write_atomic
from secateur.graph.graph import Graph
from secateur.graph.types import Declared

VERSION = 1
TEXT, BITS = "plan.json", "plan.safetensors"
KEYS = {"version", "pattern", "budget", "allocation", "shapes", "units", "slices", "masks", "meta", "declared"}


@dataclass(frozen=True, eq=False)
class Plan:
    """Which units stay (True), of which tensors.

    A mask pattern fills ``masks`` (weight name -> bool, of the weight's shape). A channel pattern fills ``units``
    (axis name -> bool per unit) and what follows from them, ``slices`` (tensor name -> dimension -> bool per index). A
    block that may go as a whole is a place of one unit in ``units``.
    ``shapes`` are the dense shapes of all tensors concerned; ``meta`` says how the plan was made, and
    ``declared`` what the user said about the model. ``graph`` is only held in memory, never saved.
    """

    pattern: str
    budget: str
    allocation: Allocation
    masks: Mapping[str, Tensor]
    units: Mapping[str, Tensor]
    slices: Mapping[str, Mapping[int, Tensor]]
    shapes: Mapping[str, tuple[int, ...]]
    meta: Mapping[str, str | int]
    graph: Graph | None = field(default=None, repr=False)
    declared: Declared = field(default_factory=Declared)

    def keep(self, name: str) -> Tensor:
        """A bool tensor of the dense tensor's shape, True where it stays."""
        if name in self.masks:
            return self.masks[name]
        if name not in self.slices:
            raise PlanError(f"the plan does not touch {name!r}; it touches {', '.join(list(self.shapes)[:5])}, …")
        shape = self.shapes[name]
        keep = torch.ones(shape, dtype=torch.bool)
        for dim, flags in self.slices[name].items():
            keep &= flags.view([-1 if d == dim else 1 for d in range(len(shape))])
        return keep

    @property
    def dropped(self) -> tuple[str, ...]:
        """Names of the blocks that go."""
        return tuple(name for name, flags in self.units.items() if not bool(flags.any()))

    @property
    def cuts(self) -> dict[str, Mapping[int, Tensor]]:
        """The slices of those tensors that stay: a tensor that goes with a block loses all indices of dimension 0."""
        return {n: dims for n, dims in self.slices.items() if all(bool(flags.any()) for flags in dims.values())}

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of all parameters and buffers that the plan touches."""
        return (*self.masks, *self.slices)

    def check_fits(self, model: nn.Module) -> None:
        """Raise PlanError, naming the first misfit, where ``model`` is not the dense model of this plan."""
        named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        named.update(model.named_buffers(remove_duplicate=False))
        for name in self.tensors:
            found = tuple(named[name].shape) if name in named else None
            if found != self.shapes[name]:
                raise PlanError(
                    f"the plan is for a model with {name} of shape {list(self.shapes[name])}, "
                    f"{type(model).__name__} has {list(found) if found is not None else 'no such tensor'}; "
                    "use the dense model that the plan was made for, or make a new plan"
                )

    def diff(self, other: Plan) -> dict[str, tuple[int, int]]:
        """Per place, how many units are kept only here and only there; places that agree are left out."""
        places: dict[str, tuple[int, int]] = {}
        for mine, theirs in ((self.masks, other.masks), (self.units, other.units)):
            for name in sorted(mine.keys() | theirs.keys()):
                a, b = mine.get(name), theirs.get(name)
                if a is not None and b is not None and a.shape != b.shape:
                    raise PlanError(f"{name!r} has shape {list(a.shape)} in one plan and {list(b.shape)} in the other")
                only_here = int((a if b is None else a & ~b).sum()) if a is not None else 0
                only_there = int((b if a is None else b & ~a).sum()) if b is not None else 0
                if only_here or only_there:
                    places[name] = (only_here, only_there)
        return places

    def save(self, folder: Path | str) -> None:
        """Write plan.json and plan.safetensors, as docs/format.md describes them."""
        text = {
            "version": VERSION,
            "pattern": self.pattern,
            "budget": self.budget,
            "allocation": json.loads(self.allocation.to_json()),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "units": {name: len(flags) for name, flags in self.units.items()},
            "slices": {name: sorted(dims) for name, dims in self.slices.items()},
            "masks": sorted(self.masks),
            "meta": dict(self.meta),
            "declared": asdict(self.declared),
        }
        bits = {f"mask/{name}": _pack(m) for name, m in self.masks.items()}
        bits |= {f"unit/{name}": _pack(u) for name, u in self.units.items()}
        bits |= {f"slice/{d}/{name}": _pack(f) for name, dims in self.slices.items() for d, f in dims.items()}
        write_atomic(Path(folder) / BITS, to_safetensors(bits))
        write_atomic(Path(folder) / TEXT, json.dumps(text, indent=1))

    @classmethod
    def load(cls, folder: Path | str) -> Plan:
        """Read a plan. Raises DataError for files that are missing, damaged, or do not agree with each other."""
        path = Path(folder) / TEXT
        text = read_json(path)
        try:
            if text["version"] > VERSION:
                raise DataError(
                    f"{path} has format version {text['version']}, this Secateur reads {VERSION}; update it"
                )
            if foreign := set(text) - KEYS:
                raise DataError(f"{path} holds {min(foreign)!r}, which no plan has; see docs/format.md")
            bits = parse_safetensors((Path(folder) / BITS).read_bytes())
            shapes = {str(name): tuple(int(n) for n in shape) for name, shape in text["shapes"].items()}
            plan = cls(
                pattern=str(patterns.parse(text["pattern"])),
                budget=str(text["budget"]),
                allocation=Allocation.from_json(json.dumps(text["allocation"])),
                masks={n: _unpack(bits.pop(f"mask/{n}"), shapes[n]) for n in text["masks"]},
                units={n: _unpack(bits.pop(f"unit/{n}"), (int(size),)) for n, size in text["units"].items()},
                slices={
                    n: {int(d): _unpack(bits.pop(f"slice/{int(d)}/{n}"), (shapes[n][int(d)],)) for d in dims}
                    for n, dims in text["slices"].items()
                },
                shapes=shapes,
                meta={str(k): v for k, v in text["meta"].items() if isinstance(v, (str, int))},
                declared=Declared(
                    tuple((str(a), str(b)) for a, b in text["declared"]["ties"]),
                    tuple(int(i) for i in text["declared"]["free_outputs"]),
                ),
            )
        except (OSError, SafetensorError, LookupError, TypeError, ArithmeticError, ValueError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"the plan in {folder} is damaged: {type(error).__name__}: {error}") from error
        if bits:
            raise DataError(f"{Path(folder) / BITS} holds {min(bits)!r}, which {TEXT} does not name")
        plan._check_counts(path)
        return plan

    def _check_counts(self, path: Path) -> None:
        kept, total = self.allocation.kept, self.allocation.total
        if kept.keys() != self.units.keys() | self.masks.keys():
            raise DataError(f"{path}: the allocation is for other places than the flags")
        for name, flags in (*self.units.items(), *self.masks.items()):
            n, size = int(flags.count_nonzero()), flags.numel()
            blocks = isinstance(patterns.parse(self.pattern), patterns.Block)  # those are counted, not their weights
            if (n, size) != (kept[name], total[name]) and not blocks:
                raise DataError(f"{path}: {name!r} keeps {n} of {size}, its allocation {kept[name]} of {total[name]}")
            if n == 0 and name in self.units and not (size == 1 and "layer" in self.pattern):
                raise DataError(f"{path}: {name!r} keeps no unit at all")
        for name, dims in self.slices.items():
            if min(dims, default=0) < 0:
                raise DataError(f"{path}: {name!r} has no dimension {min(dims)}")


def _pack(flags: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(flags.cpu().numpy().reshape(-1)))


def _unpack(bits: Any, shape: tuple[int, ...]) -> Tensor:
    count = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.numel() != -(-count // 8) or min(shape, default=1) < 0:
        raise DataError(
            f"expected {count} flags packed into {-(-count // 8)} bytes, found {bits.numel()} of {bits.dtype}"
        )
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count).astype(bool)).view(shape)
