"""A packed directory: the same model in fewer bytes, mapped into the engine, and nothing damaged gets through."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from packed import masked, mlp, rewrite, saved
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from nets import build
from secateur import api, store
from secateur.cli import app
from secateur.errors import SpecError, TargetError
from secateur.patterns import Block, parse
from secateur.report import Report
from secateur.runtime import disk, kernels
from secateur.runtime.formats import check, expand, pack, read_header

engine = pytest.mark.skipif(bool(kernels.why_missing()), reason=kernels.why_missing())


@pytest.fixture(scope="module", autouse=True)
def no_page() -> Iterator[None]:
    """Saving draws no report.html, which takes longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Report, "save_html", lambda *_: None)
        yield


def same(model: nn.Module, other: nn.Module) -> bool:
    one, two = model.state_dict(), other.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# --- what comes back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["", "plain", "plain_1d", "grouped", "depthwise", "transposed", "tied_linear"])
@pytest.mark.parametrize("pattern", ["unstructured", "block:4x1"])
def test_save_and_load_is_identity(net: str, pattern: str, tmp_path: Path) -> None:
    _, inputs, result, folder = saved(tmp_path, net, pattern, "sparsity=80%")
    assert json.loads((folder / store.MODEL).read_text())["packed"]
    loaded = store.load(folder, build(net, seed=9)[0] if net else mlp()[0])
    assert same(loaded, result.model)
    assert torch.equal(loaded(inputs), result.model.eval()(inputs))


@pytest.mark.parametrize(("pattern", "most"), [("unstructured", 0.128), ("block:4x1", 0.118), ("block:16x1", 0.114)])
def test_nine_of_ten_weights_gone_take_the_bytes_promised(pattern: str, most: float, tmp_path: Path) -> None:
    model, _, _, folder = saved(tmp_path, "", pattern)
    dense = sum(p.nbytes for p in model.parameters())
    assert (folder / store.WEIGHTS).stat().st_size < most * dense


@pytest.mark.parametrize(
    ("pattern", "density", "format"),
    [
        *(("unstructured", 0.08, "csr"), ("unstructured", 0.3, "bitmask"), ("block:1x4", 0.08, "csr")),
        *(
            ("block:4x1", 0.08, "4x1"),
            ("block:4x1", 0.6, "4x1"),
            ("block:8x1", 0.1, "4x1"),
            ("block:32x2", 0.1, "16x1"),
        ),
        *(("unstructured", 0.99, ""), ("block:16x1", 1.0, "")),
    ],
)
def test_a_weight_takes_the_form_of_its_pattern_or_of_the_fewest_bytes(
    pattern: str, density: float, format: str
) -> None:
    shape = parse(pattern)
    rows, cols = (shape.rows, shape.cols) if isinstance(shape, Block) else (1, 1)
    kept = torch.rand(256 // rows, 256 // cols) < density
    weight = torch.randn(256, 256) * kept.repeat_interleave(rows, 0).repeat_interleave(cols, 1)
    packed = disk.packed(weight, shape)
    assert ("" if packed is None else str(read_header(packed).format)) == format


def test_half_the_weights_take_a_mask_and_few_zeros_nothing(tmp_path: Path) -> None:
    *_, folder = saved(tmp_path, pattern="2:4", budget=None)
    assert str(read_header(load_file(folder / store.WEIGHTS)["0.weight"]).format) == "bitmask"
    *_, folder = saved(tmp_path / "few", budget="sparsity=1%")
    assert json.loads((folder / store.MODEL).read_text())["packed"] == {}
    assert load_file(folder / store.WEIGHTS)["0.weight"].shape == (384, 256)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    model, inputs = mlp()
    model, inputs = model.to(dtype), inputs.to(dtype)
    result = masked(model, inputs)
    store.save(result, tmp_path, packed=True)
    values = {read_header(load_file(tmp_path / store.WEIGHTS)[f"{i}.weight"]).format.values for i in (0, 2)}
    assert values == {"bfloat16" if dtype == torch.bfloat16 else "float32"}
    assert same(store.load(tmp_path, model), result.model)


def test_doubles_stay_as_they_are(tmp_path: Path) -> None:
    model, inputs = mlp()
    result = masked(model.double(), inputs.double())
    store.save(result, tmp_path, packed=True)
    assert load_file(tmp_path / store.WEIGHTS)["0.weight"].dtype == torch.float64
    assert same(store.load(tmp_path, model), result.model)


def test_values_that_bfloat16_holds_are_stored_as_such() -> None:
    weight = (torch.randn(64, 64) * (torch.rand(64, 64) < 0.1)).bfloat16().float()
    packed = disk.packed(weight, parse("unstructured"))
    assert str(read_header(packed).format) == "csr bfloat16"
    assert torch.equal(disk.unpacked(packed, disk.Unpacked((64, 64), "float32")), weight)
    assert str(read_header(disk.packed(weight + 1e-3 * (weight != 0), parse("unstructured"))).format) == "csr"


def test_odd_values_come_back_but_for_the_smallest(tmp_path: Path) -> None:
    model, _, result, folder = saved(tmp_path)
    with torch.no_grad():
        odd = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-40, -1e-40, 1e-37])
        result.model.get_parameter("0.weight")[5, :7] = odd
    store.save(result, folder, packed=True)
    found = store.load(folder, model).get_parameter("0.weight")[5, :7]
    expected = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 0.0, 0.0, 1e-37])
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


