"""Giving a pruned model its accuracy back: recalibrated norms, fine-tuning, distillation."""

from secateur.recover.distill import distillation_loss
from secateur.recover.finetune import Epoch, recover
from secateur.recover.recalibrate import recalibrate_

__all__ = ["Epoch", "distillation_loss", "recalibrate_", "recover"]
