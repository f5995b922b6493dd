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
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(20) % 5)
    task = datasets.load(str(tmp_path / "a.npz"))
    parts = [task.train, task.validation, task.test]
    assert [len(x) for x, _ in parts] == [12, 4, 4]
    assert torch.equal(torch.cat([x for x, _ in parts]).flatten().sort().values, torch.arange(80.0))
    for px, py in parts:
        assert torch.equal((px[:, 0, 0, 0] / 4).long() % 5, py)


def test_an_archive_of_splits_is_taken_as_it_is_and_bytes_are_scaled(tmp_path):
    arrays = {}
    for i, split in enumerate(SPLITS):
        arrays[f"x_{split}"] = np.full((3, 2), 51 * i, np.uint8)
        arrays[f"y_{split}"] = np.array([i, i, 9], np.int32)
    np.savez(tmp_path / "a.npz", **arrays)
    task = datasets.load(str(tmp_path / "a.npz"))
    for i, split in enumerate(SPLITS):
        x, y = everything(task, split)
        assert torch.allclose(x, torch.full((3, 2), 0.2 * i))
        assert y.tolist() == [i, i, 9]


def _splits(**labels):
    """An archive of splits, with these labels in place of 0, 1, 2."""
    named = {"train": [0, 1, 2], "validation": [0, 1, 2], "test": [0, 1, 2]} | labels
    arrays = {f"x_{split}": np.ones((len(y), 2)) for split, y in named.items()}
    return arrays | {f"y_{split}": np.array(y, int) for split, y in named.items()}


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
        ({"x": np.ones((20, 2)), "y": np.ones(20, int)}, r"a\.npz: all 12 examples of the train split are of class 1"),
        ({"x": np.full((20, 2), np.nan), "y": np.arange(20) % 2}, "x holds NaN or infinite values"),
        ({"x": np.ones((20, 2)), "y": np.arange(20) % 2 - 1}, "y holds the class -1, expected indices from 0"),
        (_splits(validation=[2, 2, 2]), "all 3 examples of the validation split are of class 2, so that a model which"),
        (_splits(test=[]), "the test split is empty; give examples of at least two classes"),
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
        for i in range(10):
            image.new("RGB", (20 + i, 30), colour).save(tmp_path / label / f"{i}.png")
    image.new("L", (9, 9), 7).save(tmp_path / "red" / "grey.GIF")
    (tmp_path / "red" / "notes.txt").write_text("no image")
    return tmp_path


def test_an_image_folder_gives_squares_of_the_size_asked_for(folder):
    task = datasets.load(str(folder), input_size=16)
    assert task.classes == ("blue", "red")
    assert sum(len(task.examples[s]) for s in ("train", "validation", "test")) == 21
    for split in SPLITS:
        x, y = everything(task, split)
        assert x.shape[1:] == (3, 16, 16)
        for image, label in zip(x, y, strict=True):
            red, _, blue = image.mean((1, 2))
            assert label == int(red >= blue) or image.std(correction=0) < 0.2
    assert evaluate(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2)), task, "test").shape == (4,)


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


def paint(folder, counts):
    """Images in ``folder/CLASS``, the class's name and number in their brightness."""
    image = pytest.importorskip("PIL.Image")
    for shade, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image.new("L", (8, 8), 100 * shade + i).save(folder / name / f"{i}.png")


@pytest.mark.parametrize("validation", ["val", "validation", "valid"])
def test_splits_that_are_folders_are_taken_as_they_are(tmp_path, validation):
    paint(tmp_path / "train", {"a": 4, "b": 3, "c": 2})
    paint(tmp_path / validation, {"a": 2, "b": 2})
    paint(tmp_path / "test", {"a": 1, "c": 2})
    task = datasets.load(str(tmp_path), input_size=8)
    assert task.classes == ("a", "b", "c")
    labels = {split: sorted(everything(task, split)[1].tolist()) for split in ("train", "validation", "test")}
    assert labels == {"train": [0] * 4 + [1] * 3 + [2] * 2, "validation": [0, 0, 1, 1], "test": [0, 2, 2]}
    assert all(path.parts[-3] == "test" for path, _ in task.examples["test"])


def test_without_a_test_folder_half_of_the_validation_images_are_for_testing(tmp_path):
    paint(tmp_path / "train", {"a": 2, "b": 2})
    paint(tmp_path / "val", {"a": 8, "b": 8})
    task = datasets.load(str(tmp_path), input_size=8)
    assert [len(task.examples[split]) for split in ("train", "validation", "test")] == [4, 8, 8]
    assert not set(task.examples["validation"]) & set(task.examples["test"])
    assert task.examples == datasets.load(str(tmp_path), input_size=8).examples


def test_folders_of_splits_that_do_not_fit_are_named(tmp_path):
    paint(tmp_path / "train", {"a": 2, "b": 2})
    with pytest.raises(DataError, match="has a folder train but none of validation, val, valid; add one"):
        datasets.load(str(tmp_path))
    paint(tmp_path / "val", {"a": 2, "z": 2})
    with pytest.raises(DataError, match=r"val has a class 'z' that .*train lacks; it has \('a', 'b'\)"):
        datasets.load(str(tmp_path))
    (tmp_path / "val" / "z").rename(tmp_path / "z")
    with pytest.raises(DataError, match="split are of class 0, so that a model which always says so would be right"):
        datasets.load(str(tmp_path))


