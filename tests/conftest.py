"""What every test shares: the same seeds, and where the real networks and data lie."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# Two processes share the suite; more threads than one in each only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_process_group() -> None:
    """accelerate and Lightning make one, by variables that they set, and leave it to whatever comes next."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports time their models for an instant: no test asserts a time."""
    for clock in ("report.log", "targets.cpu_sparse", "runtime.tune"):
        monkeypatch.setattr(f"secateur.{clock}.SECONDS", 0.02)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real weights and images, named by SECATEUR_DATA or next to the repository."""
    folder = Path(os.environ.get("SECATEUR_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("real networks and data are not here; set SECATEUR_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def torchvision():
    """The torchvision package. Its wheel for CUDA does not load its operators on a CPU-only torch."""
    try:
        import torchvision
    except ImportError:
        pytest.skip("torchvision is not installed")
    except RuntimeError:
        # Without the compiled library, importing fails on the schema of two operators; declare them.
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    yield torchvision  # noqa: PT022 - not returned: the declarations last as long as `library`
