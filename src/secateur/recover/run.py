"""One fine-tuning: what it consists of, one step of it, where it stands."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.errors import DataError
from secateur.progress import track
from secateur.recover.checkpoint import Tree, digest
from secateur.recover.distill import distillation_loss
from secateur.recover.options import Recovery
from secateur.recover.randomness import Stream, capture, restore, untouched
from secateur.tasks import Task, call, clone, device_of, evaluate, to_device

LEAST_SCALE = 2.0**-24
"""Of the loss in fp16: where gradients overflow even below it, they are not finite at all."""


@dataclass(frozen=True)
class Epoch:
    """One pass over the training data: mean training loss, then the mean validation score it led to.

    ``seconds`` counts training and validation, ``lr`` is the rate of the last step, ``sparsity`` the part of weights
    with masks that these hold at zero.
    """

    loss: float
    validation: float
    seconds: float
    lr: float
    sparsity: float = 0.0


@dataclass(eq=False)
class Counters:
    """Where a run stands: ``batches`` are those of a whole epoch; batch, loss and seconds are the running epoch's."""

    batches: int = 0
    epoch: int = 0
    applied: int = 0
    best: float = -math.inf
    stale: int = 0
    finished: bool = False
    history: list[Epoch] = field(default_factory=list)
    batch: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    rate: float = 0.0

    def end_epoch(self, epoch: Epoch, better: bool) -> None:
        self.history.append(epoch)
        self.epoch, self.stale = self.epoch + 1, 0 if better else self.stale + 1
        self.batch, self.loss, self.seconds = 0, 0.0, 0.0


