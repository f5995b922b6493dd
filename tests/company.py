"""What training methods meet, each on one small network; run as a program, one of two processes that train together.

python company.py RANK FOLDER    writes what each method did, in company with the other process, as FOLDER/RANK.json
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import secateur as sc
from secateur import train

STEPS, STOP = 12, 6
SOME = {"budget": "sparsity=75%"}
UNITS = {"budget": "params=60%", "pattern": "channel"}

# One line for each method: its arguments. Those of channels get the graph as well.
METHODS = {
    "Gradual": {**SOME, "begin": 2, "end": 8, "every": 2},
    "ACDC": {**SOME, "warmup": 0.2, "phase": 0.2, "last_dense": 0.2, "last_sparse": 0.2},
    "RigL": {**SOME, "every": 3, "end": 9},
    "SET": {**SOME, "every": 3, "end": 9},
    "ASP": {"pattern": "2:4"},
    "Movement": {**SOME, "begin": 2, "end": 8, "every": 2},
    "SoftMovement": {**SOME, "begin": 2, "end": 8, "rate": 0.1},
    "SecondOrder": {**SOME, "begin": 3, "end": 9, "every": 2, "window": 3, "damping": 1e-3},
    "STR": {**SOME, "end": 8},
    "L0": {**SOME, "begin": 2, "end": 8, "rate": 0.1},
    "SRSTE": {"pattern": "2:4", "begin": 2, "end": 10},
    "Proximal": {**SOME, "strength": 1e-2},
    "Gradual, channel": {**UNITS, "begin": 2, "end": 8, "every": 2},
    "GroupLasso, channel": {**UNITS, "strength": 1e-2},
    "GrowingReg, channel": {**UNITS, "every": 1},
    "Proximal, channel": {**UNITS, "strength": 1e-2},
    "Slimming, channel": {**UNITS, "strength": 1e-2},
}
KINDS = ("DDP", "FSDP2", "AMP", "accumulation", "EMA", "compile", "deepcopy", "resume", "other world size")
SHARED = ("FSDP2", "other world size")


def refused(method, kind):
    """Channels are removed whole, and are refused where processes share weights."""
    return kind in SHARED and METHODS[method].get("pattern") == "channel"


def table():
    """The table of docs/training.md: every cell is a test's."""
    lines = [["method", *KINDS], ["---"] * (len(KINDS) + 1)]
    lines += [[name, *("refused" if refused(name, kind) else "yes" for kind in KINDS)] for name in METHODS]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def network(dtype=torch.float64):
    """Of its last layer's one row, the second process has none. Batch norms keep their statistics."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.ReLU()),
        *(nn.Linear(20, 9), nn.BatchNorm1d(9), nn.ReLU()),
        nn.Linear(9, 1),
    ).to(dtype).eval()  # fmt: skip


@functools.cache
def graph():
    return sc.analyze(network(torch.float32), torch.zeros(2, 12))


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)


def made(method, model, optimizer, **more):
    options = {**METHODS[method], **more}
    if options.get("pattern") == "channel":
        options["graph"] = graph()
    return getattr(train, method.split(",")[0])(model, optimizer, options.pop("budget", None), STEPS, **options)


def started(method, shard=None, optimizer=sgd, dtype=torch.float64, **more):
    """A model, sharded or whole, its optimizer and the method."""
    model = network(dtype)
    if shard is not None:
        shard(model)
    chosen = optimizer(model)
    return model, chosen, made(method, model, chosen, **more)


def batch(step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 12, generator=generator, dtype=torch.float64).to(dtype)
    return x, (x[:, :3].prod(1, keepdim=True) + x[:, 3:4]).to(dtype)


def loss_of(model, x, y):
    return (model(x) - y).square().mean()


def steps(model, optimizer, pruner, numbers, mine=slice(None), run=None):
    """Ordinary training, on this process's part of each batch; ``run`` is the model's wrapper."""
    for step in numbers:
        x, y = batch(step, next(model.parameters()).dtype)
        optimizer.zero_grad()
        loss_of(run or model, x[mine], y[mine]).backward()
        optimizer.step()
        pruner.step()


def whole(state):
    """A method's state without shards."""
    full = {n: {k: getattr(v, "full_tensor", v.clone)() for k, v in kept.items()} for n, kept in state["state"].items()}
    return {**state, "state": full}


def saved(model, optimizer, pruner):
    """All of a training as whole tensors."""
    options = StateDictOptions(full_state_dict=True)
    return *copy.deepcopy(get_state_dict(model, optimizer, options=options)), whole(pruner.state_dict())


def loaded(method, shard, state):
    model, optimizer, pruner = started(method, shard)
    theirs, moments, own = copy.deepcopy(state)
    options = StateDictOptions(full_state_dict=True)
    set_state_dict(model, optimizer, model_state_dict=theirs, optim_state_dict=moments, options=options)
    pruner.load_state_dict(own)
    return model, optimizer, pruner


def outcome(model, pruner):
    """What a training came to: masks as digests, which all must agree on, and weights as a sum."""
    masks = pruner.state_dict()["masks"]
    values = [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in model.parameters()]
    return {
        "masks": {n: hashlib.sha256(bits.numpy().tobytes()).hexdigest()[:16] for n, bits in sorted(masks.items())},
        "weights": [float(v.sum()) for v in values],
        "sparsity": pruner.sparsity,
        "steps": pruner.applied,
    }


# --- two processes ---------------------------------------------------------------------------------


def together(method, rank):
    """How a method does on one process, on two by DDP and FSDP2, and from one to two and back."""
    mine = slice(rank * 8, rank * 8 + 8)
    alone = started(method)
    steps(*alone, range(STOP))
    middle = saved(*alone)
    steps(*alone, range(STOP, STEPS))
    found = {"alone": outcome(alone[0], alone[2])}

    model = network()
    wrapped = DistributedDataParallel(model)
    optimizer = sgd(wrapped)
    pruner = made(method, wrapped, optimizer)
    steps(model, optimizer, pruner, range(STEPS), mine, wrapped)
    found["ddp"] = outcome(model, pruner)

    if refused(method, "FSDP2"):
        try:
            started(method, shard)
        except sc.PruneError as error:
            found["refused"] = str(error)
        return found
    shared = started(method, shard)
    steps(*shared, range(STOP), mine)
    later = saved(*shared)
    steps(*shared, range(STOP, STEPS), mine)
    found["fsdp2"] = outcome(shared[0], shared[2])
    found["zeros"] = int(sum(p.full_tensor().eq(0).sum() for p in shared[0].parameters() if p.ndim > 1))
    found["plan"] = sum(int(mask.sum()) for mask in shared[2].finish().masks.values())

    grown = loaded(method, shard, middle)
    steps(*grown, range(STOP, STEPS), mine)
    found["one to two"] = outcome(grown[0], grown[2])
    shrunk = loaded(method, None, later)
    steps(*shrunk, range(STOP, STEPS))
    found["two to one"] = outcome(shrunk[0], shrunk[2])
    return found


def shard(model):
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)


def main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {method: together(method, rank) for method in METHODS}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
