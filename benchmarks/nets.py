"""The networks and data of the benchmarks, as MODEL and DATA for the command line.

    secateur prune benchmarks/nets.py:resnet20 --data benchmarks/nets.py:cifar10 ...

Weights and images are looked for where ``weights.py`` says.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import DataError
from secateur.tasks import Classification
from weights import data_folder, pillow, pretrained

CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_VALIDATION = 2_000
"""Training images kept out of fine-tuning. The published weights have seen them; see ``cifar10``."""


# --- ResNet, CIFAR form (He et al. 2016, section 4.2) -----------------------------------------------


class BasicBlock(nn.Module):
    """Two 3x3 convolutions. Where the shape changes, the shortcut is option A: subsampled, zero-padded."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride != 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + x)


class ResNet(nn.Module):
    """6n+2 layers; widths are all odd or all even. Input (batch, 3, 32, 32), normalised; output (batch, 10)."""

    def __init__(self, blocks: int, widths: tuple[int, int, int] = (16, 32, 64)) -> None:
        super().__init__()
        first, second, third = widths
        self.conv1 = nn.Conv2d(3, first, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = _stage(first, first, blocks, stride=1)
        self.layer2 = _stage(first, second, blocks, stride=2)
        self.layer3 = _stage(second, third, blocks, stride=2)
        self.linear = nn.Linear(third, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    rest = (BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1))
    return nn.Sequential(BasicBlock(inputs, outputs, stride), *rest)


def resnet20() -> nn.Module:
    """ResNet-20, trained on CIFAR-10: 91.5 % on 1,000 official test images."""
    return pretrained(ResNet(3), "cifar10_nets/resnet20_akamaster")


def resnet56() -> nn.Module:
    """ResNet-56, trained on CIFAR-10: 92.6 % on 1,000 official test images."""
    return pretrained(ResNet(9), "cifar10_nets/resnet56_akamaster")


# --- MobileNetV2 0.35 (Sandler et al. 2018), batch norm folded --------------------------------------


class Block(nn.Module):
    """Expand (1x1), depthwise (3x3), project (1x1); the widths and clamps of ``convs``."""

    def __init__(self, convs: list[dict[str, Any]], residual: bool) -> None:
        super().__init__()
        for spec in convs:
            setattr(self, spec["name"].rpartition(".")[2], _conv(spec))
        self.tops = tuple(spec["relu_max"] for spec in convs)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for conv, top in zip(self.children(), self.tops, strict=True):
            out = conv(out) if top is None else conv(out).clamp(0.0, top)
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """Input (batch, 3, 128, 128) in -1..1; output (batch, 1000). ``layers`` lists them in order."""

    def __init__(self, layers: list[dict[str, Any]]) -> None:
        super().__init__()
        first, *blocks, pool, last = layers
        if (first["type"], pool["type"], last["type"]) != ("conv", "global_avg_pool", "conv"):
            raise DataError("the layer list is not convolution, blocks, global_avg_pool, convolution")
        self.first_conv = _conv(first)
        self.top = first["relu_max"]
        self.blocks = nn.Sequential(*(Block(b["convs"], b["residual"]) for b in blocks))
        self.classifier = _conv(last)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.first_conv(x).clamp(0.0, self.top))
        return self.classifier(x.mean(dim=(2, 3), keepdim=True)).flatten(1)


def _conv(spec: dict[str, Any]) -> nn.Conv2d:
    return nn.Conv2d(spec["cin"], spec["cout"], spec["k"], spec["stride"], spec["pad"], groups=spec["groups"])


def mobilenetv2() -> nn.Module:
    """MobileNetV2-0.35 at 128 x 128, trained on ImageNet: 50.9 % top-1 on 1,000 sample images."""
    layers = json.loads((data_folder() / "imagenet_nets/mbv2_w035.arch.json").read_text())["layers"]
    return pretrained(MobileNetV2(layers), "imagenet_nets/mbv2_w035")


# --- Data -------------------------------------------------------------------------------------------


