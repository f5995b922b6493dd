"""Pruning while Lightning's Trainer fits: one callback, with an optimizer and accumulated gradients as ever.

python examples/training_lightning.py
"""

from functools import partial

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from secateur.datasets import digits
from secateur.tasks import evaluate
from secateur.train import RigL
from secateur.train.integrations.lightning import PruningCallback


class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(self.net(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def main() -> float:
    """Returns the part of test images told right."""
    torch.manual_seed(0)
    task, module = digits(), Digits()
    batches = DataLoader(TensorDataset(*task.train), batch_size=32, shuffle=True)

    pruning = PruningCallback(partial(RigL, budget="sparsity=90%", every=10))
    trainer = Trainer(
        max_epochs=15, accumulate_grad_batches=2, callbacks=[pruning], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, batches)
    plan = pruning.plan

    score = float(evaluate(module.net, task, "test").mean())
    assert plan is not None
    kept = sum(int(mask.sum()) for mask in plan.masks.values())
    print(f"{score:.3f} of the test images, with {kept} of {sum(m.numel() for m in plan.masks.values())} weights")
    return score


if __name__ == "__main__":
    main()
