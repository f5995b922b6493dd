import pytest
import torch
from torch import nn

from secateur.errors import DataError, MissingExtra, TargetError
from secateur.targets.onnx import _difference, export_onnx

onnxruntime = pytest.importorskip("onnxruntime")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.conv(x)).relu().mean((2, 3))))


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)

    def forward(self, ids, scale, bias=None):
        out = self.table(ids) * scale[:, None, None]
        return {"out": out if bias is None else out + bias, "sum": out.sum((1, 2))}


def run(path, *arrays):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: a.numpy() for i, a in zip(session.get_inputs(), arrays, strict=True)})


@pytest.mark.parametrize("batch", [1, 2])
def test_the_file_equals_eager_at_any_batch_size(tmp_path, batch):
    torch.manual_seed(0)
    model = Net()
    path = export_onnx(model, torch.randn(batch, 3, 6, 6), tmp_path / "out")
    assert path == tmp_path / "out" / "model.onnx"
    assert model.training
    assert model.drop.training
    model.eval()
    for size in (1, 2, 5):
        x = torch.randn(size, 3, 6, 6)
        (found,) = run(path, x)
        torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keyword", [False, True])
def test_several_inputs_of_several_types(tmp_path, keyword):
    ids, scale, bias = torch.tensor([[0, 6, 3], [1, 1, 1]]), torch.tensor([1.0, 2.0]), torch.ones(4)
    inputs = {"ids": ids, "scale": scale, "bias": bias} if keyword else (ids, scale, bias)
    path = export_onnx(Table(), inputs, str(tmp_path), name="table.onnx")
    out, total = run(path, ids.repeat(2, 1), scale.repeat(2), bias)
    assert out.shape == (4, 3, 4)
    assert total.shape == (4,)


def test_a_fixed_batch_refuses_another_size(tmp_path):
    path = export_onnx(Net(), torch.randn(2, 3, 6, 6), tmp_path, dynamic_batch=False)
    with pytest.raises(Exception, match=r"(?i)invalid dimensions|INVALID_ARGUMENT"):
        run(path, torch.randn(3, 3, 6, 6))


class Eigen(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvals(x.mT @ x).real


def test_an_operator_without_onnx_form_is_named_and_nothing_is_written(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), Eigen())
    with pytest.raises(TargetError, match=r"linalg_eig.* at test_onnx\.py:\d+ .* in layer '1'"):
        export_onnx(model, torch.randn(2, 4), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Fixed(nn.Module):
    def forward(self, x):
        return x * torch.ones(2, 1) + x.new_zeros(2, 3)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_model_that_cannot_be_captured_is_named(tmp_path):
    with pytest.raises(TargetError, match=r"Branch cannot be captured by torch.export on \(float32\[2, 3\]\)"):
        export_onnx(Branch(), torch.randn(2, 3), tmp_path / "out", dynamic_batch=False)
    with pytest.raises(TargetError, match="needs dynamic_batch=False"):
        export_onnx(Fixed(), torch.randn(2, 3), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert export_onnx(Fixed(), torch.randn(2, 3), tmp_path / "out", dynamic_batch=False).exists()


def test_a_disagreement_is_refused_and_the_old_folder_stays(tmp_path):
    (tmp_path / "model.onnx").write_text("old")
    with pytest.raises(TargetError, match=r"differs from eager PyTorch by .* in output 0 on the example inputs"):
        export_onnx(Net(), torch.randn(2, 3, 6, 6), tmp_path, tolerance=-1.0)
    assert (tmp_path / "model.onnx").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_a_changing_model_is_refused(tmp_path):
    class Drifting(nn.Module):
        calls = 0

        def forward(self, x):
            if not torch.compiler.is_exporting():
                type(self).calls += 1
            return x + self.calls

    with pytest.raises(TargetError, match="differs from eager"):
        export_onnx(Drifting(), torch.ones(2, 3), tmp_path / "out")


@pytest.mark.parametrize(
    ("wanted", "got", "gap"),
    [
        ([1.0, -4.0], [1.0, -3.0], 0.25),
        ([torch.nan, torch.inf], [torch.nan, torch.inf], 0.0),
        ([torch.nan, 1.0], [0.0, 1.0], torch.inf),
        ([torch.inf, 1.0], [-torch.inf, 1.0], torch.inf),
        ([1.0], [torch.nan], torch.inf),
        ([1.0], [[1.0]], torch.inf),
        ([], [], 0.0),
    ],
)
def test_the_difference_takes_nan_and_infinity_seriously(wanted, got, gap):
    assert _difference(torch.tensor(wanted), torch.tensor(got).numpy()) == gap


def test_inputs_without_a_tensor_are_refused(tmp_path):
    with pytest.raises(DataError, match="at least one tensor"):
        export_onnx(Net(), {}, tmp_path)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(MissingExtra, match=r"'onnxscript'.*secateur\[onnx\]"):
        export_onnx(Net(), torch.randn(2, 3, 6, 6), tmp_path)