def test_packed_weights_begin_at_multiples_of_64_bytes(tmp_path: Path) -> None:
    *_, folder = saved(tmp_path, "plain")
    raw = (folder / store.WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8 : 8 + length])
    packed = json.loads((folder / store.MODEL).read_text())["packed"]
    for name in packed:
        begin, end = entries[name]["data_offsets"]
        assert (8 + length + begin) % 64 == 0
        check(torch.frombuffer(bytearray(raw[8 + length + begin : 8 + length + end]), dtype=torch.uint8))


def test_plans_that_remove_units_have_nothing_to_pack(tmp_path: Path) -> None:
    model, inputs = build("plain")
    result = api.prune(model, inputs, budget="params=60%")
    with pytest.raises(SpecError, match="the pattern 'channel' removes units"):
        store.save(result, tmp_path / "out", packed=True)
    assert not (tmp_path / "out").exists()


def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))\n"
    )
    (tmp_path / "wide.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    words = ["prune", "wide.py:net", "--input", "1x64", "--budget", "sparsity=90%", "--out", "out", "--packed"]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2
    assert "removes units" in refused.stderr
    assert not Path("out").exists()
    done = CliRunner().invoke(app, [*words, "--pattern", "unstructured", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(Path("out/model.json").read_text())["packed"].keys() == {"0.weight", "2.weight"}
    assert CliRunner().invoke(app, ["bench", "out", "--against", "wide.py:net", "--seconds", "0.1"]).exit_code == 0


# --- the engine --------------------------------------------------------------------------------------


@engine
@pytest.mark.parametrize("net", ["", "plain", "plain_1d", "grouped", "depthwise", "shared_module"])
@pytest.mark.parametrize("pattern", ["unstructured", "block:4x1"])
def test_the_engine_gives_what_the_model_gives(net: str, pattern: str, tmp_path: Path) -> None:
    model, inputs, result, folder = saved(tmp_path, net, pattern, "sparsity=80%")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loaded = store.load(folder, model, target="cpu-sparse")
    with torch.no_grad():
        torch.testing.assert_close(loaded(inputs), result.model.eval()(inputs), rtol=1e-4, atol=1e-5)
    assert any(type(module).__name__.startswith("Sparse") for module in loaded.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(type(module).__name__.startswith("Sparse") for module in model.modules())


@engine
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_run_on_the_engine(dtype: torch.dtype, tmp_path: Path) -> None:
    model, inputs = mlp()
    result = masked(model.to(dtype), inputs.to(dtype))
    store.save(result, tmp_path, packed=True)
    loaded = store.load(tmp_path, model, target="cpu-sparse")
    with torch.no_grad():
        found, expected = loaded(inputs.to(dtype)), result.model.eval()(inputs.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@engine
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_layers_of_encoders_keep_away_from_the_fused_operator(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model, inputs = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 64)
    result = masked(model, inputs, budget="sparsity=80%")
    store.save(result, tmp_path, packed=True)
    loaded = store.load(tmp_path, model, target="cpu-sparse")
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        for given in ({}, {"src_key_padding_mask": padding}):
            found, expected = loaded(inputs, **given), result.model.eval()(inputs, **given)
            torch.testing.assert_close(found[:, :3], expected[:, :3], rtol=1e-4, atol=1e-5)
    kinds = {name: type(module).__name__ for name, module in loaded.named_modules()}
    assert kinds["layers.1.linear1"] == "SparseLinear"
    assert kinds["layers.1.self_attn.out_proj"] == "NonDynamicallyQuantizableLinear"


@engine
def test_weights_that_others_see_are_expanded(tmp_path: Path) -> None:
    model, inputs, result, folder = saved(tmp_path, "tied_linear", budget="sparsity=90%")
    loaded = store.load(folder, model, target="cpu-sparse")
    assert loaded.head.weight is loaded.emb.weight
    torch.testing.assert_close(loaded(inputs), result.model.eval()(inputs))


MAPPED = """
import sys, torch
from torch import nn
from secateur import store

def resident(kind):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(kind))

folder, target = sys.argv[1:]
model = nn.Sequential(nn.Linear(4096, 4096, bias=False, device="meta")).eval()
model.to_empty(device="cpu")
store.load  # everything is imported
import secateur.runtime.attach
before = resident("RssAnon")
loaded = store.load(folder, model, target=target)
print(resident("RssAnon") - before)
if target:
    with open("/proc/self/maps") as maps:
        for line in maps:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if start <= loaded[0].packed.data_ptr() < end:
                print(line.split()[-1])
    torch.manual_seed(0)
    print(loaded(torch.ones(1, 4096)).sum().item())
"""


@engine
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc here that tells what is mapped")
def test_packed_weights_are_mapped_and_not_expanded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4096, 4096, bias=False))
    result = masked(model, torch.zeros(1, 4096), budget="sparsity=80%")
    store.save(result, tmp_path, packed=True)

    def run(target: str) -> list[str]:
        words = [sys.executable, "-c", MAPPED, str(tmp_path), target]
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout.split()

    grown, where, total = run("cpu-sparse")
    assert Path(where).samefile(tmp_path / store.WEIGHTS)
    assert int(grown) < 24_000  # kB; dense it has 65,536, packed about 16,800, and plan and masks are read too
    assert int(run("")[0]) > 65_000
    with torch.no_grad():
        assert float(total) == pytest.approx(float(result.model(torch.ones(1, 4096)).sum()), rel=1e-3, abs=1e-2)


@engine
def test_files_that_another_tool_wrote_out_of_line_are_copied(tmp_path: Path) -> None:
    model, inputs, result, folder = saved(tmp_path)
    rewrite(folder, "", None)
    loaded = store.load(folder, model, target="cpu-sparse")
    assert loaded[0].packed.data_ptr() % 64 == 0
    with torch.no_grad():
        torch.testing.assert_close(loaded(inputs), result.model(inputs), rtol=1e-4, atol=1e-5)


@engine
def test_layers_with_hooks_and_a_layer_alone_are_expanded(tmp_path: Path) -> None:
    model, inputs = mlp()
    model[0].register_forward_hook(lambda module, args, output: output + 1)
    result = masked(model, inputs)
    store.save(result, tmp_path / "hooked", packed=True)
    loaded = store.load(tmp_path / "hooked", model, target="cpu-sparse")
    assert [type(layer).__name__ for layer in loaded] == ["Linear", "ReLU", "SparseLinear"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(inputs), result.model(inputs), rtol=1e-4, atol=1e-5)
    alone = nn.Linear(64, 64)
    store.save(masked(alone, torch.randn(1, 64)), tmp_path / "alone", packed=True)
    with pytest.raises(TargetError, match="holds no packed weight of a layer"):
        store.load(tmp_path / "alone", alone, target="cpu-sparse")


@engine
def test_targets_that_have_nothing_to_run(tmp_path: Path) -> None:
    model, inputs = mlp()
    result = masked(model, inputs)
    store.save(result, tmp_path)
    with pytest.raises(TargetError, match="holds no packed weight"):
        store.load(tmp_path, model, target="cpu-sparse")
    with pytest.raises(SpecError, match="target 'tpu' is unknown"):
        store.load(tmp_path, model, target="tpu")


def test_without_the_engine_a_target_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, result, folder = saved(tmp_path)
    monkeypatch.setattr(kernels, "why_missing", lambda: "the sparse engine was not built")
    with pytest.raises(TargetError, match="was not built"):
        store.load(folder, model, target="cpu-sparse")
    assert same(store.load(folder, model), result.model)


def test_expanding_by_the_page_alone() -> None:
    """The reader that docs/format.md prints."""
    page = (Path(__file__).parents[1] / "docs" / "format.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    scope: dict[str, object] = {}
    exec(code, scope)
    weight = torch.randn(18, 300) * (torch.rand(18, 300) < 0.1)
    for form in (disk.Format("blocks"), disk.Format("blocks", 4), disk.Format("blocks", 16), disk.Format("bitmask")):
        packed = pack(weight, form)
        assert torch.equal(torch.from_numpy(scope["dense"](packed.numpy())), weight)  # type: ignore[operator]
        assert torch.equal(expand(packed), weight)