def cifar10() -> Classification:
    """CIFAR-10: 48,000 training, 2,000 validation, 400 official test images.

    The validation images are the last of the training set, kept out of fine-tuning here. The
    published weights were trained on them, so they rank candidates but say nothing of the accuracy:
    that is reported on the test images. Training images stay bytes until a batch is drawn.
    """
    x, y = cifar10_training()
    folder = data_folder() / "cifar10"
    labels = json.loads((folder / "labels.json").read_text())
    cut = len(x) - CIFAR_VALIDATION
    return Classification(
        train=(x[:cut], y[:cut]),
        calibration=(normalise(x[:512]), y[:512]),
        validation=(normalise(x[cut:]), y[cut:]),
        test=(normalise(_sheet(folder / "test_400.png")), torch.tensor(labels["test"])),
        batch_size=128,
        augment=crop_and_flip,
    )


def cifar10_training() -> tuple[Tensor, Tensor]:
    """All training images as bytes of shape (50000, 3, 32, 32), and their classes."""
    folder = data_folder() / "cifar10"
    x = torch.cat([_sheet(folder / f"train_{sheet:02}.png") for sheet in range(50)])
    return x, torch.tensor(json.loads((folder / "labels.json").read_text())["train"])


def imagenet() -> Classification:
    """500 ImageNet images, one each of the even classes: 200 training, 100 validation, 200 test.

    Which is which is drawn once, from a fixed seed. 200 images cannot teach a network of 1,000
    classes anything: epochs on them only let a pruned network follow the dense one's outputs on
    natural images (distillation). They serve as calibration images too.
    """
    folder = data_folder()
    size = json.loads((folder / "imagenet_nets/mbv2_w035.arch.json").read_text())["input"]
    with zipfile.ZipFile(folder / "imagenet_sample/images_256.zip") as archive:
        names = sorted(archive.namelist())
        images = [_photo(archive.read(name), size["resize_short"], size["size"]) for name in names]
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))
    x = torch.stack(images)[order]
    y = torch.tensor([int(name[:4]) for name in names])[order]
    train, validation, test = ((x[part], y[part]) for part in (slice(200), slice(200, 300), slice(300, None)))
    return Classification(
        train=train, calibration=train, validation=validation, test=test, batch_size=20, augment=_flip
    )


def _sheet(path: Path) -> Tensor:
    """A column of 32 x 32 images as bytes of shape (images, 3, 32, 32)."""
    pixels = np.asarray(pillow().open(path).convert("RGB")).reshape(-1, 32, 32, 3)
    return torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).contiguous()


def _photo(raw: bytes, short: int, size: int) -> Tensor:
    """A photo, resized so that its short side is ``short``, and its middle ``size`` x ``size`` in -1..1."""
    pil = pillow()
    photo = pil.open(io.BytesIO(raw)).convert("RGB")
    scale = short / min(photo.size)
    photo = photo.resize([round(side * scale) for side in photo.size], pil.Resampling.BILINEAR)
    left, top = ((side - size) // 2 for side in photo.size)
    pixels = np.asarray(photo.crop((left, top, left + size, top + size)), dtype=np.float32)
    return torch.from_numpy((pixels / 255 - 0.5) / 0.5).permute(2, 0, 1).contiguous()


def normalise(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CIFAR_MEAN, CIFAR_STD))
    return (pixels / 255 - mean) / std


def crop_and_flip(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Pad with 4 black pixels, crop 32 x 32 at random, mirror half of them: as the nets were trained."""
    padded = F.pad(pixels, (4, 4, 4, 4))
    n, size = len(pixels), pixels.shape[-1]
    rows, columns = (torch.randint(0, 9, (n, 1), generator=generator) + torch.arange(size) for _ in range(2))
    cropped = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return _flip(normalise(cropped.permute(0, 3, 1, 2).contiguous()), generator)


def _flip(images: Tensor, generator: torch.Generator) -> Tensor:
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored, images.flip(-1), images)
