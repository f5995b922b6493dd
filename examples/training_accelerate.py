"""Pruning in a loop with accelerate: the method takes what ``prepare`` gave, and is saved with everything else.

python examples/training_accelerate.py
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from secateur.datasets import digits
from secateur.tasks import evaluate
from secateur.train import Gradual

EPOCHS = 15


def main() -> float:
    """Returns the part of test images told right."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    task = digits()
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    adam = torch.optim.Adam(net.parameters(), lr=3e-3)
    loader = DataLoader(TensorDataset(*task.train), batch_size=32, shuffle=True)

    model, optimizer, batches = accelerator.prepare(net, adam, loader)
    steps = EPOCHS * -(-len(batches) // accelerator.gradient_accumulation_steps)
    pruner = Gradual(model, optimizer, "sparsity=90%", steps=steps)
    accelerator.register_for_checkpointing(pruner)  # save_state and load_state take it along
    for _ in range(EPOCHS):
        for inputs, targets in batches:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(inputs), targets))
                optimizer.step()
                pruner.step()
                optimizer.zero_grad()
    plan = pruner.finish()

    score = float(evaluate(net, task, "test").mean())
    kept = sum(int(mask.sum()) for mask in plan.masks.values())
    print(f"{score:.3f} of the test images, with {kept} of {sum(m.numel() for m in plan.masks.values())} weights")
    return score


if __name__ == "__main__":
    main()
