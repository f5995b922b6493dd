"""Where the weights, images and texts of the benchmarks lie, and how they are read.

They are no part of this repository. They are looked for in the folder that the environment variable SECATEUR_DATA
names, by default ``../shared/data`` next to the repository.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from secateur.errors import DataError, MissingExtra


def data_folder() -> Path:
    """Where weights and images lie. Raises DataError where there is no such folder."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SECATEUR_DATA", default))
    if not folder.is_dir():
        raise DataError(f"the benchmark data are not at {folder}; set SECATEUR_DATA to the folder that holds them")
    return folder


def pretrained(model: nn.Module, name: str) -> nn.Module:
    """The model with the weights of that name, held to the output recorded with them."""
    folder = data_folder()
    model.load_state_dict(load_file(folder / f"{name}.safetensors"))
    model.eval()
    with np.load(folder / f"{name}.ref.npz") as reference, torch.inference_mode():
        error = (model(torch.from_numpy(reference["x"])) - torch.from_numpy(reference["y0"])).abs().max()
    if not error < 1e-3:
        raise DataError(f"{name} differs from its recorded output by {float(error):.2g}, expected under 1e-3")
    return model


def pillow() -> Any:
    """The ``PIL.Image`` module."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtra("pillow", "image", "reading the benchmark images") from error
    return Image
