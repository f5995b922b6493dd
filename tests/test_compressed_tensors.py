"""Sparse checkpoints of compressed-tensors <= 0.14 become dense ones; anything else is refused with its reason.

The folders beside this file were written by compressed-tensors 0.14.0, and so was what it makes of them again.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.compat.compressed_tensors import expand, expand_to
from secateur.errors import DataError

FILES = Path(__file__).parent / "compressed_tensors"


def config(folder: Path, **changes: Any) -> None:
    sparsity = {"format": "sparse-bitmask", "targets": ["Linear"], "ignore": [], "sparsity_structure": "unstructured"}
    found = {"quant_method": "compressed-tensors", "version": "0.9.0", "sparsity_config": sparsity} | changes
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": found}))


def bitmask(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The parts of a weight, from the layout's description, not from any code."""
    bits = np.packbits((weight != 0).numpy(), axis=-1, bitorder="little")
    counts = [int((row != 0).sum()) for row in weight]
    return {
        f"{name}.compressed": weight[weight != 0],
        f"{name}.bitmask": torch.from_numpy(bits),
        f"{name}.shape": torch.tensor(weight.shape),
        f"{name}.row_offsets": torch.tensor([sum(counts[:i]) for i in range(len(counts))]),
    }


def two_of_four(name: str, weight: Tensor) -> dict[str, Tensor]:
    parts = bitmask(name, weight)
    del parts[f"{name}.row_offsets"]
    parts[f"{name}.compressed"] = parts[f"{name}.compressed"].view(len(weight), -1)
    parts[f"{name}.shape"] = parts[f"{name}.shape"].view(2, 1)
    return parts


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Bit by bit, NaN included."""
    return found.keys() == expected.keys() and all(
        found[n].dtype == t.dtype and torch.equal(found[n].view(torch.uint8), t.view(torch.uint8))
        for n, t in expected.items()
    )


WEIGHT = torch.tensor([[0.0, 3, 0, 0, 5, 0, 0, 7, 1], [0.0] * 9, [2.0] + [0.0] * 8])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "sparse"
    path.mkdir()
    config(path)
    save_file(bitmask("layers.0.q_proj", WEIGHT) | {"norm.weight": torch.ones(3)}, path / "model.safetensors")
    return path


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


# --- what is read ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bitmask", "24"])
def test_what_the_package_wrote_becomes_what_the_package_makes_of_it(name: str) -> None:
    assert same(expand(FILES / name), load_file(FILES / f"{name}.dense.safetensors"))


def test_the_layout_is_the_one_described(folder: Path) -> None:
    parts = bitmask("x", WEIGHT)
    assert parts["x.bitmask"][0].tolist() == [146, 1]
    assert parts["x.row_offsets"].tolist() == [0, 4, 4]
    found = expand(folder)
    assert torch.equal(found["layers.0.q_proj.weight"], WEIGHT)
    assert torch.equal(found["norm.weight"], torch.ones(3))
    assert len(found) == 2


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("suffix", ["", ".weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_every_dialect_and_dtype_is_read(key: str, suffix: str, dtype: torch.dtype, folder: Path) -> None:
    weight = torch.randint(1, 8, (6, 20)) * (torch.rand(6, 20) < 0.5)
    parts = bitmask(f"a.b{suffix}", weight.float())
    parts[f"a.b{suffix}.compressed"] = parts[f"a.b{suffix}.compressed"].to(dtype)
    save_file(parts, folder / "model.safetensors")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("quantization_config", key))
    found = expand(folder)
    assert found.keys() == {"a.b.weight"}
    assert found["a.b.weight"].dtype == dtype
    assert torch.equal(found["a.b.weight"].float(), weight.float())


def test_two_of_four_may_store_zeros_themselves(folder: Path) -> None:
    weight = torch.tensor([[1.0, 2, 0, 0, 0, 3, 4, 0], [0, 0, 5, 6, 7, 0, 0, 8]])
    parts = two_of_four("up", weight)
    parts["up.compressed"][0, 0] = 0
    save_file(parts, folder / "model.safetensors")
    config(folder, sparsity_config={"format": "sparse-24-bitmask", "sparsity_structure": "2:4"})
    weight[0, 0] = 0
    assert torch.equal(expand(folder)["up.weight"], weight)


def test_convolutions_and_vectors_are_read(folder: Path) -> None:
    conv = torch.randn(4, 3, 3, 3) * (torch.rand(4, 3, 3, 3) < 0.5)
    counts = (conv != 0).sum(-1)
    bits = torch.from_numpy(np.packbits((conv != 0).numpy(), axis=-1, bitorder="little"))
    parts = {"compressed": conv[conv != 0], "bitmask": bits, "shape": torch.tensor(conv.shape)}
    parts["row_offsets"] = counts.cumsum(0) - counts
    save_file({f"conv.{name}": part for name, part in parts.items()}, folder / "model.safetensors")
    assert torch.equal(expand(folder)["conv.weight"], conv)


def sharded(folder: Path) -> dict[str, Tensor]:
    """Two files, a weight's parts spread over both."""
    state = stored(folder) | bitmask("layers.1.q_proj", 2 * WEIGHT)
    first = {n: t for n, t in state.items() if n.startswith("layers.0") and not n.endswith("bitmask")}
    second = {n: t for n, t in state.items() if n not in first}
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    where = {}
    for name, part in zip(names, (first, second), strict=True):
        save_file(part, folder / name)
        where |= dict.fromkeys(part, name)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return state


