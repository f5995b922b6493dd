"""Giving a pruned model its accuracy back: compensation, recalibrated norms, fine-tuning, distillation."""

from secateur.recover.compensate import METHODS, reconstruct
from secateur.recover.distill import distillation_loss
from secateur.recover.finetune import recover
from secateur.recover.options import Recovery
from secateur.recover.recalibrate import recalibrate_
from secateur.recover.run import Epoch
from secateur.recover.schedules import Schedule, rewind

__all__ = [
    "METHODS",
    "Epoch",
    "Recovery",
    "Schedule",
    "distillation_loss",
    "recalibrate_",
    "reconstruct",
    "recover",
    "rewind",
]
