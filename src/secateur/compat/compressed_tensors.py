"""Reads the sparse checkpoints of compressed-tensors up to 0.14, which dropped the two formats afterwards.

``sparse-bitmask`` and ``sparse-24-bitmask``, as llm-compressor wrote them: a folder with config.json and safetensors
files, in which each ``<module>.weight`` is stored as ``compressed`` (its values), ``bitmask`` and ``shape``, the first
format with ``row_offsets`` too. Source: github.com/vllm-project/compressed-tensors, tag 0.14.0, sparse_compressors.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from secateur.errors import DataError
from secateur.files import read_json, replace_dir, write_atomic
from secateur.runtime import disk

FORMATS = ("sparse-bitmask", "sparse-24-bitmask")

_CONFIG, _SINGLE, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_KEYS = ("quantization_config", "compression_config")  # of config.json; the second until 2024
_PARTS = ("compressed", "bitmask", "shape", "row_offsets")
_QUANTIZED = ("_scale", "zero_point", "g_idx", ".weight_packed")  # ends of names
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth")
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def expand(folder: Path | str) -> dict[str, Tensor]:
    """The dense state of a sparse checkpoint: every tensor by the name that the model has for it, on the CPU.

    One file or several with an index, in the names of before 0.9 (``….weight.compressed``) or after (``….compressed``).

    Raises DataError where the folder holds no such checkpoint or a damaged one, and for one that is quantized or
    transformed besides: those need the model code of compressed-tensors.
    """
    return {name: tensor for _, tensors in _files(Path(folder)) for name, tensor in tensors.items()}


def expand_to(folder: Path | str, out: Path | str) -> Path:
    """Write the checkpoint as a plain one, which transformers reads, one file after the other; returns ``out``.

    config.json loses what it said of the format; all other files, such as those of the tokenizer, come along. Raises
    as ``expand``; ``out`` is then as it was.
    """
    folder, out = Path(folder), Path(out)
    with replace_dir(out) as new:
        where, size = dict[str, str](), 0
        for file, tensors in _files(folder):
            whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
            write_atomic(new / file, to_safetensors(whole, {"format": "pt"}))
            where |= dict.fromkeys(tensors, file)
            size += sum(tensor.nbytes for tensor in tensors.values())
        if set(where.values()) != {_SINGLE}:
            index = {"metadata": {"total_size": size}, "weight_map": where}
            write_atomic(new / _INDEX, json.dumps(index, indent=2, sort_keys=True))
        config = {key: value for key, value in read_json(folder / _CONFIG).items() if key not in _KEYS}
        write_atomic(new / _CONFIG, json.dumps(config, indent=2, sort_keys=True))
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.name != _CONFIG and not path.name.endswith(_WEIGHTS):
                shutil.copyfile(path, new / path.name)
    return out


def _files(folder: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The dense tensors of each file; a weight is of the file that has its values."""
    format = _format(folder / _CONFIG)
    where = _where(folder)
    stored = {file: disk.read(folder / file) for file in dict.fromkeys(where.values())}  # mapped, not read
    for name, file in where.items():
        if name not in stored[file]:
            raise DataError(f"{folder / file} does not hold {name!r}, which {_INDEX} says it does")
        if name.endswith(_QUANTIZED):
            raise DataError(f"{folder / file}: {name!r} is of a quantized checkpoint; {_REASON}")
    weights = {name.removesuffix(".compressed") for name in where if name.endswith(".compressed")}
    parts = {f"{weight}.{part}" for weight in weights for part in _PARTS}
    for file in stored:
        dense: dict[str, Tensor] = {}
        for name in (name for name, at in where.items() if at == file):
            weight = name.removesuffix(".compressed")
            if name not in parts:
                _add(dense, name, stored[file][name], folder / file)
            elif weight in weights:
                found = {p: stored[where[n]][n] for p in _PARTS if (n := f"{weight}.{p}") in where}
                try:
                    tensor = _dense(found, format)
                except DataError as error:
                    raise DataError(f"{folder / file}: {weight}: {error}") from error
                _add(dense, weight if weight.endswith(".weight") else f"{weight}.weight", tensor, folder / file)
        yield file, dense


_REASON = "only weights that are sparse and nothing else can be expanded; use compressed-tensors 0.14 for this one"


