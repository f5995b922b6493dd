"""FastestDet, its COCO images, and what it finds in them.

Weights and images are looked for where ``weights.py`` says.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.tasks.detection import Match, iou, match
from weights import data_folder, pillow, pretrained

SIDE, CELLS, CLASSES = 352, 22, 80
LEAST, OVERLAP, MOST = 0.01, 0.45, 100
"""Score a box needs, IoU above which a better box of its class swallows it, boxes an image may have."""


# --- The network (github.com/dog-qiuqiu/FastestDet) --------------------------------------------------


def _conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class ShuffleV2Block(nn.Module):
    """Ma et al. 2018, figure 3 c and d: the branches are concatenated, and shuffled where the next block splits."""

    def __init__(self, inputs: int, outputs: int, middle: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.branch_main = nn.Sequential(
            *(*_conv(inputs, middle), nn.ReLU(inplace=True)),
            *_conv(middle, middle, 3, stride, middle),
            *(*_conv(middle, outputs - inputs), nn.ReLU(inplace=True)),
        )
        if stride == 2:
            depthwise = _conv(inputs, inputs, 3, stride, inputs)
            self.branch_proj = nn.Sequential(*depthwise, *_conv(inputs, inputs), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            left, right = _shuffle(x)
            return torch.cat((left, self.branch_main(right)), 1)
        return torch.cat((self.branch_proj(x), self.branch_main(x)), 1)


def _shuffle(x: Tensor) -> tuple[Tensor, Tensor]:
    """Even and odd channels, taken apart as the original does it: with the batch inside the reshaped dimension."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch * channels // 2, 2, height * width).permute(1, 0, 2)
    x = x.reshape(2, -1, channels // 2, height, width)
    return x[0], x[1]


class ShuffleNetV2(nn.Module):
    """Stages of 4, 8 and 4 blocks of 48, 96 and 192 channels; returns all three outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(*_conv(3, 24, 3, 2), nn.ReLU(inplace=True))
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.stage2, self.stage3, self.stage4 = _stage(24, 48, 4), _stage(48, 96, 8), _stage(96, 192, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = self.stage2(self.maxpool(self.first_conv(x)))
        second = self.stage3(first)
        return first, second, self.stage4(second)


def _stage(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    rest = (ShuffleV2Block(outputs // 2, outputs, outputs // 2, 1) for _ in range(blocks - 1))
    return nn.Sequential(ShuffleV2Block(inputs, outputs, outputs // 2, 2), *rest)


class Conv1x1(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1x1 = nn.Sequential(*_conv(inputs, outputs), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1x1(x)


class SPP(nn.Module):
    """Three stacks of one, two and three depthwise 5x5 convolutions side by side, and a shortcut."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.Conv1x1 = Conv1x1(inputs, width)
        self.S1, self.S2, self.S3 = (
            nn.Sequential(
                *(m for _ in range(depth) for m in (*_conv(width, width, 5, 1, width), nn.ReLU(inplace=True)))
            )
            for depth in (1, 2, 3)
        )
        self.output = nn.Sequential(*_conv(3 * width, width))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv1x1(x)
        stacks = torch.cat((self.S1(x), self.S2(x), self.S3(x)), dim=1)
        return self.relu(x + self.output(stacks))


class Head(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        depthwise = (*_conv(inputs, inputs, 5, 1, inputs), nn.ReLU(inplace=True))
        self.conv5x5 = nn.Sequential(*depthwise, *_conv(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv5x5(x)


class DetectHead(nn.Module):
    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.conv1x1 = Conv1x1(inputs, inputs)
        self.obj_layers, self.reg_layers, self.cls_layers = Head(inputs, 1), Head(inputs, 4), Head(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1x1(x)
        return torch.cat((self.obj_layers(x).sigmoid(), self.reg_layers(x), self.cls_layers(x).softmax(dim=1)), dim=1)


class Detector(nn.Module):
    """Input (batch, 3, 352, 352), BGR in 0..1; output (batch, 85, 22, 22): objectness, 4 of a box, 80 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = ShuffleNetV2()
        self.upsample = nn.Upsample(scale_factor=2.0, mode="nearest")
        self.avg_pool = nn.AvgPool2d(3, 2, 1)
        self.SPP = SPP(336, 96)
        self.detect_head = DetectHead(96, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.backbone(x)
        return self.detect_head(self.SPP(torch.cat((self.avg_pool(first), second, self.upsample(third)), dim=1)))


def fastestdet() -> nn.Module:
    """FastestDet, trained on COCO: mAP50 31.8 on the 128 images of ``coco``."""
    return pretrained(Detector(), "detectors/fastestdet")


# --- The images --------------------------------------------------------------------------------------

Truth = NDArray[np.float64]  # (boxes, 5): class, left, top, right, bottom, relative to the image


def coco() -> tuple[Tensor, list[Truth]]:
    """128 COCO images, (128, 3, 352, 352) BGR in 0..1, and their boxes."""
    folder = data_folder() / "coco_sample"
    photos = sorted((folder / "images/train2017").glob("*.jpg"))
    truths = [_boxes(folder / "labels/train2017" / f"{photo.stem}.txt") for photo in photos]
    return torch.stack([_squashed(photo) for photo in photos]), truths


def _squashed(photo: Path) -> Tensor:
    """The photo at 352 x 352, its proportions not kept, bilinear without antialias."""
    pixels = np.asarray(pillow().open(photo).convert("RGB"))[:, :, ::-1].copy()
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    return nn.functional.interpolate(image, (SIDE, SIDE), mode="bilinear")[0] / 255


def _boxes(path: Path) -> Truth:
    """``class cx cy w h`` lines; an image without objects has no file, or an empty one."""
    text = path.read_text().split() if path.exists() else []
    kind, cx, cy, w, h = np.array(text, np.float64).reshape(-1, 5).T
    return np.stack([kind, cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], axis=1)


# --- From outputs to boxes ---------------------------------------------------------------------------


def decode(output: Tensor) -> Truth:
    """One image's output (85, 22, 22) as (boxes, 6): class, left, top, right, bottom, score; best first."""
    y, x = torch.meshgrid(torch.arange(CELLS), torch.arange(CELLS), indexing="ij")
    cx, cy = (output[1].tanh() + x) / CELLS, (output[2].tanh() + y) / CELLS
    w, h = output[3].sigmoid(), output[4].sigmoid()
    chance, kind = output[5:].max(0)
    score = output[0] ** 0.6 * chance**0.4
    rows = torch.stack([kind.to(cx), cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2, score]).flatten(1).T.double()
    rows = rows[rows[:, 5] > LEAST]
    return suppress(rows[rows[:, 5].argsort(descending=True, stable=True)].numpy())[:MOST]


def suppress(boxes: Truth) -> Truth:
    """Non-maximum suppression within each class of boxes that are sorted by score."""
    overlap = iou(boxes[:, 1:5], boxes[:, 1:5]) * (boxes[:, None, 0] == boxes[None, :, 0])
    keep = np.ones(len(boxes), bool)
    for i in range(len(boxes)):
        if keep[i]:
            keep[i + 1 :] &= overlap[i, i + 1 :] <= OVERLAP
    return boxes[keep]


def examples(model: nn.Module, images: Tensor, truths: list[Truth]) -> list[Match]:
    """What the model finds in each image, held against the truth."""
    with torch.inference_mode():
        found = [decode(output) for batch in images.split(16) for output in model(batch)]
    return [
        match((boxes[:, 1:5], boxes[:, 5], boxes[:, 0]), (truth[:, 1:], truth[:, 0]))
        for boxes, truth in zip(found, truths, strict=True)
    ]