class Run:
    """A fine-tuning under way. ``student`` is trained, ``judged`` is what is validated: it, or its running average."""

    def __init__(
        self,
        student: nn.Module,
        task: Task,
        how: Recovery,
        optimizer: torch.optim.Optimizer,
        teacher: nn.Module | None,
        masks: Mapping[str, Tensor],
    ) -> None:
        self.student, self.task, self.how, self.optimizer, self.teacher = student, task, how, optimizer, teacher
        self.device = device_of(student)
        self.judged = clone(student) if how.ema is not None else student
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=how.dtype is torch.float16)
        self.masks = {name: keep.to(self.device) for name, keep in masks.items()}
        self.data = Stream(int(torch.randint(2**31, ())), self.device)
        self.data_start = self.data.state
        self.at = Counters()
        self.best: dict[str, Tensor] = {}

    @property
    def sparsity(self) -> float:
        """See ``Epoch``."""
        gone = sum(int((~keep).sum()) for keep in self.masks.values())
        return gone / max(1, sum(keep.numel() for keep in self.masks.values()))

    def begin(self) -> None:
        """Before the first epoch of a run that is not gone on with: the weights given are the first to be judged."""
        self.at.batches = self.count()
        self.validate()

    def end(self) -> None:
        """After the last epoch: the weights of the best validation score."""
        put_(self.student, self.best)
        self.optimizer.zero_grad()

    def count(self) -> int:
        """Batches of a training pass; counted where it does not know its length."""
        with untouched(self.device):
            restore(self.data.state, self.device)
            batches = self.task.batches("train")
            return len(batches) if isinstance(batches, Sized) else sum(1 for _ in track(batches, "Counting batches"))

    def steps(self, batches: int) -> int:
        """Steps of the whole run, whose epochs have so many batches."""
        return self.how.epochs * -(-batches // self.how.accumulate)

    def step(self, group: Sequence[Any]) -> None:
        """One step on the gradient of all batches of ``group``, as if they were one."""
        at = self.at
        factor = self.how.rate((at.applied + 0.5) / self.steps(at.batches))
        for settings, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            settings["lr"] = peak * factor
        at.rate = self.how.lr * factor
        at.loss += self.gradients(group)
        at.batch += len(group)
        self.advance(group)

    def gradients(self, group: Sequence[Any]) -> float:
        """Gradients of the mean loss over the examples of ``group``; returns the sum of its batches' losses."""
        self.optimizer.zero_grad()
        total, sizes = 0.0, [_examples(batch) for batch in group]
        for batch, size in zip(group, sizes, strict=True):
            loss = self.loss(*to_device(batch, self.device))
            total += self._finite(loss)
            self.scaler.scale(loss * (size / sum(sizes))).backward()  # type: ignore[no-untyped-call]
        return total

    def advance(self, group: Sequence[Any]) -> None:
        """Step on the gradients of ``group``."""
        if self.apply():
            self.at.applied += 1
            self.average()

    def loss(self, inputs: Any, targets: Any) -> Tensor:
        with torch.autocast(self.device.type, self.how.dtype, enabled=self.how.dtype is not None):
            output = call(self.student, inputs)
            loss = self.task.loss(output, targets)
            if self.teacher is None:
                return loss
            with torch.no_grad():
                told = call(self.teacher, inputs)
            alpha = self.how.alpha
            return alpha * distillation_loss(output, told, self.how.temperature) + (1 - alpha) * loss

    def _finite(self, loss: Tensor) -> float:
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise DataError(f"task.loss gave {found}, expected one number that depends on the model's output")
        value = loss.item()
        if not math.isfinite(value):
            raise DataError(f"the training loss became {value}; lower lr (now {self.at.rate:.3g}) or check the data")
        return value

    def apply(self) -> bool:
        """Step the optimizer; False where gradients in fp16 overflowed, and the step was left out."""
        if self.how.clip is not None:
            self.scaler.unscale_(self.optimizer)
            self.mask_gradients()
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.how.clip)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() < LEAST_SCALE:
            raise DataError("the gradients overflow in fp16 at every scale; use amp='bf16', or check the data")
        return self.scaler.get_scale() >= scale

    def mask_gradients(self) -> None:
        """Zero the gradients of what is masked, which shall not count in their norm."""
        named = dict(self.student.named_parameters(remove_duplicate=False))
        for name, keep in self.masks.items():
            if (grad := named[name].grad) is not None:
                grad.mul_(keep)

    def average(self) -> None:
        """Move the average towards the weights. Zeros of both stay zeros; counts are taken over."""
        if self.how.ema is None:
            return
        decay = min(self.how.ema, self.at.applied / (9 + self.at.applied))
        with torch.no_grad():
            values = tensors_of(self.student)
            for name, mean in tensors_of(self.judged).items():
                value = values[name]
                if mean.is_floating_point():
                    mean.lerp_(value, 1 - decay)
                else:
                    mean.copy_(value)

    def validate(self) -> tuple[float, bool]:
        """The mean validation score of what is judged, and whether it is the best so far, whose weights are kept."""
        score = float(evaluate(self.judged, self.task, "validation").mean())
        better = score > self.at.best
        if better:
            self.at.best, self.best = score, snapshot(self.judged)
        return score, better

    def identity(self) -> dict[str, Any]:
        """What tells this run from others, besides its data, as JSON; digests stand for tensors."""
        trained = [name for name, p in self.student.named_parameters() if p.requires_grad]
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        return {
            **self.how.identity(),
            "optimizer": f"{kind_of(self.optimizer)} {groups}",
            "model": f"{_weights(self.student)} {digest(trained)}",
            "teacher": None if self.teacher is None else _weights(self.teacher),
            "plan": digest(sorted(self.masks.items())) if self.masks else None,
        }

    def state(self) -> Tree:
        """All that the rest of the run depends on; tensors are the run's own, not copies."""
        optimizer = self.optimizer.state_dict()
        return {
            "at": asdict(self.at),
            "weights": tensors_of(self.student),
            "average": tensors_of(self.judged) if self.how.ema is not None else {},
            "best": self.best,
            "optimizer": optimizer["state"],
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer["param_groups"]],
            "scaler": self.scaler.state_dict(),
            "data start": self.data_start,
            "data": self.data.state,
            "model": capture(self.device),
        }

    def load(self, state: Tree) -> None:
        for name, value in state["at"].items():
            setattr(self.at, name, [Epoch(**epoch) for epoch in value] if name == "history" else value)
        put_(self.student, state["weights"])
        put_(self.judged, state["average"])
        self.best = {name: value.to(self.device) for name, value in state["best"].items()}
        groups = self.optimizer.state_dict()["param_groups"]
        groups = [group | saved for group, saved in zip(groups, state["groups"], strict=True)]
        self.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        self.scaler.load_state_dict(state["scaler"])
        self.data_start, self.data.state = state["data start"], state["data"]
        restore(state["model"], self.device)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}


def put_(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write a snapshot's values into the model's own tensors."""
    tensors = tensors_of(model)
    with torch.no_grad():
        for name, value in values.items():
            tensors[name].copy_(value)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, tied ones once."""
    return dict(chain(model.named_parameters(), model.named_buffers()))


def _examples(batch: Any) -> int:
    """How many examples a batch has: the length of the first tensor of its inputs, else of its targets."""
    sizes = [len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
    return max(1, sizes[0]) if sizes else 1


def kind_of(value: object) -> str:
    return type(value).__qualname__


def _weights(model: nn.Module) -> str:
    return f"{kind_of(model)} {digest(list(tensors_of(model).items()))}"
