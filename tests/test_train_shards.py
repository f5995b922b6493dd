"""Choices over weights that three processes share are those of one that has them all."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from secateur.allocate import best
from secateur.allocate.globally import Global
from secateur.errors import DataError, PlanError
from secateur.train.bits import keep_, pack, unpack
from secateur.train.scores import Scorer
from secateur.train.shards import (
    Part,
    SharedGlobal,
    best_here,
    common_group,
    finite_everywhere,
    gather,
    local,
    noise,
    part_of,
)

WORLD = 3
SHAPES = {"even": (6, 5), "ragged": (7, 4), "short": (2, 9), "flat": (4,), "one": (1, 3)}  # some have no rows for some


def split(shape, rank, group):
    step = math.ceil(shape[0] / WORLD)
    first = min(rank * step, shape[0])
    return Part(shape, first, min(step, shape[0] - first), group)


def scored(kind, seed):
    """Scores for every shape: distinct ones, ones with many ties, and ones at the ends of the number line."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        if kind == "ties":
            values = values.round()  # -0.0 among them
        if kind == "ends":
            values[values > 1.0], values[values < -0.5], values[values.abs() < 0.3] = math.inf, -math.inf, -0.0
            values[(values > 0.3) & (values < 0.6)] = 5e-324
        narrow = torch.float32 if kind != "mixed" else (torch.float64, torch.float32, torch.bfloat16)[i % 3]
        found[name] = values.to(narrow) if kind != "ends" else values
    return found


def worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    group = dist.group.WORLD
    parts = {name: split(shape, rank, group) for name, shape in SHAPES.items()}
    alone = {name: Part(shape, 0, shape[0]) for name, shape in SHAPES.items()}
    found = {}

    def says(law, holds):
        found[law] = found.get(law, True) and bool(holds)

    for seed, kind in enumerate(["distinct", "ties", "ends", "mixed"]):
        whole = scored(kind, seed)
        sizes = {name: score.numel() for name, score in whole.items()}
        here = {name: parts[name].slice(score).flatten() for name, score in whole.items()}
        finite = {name: score.flatten().nan_to_num() for name, score in whole.items()}  # of any size, as Global has it
        single = Global(finite)
        mine = {name: score.nan_to_num() for name, score in here.items()}
        shared = SharedGlobal(mine, parts, sizes)
        replicated = {**mine, "flat": finite["flat"]}
        mixed = SharedGlobal(replicated, {**parts, "flat": alone["flat"]}, sizes)
        for rung in range(single.rungs + 1):
            says(f"global, {kind}", shared.kept(rung) == single.kept(rung))
            says(f"global with replicated, {kind}", mixed.kept(rung) == single.kept(rung))
        for name, score in whole.items():
            for kept in range(score.numel() + 1):
                keep = best(score.flatten(), kept).view(score.shape)
                mine = best_here(here[name], kept, sizes[name], parts[name])
                says(f"best, {kind}", torch.equal(mine, parts[name].slice(keep).flatten()))
    for name, part in parts.items():
        text = f"seed {name}"
        says("noise", torch.equal(noise(text, part, "cpu"), part.slice(noise(text, alone[name], "cpu"))))
        flags = noise(text, alone[name], "cpu") < 0.5
        says("gather", torch.equal(gather(part.slice(flags), part), flags))
    fine, nan, infinite, none = (
        torch.ones(3),
        torch.tensor([1.0, math.nan]),
        torch.tensor([-math.inf]),
        torch.ones(0, 2),
    )
    mixed = [fine, none, nan if rank == 1 else fine, infinite if rank == 2 else none, nan * 1j if rank == 0 else fine]
    says("finite", finite_everywhere(mixed, group) == [True, True, False, False, False])
    says("common", common_group([*alone.values(), *parts.values()]) is group)
    pairs = [dist.new_group([0, 1]), dist.new_group([1, 2])]
    says("meshes", rank != 1 or refuses(lambda: common_group([Part((4,), 0, 2, pair) for pair in pairs])))
    says("scores", refuses(lambda: nan_on_the_last(rank, group), DataError))
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def nan_on_the_last(rank, group):
    value = torch.full((2, 2), math.nan if rank == WORLD - 1 else 1.0)
    weights = {"w": type("W", (), {"out_dim": 0})()}
    return Scorer("magnitude", torch.nn.Identity(), None, None, 0, weights, group).scores({"w": value}, {}, ["w"])


