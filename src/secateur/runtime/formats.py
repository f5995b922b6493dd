"""Packed weights: one flat ``uint8`` tensor each, header and sections, as docs/format.md specifies.

What is packed here the engine reads as it lies in memory or in a file; nothing is expanded.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateur.errors import DataError, SpecError

MAGIC, VERSION = b"SECATEUR", 1
ALIGN = 64
"""Sections begin at multiples of it; the values end with as many zero bytes."""

_HEADER = struct.Struct("<8s5B3xIIQ32x")
_VALUES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
_LEAST = torch.finfo(torch.float32).tiny  # smaller weights are denormal: slow, and nothing


@dataclass(frozen=True)
class Format:
    """How a weight is stored: "bitmask", or blocks of ``height`` outputs that share an input; 1 is CSR.

    values: "float32", "bfloat16", or "int8" with a scale for each output.
    """

    kind: str
    height: int = 1
    values: str = "float32"

    def __str__(self) -> str:
        name = "bitmask" if self.kind == "bitmask" else "csr" if self.height == 1 else f"{self.height}x1"
        return name if self.values == "float32" else f"{name} {self.values}"


@dataclass(frozen=True)
class Header:
    """What the first 64 bytes of a packed weight say. ``index``: bytes of a column index, 1 where it is a distance."""

    format: Format
    index: int
    rows: int
    cols: int
    count: int

    @property
    def sections(self) -> tuple[int, int, int, int]:
        """Bytes of row starts, indices (or mask), values, scales, as they are stored."""
        height = self.format.height
        mask = self.format.kind == "bitmask"
        indices = self.rows * -(-self.cols // 64) * 8 if mask else self.count * self.index
        width = _VALUES[self.format.values].itemsize
        scales = self.rows * 4 if self.format.values == "int8" else 0
        values = _padded(self.count * height * width) + ALIGN
        return _padded((-(-self.rows // height) + 1) * 4), _padded(indices), values, _padded(scales)

    @property
    def size(self) -> int:
        return _HEADER.size + sum(self.sections)


def pack(weight: Tensor, format: Format) -> Tensor:
    """The weight (outputs, inputs), of any float dtype, as a packed ``uint8`` tensor on the CPU.

    Zeros, -0.0 and denormals are not stored; NaN and infinities are. int8 values are rounded symmetrically, the largest
    of a row to 127. Raises SpecError for a weight or a format that the engine has no form for, DataError for int8 of a
    weight that is not finite.
    """
    if weight.ndim != 2 or not weight.dtype.is_floating_point:
        raise SpecError(f"a packed weight is a matrix of floats, found {weight.dtype} of shape {list(weight.shape)}")
    if format.height not in (1, 4, 16) or format.values not in _VALUES or format.kind not in ("blocks", "bitmask"):
        raise SpecError(f"the engine has no format {format}; expected a bitmask, or blocks of height 1, 4 or 16")
    dense = weight.detach().to("cpu", torch.float32)
    dense = torch.where(dense.abs() < _LEAST, 0.0, dense)
    scales = None
    if format.values == "int8":
        dense, scales = quantized(dense)
    if format.kind == "bitmask":
        return _bitmask(dense, format, scales)
    return _blocks(dense, format, scales)


def expand(packed: Tensor) -> Tensor:
    """The dense ``float32`` weight (outputs, inputs) of a packed one. Raises DataError where its bytes are damaged."""
    header = read_header(packed)
    starts_at, indices_at, values_at, scales_at = np.cumsum([_HEADER.size, *header.sections[:3]]).tolist()
    raw = packed.numpy(force=True)
    height, rows, cols = header.format.height, header.rows, header.cols
    block_rows = -(-rows // height)
    starts = raw[starts_at:].view(np.uint32)[: block_rows + 1].astype(np.int64)
    if starts[0] != 0 or starts[-1] != header.count or (np.diff(starts) < 0).any():
        raise DataError("a packed weight has row starts that do not rise from 0 to its count")
    values = _read_values(packed[values_at:], header)
    row = np.repeat(np.arange(block_rows), np.diff(starts))
    if header.format.kind == "bitmask":
        bits = np.unpackbits(raw[indices_at : indices_at + rows * -(-cols // 64) * 8], bitorder="little")
        mask = bits.reshape(rows, -1)
        if (mask.sum(1) != np.diff(starts)).any() or mask[:, cols:].any():
            raise DataError("a packed weight has a mask that does not fit its values")
        column = np.nonzero(mask)[1]
    else:
        column = _read_columns(raw[indices_at : indices_at + header.count * header.index], header.index, starts, row)
        if (column >= cols).any():
            raise DataError(f"a packed weight of {cols} columns has a column index of {column.max()}")
    dense = torch.zeros(block_rows, cols, height)
    dense[torch.from_numpy(row), torch.from_numpy(column)] = values.view(-1, height)
    dense = dense.transpose(1, 2).reshape(-1, cols)[:rows]
    if header.format.values == "int8":
        dense = dense * torch.from_numpy(raw[scales_at:].view(np.float32)[:rows].copy())[:, None]
    return dense.contiguous()


def read_header(packed: Tensor) -> Header:
    """What a packed weight is. Raises DataError where it is none, or not as long as it says."""
    if packed.dtype != torch.uint8 or packed.ndim != 1 or packed.numel() < _HEADER.size:
        raise DataError(f"a packed weight is a flat uint8 tensor, found {packed.dtype} of shape {list(packed.shape)}")
    head = packed[: _HEADER.size].numpy(force=True).tobytes()
    magic, version, kind, value, height, index, rows, cols, count = _HEADER.unpack(head)
    if magic != MAGIC or version != VERSION:
        raise DataError(f"no packed weight of version {VERSION}: it begins with {magic!r}, version {version}")
    known = kind in (1, 2) and value < 3 and height in (1, 4, 16) and index in ((1, 2, 4) if kind == 1 else (0,))
    if not known or (kind == 2 and height != 1):
        raise DataError(f"a packed weight of unknown format {kind}, values {value}, height {height}, index {index}")
    form = Format("blocks" if kind == 1 else "bitmask", height, list(_VALUES)[value])
    header = Header(form, index, rows, cols, count)
    if packed.numel() != header.size:
        raise DataError(f"a packed weight should have {header.size} bytes by its header, found {packed.numel()}")
    return header


def quantized(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Integers from -127 to 127 (as floats) and one scale for each row. Raises DataError where a value is not finite."""
    if not dense.isfinite().all():
        raise DataError("a weight with NaN or infinite values cannot be stored as int8")
    scales = dense.abs().amax(1) / 127 if dense.shape[1] else dense.new_zeros(dense.shape[0])
    scales = torch.where(scales > 0, scales, 1.0)
    return (dense / scales[:, None]).round().clamp(-127, 127), scales


