"""Detection, language models and text classification: their batches, losses, scores and summaries."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur import api
from secateur.errors import DataError
from secateur.recover import recover
from secateur.report import Report
from secateur.report.terminal import show
from secateur.tasks import Classification, Detection, LanguageModel, TextClassification, evaluate, judge
from secateur.tasks.detection import Match, image_score, iou, match, mean_ap

# --- language models --------------------------------------------------------------------------------


def tokens(*sequences):
    return [torch.tensor(s) for s in sequences]


def language(**changes):
    parts = {"train": tokens([1, 2, 3], [2, 3], [3, 1, 2, 3]), "validation": tokens([1, 2, 3, 1], [2, 3])}
    return LanguageModel(**({**parts, "test": tokens([3, 1], [1, 2, 3]), "batch_size": 2} | changes))


class Next(nn.Module):
    """Says with some certainty that after token t comes t + 1, and 1 after 3."""

    def __init__(self, certainty=2.0):
        super().__init__()
        self.table = nn.Embedding(4, 4)
        with torch.no_grad():
            self.table.weight.copy_(certainty * torch.eye(4)[[0, 2, 3, 1]])

    def forward(self, ids):
        return SimpleNamespace(logits=self.table(ids))


def test_sequences_are_filled_up_for_the_model_and_left_out_of_the_targets():
    ((inputs, targets),) = language(pad=9).batches("validation")
    assert inputs.tolist() == [[1, 2, 3, 1], [2, 3, 9, 9]]
    assert targets.tolist() == [[1, 2, 3, 1], [2, 3, -100, -100]]


def test_loss_score_and_perplexity_are_of_real_next_tokens():
    """Of the tokens after the first, those of the last sequence are wrong."""
    task = language(test=tokens([1, 2, 3, 1], [2, 3], [1, 3, 2]), batch_size=2)
    scores, summary = judge(Next(), task, "test")
    assert scores.tolist() == [1, 1, 0]
    right, wrong = 2 - math.log(math.exp(2) + 3), -math.log(math.exp(2) + 3)
    assert summary == {"perplexity": pytest.approx(math.exp(-(4 * right + 2 * wrong) / 6))}
    (inputs, targets), _ = task.batches("test")
    assert task.loss(Next()(inputs), targets).item() == pytest.approx(-right)
    assert task.loss(Next()(inputs).logits, targets).item() == pytest.approx(-right)
    assert evaluate(Next(), task, "test").tolist() == scores.tolist()


def test_what_fills_up_does_not_count_for_an_embedding():
    """The same gradient whether sequences share a batch or not, but for the weight of each."""
    one = language(validation=tokens([2, 3]))
    both = language(validation=tokens([2, 3], [1, 2, 3, 1]))
    model = Next()
    for task, count in ((one, 1), (both, 4)):
        ((inputs, targets),) = task.batches("validation")
        model.zero_grad()
        (task.loss(model(inputs), targets) * count).backward()
        if task is one:
            expected = model.table.weight.grad[2].clone()
    assert torch.allclose(model.table.weight.grad[2], 2 * expected)
    assert (model.table.weight.grad[0] == 0).all()


def test_a_language_model_learns():
    text = torch.tensor([1, 2, 3] * 40).view(-1, 6)
    task = language(train=list(text), validation=list(text[:4]), test=list(text[:4]))
    better, _ = recover(Next(0.0), task, epochs=3, lr=1.0, accumulate=2)
    assert evaluate(better, task, "test").mean() == 1.0
    assert judge(better, task, "test")[1]["perplexity"] < 0.7 * judge(Next(0.0), task, "test")[1]["perplexity"]


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        ([1], r"sequence 1 of split 'test' is of type torch\.int64 and shape \(1,\); expected two or more token"),
        ([[1, 2], [2, 3]], r"shape \(2, 2\)"),
        ([1.0, 2.0], r"type torch\.float32"),
    ],
)
def test_what_is_no_token_sequence_is_named(sequence, message):
    with pytest.raises(DataError, match=message):
        language(test=tokens([1, 2], sequence))


@pytest.mark.parametrize("kind", [lambda: language(), lambda: texts()])
def test_a_model_without_its_head_is_named(kind):
    class Headless(nn.Module):
        def forward(self, *_, **__):
            return SimpleNamespace(last_hidden_state=torch.zeros(2, 3))

    with pytest.raises(DataError, match=r"gave a SimpleNamespace, expected logits.*load the model with its head"):
        evaluate(Headless(), kind(), "test")


# --- text classification ----------------------------------------------------------------------------


def texts(**changes):
    parts = {name: (tokens([1, 2, 3], [2]), torch.tensor([1, 0])) for name in ("train", "validation", "test")}
    return TextClassification(**(parts | {"pad": 7} | changes))


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(8, 2)

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=(self.table(input_ids) * attention_mask[..., None]).sum(1))


def test_texts_come_with_their_mask():
    ((inputs, labels),) = texts().batches("validation")
    assert inputs["input_ids"].tolist() == [[1, 2, 3], [2, 7, 7]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert labels.tolist() == [1, 0]


def test_texts_can_be_learned_and_do_not_depend_on_what_fills_up():
    torch.manual_seed(0)
    better, _ = recover(Bag(), texts(), epochs=20, lr=0.5)
    assert evaluate(better, texts(), "test").tolist() == [1, 1]
    assert evaluate(better, texts(pad=0), "test").tolist() == [1, 1]


def test_texts_and_classes_that_do_not_match_are_named():
    with pytest.raises(DataError, match=r"'train' has 2 texts and classes of shape \(3,\); expected one class index"):
        texts(train=(tokens([1], [2]), torch.tensor([0, 1, 2])))


# --- detection --------------------------------------------------------------------------------------

LEFT, RIGHT, APART = [0.0, 0, 10, 10], [20.0, 0, 30, 10], [50.0, 50, 60, 60]
SHIFTED = [0.0, 0, 10, 15]  # IoU 2/3 with LEFT
NOTHING = (torch.zeros(0, 4), torch.zeros(0), torch.zeros(0))


def found(*boxes):
    """Of (box, score, class)."""
    corners, scores, classes = zip(*boxes, strict=True)
    return torch.tensor(corners), torch.tensor(scores), torch.tensor(classes)


def truth(*boxes):
    corners, classes = zip(*boxes, strict=True) if boxes else ((), ())
    return torch.tensor(corners).reshape(-1, 4), torch.tensor(classes)


def test_overlap_is_intersection_over_union():
    boxes = np.array([LEFT, SHIFTED, RIGHT, [5.0, 5, 5, 5]])
    assert iou(boxes, boxes)[0].tolist() == pytest.approx([1, 2 / 3, 0, 0])
    assert iou(boxes, boxes).T.tolist() == iou(boxes, boxes).tolist()


def test_every_object_is_found_once_and_by_the_best_box_of_its_class():
    boxes = found((SHIFTED, 0.5, 0), (LEFT, 0.9, 0), (RIGHT, 0.8, 1), (RIGHT, 0.7, 0), (APART, 0.95, 0))
    result = match(boxes, truth((LEFT, 0), (RIGHT, 0)))
    assert result.scores.tolist() == pytest.approx([0.95, 0.9, 0.8, 0.7, 0.5])
    assert result.right.tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("right", "objects", "expected"),
    [
        ([1, 1], 2, 1.0),
        ([0, 0], 2, 0.0),
        ([], 2, 0.0),
        ([1, 0], 2, 51 / 101),
        ([0, 1, 1], 2, 2 / 3),
        ([1, 0, 1], 2, (51 + 50 * 2 / 3) / 101),
    ],
)
def test_average_precision_is_taken_at_101_recalls(right, objects, expected):
    scores = np.linspace(1, 0.5, len(right))
    one = Match(np.zeros(len(right)), scores, np.array(right, float), np.zeros(objects))
    assert image_score(one) == pytest.approx(expected)
    assert mean_ap([one]) == pytest.approx(expected)


def test_the_mean_is_over_classes_that_occur_and_over_all_images_at_once():
    images = [
        match(found((LEFT, 0.9, 0), (APART, 0.8, 0), (APART, 0.99, 5)), truth((LEFT, 0), (RIGHT, 1))),
        match(found((LEFT, 0.85, 0)), truth((LEFT, 0))),
    ]
    assert mean_ap(images) == pytest.approx((1.0 + 0.0) / 2)
    images.append(match(found((RIGHT, 0.87, 0)), truth()))  # found where there is nothing: before the second right one
    assert mean_ap(images) == pytest.approx((51 + 50 * 2 / 3) / 101 / 2)
    assert mean_ap(images[::-1]) == pytest.approx(mean_ap(images))


def test_an_image_without_objects_scores_by_what_is_found_in_it():
    assert image_score(match(NOTHING, truth())) == 1.0
    assert image_score(match(found((LEFT, 0.1, 0)), truth())) == 0.0
    with pytest.raises(DataError, match="the images have no objects, so there is no average precision"):
        mean_ap([match(NOTHING, truth())])


def shapes(n, seed):
    """Images with one bright square each, of two classes by its row, and where it is."""
    generator = torch.Generator().manual_seed(seed)
    images, truths = torch.zeros(n, 1, 4, 4), []
    for image in images:
        row, column = (int(torch.randint(4, (), generator=generator)) for _ in range(2))
        image[0, row, column] = 1
        corner = [float(column), float(row), column + 1.0, row + 1.0]
        truths.append(truth((corner, int(row > 1))))
    return images, truths


def squares(output):
    """Outputs (batch, 2, 4, 4): a score for each class and cell, whose cell is the box."""
    results = []
    for image in output.sigmoid():
        classes, rows, columns = (image > 0.3).nonzero().T
        boxes = torch.stack([columns, rows, columns + 1, rows + 1], 1).double()
        results.append((boxes, image[classes, rows, columns], classes))
    return results


def cells(output, truths):
    """Cross entropy of every cell and class."""
    goal = torch.zeros_like(output)
    for plane, (boxes, classes) in zip(goal, truths, strict=True):
        plane[classes, boxes[:, 1].long(), boxes[:, 0].long()] = 1
    return F.binary_cross_entropy_with_logits(output, goal)


def detection(**changes):
    parts = {"train": shapes(320, 0), "validation": shapes(16, 1), "test": shapes(16, 2), "batch_size": 8}
    return Detection(**(parts | {"decode": squares, "loss": cells} | changes))


def finder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.Unflatten(1, (2, 4, 4)))


def test_a_detector_is_trained_pruned_and_reported(tmp_path, capsys):
    task = detection()
    model, _ = recover(finder(), task, epochs=40, lr=2.0, accumulate=2)
    scores, summary = judge(model, task, "test")
    assert scores.shape == (16,)
    assert summary["mAP50"] > 0.9
    assert scores.mean() > 0.9
    result = api.prune(model.eval(), task.test[0][:1], budget="params=60%", task=task, epochs=1, verify=True)
    rows = result.report.rows
    assert [row.stage for row in rows] == ["dense", "pruned", "recovered"]
    assert rows[0].metrics == {"mAP50": summary["mAP50"]}
    assert rows[0].accuracy.value == pytest.approx(scores.mean())
    assert rows[-1].drop.low <= scores.mean() - rows[-1].accuracy.value <= rows[-1].drop.high
    text = result.report.to_json()
    assert Report.from_json(text) == result.report
    show(result.report, None)
    assert "mAP50" in capsys.readouterr().out


def test_a_report_without_metrics_is_read():
    report = Report.from_json(
        json.dumps(
            {
                "version": 1, "title": "old", "layers": [], "frozen": [], "law": None, "meta": {}, "notes": [],
                "rows": [
                    {"stage": "dense", "params": 1, "nonzero": 1, "macs": 1, "bytes": 1, "accuracy": None,
                     "drop": None, "latency": None, "memory": None},
                ],
            }
        )
    )  # fmt: skip
    assert report.rows[0].metrics == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": (torch.zeros(3, 1, 4, 4), [truth()])}, "split 'test' has 3 images and 1 truths"),
        ({"test": (torch.zeros(1, 1), [(torch.ones(2, 4), torch.ones(1))])}, r"truth 0 of split 'test' .* 1 classes"),
        ({"test": (torch.zeros(1, 1), [(torch.ones(2, 5), torch.ones(2))])}, r"boxes of shape \(2, 5\)"),
    ],
)
def test_images_and_truths_that_do_not_match_are_named(changes, message):
    with pytest.raises(DataError, match=message):
        detection(**changes)


@pytest.mark.parametrize(
    ("decode", "message"),
    [
        (lambda output: squares(output)[1:], "decode gave 7 results for 8 images"),
        (lambda output: [(b[:, :3], s, c) for b, s, c in squares(output)], r"boxes of shape \(\d+, 3\), scores"),
        (lambda output: [(b, s[1:], c) for b, s, c in squares(output)], r"expected \(boxes, 4\), \(boxes,\) and"),
    ],
)
def test_what_decode_must_give_is_said(decode, message):
    with pytest.raises(DataError, match=message):
        evaluate(finder(), detection(decode=decode), "test")


# --- summaries of the user's own --------------------------------------------------------------------


class Counting(Classification):
    def summary(self, outputs):
        first = next(iter(outputs))
        return {"classes": first[0].shape[1]}


def test_a_summary_need_not_look_at_everything():
    x, y = torch.randn(200, 4), torch.arange(200) % 3
    task = Counting((x, y), (x, y), (x, y), batch_size=16)
    scores, summary = judge(nn.Linear(4, 3), task, "test")
    assert len(scores) == 200
    assert summary == {"classes": 3.0}
    assert judge(nn.Linear(4, 3), task, "test", summarize=False)[1] == {}
