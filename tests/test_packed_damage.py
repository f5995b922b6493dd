"""Nothing damaged gets through: packed directories that are not what they were."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from packed import mlp, rewrite, saved
from torch import Tensor

from secateur import store
from secateur.errors import DataError, PruneError
from secateur.report import Report
from secateur.runtime import disk, kernels
from secateur.runtime.formats import pack

engine = pytest.mark.skipif(bool(kernels.why_missing()), reason=kernels.why_missing())


@pytest.fixture(scope="module", autouse=True)
def no_page() -> Iterator[None]:
    """Saving draws no report.html, which takes longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Report, "save_html", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("packed"))[-1]


@pytest.fixture
def folder(once: Path, tmp_path: Path) -> Path:
    """A packed directory to damage; ``mlp()`` is its model."""
    return Path(shutil.copytree(once, tmp_path / "out"))


def retell(folder: Path, **changes: object) -> None:
    about = json.loads((folder / store.MODEL).read_text())
    (folder / store.MODEL).write_text(json.dumps(about | changes))


# --- damage ------------------------------------------------------------------------------------------

TARGETS = ["", *(["cpu-sparse"] if not kernels.why_missing() else [])]
IS = {"shape": [384, 256], "dtype": "float32", "groups": 1}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("packed", "message"),
    [
        ({"0.weight": IS | {"shape": [256, 384]}}, "expected 0.weight of torch.float32 .384, 256., found"),
        ({"0.weight": IS | {"dtype": "bfloat16"}}, "expected 0.weight of torch.float32"),
        ({"0.weight": IS | {"groups": 2}}, "0.weight: expected a packed weight of shape .384, 256. in 2 groups, found"),
        ({"0.weight": IS, "5.weight": IS}, "holds '5.weight', which the model does not have"),
        ({"0.weight": IS, "0.bias": IS | {"shape": [384, 1]}}, "expected 0.bias"),
        ({"0.weight": IS | {"shape": [2**70, 2**70]}}, "expected 0.weight of torch.float32"),
        ({"0.weight": IS | {"shape": [-1, 256]}}, "'packed' is damaged"),
        ({"0.weight": IS | {"dtype": "int8"}}, "'packed' is damaged"),
        ({"0.weight": IS | {"more": 1}}, "'packed' is damaged"),
        ({"0.weight": IS | {"groups": True}}, "'packed' is damaged"),
        (["0.weight"], "'packed' is damaged"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(packed: object, message: str, target: str, folder: Path) -> None:
    if isinstance(packed, dict):
        packed = {"2.weight": IS | {"shape": [256, 384]}} | packed
    retell(folder, packed=packed)
    with pytest.raises(PruneError, match=message) as caught:
        store.load(folder, mlp()[0], target=target)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(384, 256), "0.weight: a packed weight is a flat uint8 tensor"),
        (torch.zeros(640, dtype=torch.uint8), "0.weight: no packed weight of version 1"),
        (pack(torch.zeros(256, 384), disk.Format("blocks")), "found one of 256 x 384"),
        (pack(torch.zeros(384, 256), disk.Format("blocks"))[:-64], "should have 1728 bytes by its header, found 1664"),
        (None, "0.weight"),
    ],
)
def test_tensors_that_are_no_such_packed_weight_are_refused(
    tensor: Tensor | None, message: str, target: str, folder: Path
) -> None:
    rewrite(folder, "0.weight", tensor)
    with pytest.raises(PruneError, match=message) as caught:
        store.load(folder, mlp()[0], target=target)
    assert store.WEIGHTS in str(caught.value)


@pytest.mark.parametrize("target", TARGETS)
def test_a_huge_declared_weight_is_refused_before_anything_is_allocated(target: str, folder: Path) -> None:
    huge = pack(torch.zeros(1, 1), disk.Format("blocks")).clone()
    huge[20:24] = 255  # columns
    rewrite(folder, "0.weight", huge)
    with pytest.raises(DataError, match="found one of 1 x 4294967295"):
        store.load(folder, mlp()[0], target=target)


