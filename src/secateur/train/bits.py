"""Flags as bits, eight to a byte, the first flag in the highest bit (as ``numpy.packbits``)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pack(flags: Tensor) -> Tensor:
    """bool of any shape -> uint8 of ceil(n / 8) bytes, on the same device."""
    flat = flags.flatten()
    if flat.device.type == "cpu":
        return torch.from_numpy(np.packbits(flat.numpy()))
    padded = torch.nn.functional.pad(flat.to(torch.uint8), (0, -flat.numel() % 8)).view(-1, 8)
    return (padded << _shifts(flat.device)).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The flags that ``pack`` packed, as bool of the shape."""
    count = int(np.prod(shape))
    if bits.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(bits.numpy(), count=count).view(np.bool_)).view(shape)
    flags = (bits[:, None] >> _shifts(bits.device)) & 1
    return flags.flatten()[:count].bool().view(shape)


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=device)
