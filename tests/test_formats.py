"""Packed weights: what is packed comes back, in the bytes promised; damage is refused as the engine refuses it."""

from __future__ import annotations

import random
import struct

import pytest
import torch
from torch import Tensor

from secateur.errors import DataError, SpecError
from secateur.runtime import formats, kernels
from secateur.runtime.formats import Format, check, expand, pack, read_header

FORMATS = [
    Format(kind, height, values)
    for kind, height in (("bitmask", 1), ("blocks", 1), ("blocks", 4), ("blocks", 16))
    for values in ("float32", "bfloat16", "int8")
]
engine = pytest.mark.skipif(bool(kernels.why_missing()), reason=kernels.why_missing())


def sparse(rows: int, cols: int, part: float = 0.2, seed: int = 0) -> Tensor:
    """Integers from -127 to 127, 127 in every row that has any, so that every kind of value holds them."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (rows, cols), generator=draw).float()
    weight *= torch.rand(rows, cols, generator=draw) < part
    if cols:
        weight[:, 0] = torch.where((weight != 0).any(1), 127.0, 0.0)
    return weight


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (3, 64), (16, 65), (37, 300), (33, 70000)], ids=str)
@pytest.mark.parametrize("part", [0.0, 0.1, 1.0])
def test_what_is_packed_comes_back(format: Format, shape: tuple[int, int], part: float) -> None:
    weight = sparse(*shape, part)
    packed = pack(weight, format)
    assert torch.equal(expand(packed), weight)
    header = check(packed)
    assert (header.format, header.rows, header.cols) == (format, *shape)
    assert packed.numel() == header.size
    assert header.size % 64 == 0


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize(("outputs", "inputs", "groups"), [(12, 9, 1), (12, 9, 3), (50, 27, 10), (64, 25, 64)])
def test_groups_are_blocks_on_the_diagonal(format: Format, outputs: int, inputs: int, groups: int) -> None:
    weight = sparse(outputs, inputs, 0.5)
    whole = torch.block_diag(*weight.chunk(groups))
    packed = pack(weight, format, groups)
    assert torch.equal(packed, pack(whole, format))
    assert torch.equal(expand(packed), whole)
    assert torch.equal(expand(packed, groups), weight)


def test_large_weights_are_packed_and_expanded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = sparse(70, 50, 0.5)
    whole = {str(format): pack(weight, format) for format in FORMATS}
    monkeypatch.setattr(formats, "_CHUNK", 200)
    for format in FORMATS:
        assert torch.equal(pack(weight, format), whole[str(format)])
        assert torch.equal(expand(whole[str(format)]), weight)


def test_columns_take_the_fewest_bytes() -> None:
    def index(cols: int, *columns: int) -> int:
        weight = torch.zeros(2, cols)
        weight[1, list(columns)] = 1
        packed = pack(weight, Format("blocks"))
        assert torch.equal(expand(packed), weight)
        return read_header(packed).index

    assert index(100_000, 255, 510, 765) == 1
    assert index(65_536, 0, 256, 65_535) == 2
    assert index(65_537, 256, 65_536) == 4
    assert index(7) == 1


def test_zeros_of_every_kind_are_not_stored_and_other_values_are() -> None:
    weight = torch.tensor([[0.0, -0.0, 1e-40, -1e-40, torch.finfo(torch.float32).tiny, float("nan"), -float("inf")]])
    for format in (Format("blocks"), Format("bitmask")):
        packed = pack(weight, format)
        assert read_header(packed).count == 3
        found = expand(packed)
        assert found[0, :4].view(torch.int32).tolist() == [0, 0, 0, 0]
        assert torch.equal(found[0, 4:].view(torch.int32), weight[0, 4:].view(torch.int32))


def test_int8_rounds_to_the_nearest_step_of_its_row() -> None:
    weight = torch.randn(20, 50)
    found = expand(pack(weight, Format("blocks", 4, "int8")))
    assert ((found - weight).abs() <= weight.abs().amax(1, keepdim=True) / 127 * 0.5001).all()
    with pytest.raises(DataError, match="NaN"):
        pack(torch.tensor([[float("nan")]]), Format("blocks", 1, "int8"))


@pytest.mark.parametrize(
    ("weight", "format", "groups"),
    [
        (torch.zeros(4), Format("blocks"), 1),
        (torch.zeros(4, 4, dtype=torch.int32), Format("blocks"), 1),
        (torch.zeros(4, 4), Format("blocks", 8), 1),
        (torch.zeros(4, 4), Format("coordinates"), 1),
        (torch.zeros(4, 4), Format("blocks", 1, "float16"), 1),
        (torch.zeros(4, 4), Format("blocks"), 3),
    ],
)
def test_what_has_no_form_is_refused(weight: Tensor, format: Format, groups: int) -> None:
    with pytest.raises(SpecError):
        pack(weight, format, groups)


def test_weights_outside_their_groups_are_refused() -> None:
    packed = pack(torch.ones(4, 6), Format("blocks"))
    with pytest.raises(DataError, match="from an output to another group"):
        expand(packed, 2)
    with pytest.raises(DataError, match="has no 4 groups"):
        expand(packed, 4)


# --- damage ------------------------------------------------------------------------------------------


def changed(packed: Tensor, at: int, kind: str, *values: int) -> Tensor:
    raw = bytearray(packed.numpy().tobytes())
    struct.pack_into(f"<{len(values)}{kind}", raw, at, *values)
    return torch.frombuffer(raw, dtype=torch.uint8).clone()


def accepts(read: object, packed: Tensor) -> bool:
    try:
        read(packed)  # type: ignore[operator]
    except DataError:
        return False
    return True


STARTS = 64
DAMAGE = {
    "magic": (0, "B", 1),
    "version": (8, "B", 2),
    "format": (9, "B", 3),
    "values": (10, "B", 3),
    "height": (11, "B", 2),
    "index": (12, "B", 3),
    "reserved": (13, "B", 1),
    "more rows": (16, "I", 2**32 - 1),
    "fewer rows": (16, "I", 1),
    "more columns of a mask": (20, "I", 2**31),
    "huge count": (24, "Q", 2**63),
    "count": (24, "Q", 3),
    "reserved rest": (63, "B", 1),
    "first start": (STARTS, "I", 1),
    "falling starts": (STARTS + 4, "I", 2**32 - 1),
    "last start": (STARTS + 4 * 40, "I", 2**31),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("format", [Format("blocks"), Format("bitmask")], ids=str)
def test_damage_is_refused_before_anything_is_allocated(name: str, format: Format) -> None:
    packed = pack(sparse(40, 100), format)
    if name == "more columns of a mask" and format.kind == "blocks":
        pytest.skip("more columns that nothing is stored in are no damage")
    bad = changed(packed, *DAMAGE[name])
    with pytest.raises(DataError, match="packed weight"):
        check(bad)
    if not kernels.why_missing():
        assert not accepts(kernels.Handle, bad)


@pytest.mark.parametrize("cols", [200, 60_000, 70_000])
@pytest.mark.parametrize("columns", [(5, 5), (6, 5), (5, None)], ids=["twice", "falling", "beyond"])
def test_columns_rise_and_stay_inside(cols: int, columns: tuple[int, int | None]) -> None:
    weight = torch.zeros(3, cols)
    weight[1, 5] = weight[1, 7] = weight[1, -1] = 1
    packed = pack(weight, Format("blocks"))
    width = read_header(packed).index
    first, second = columns[0], cols if columns[1] is None else columns[1]
    if width == 1:
        first, second = first, (second - first) % 256
    bad = changed(packed, 128, {1: "B", 2: "H", 4: "I"}[width], first, second)
    with pytest.raises(DataError, match="not rising in a row"):
        check(bad)
    if not kernels.why_missing():
        assert not accepts(kernels.Handle, bad)


def test_a_mask_has_as_many_bits_as_values_and_none_beyond() -> None:
    packed = pack(torch.eye(3, 5), Format("bitmask"))
    for bits in (0b11, 0, 1 << 5, 1 << 40):
        bad = changed(packed, 128, "Q", bits)
        with pytest.raises(DataError, match="mask"):
            check(bad)
        if not kernels.why_missing():
            assert not accepts(kernels.Handle, bad)


@pytest.mark.parametrize("wrong", [torch.zeros(10, dtype=torch.uint8), torch.zeros(100), torch.zeros(8, 64).byte()])
def test_other_tensors_are_no_packed_weights(wrong: Tensor) -> None:
    with pytest.raises(DataError, match="flat uint8 tensor"):
        read_header(wrong)


def mutated(packed: Tensor, draw: random.Random) -> Tensor:
    """Some bytes changed, mostly where the structure is; or bytes lost, added, moved."""
    raw = bytearray(packed.numpy().tobytes())
    match draw.randrange(6):
        case 0:
            raw = raw[: draw.randrange(len(raw) + 1)]
        case 1:
            raw += bytes(draw.choice((1, 64, 128)))
        case 2:
            at = draw.randrange(8, 64) // 4 * 4
            struct.pack_into("<I", raw, at, draw.choice((0, 1, 2, 16, 63, 64, 65, 2**16, 2**31, 2**32 - 1)))
        case _:
            for _ in range(draw.choice((1, 1, 2, 8))):
                at = draw.randrange(min(len(raw), draw.choice((64, 256, len(raw)))))
                raw[at] = draw.choice((0, 1, 255, raw[at] ^ (1 << draw.randrange(8))))
    return torch.frombuffer(raw, dtype=torch.uint8).clone() if raw else torch.zeros(0, dtype=torch.uint8)


def fuzz(cases: int, seed: int) -> None:
    draw = random.Random(seed)
    accepted = 0
    for case in range(cases):
        rows, cols = draw.choice((1, 3, 16, 33)), draw.choice((1, 64, 65, 300, 70_000))
        whole = pack(sparse(rows, cols, draw.choice((0.01, 0.3)), case), draw.choice(FORMATS))
        bad = mutated(whole, draw)
        ours = accepts(check, bad)
        accepted += ours
        if not kernels.why_missing():
            assert ours == accepts(kernels.Handle, bad), (seed, case)
        if ours and read_header(bad).rows * read_header(bad).cols < 10**7:
            assert expand(bad).shape == (read_header(bad).rows, read_header(bad).cols)
    assert 0 < accepted < cases


def test_mutated_bytes_are_a_weight_or_refused_as_the_engine_does() -> None:
    fuzz(400, 0)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(1, 21))
def test_mutated_bytes_many(seed: int) -> None:
    fuzz(1000, seed)


@engine
def test_the_engine_reads_what_is_packed() -> None:
    for format in FORMATS:
        handle = kernels.Handle(pack(sparse(33, 70), format))
        assert (handle.rows, handle.cols) == (33, 70)
