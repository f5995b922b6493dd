import sys

import numpy as np
import pytest
import torch
from torch import nn

from secateur import datasets
from secateur.errors import DataError, MissingExtra, SpecError
from secateur.tasks import SPLITS, Classification, evaluate

SHAPE = (20, 1, 2, 2)


def everything(task, split):
    xs, ys = zip(*task.batches(split), strict=True)
    return torch.cat(xs), torch.cat(ys)


def test_digits_are_split_once_and_for_all():
    task = datasets.load("digits")
    rows = {split: everything(task, split)[0] for split in ("validation", "test")}
    assert [len(task.train[0]), len(rows["validation"]), len(rows["test"])] == [1078, 360, 359]
    assert rows["test"].shape[1:] == (1, 8, 8)
    assert 0 <= rows["test"].min() < rows["test"].max() <= 1
    again = datasets.digits()
    assert torch.equal(again.test[0], task.test[0])
    every = torch.cat([task.train[0], *rows.values()]).flatten(1)
    assert len(every.unique(dim=0)) >= 1790
    assert all(len(getattr(task, split)[1].unique()) == 10 for split in ("train", "validation", "test"))


def test_an_archive_of_x_and_y_is_split(tmp_path):
    x = np.arange(80, dtype=np.float64).reshape(SHAPE)
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(20) % 2)
    task = datasets.load(str(tmp_path / "a.npz"))
    parts = [task.train, task.validation, task.test]
    assert [len(x) for x, _ in parts] == [12, 4, 4]
    assert torch.equal(torch.cat([x for x, _ in parts]).flatten().sort().values, torch.arange(80.0))
    for px, py in parts:
        assert torch.equal((px[:, 0, 0, 0] / 4).long() % 2, py)


def test_an_archive_of_splits_is_taken_as_it_is_and_bytes_are_scaled(tmp_path):
    arrays = {}
    for i, split in enumerate(SPLITS):
        arrays[f"x_{split}"] = np.full((3, 2), 51 * i, np.uint8)
        arrays[f"y_{split}"] = np.full(3, i, np.int32)
    np.savez(tmp_path / "a.npz", **arrays)
    task = datasets.load(str(tmp_path / "a.npz"))
    for i, split in enumerate(SPLITS):
        x, y = everything(task, split)
        assert torch.allclose(x, torch.full((3, 2), 0.2 * i))
        assert y.tolist() == [i] * 3


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"x": np.ones((20, 2)), "labels": np.ones(20, int)},
            r"a\.npz holds labels, x; expected x and y, or x_test",
        ),
        ({"x": np.ones((20, 2)), "y": np.ones(19, int)}, "x holds 20 examples and y 19"),
        ({"x": np.ones((20, 2), int), "y": np.ones(20, int)}, "x is of type int64.*expected floats or bytes"),
        ({"x": np.ones((20, 2)), "y": np.ones(20)}, "y is of type float64.*one class index per example"),
        ({"x": np.ones((20, 2)), "y": np.ones((20, 2), int)}, r"y is of type int64 and shape \(20, 2\)"),
        ({"x": np.ones((2, 2)), "y": np.ones(2, int)}, "2 examples are too few to split"),
        ({"x": np.array([{"a": 1}] * 20), "y": np.ones(20, int)}, "cannot be read as an .npz file of plain"),
        ({}, r"a\.npz holds nothing"),
    ],
)
def test_an_unusable_archive_is_named(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        datasets.load(str(tmp_path / "a.npz"))


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 broken"])
def test_a_damaged_archive_is_named(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.npz cannot be read as an \.npz file"):
        datasets.load(str(tmp_path / "a.npz"))


def test_a_single_array_is_no_archive(tmp_path):
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(DataError, match=r"a\.npz cannot be read as an \.npz file"):
        datasets.load(str(tmp_path / "a.npz"))


def test_what_is_not_there_is_named():
    with pytest.raises(DataError, match=r"nowhere\.npz cannot be read.*No such file"):
        datasets.load("nowhere.npz")
    with pytest.raises(DataError, match="there is no data 'nowhere'; expected digits, a folder"):
        datasets.load("nowhere")


@pytest.fixture
def folder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for label, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
        (tmp_path / label).mkdir()
        for i in range(6):
            image.new("RGB", (20 + i, 30), colour).save(tmp_path / label / f"{i}.png")
    image.new("L", (9, 9), 7).save(tmp_path / "red" / "grey.GIF")
    (tmp_path / "red" / "notes.txt").write_text("no image")
    return tmp_path


def test_an_image_folder_gives_squares_of_the_size_asked_for(folder):
    task = datasets.load(str(folder), input_size=16)
    assert task.classes == ("blue", "red")
    assert sum(len(task.examples[s]) for s in ("train", "validation", "test")) == 13
    for split in SPLITS:
        x, y = everything(task, split)
        assert x.shape[1:] == (3, 16, 16)
        for image, label in zip(x, y, strict=True):
            red, _, blue = image.mean((1, 2))
            assert label == int(red >= blue) or image.std(correction=0) < 0.2
    assert evaluate(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2)), task, "test").shape == (3,)


def test_image_training_order_follows_the_seed(folder):
    task = datasets.load(str(folder), input_size=4)
    orders = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        orders.append(everything(task, "train")[0])
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def test_an_undecodable_image_is_named(folder):
    for image in (folder / "red").glob("*.png"):
        image.write_bytes(b"\x89PNG\r\n\x1a\n broken")
    task = datasets.load(str(folder), input_size=4)
    with pytest.raises(DataError, match=r"red.\d\.png cannot be decoded as an image.*repair or remove"):
        everything(task, "train")


def test_a_folder_without_classes_or_images_is_named(folder):
    (folder / "green").mkdir()
    with pytest.raises(DataError, match=r"green holds no images; expected files ending in \.bmp"):
        datasets.load(str(folder))
    with pytest.raises(DataError, match="red has no folders; expected one per class"):
        datasets.load(str(folder / "red"))


def test_a_function_of_the_user_gives_the_task(tmp_path):
    (tmp_path / "mine.py").write_text("from secateur.datasets import digits as task\n\ndef number():\n    return 3\n")
    assert isinstance(datasets.load(f"{tmp_path}/mine.py:task"), Classification)
    assert isinstance(datasets.load("secateur.datasets:digits"), Classification)
    with pytest.raises(DataError, match="number gave a int, expected a Task with batches, loss and scores"):
        datasets.load(f"{tmp_path}/mine.py:number")
    with pytest.raises(SpecError, match="no function 'other'"):
        datasets.load(f"{tmp_path}/mine.py:other")


@pytest.mark.parametrize(
    ("module", "spec", "message"),
    [
        ("sklearn.datasets", "digits", r"scikit-learn.*secateur\[demo\]"),
        ("PIL", ".", r"pillow.*secateur\[image\]"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, module, spec, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=message):
        datasets.load(spec)