def _blocks(dense: Tensor, format: Format, scales: Tensor | None) -> Tensor:
    rows, cols = dense.shape
    height = format.height
    block_rows = -(-rows // height)
    padded = dense.new_zeros(block_rows * height, cols)
    padded[:rows] = dense
    view = padded.view(block_rows, height, cols)
    row, column = (view != 0).any(1).nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=block_rows)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    distance = column.diff(prepend=column.new_zeros(1))
    first = starts[:-1][counts > 0]
    distance[first] = column[first]
    index = 1 if not len(distance) or int(distance.max()) < 256 else 2 if cols <= 65536 else 4
    indices = (
        {1: distance, 2: column, 4: column}[index].numpy().astype({1: np.uint8, 2: np.uint16, 4: np.uint32}[index])
    )
    header = Header(format, index, rows, cols, len(row))
    return _joined(header, starts, indices, view.transpose(1, 2)[row, column], scales)


def _bitmask(dense: Tensor, format: Format, scales: Tensor | None) -> Tensor:
    rows, cols = dense.shape
    mask = dense != 0
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    bits = np.zeros((rows, -(-cols // 64) * 64), np.bool_)
    bits[:, :cols] = mask.numpy()
    words = np.packbits(bits, axis=1, bitorder="little")
    return _joined(Header(format, 0, rows, cols, int(starts[-1])), starts, words, dense[mask], scales)


def _joined(header: Header, starts: Tensor, indices: np.ndarray, values: Tensor, scales: Tensor | None) -> Tensor:
    kind, value = (1 if header.format.kind == "blocks" else 2), list(_VALUES).index(header.format.values)
    if header.count >= 2**32:
        raise SpecError(f"a packed weight holds at most {2**32 - 1} blocks, found {header.count}")
    packed = torch.zeros(header.size, dtype=torch.uint8)
    shape = (header.format.height, header.index, header.rows, header.cols, header.count)
    head = _HEADER.pack(MAGIC, VERSION, kind, value, *shape)
    stored = values.to(_VALUES[header.format.values]).contiguous().view(-1).view(torch.uint8).numpy()
    sections = [starts.numpy().astype(np.uint32), indices, stored]
    sections += [] if scales is None else [scales.numpy()]
    raw, at = packed.numpy(), _HEADER.size
    raw[:at] = np.frombuffer(head, np.uint8)
    for section, size in zip(sections, header.sections, strict=False):
        flat = np.ascontiguousarray(section).reshape(-1).view(np.uint8)
        raw[at : at + len(flat)] = flat
        at += size
    return packed


def _read_values(section: Tensor, header: Header) -> Tensor:
    dtype = _VALUES[header.format.values]
    length = header.count * header.format.height * dtype.itemsize
    return section[:length].clone().view(dtype).float()


def _read_columns(raw: np.ndarray, index: int, starts: np.ndarray, row: np.ndarray) -> np.ndarray:
    stored = raw.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[index]).astype(np.int64)
    if index > 1:
        return stored
    running = np.concatenate([[0], stored.cumsum()])
    return running[1:] - running[starts[:-1]][row]


def _padded(size: int) -> int:
    return -(-size // ALIGN) * ALIGN