def _format(path: Path) -> str:
    """What config.json calls the format, one of FORMATS. Raises DataError for anything that changes weights besides."""
    config = read_json(path)
    found = next((config[key] for key in _KEYS if isinstance(config, dict) and config.get(key)), None)
    if not isinstance(found, dict) or found.get("quant_method", "compressed-tensors") != "compressed-tensors":
        raise DataError(f"{path} describes no checkpoint of compressed-tensors; there is nothing to expand")
    groups, format = found.get("config_groups"), found.get("format")
    if groups or found.get("kv_cache_scheme") or format not in (None, "dense", *FORMATS):
        raise DataError(f"{path} describes a quantized checkpoint (format {format!r}, groups {groups!r}); {_REASON}")
    if found.get("transform_config"):
        raise DataError(f"{path} describes a checkpoint with transformed weights; {_REASON}")
    sparsity = found.get("sparsity_config") or {}
    name = sparsity.get("format") if isinstance(sparsity, dict) else sparsity
    if name not in FORMATS:
        raise DataError(f"{path}: the sparsity_config has format {name!r}, expected {' or '.join(FORMATS)}")
    return str(name)


def _where(folder: Path) -> dict[str, str]:
    """The file of every stored tensor."""
    if (folder / _SINGLE).exists() or not (folder / _INDEX).exists():
        return dict.fromkeys(disk.read(folder / _SINGLE), _SINGLE)
    index = read_json(folder / _INDEX)
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not where:
        raise DataError(f"{folder / _INDEX} has no 'weight_map' of tensors and their files")
    for name, file in where.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise DataError(
                f"{folder / _INDEX} says that {name!r} is in {file!r}, expected a safetensors file beside it"
            )
    return where


def _dense(parts: Mapping[str, Tensor], format: str) -> Tensor:
    """A weight from its parts, all of which must agree before anything is allocated."""
    wanted = set(_PARTS if format == "sparse-bitmask" else _PARTS[:3])
    if parts.keys() != wanted:
        raise DataError(f"expected the parts {sorted(wanted)} of a {format} weight, found {sorted(parts)}")
    values, bits = parts["compressed"], parts["bitmask"]
    shape = _shape(parts["shape"])
    lead, cols = shape[:-1], shape[-1]
    if bits.dtype != torch.uint8 or tuple(bits.shape) != (*lead, -(-cols // 8)):
        raise DataError(
            f"a weight of shape {list(shape)} has a bitmask of uint8 {[*lead, -(-cols // 8)]}, found {bits.dtype} "
            f"{list(bits.shape)}"
        )
    mask = torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1, bitorder="little")).bool()
    count = int(mask.sum())
    expected = (count,) if format == "sparse-bitmask" else (*lead, cols // 2)
    if not values.dtype.is_floating_point or tuple(values.shape) != expected or values.numel() != count:
        raise DataError(
            f"expected compressed values of shape {list(expected)}, one for each of {count} bits, found {values.dtype} "
            f"{list(values.shape)}"
        )
    if bool(mask[..., cols:].any()):
        raise DataError(f"the bitmask has bits beyond its {cols} columns")
    mask = mask[..., :cols]
    if format == "sparse-bitmask":
        rows, offsets = mask.sum(-1), parts["row_offsets"]
        if offsets.dtype != torch.int64 or not torch.equal(offsets, rows.cumsum(0) - rows):
            raise DataError("the row_offsets do not count the bits of the rows before")
    elif mask.numel() % 4 or bool((mask.reshape(-1, 4).sum(1) != 2).any()):
        raise DataError("the bitmask does not keep two of every four weights")
    dense = torch.zeros(shape, dtype=values.dtype)
    raw = _BITS[values.element_size()]  # not every float type can be indexed
    dense.view(raw)[mask] = values.view(raw).flatten()
    return dense


def _shape(stored: Tensor) -> tuple[int, ...]:
    sizes = stored.flatten().tolist() if stored.dtype == torch.int64 and 0 < stored.numel() <= 8 else [-1]
    if min(sizes) < 1:
        raise DataError(
            f"expected a shape of positive int64 sizes, found {stored.dtype} {stored.flatten()[:8].tolist()}"
        )
    return tuple(sizes)


def _add(dense: dict[str, Tensor], name: str, tensor: Tensor, path: Path) -> None:
    if name in dense:
        raise DataError(f"{path} holds {name!r} both as it is and compressed")
    dense[name] = tensor
