"""Packed weights in safetensors files: the form that each takes, and how they are written and found again.

A file that ``write`` made is mapped into memory when it is read, so a packed weight costs no memory before it is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from secateur.errors import DataError
from secateur.files import once, write_atomic
from secateur.patterns import Block, Pattern
from secateur.runtime import kernels
from secateur.runtime.formats import ALIGN, Format, Header, check, expand, pack, read_header

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WORSE = 1.1  # a pattern's own blocks may take this part of the fewest bytes: they are the faster form


@dataclass(frozen=True)
class Unpacked:
    """What a packed weight was, and is again when expanded. ``groups`` are those of a convolution."""

    shape: tuple[int, ...]
    dtype: str
    groups: int = 1

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape)}

    @classmethod
    def from_json(cls, found: Any) -> Unpacked:
        """Raises DataError for anything else than ``to_json`` gives."""
        match found:
            case {"shape": [_, _, *_] as shape, "dtype": str(dtype), "groups": groups} if len(found) == 3:
                if dtype in _DTYPES and all(type(size) is int and size > 0 for size in (*shape, groups)):
                    return cls(tuple(shape), dtype, groups)
        raise DataError(
            f"expected a packed weight as {{'shape': [sizes], 'dtype': one of {sorted(_DTYPES)}, 'groups': number}}, "
            f"found {found!r}"
        )


def packed(weight: Tensor, pattern: Pattern, groups: int = 1) -> Tensor | None:
    """A weight (outputs, inputs of one group, …) in the form of its pattern, else in the one of the fewest bytes.

    Patterns of blocks whose height is a multiple of 16 or 4 are stored as such blocks. Values are bfloat16 where all
    are exactly that, else float32. None where the weight as it is takes as few bytes, or has no form in the engine.
    """
    if weight.ndim < 2 or not weight.numel() or weight.dtype not in _DTYPES.values() or weight.shape[0] % groups:
        return None
    matrix = weight.detach().cpu().flatten(1)
    values = "bfloat16" if _exact(matrix) else "float32"
    found = pack(matrix, Format("blocks", 1, values), groups)
    count = read_header(found).count
    mask = Format("bitmask", 1, values)
    if Header(mask, 0, len(matrix), matrix.shape[1] * groups, count).size < found.numel():
        found = pack(matrix, mask, groups)
    height = pattern.rows if isinstance(pattern, Block) else 1
    height = next((h for h in (16, 4) if height % h == 0), 1)
    if height > 1:
        blocks = pack(matrix, Format("blocks", height, values), groups)
        found = blocks if blocks.numel() <= _WORSE * found.numel() else found
    return found if found.numel() < weight.numel() * weight.element_size() else None


def unpacked(packed: Tensor, of: Unpacked) -> Tensor:
    """The dense weight. Raises DataError where it is damaged, or is not ``of`` that shape."""
    _require(packed, of)
    return expand(packed, of.groups).view(of.shape).to(_DTYPES[of.dtype])


def runnable(packed: Tensor, of: Unpacked) -> Tensor:
    """The packed weight, checked, as the engine takes it. It is copied where another tool wrote it out of line.

    Raises DataError as ``unpacked``.
    """
    _require(packed, of)
    if packed.data_ptr() % ALIGN:
        room = torch.empty(packed.numel() + ALIGN, dtype=torch.uint8)
        start = -room.data_ptr() % ALIGN
        packed = room[start : start + packed.numel()].copy_(packed)
    if of.groups > 1:
        check(packed, of.groups)
    kernels.opened(packed)
    return packed


def _require(packed: Tensor, of: Unpacked) -> None:
    """Before anything of its size is allocated, let a packed weight be one of that shape."""
    header = read_header(packed)
    expected = (of.shape[0], prod(of.shape[1:]) * of.groups)
    if (header.rows, header.cols) != expected or of.shape[0] % of.groups:
        raise DataError(
            f"expected a packed weight of shape {list(of.shape)} in {of.groups} groups, found one of {header.rows} x "
            f"{header.cols}"
        )


def write(path: Path, packed: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    """Write a safetensors file in which every packed weight begins at a multiple of 64 bytes: they come first."""
    raw = to_safetensors(dict(others))
    length = 8 + int.from_bytes(raw[:8], "little")
    entries: dict[str, Any] = {}
    at = 0
    for name, tensor in packed.items():
        entries[name] = {"dtype": "U8", "shape": [tensor.numel()], "data_offsets": [at, at + tensor.numel()]}
        at += tensor.numel()
    for name, entry in json.loads(raw[8:length]).items():
        entries[name] = {**entry, "data_offsets": [at + offset for offset in entry["data_offsets"]]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % ALIGN)
    start = len(header).to_bytes(8, "little") + header
    write_atomic(path, [start, *(t.numpy(force=True).data for t in packed.values()), memoryview(raw)[length:]])


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped into memory: read from the disk when they are used.

    Raises DataError where it is missing or damaged, or names a tensor twice.
    """
    try:
        tensors = load_file(path)
        with path.open("rb") as file:
            json.loads(file.read(int.from_bytes(file.read(8), "little")), object_pairs_hook=once)
    except (OSError, SafetensorError, ValueError, TypeError, RuntimeError, LookupError) as error:
        raise DataError(f"{path} is missing or no whole safetensors file: {error}") from error
    return tensors


def _exact(matrix: Tensor) -> bool:
    """Whether bfloat16 holds every value exactly."""
    if matrix.dtype == torch.bfloat16:
        return True
    step = max(1, 2**22 // matrix.shape[1])
    parts = (matrix[first : first + step] for first in range(0, len(matrix), step))
    return all(not (part.float().view(torch.int32) & 0xFFFF).any() for part in parts)