def test_a_short_last_training_batch_is_dropped(tmp_path):
    paint(tmp_path, {"a": 40, "b": 41})
    task = datasets.load(str(tmp_path), input_size=8)
    assert [len(x) for x, _ in task.batches("train")] == [32]
    assert sum(len(x) for x, _ in task.batches("calibration")) == len(task.examples["train"]) == 49


def test_bytes_of_a_text_are_tokens_in_the_order_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_text("Grüße! " * 1000, encoding="utf-8")
    task = datasets.load(str(tmp_path / "a.txt"), model="mine.py:net")
    sequences = [*task.train, *task.validation, *task.test]
    assert {len(s) for s in sequences} == {512}
    assert [len(task.train), len(task.validation), len(task.test)] == [10, 4, 3]
    text = "Grüße! ".encode() * 1000
    assert torch.cat(sequences).tolist() == list(text[: 17 * 512])
    (tmp_path / "a.txt").write_text("a" * 200)
    assert {len(s) for s in datasets.load(str(tmp_path / "a.txt")).train} == {20}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"short", r"a\.txt has 5 tokens, too few to split"),
        ("a.txt", b"\xff\xfe" * 99, r"a\.txt is no UTF-8 text"),
        ("a.tsv", b"a\t1\nb 2\n", r"a\.tsv, line 2: expected text<TAB>label, found 'b 2'"),
        ("a.tsv", b"text\tlabel\n\n", r"a\.tsv has no lines of text<TAB>label"),
        ("a.tsv", b"fine\t1\n" * 20, r"a\.tsv: all 12 examples of the train split are of class 1"),
    ],
)
def test_unusable_texts_are_named(tmp_path, hf, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        datasets.load(str(tmp_path / name), model=hf if name.endswith("tsv") else "")


def test_texts_that_are_not_there_or_cannot_be_read_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt cannot be read: No such file"):
        datasets.load("nowhere.txt")
    (tmp_path / "a.tsv").write_text("a\t0\nb\t1\n")
    with pytest.raises(DataError, match=r"only the tokenizer of a model hf:… can read here; give such a model"):
        datasets.load(str(tmp_path / "a.tsv"), model="timm:resnet18")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty has no tokenizer to read the text with"):
        datasets.load(str(tmp_path / "a.tsv"), model=f"hf:{tmp_path}/empty")


@pytest.fixture
def hf(tmp_path):
    """A model's folder with a tokenizer of words: known are 'a' to 'z', which are 3 to 28."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "<unk>", "<cls>", *map(chr, range(97, 123))]
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    core.post_processor = tokenizers.processors.TemplateProcessing("<cls> $A", special_tokens=[("<cls>", 2)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", cls_token="<cls>", model_max_length=16
    )
    fast.save_pretrained(tmp_path / "model")
    labels = {"good": 1, "bad": 0}
    transformers.BertConfig(
        vocab_size=29, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, label2id=labels,
        id2label={i: name for name, i in labels.items()}, max_position_embeddings=16,
    ).save_pretrained(tmp_path / "model")  # fmt: skip
    return f"hf:{tmp_path / 'model'}"


def test_a_text_is_read_with_the_models_own_tokenizer(tmp_path, hf):
    (tmp_path / "a.txt").write_text("b c d e " * 100)
    task = datasets.load(str(tmp_path / "a.txt"), model=hf)
    assert torch.cat([*task.train, *task.validation, *task.test]).tolist() == [4, 5, 6, 7] * 100
    assert {len(s) for s in task.train} == {16}


def test_labelled_texts_get_the_models_tokens_and_class_numbers(tmp_path, hf):
    lines = ["a b\tgood", "c\tbad", "d ü e\tgood", f"{'z ' * 40}\tbad"] * 10
    (tmp_path / "a.tsv").write_text("sentence\tlabel\n" + "\n".join(lines) + "\n\n", encoding="utf-8")
    task = datasets.load(str(tmp_path / "a.tsv"), model=hf)
    seen = set()
    for split in ("train", "validation", "test"):
        for inputs, labels in task.batches(split):
            assert inputs["input_ids"].shape == inputs["attention_mask"].shape
            for ids, mask, label in zip(inputs["input_ids"], inputs["attention_mask"], labels, strict=True):
                assert (ids[mask == 0] == 0).all()
                seen.add((*ids[mask == 1].tolist(), "label", int(label)))
    assert seen == {
        (2, 3, 4, "label", 1), (2, 5, "label", 0), (2, 6, 1, 7, "label", 1), (2, *[28] * 15, "label", 0),
    }  # fmt: skip


@pytest.mark.parametrize(("labels", "indices"), [(("7", "3"), (7, 3)), (("zebra", "ant"), (1, 0))])
def test_labels_are_numbers_or_numbered_by_name(tmp_path, hf, labels, indices):
    (tmp_path / "a.tsv").write_text("".join(f"{'ab'[i % 2]}\t{labels[i % 2]}\n" for i in range(40)))
    task = datasets.load(str(tmp_path / "a.tsv"), model=hf)
    found = {(int(ids[1]), int(label)) for ids, label in zip(*task.train, strict=True)}
    assert found == {(3, indices[0]), (4, indices[1])}


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