def test_several_files_are_one_checkpoint(folder: Path) -> None:
    sharded(folder)
    found = expand(folder)
    assert torch.equal(found["layers.0.q_proj.weight"], WEIGHT)
    assert torch.equal(found["layers.1.q_proj.weight"], 2 * WEIGHT)
    assert found.keys() == {"layers.0.q_proj.weight", "layers.1.q_proj.weight", "norm.weight"}


def test_a_plain_folder_is_written(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    out = expand_to(folder, tmp_path / "dense")
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert same(load_file(out / "model.safetensors"), expand(folder))
    assert json.loads((out / "config.json").read_text()) == {"model_type": "llama"}
    with pytest.raises(DataError, match="nothing to expand"):
        expand(out)


def test_a_plain_folder_of_several_files_is_written(folder: Path, tmp_path: Path) -> None:
    sharded(folder)
    out = expand_to(folder, tmp_path / "dense")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    found = {name: load_file(out / file)[name] for name, file in index["weight_map"].items()}
    assert same(found, expand(folder))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())


@pytest.mark.usefixtures("torchvision")
def test_transformers_reads_what_is_written(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **sizes))
    folder, state = tmp_path / "sparse", {}
    model.save_pretrained(folder)
    for name, tensor in model.state_dict().items():
        sparse = tensor * (torch.rand_like(tensor) < 0.5)
        state |= bitmask(name.removesuffix(".weight"), sparse) if "_proj" in name else {name: tensor}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    found = json.loads((folder / "config.json").read_text())
    config(folder)
    found |= json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found))
    out = expand_to(folder, tmp_path / "dense")
    loaded, expected = transformers.LlamaForCausalLM.from_pretrained(out, dtype="auto").state_dict(), expand(folder)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


# --- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config_groups": {"group_0": {}}, "format": "int-quantized"}, "describes a quantized checkpoint"),
        ({"format": "marlin-24"}, "describes a quantized checkpoint"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "describes a quantized checkpoint"),
        ({"transform_config": {"config_groups": {}}}, "transformed weights"),
        ({"sparsity_config": {}}, "has format None, expected sparse-bitmask or sparse-24-bitmask"),
        ({"sparsity_config": {"format": "os:system"}}, "has format 'os:system'"),
        ({"sparsity_config": {"format": "dense"}}, "has format 'dense'"),
        ({"sparsity_config": ["sparse-bitmask"]}, "has format"),
        ({"quant_method": "gptq"}, "no checkpoint of compressed-tensors"),
    ],
)
def test_other_checkpoints_are_refused_with_the_reason(changes: dict[str, Any], message: str, folder: Path) -> None:
    config(folder, **changes)
    with pytest.raises(DataError, match=message) as caught:
        expand(folder)
    assert "config.json" in str(caught.value)