@pytest.mark.parametrize("target", TARGETS)
def test_weights_from_one_group_to_another_are_refused(target: str, tmp_path: Path) -> None:
    model, _, _, folder = saved(tmp_path, "grouped", budget="sparsity=50%")
    about = json.loads((folder / store.MODEL).read_text())["packed"]
    name, of = next((name, of) for name, of in about.items() if of["groups"] > 1)
    whole = torch.zeros(of["shape"][0], of["groups"] * of["shape"][1] * 9)
    whole[0, -1] = 1
    rewrite(folder, name, pack(whole, disk.Format("blocks")))
    with pytest.raises(DataError, match=f"{name}: a packed weight of .* from an output to another group"):
        store.load(folder, model, target=target)


@pytest.mark.parametrize("file", [store.WEIGHTS, store.INPUTS])
def test_a_tensor_that_comes_twice_is_refused(file: str, folder: Path) -> None:
    raw = (folder / file).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries = raw[8 : 8 + length].rstrip()
    twice = entries[:-1] + b"," + entries[1:]
    (folder / file).write_bytes(len(twice).to_bytes(8, "little") + twice + raw[8 + length :])
    with pytest.raises(DataError, match="is there twice"):
        store.load(folder, mlp()[0])


def test_a_key_that_comes_twice_is_refused(folder: Path) -> None:
    text = (folder / store.MODEL).read_text()
    (folder / store.MODEL).write_text(text[:-1] + ', "packed": {}}')
    with pytest.raises(DataError, match="'packed' is there twice"):
        store.load(folder, mlp()[0])


def test_ties_of_packed_weights_are_checked(folder: Path) -> None:
    retell(folder, aliases={"0.weight": "2.weight"})
    with pytest.raises(DataError, match=r"ties '0\.weight' to '2\.weight'"):
        store.load(folder, mlp()[0])


# --- many kinds of damage ----------------------------------------------------------------------------

FILES = [store.WEIGHTS, store.WEIGHTS, store.WEIGHTS, store.MODEL, "plan.json", "plan.safetensors", store.INPUTS]


def mutated(raw: bytes, draw: random.Random) -> bytes:
    found = bytearray(raw)
    at = draw.randrange(len(found))
    match draw.randrange(7):
        case 0:
            return bytes(found[:at])
        case 1:
            return bytes(found[:at] + found[at + draw.choice((1, 8, 64)) :])
        case 2:
            return bytes(found[:at] + draw.randbytes(draw.choice((1, 8, 64))) + found[at:])
        case 3:
            where = at // 4 * 4
            return bytes(
                found[:where] + struct.pack("<I", draw.choice((0, 1, 64, 2**31, 2**32 - 1))) + found[where + 4 :]
            )
        case 4:
            return bytes(found[:8] + draw.randbytes(1) + found[9:])
        case _:
            for _ in range(draw.choice((1, 1, 4))):
                at = draw.randrange(min(len(found), draw.choice((512, 2048, len(found)))))
                found[at] = draw.choice((0, 48, 57, 255, found[at] ^ (1 << draw.randrange(8))))
            return bytes(found)


def fuzz(folder: Path, cases: int, seed: int) -> None:
    model, inputs, result, out = saved(folder, "grouped", budget="sparsity=60%")
    shapes = {name: (value.shape, value.dtype) for name, value in result.model.state_dict().items()}
    draw, loaded = random.Random(seed), 0
    for case in range(cases):
        path = out / draw.choice(FILES)
        whole = path.read_bytes()
        path.write_bytes(mutated(whole, draw))
        try:
            found = store.load(out, model)
            loaded += 1
            assert {n: (v.shape, v.dtype) for n, v in found.state_dict().items()} == shapes, (seed, case)
            if len(TARGETS) > 1:
                with torch.no_grad():
                    assert store.load(out, model, target="cpu-sparse")(inputs).shape == result.model(inputs).shape
        except PruneError:
            pass
        finally:
            path.write_bytes(whole)
    assert 0 < loaded < cases


def test_a_mutated_directory_gives_a_model_of_that_form_or_an_error_of_ours(tmp_path: Path) -> None:
    fuzz(tmp_path, 300, 0)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(1, 11))
def test_mutated_directories_many(seed: int, tmp_path: Path) -> None:
    fuzz(tmp_path, 1000, seed)
