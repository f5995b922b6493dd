"""Pruning while Hugging Face's Trainer trains: one callback.

python examples/training_trainer.py FOLDER

The folder is for the Trainer's checkpoints. Interrupted and called again, it goes on from the last one.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from secateur.train import Gradual
from secateur.train.integrations.hf import PruningCallback


def sentences(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Ten tokens each; the label says whether one of the first three comes twice or more."""
    tokens = torch.randint(1, 20, (count, 10), generator=torch.Generator().manual_seed(seed))
    labels = (tokens <= 3).sum(1).ge(2).long()
    return [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]


def main(folder: str) -> float:
    """Returns the part of new sentences told right."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    )
    arguments = TrainingArguments(
        folder, max_steps=200, per_device_train_batch_size=32, learning_rate=3e-3, save_steps=50, report_to="none",
        disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip

    pruning = PruningCallback(partial(Gradual, budget="sparsity=80%", ignore="classifier.weight"))
    trainer = Trainer(model, arguments, train_dataset=sentences(2000, 0), callbacks=[pruning])
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder))
    plan = pruning.plan

    told = trainer.predict(sentences(500, 1))
    score = float((told.predictions.argmax(1) == told.label_ids).mean())
    assert plan is not None
    kept = sum(int(mask.sum()) for mask in plan.masks.values())
    print(f"{score:.3f} of the test sentences, with {kept} of {sum(m.numel() for m in plan.masks.values())} weights")
    return score


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    main(sys.argv[1])
