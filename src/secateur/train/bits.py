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


_SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def keep_(tensor: Tensor, mask: Tensor) -> None:
    """Make zero, in place, what the mask does not keep, also where it is NaN; the rest stays as it is, to the bit.

    A product of integers: on the CPU it takes a tenth of the time of filling under a mask.
    """
    if tensor.element_size() in _SAME_SIZE:
        tensor.view(_SAME_SIZE[tensor.element_size()]).mul_(mask)
    else:  # complex128
        tensor.masked_fill_(~mask, 0)


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=device)