def test_what_only_the_tensors_show_is_refused_too(folder: Path) -> None:
    save_file(stored(folder) | {"layers.0.q_proj.weight_scale": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(DataError, match=r"'layers\.0\.q_proj\.weight_scale' is of a quantized checkpoint"):
        expand(folder)


def test_a_dense_quantization_section_is_none(folder: Path) -> None:
    config(folder, config_groups={}, format="dense", kv_cache_scheme=None, transform_config={})
    assert torch.equal(expand(folder)["layers.0.q_proj.weight"], WEIGHT)


Q = "layers.0.q_proj"
DAMAGE = {
    "a part less": ({f"{Q}.shape": None}, "expected the parts"),
    "no offsets": ({f"{Q}.row_offsets": None}, "expected the parts"),
    "other offsets": ({f"{Q}.row_offsets": torch.tensor([0, 4, 5])}, "row_offsets do not count"),
    "fewer offsets": ({f"{Q}.row_offsets": torch.tensor([0, 4])}, "row_offsets do not count"),
    "float offsets": ({f"{Q}.row_offsets": torch.tensor([0.0, 4, 4])}, "row_offsets do not count"),
    "fewer values": ({f"{Q}.compressed": torch.ones(4)}, "one for each of 5 bits"),
    "more values": ({f"{Q}.compressed": torch.ones(6)}, "one for each of 5 bits"),
    "integers": ({f"{Q}.compressed": torch.ones(5, dtype=torch.int8)}, "found torch.int8"),
    "two dimensions": ({f"{Q}.compressed": torch.ones(1, 5)}, "one for each of 5 bits"),
    "mask of floats": ({f"{Q}.bitmask": torch.ones(3, 2)}, "found torch.float32"),
    "narrow mask": ({f"{Q}.bitmask": torch.zeros(3, 1, dtype=torch.uint8)}, "has a bitmask of uint8"),
    "huge shape": ({f"{Q}.shape": torch.tensor([2**40, 2**40])}, "has a bitmask of uint8"),
    "negative shape": ({f"{Q}.shape": torch.tensor([-3, 9])}, "positive int64 sizes"),
    "empty shape": ({f"{Q}.shape": torch.zeros(0, dtype=torch.int64)}, "positive int64 sizes"),
    "shape of floats": ({f"{Q}.shape": torch.tensor([3.0, 9.0])}, "positive int64 sizes"),
    "twice": ({f"{Q}.weight": torch.ones(3, 9)}, "both as it is and compressed"),
    "both dialects": (bitmask(f"{Q}.weight", WEIGHT), "both as it is and compressed"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, folder: Path) -> None:
    changes, message = DAMAGE[name]
    state = {n: t for n, t in (stored(folder) | changes).items() if t is not None}
    save_file(state, folder / "model.safetensors")
    with pytest.raises(DataError, match=message) as caught:
        expand(folder)
    assert "model.safetensors" in str(caught.value)
    assert Q in str(caught.value)


def test_bits_beyond_the_columns_are_refused(folder: Path) -> None:
    state = stored(folder)
    state[f"{Q}.bitmask"][0, 1] = 2
    save_file(state, folder / "model.safetensors")
    with pytest.raises(DataError, match="bits beyond its 9 columns"):
        expand(folder)


def test_two_of_four_are_two_of_four(folder: Path) -> None:
    weight = torch.tensor([[1.0, 2, 3, 0, 4, 0, 0, 0]])
    save_file(two_of_four("up", weight), folder / "model.safetensors")
    config(folder, sparsity_config={"format": "sparse-24-bitmask"})
    with pytest.raises(DataError, match="two of every four"):
        expand(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "has no 'weight_map'"),
        ({"weight_map": {"a": "../model.safetensors"}}, "expected a safetensors file beside it"),
        ({"weight_map": {"a": 3}}, "expected a safetensors file beside it"),
        ({"weight_map": {"a": "model.bin"}}, "expected a safetensors file beside it"),
        ({"weight_map": {"a": "other.safetensors"}}, "missing or no whole safetensors file"),
        ({"weight_map": {"nowhere": "part.safetensors"}}, "does not hold 'nowhere'"),
    ],
)
def test_an_index_names_only_files_beside_it(index: dict[str, Any], message: str, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=message):
        expand(folder)


def test_missing_files_are_named_and_nothing_is_written(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"model\.safetensors is missing"):
        expand_to(folder, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
    with pytest.raises(DataError, match=r"config\.json cannot be read"):
        expand(tmp_path)


@pytest.mark.parametrize("name", ["bitmask", "24"])
def test_mutated_files_give_tensors_of_those_shapes_or_an_error_of_ours(name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FILES / name, tmp_path / name))
    shapes = {n: t.shape for n, t in load_file(FILES / f"{name}.dense.safetensors").items()}
    draw, read = random.Random(0), 0
    for _ in range(300):
        path = folder / draw.choice(["model.safetensors", "model.safetensors", "config.json"])
        whole = path.read_bytes()
        raw = bytearray(whole)
        for _ in range(draw.choice((1, 1, 3))):
            raw[draw.randrange(len(raw))] = draw.choice((0, 1, 34, 48, 255))
        path.write_bytes(raw[: draw.choice((len(raw), len(raw), draw.randrange(len(raw))))])
        try:
            found = expand(folder)
            read += 1
            assert sorted(map(tuple, (t.shape for t in found.values()))) == sorted(map(tuple, shapes.values()))
        except DataError:
            pass
        path.write_bytes(whole)
    assert 0 < read < 300
