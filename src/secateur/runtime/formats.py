"""Packed weights: one flat ``uint8`` tensor each, header and sections, as docs/format.md specifies.

What is packed here the engine reads as it lies in memory or in a file; nothing is expanded.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateur.errors import DataError, SpecError

MAGIC, VERSION = b"SECATEUR", 1
ALIGN = 64
"""Sections begin at multiples of it; the values end with as many zero bytes."""

_HEADER = struct.Struct("<8s5B3sIIQ32s")
VALUES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
_INDEX = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_SAME_SIZE = {4: np.float32, 2: np.int16, 1: np.int8}  # numpy has no bfloat16
_LEAST = torch.finfo(torch.float32).tiny  # smaller weights are denormal: slow, and nothing
_CHUNK = 2**22  # weights that are packed or expanded at a time: the rest of the memory is the result's


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
        width = VALUES[self.format.values].itemsize
        scales = self.rows * 4 if self.format.values == "int8" else 0
        values = _padded(self.count * height * width) + ALIGN
        return _padded((-(-self.rows // height) + 1) * 4), _padded(indices), values, _padded(scales)

    @property
    def size(self) -> int:
        return _HEADER.size + sum(self.sections)


def pack(weight: Tensor, format: Format, groups: int = 1) -> Tensor:
    """The weight (outputs, inputs), of any float dtype, as a packed ``uint8`` tensor on the CPU.

    groups: of a convolution. The weight is then (outputs, inputs of one group), and is stored among the columns of all
    inputs, where the engine looks for it: outputs of the second group in the second part of the columns, and so on.

    Zeros, -0.0 and denormals are not stored; NaN and infinities are. int8 values are rounded symmetrically, the largest
    of a row to 127. Raises SpecError for a weight or a format that the engine has no form for, DataError for int8 of a
    weight that is not finite.
    """
    if weight.ndim != 2 or not weight.dtype.is_floating_point:
        raise SpecError(f"a packed weight is a matrix of floats, found {weight.dtype} of shape {list(weight.shape)}")
    if groups < 1 or weight.shape[0] % groups:
        raise SpecError(f"a weight of {weight.shape[0]} outputs has no {groups} groups of equal size")
    if format.height not in (1, 4, 16) or format.values not in VALUES or format.kind not in ("blocks", "bitmask"):
        raise SpecError(f"the engine has no format {format}; expected a bitmask, or blocks of height 1, 4 or 16")
    read = _bits if format.kind == "bitmask" else _blocks
    counts, places, values, scales = [np.zeros(1, np.int64)], [], [], []
    for part in _parts(weight.detach(), groups):
        dense = part.to("cpu", torch.float32)
        dense = torch.where(dense.abs() < _LEAST, 0.0, dense)
        if format.values == "int8":
            dense, scale = quantized(dense)
            scales.append(scale.numpy())
        count, place, value = read(dense, format.height)
        counts.append(count)
        places.append(place)
        values.append(value.to(VALUES[format.values]))
    return _joined(format, weight, groups, np.concatenate(counts).cumsum(), places, values, scales)


def expand(packed: Tensor, groups: int = 1) -> Tensor:
    """The dense ``float32`` weight (outputs, inputs) of a packed one; with ``groups`` the inputs of one group.

    Raises DataError where its bytes are damaged, it has weights outside its groups, or there is no memory for it.
    """
    header = read_header(packed)
    try:
        dense = torch.zeros(header.rows, header.cols // max(groups, 1))
    except RuntimeError as error:
        raise DataError(f"there is no memory for a weight of {header.rows} x {header.cols // groups}") from error
    for row, column, value in _weights(packed, header, groups):
        dense[torch.from_numpy(row), torch.from_numpy(column)] = value
    return dense


def check(packed: Tensor, groups: int = 1) -> Header:
    """Its header. Raises DataError, as the engine would, where it is damaged anywhere but in its values.

    Besides, where it has weights outside its groups: the engine would multiply them.
    """
    header = read_header(packed)
    for _ in _weights(packed, header, groups):
        pass
    return header


def read_header(packed: Tensor) -> Header:
    """What a packed weight is. Raises DataError where it is none, or not as long as it says."""
    if packed.dtype != torch.uint8 or packed.ndim != 1 or packed.numel() < _HEADER.size:
        raise DataError(f"a packed weight is a flat uint8 tensor, found {packed.dtype} of shape {list(packed.shape)}")
    head = packed[: _HEADER.size].numpy(force=True).tobytes()
    magic, version, kind, value, height, index, zero, rows, cols, count, rest = _HEADER.unpack(head)
    if magic != MAGIC or version != VERSION:
        raise DataError(f"no packed weight of version {VERSION}: it begins with {magic!r}, version {version}")
    known = kind in (1, 2) and value < 3 and height in (1, 4, 16) and index in ((1, 2, 4) if kind == 1 else (0,))
    if not known or (kind == 2 and height != 1):
        raise DataError(f"a packed weight of unknown format {kind}, values {value}, height {height}, index {index}")
    if any(zero) or any(rest) or count >= 2**32:
        raise DataError(f"a packed weight has reserved bytes that are not zero, or a count of {count}")
    form = Format("blocks" if kind == 1 else "bitmask", height, list(VALUES)[value])
    header = Header(form, index, rows, cols, count)
    if packed.numel() != header.size:
        raise DataError(f"a packed weight should have {header.size} bytes by its header, found {packed.numel()}")
    return header


def quantized(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Integers from -127 to 127 (as floats), and a scale for each row. Raises DataError for NaN and infinities."""
    if not dense.isfinite().all():
        raise DataError("a weight with NaN or infinite values cannot be stored as int8")
    scales = dense.abs().amax(1) / 127 if dense.shape[1] else dense.new_zeros(dense.shape[0])
    scales = torch.where(scales > 0, scales, 1.0)
    return (dense / scales[:, None]).round().clamp(-127, 127), scales


