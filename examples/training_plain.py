"""Pruning in a loop of one's own: 90 % of the weights go while it trains, taught by the dense network.

python examples/training_plain.py
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from secateur.datasets import digits
from secateur.tasks import evaluate
from secateur.train import Distill, Gradual

EPOCHS = 10


def main() -> float:
    """Returns the part of test images told right."""
    torch.manual_seed(0)
    task = digits()
    batches = DataLoader(TensorDataset(*task.train), batch_size=64, shuffle=True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    # Train dense first, as ever.
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(EPOCHS):
        for inputs, targets in batches:
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    print(f"dense:      {evaluate(model, task, 'test').mean():.3f} of the test images")

    # Then prune in the same loop; the network as it is now is the teacher.
    distill = Distill(model, features={"2": 0.1})
    pruner = Gradual(model, optimizer, "sparsity=90%", steps=EPOCHS * len(batches), begin=0)
    for _ in range(EPOCHS):
        for inputs, targets in batches:
            output = model(inputs)
            distill(output, F.cross_entropy(output, targets), inputs).backward()
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()
    distill.close()
    plan = pruner.finish()

    score = float(evaluate(model, task, "test").mean())
    zeros = sum(int((~mask).sum()) for mask in plan.masks.values())
    print(f"90 % less:  {score:.3f}, {zeros} of {sum(m.numel() for m in plan.masks.values())} weights are zero")
    return score


if __name__ == "__main__":
    main()