def refuses(call, error=PlanError):
    try:
        call()
    except error:
        return True
    return False


@pytest.fixture(scope="module")
def laws(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    all_three = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)]) for rank in range(WORLD)]
    try:
        assert [process.wait(timeout=120) for process in all_three] == [0] * WORLD
    finally:
        for process in all_three:
            process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


KINDS = ("distinct", "ties", "ends", "mixed")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("law", ["global", "global with replicated", "best"])
def test_thresholds_over_processes_are_those_of_one(laws, law: str, kind: str) -> None:
    assert [found[f"{law}, {kind}"] for found in laws] == [True] * WORLD


def test_noise_depends_on_the_place_alone(laws) -> None:
    assert all(found["noise"] for found in laws)
    numbers = noise("text", Part((100, 50), 0, 100), torch.device("cpu"))
    assert 0 <= float(numbers.min()) < 0.01
    assert 0.99 < float(numbers.max()) < 1
    assert numbers.unique().numel() > 4990
    assert abs(float(numbers.mean()) - 0.5) < 0.02
    assert not torch.equal(numbers, noise("test", Part((100, 50), 0, 100), torch.device("cpu")))


@pytest.mark.parametrize("law", ["gather", "finite", "common", "meshes"])
def test_processes_answer_alike(laws, law: str) -> None:
    assert all(found[law] for found in laws)


def test_scores_that_are_not_finite_anywhere_are_refused_everywhere(laws) -> None:
    assert all(found["scores"] for found in laws)


# --- without other processes ------------------------------------------------------------------------


class Split:
    """A tensor as a DTensor shows itself."""

    def __init__(self, shape, placements):
        self.shape, self.placements, self.device_mesh = shape, placements, None


def test_only_rows_may_be_split() -> None:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import Partial, _StridedShard

    assert part_of(Split((4, 2), (Replicate(),)), "w").group is None
    strided = _StridedShard(0, split_factor=2)
    for placements in [(Shard(1),), (Shard(0), Shard(0)), (strided, Shard(0)), (Partial(),), (strided,)]:
        with pytest.raises(PlanError, match=r"'w' is placed as .* split by rows"):
            part_of(Split((4, 2), placements), "w")


def test_an_ordinary_tensor_is_here() -> None:
    tensor = torch.rand(3, 2)
    assert local(tensor) is tensor
    assert part_of(tensor, "w").local_shape == (3, 2)
    assert part_of(torch.tensor(1.0), "w").local_shape == ()


@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (9, 3), (0, 4), (2, 3, 5)])
def test_bits_come_back(shape: tuple[int, ...]) -> None:
    flags = torch.rand(shape) < 0.5
    bits = pack(flags)
    assert bits.dtype == torch.uint8
    assert bits.numel() == -(-flags.numel() // 8)
    assert torch.equal(unpack(bits, shape), flags)


def test_bits_of_a_transposed_mask_are_in_its_order() -> None:
    flags = (torch.rand(5, 7) < 0.5).T
    assert torch.equal(unpack(pack(flags), flags.shape), flags)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
)
def test_what_a_mask_drops_is_zero_and_the_rest_is_untouched(dtype: torch.dtype) -> None:
    mask = torch.rand(4, 6) < 0.5
    for layout in (torch.randn(4, 6, dtype=dtype), torch.randn(6, 4, dtype=dtype).T):
        tensor, before = layout, layout.clone()
        tensor[~mask] = math.nan
        keep_(tensor, mask)
        assert torch.equal(tensor[mask], before[mask])
        assert not tensor[~mask].any()
        assert not torch.view_as_real(tensor).signbit()[~mask].any() if dtype.is_complex else True
        assert dtype.is_complex or not tensor.signbit()[~mask].any()


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