# --- packing -----------------------------------------------------------------------------------------


def _parts(weight: Tensor, groups: int) -> Iterator[Tensor]:
    """Some rows at a time, whole blocks of them, over all columns: zeros where an output is of another group."""
    rows, inputs = weight.shape
    step = max(1, _CHUNK // (16 * max(1, inputs * groups))) * 16
    for first in range(0, rows, step):
        part = weight[first : first + step]
        if groups > 1:
            wide = part.new_zeros(len(part), groups, inputs)
            here = torch.arange(len(part))
            wide[here, (here + first) // (rows // groups)] = part
            part = wide.flatten(1)
        yield part


def _blocks(dense: Tensor, height: int) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """Blocks of every block row, their columns, and their values (blocks, height)."""
    block_rows = -(-len(dense) // height)
    padded = dense
    if len(dense) % height:
        padded = dense.new_zeros(block_rows * height, dense.shape[1])
        padded[: len(dense)] = dense
    view = padded.view(block_rows, height, dense.shape[1])
    row, column = (view != 0).any(1).nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=block_rows)
    return counts.numpy(), column.numpy().astype(np.uint32), view.transpose(1, 2)[row, column]


def _bits(dense: Tensor, height: int) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """Values of every row, the bits of the rows, and the values."""
    rows, cols = dense.shape
    mask = dense != 0
    bits = np.zeros((rows, -(-cols // 64) * 64), np.bool_)
    bits[:, :cols] = mask.numpy()
    return mask.sum(1).numpy(), np.packbits(bits, axis=1, bitorder="little").reshape(-1), dense[mask]


def _narrow(columns: np.ndarray, starts: np.ndarray, cols: int) -> np.ndarray:
    """Columns in as few bytes as they fit: distances in 1 where none is above 255, else themselves in 2 or 4."""
    distances = np.diff(columns, prepend=columns[:1])  # wraps around where a row begins, which is overwritten
    first = starts[:-1][np.diff(starts) > 0]
    distances[first] = columns[first]
    if not len(distances) or distances.max() < 256:
        return distances.astype(np.uint8)
    return columns.astype(np.uint16) if cols <= 65536 else columns


def _joined(
    format: Format, weight: Tensor, groups: int, starts: np.ndarray, places: list[np.ndarray], values: list[Tensor],
    scales: list[np.ndarray],
) -> Tensor:  # fmt: skip
    rows, cols = weight.shape[0], weight.shape[1] * groups
    if starts[-1] >= 2**32 or max(rows, cols) >= 2**32:
        raise SpecError(f"a packed weight holds at most {2**32 - 1} blocks, rows and columns, found {starts[-1]}")
    indices, index, kind = (
        np.concatenate([np.zeros(0, np.uint32 if format.kind == "blocks" else np.uint8), *places]),
        0,
        2,
    )
    if format.kind == "blocks":
        indices, kind = _narrow(indices, starts, cols), 1
        index = indices.itemsize
    header = Header(format, index, rows, cols, int(starts[-1]))
    packed = torch.zeros(header.size, dtype=torch.uint8)
    shape = (format.height, index, b"", rows, cols, header.count, b"")
    raw, at = packed.numpy(), _HEADER.size
    raw[:at] = np.frombuffer(_HEADER.pack(MAGIC, VERSION, kind, list(VALUES).index(format.values), *shape), np.uint8)
    stored = [value.contiguous().view(-1).view(torch.uint8).numpy() for value in values]
    sections = ([starts.astype(np.uint32)], [indices], stored, scales)
    for section, size in zip(sections, header.sections, strict=True):
        end = at
        for piece in section:
            flat = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
            raw[end : end + len(flat)] = flat
            end += len(flat)
        at += size
    return packed


# --- reading -----------------------------------------------------------------------------------------


def _weights(packed: Tensor, header: Header, groups: int) -> Iterator[tuple[np.ndarray, np.ndarray, Tensor]]:
    """Row, column in its group, and value of every stored weight, some at a time."""
    if groups < 1 or header.rows % groups or header.cols % groups:
        raise DataError(f"a packed weight of {header.rows} x {header.cols} has no {groups} groups of equal size")
    each, inputs, height = header.rows // groups, header.cols // groups, header.format.height
    for block_rows, columns, values in _entries(packed, header):
        for offset in range(height):
            row, value, column = block_rows * height + offset, values[:, offset], columns
            if height > 1:
                inside = row < header.rows
                row, value, column = row[inside], value[inside], column[inside]
            if groups > 1:
                column = column - row // each * inputs
                inside = (column >= 0) & (column < inputs)
                if (value[~inside] != 0).any():
                    raise DataError(f"a packed weight of {groups} groups has a weight from an output to another group")
                row, value, column = row[inside], value[inside], column[inside]
            yield row, column, value


def _entries(packed: Tensor, header: Header) -> Iterator[tuple[np.ndarray, np.ndarray, Tensor]]:
    """Block row and column (int64) of every block, and its values (blocks, height), some rows at a time.

    Raises DataError for what ``read_header`` did not see: the same that the engine refuses.
    """
    height, rows, cols = header.format.height, header.rows, header.cols
    raw, sections = packed.contiguous().numpy(force=True), header.sections
    starts_at, indices_at, values_at, scales_at = np.cumsum([_HEADER.size, *sections[:3]]).tolist()
    block_rows = -(-rows // height)
    starts = raw[starts_at:indices_at].view(np.uint32)[: block_rows + 1].astype(np.int64)
    if starts[0] != 0 or starts[-1] != header.count or (np.diff(starts) < 0).any():
        raise DataError("a packed weight has row starts that do not rise from 0 to its count")
    dtype = VALUES[header.format.values]
    section = raw[values_at : values_at + header.count * height * dtype.itemsize]
    stored = torch.from_numpy(section.copy().view(_SAME_SIZE[dtype.itemsize])).view(dtype)
    stored = stored.view(-1, height)
    scales = (
        torch.from_numpy(raw[scales_at:].view(np.float32)[:rows].copy()) if header.format.values == "int8" else None
    )
    indices = raw[indices_at:values_at]
    for first, last in _rows_at_a_time(starts, cols if header.format.kind == "bitmask" else 0):
        part = starts[first : last + 1]
        row = np.repeat(np.arange(first, last), np.diff(part))
        if header.format.kind == "bitmask":
            column = _columns_of_bits(indices, first, last, cols, part)
        else:
            column = _columns(indices.view(_INDEX[header.index])[part[0] : part[-1]].astype(np.int64), header, part)
        values = stored[part[0] : part[-1]].float()
        if scales is not None:
            owners = np.minimum(row[:, None] * height + np.arange(height), rows - 1)
            values = values * scales[torch.from_numpy(owners)]
        yield row, column, values


def _rows_at_a_time(starts: np.ndarray, cols: int) -> Iterator[tuple[int, int]]:
    """Ranges of block rows, of about _CHUNK stored blocks or columns of bits."""
    first, last = 0, len(starts) - 1
    while first < last:
        end = int(np.searchsorted(starts, starts[first] + _CHUNK, "right")) - 1
        if cols:
            end = min(end, first + _CHUNK // cols)
        end = min(last, max(first + 1, end))
        yield first, end
        first = end


def _columns(stored: np.ndarray, header: Header, starts: np.ndarray) -> np.ndarray:
    """The columns of some rows' blocks, which must rise within every row and stay below the matrix's."""
    counts = np.diff(starts)
    begin = (starts[:-1] - starts[0])[counts > 0]
    column = stored
    if header.index == 1:
        running = np.concatenate([[0], stored.cumsum()])
        column = running[1:] - np.repeat(running[:-1][begin], counts[counts > 0])
    rises = np.diff(column, prepend=-1) > 0
    rises[begin] = True
    if not rises.all() or (column >= header.cols).any():
        raise DataError(
            f"a packed weight of {header.cols} columns has column indices beyond them, or not rising in a row"
        )
    return column


def _columns_of_bits(words: np.ndarray, first: int, last: int, cols: int, starts: np.ndarray) -> np.ndarray:
    width = -(-cols // 64) * 8
    bits = np.unpackbits(words[first * width : last * width], bitorder="little").reshape(last - first, width * 8)
    if (bits.sum(1, dtype=np.int64) != np.diff(starts)).any() or bits[:, cols:].any():
        raise DataError("a packed weight has a mask that does not fit its values")
    return np.nonzero(bits)[1]


def _padded(size: int) -> int:
    return -(-size // ALIGN) * ALIGN
