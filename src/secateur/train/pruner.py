"""``Pruner``: what all methods that prune during training have in common.

A parameter always holds what the network computes with: zeros are in the weights themselves, so that every loop,
wrapper, copy, average and checkpoint meets an ordinary model. What a method needs besides, it keeps to itself: masks
as bits, scores, the values behind the zeros. It acts in the optimizer's step, through the optimizer's own hooks:

    before  gradients are made those of what is trained; a method of latent values puts them into the parameters
    after   zeros are put back; latent values are taken out again
    step()  after the optimizer's: where the schedule says so, masks are made anew
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur import patterns
from secateur.allocate import Strategy, Whole
from secateur.allocate import resolve as resolve_strategy
from secateur.budget import Budget
from secateur.criteria import Criterion
from secateur.errors import BudgetError, DataError, PlanError, SpecError
from secateur.graph.graph import Graph
from secateur.graph.types import Weight
from secateur.names import Choice
from secateur.patterns import NM, Block, Channel, Pattern, Unstructured
from secateur.plan import Plan
from secateur.planning import describe
from secateur.tasks import Task, plain
from secateur.train import averages, optimizers, places, saving, stages
from secateur.train.bits import keep_, pack, unpack
from secateur.train.channels import Channels
from secateur.train.choose import Masks, own_budget
from secateur.train.scores import GATHERED, Scorer
from secateur.train.shards import Part, common_group, finite_everywhere, gather, local, part_of, total
from secateur.train.stages import Stage


class Common(TypedDict, total=False):
    """Keyword arguments of every method, see ``Pruner``."""

    pattern: str
    ignore: Choice | Sequence[Choice]
    criterion: str | Criterion
    allocate: str | Strategy
    graph: Graph | None
    task: Task | None
    average: nn.Module | None
    seed: int


class Pruner:
    """A method at work on a model and its optimizer. Subclasses say when masks change, and what of this differs.

    model: as the optimizer knows it: make both, and wrap or shard the model, first. ``torch.compile``, DDP and
        FSDP2 may be around it.
    optimizer: that takes the steps; accelerate's and Lightning's may be around it. Its closure, where it is given one,
        is evaluated once in a step.
    budget: what holds in the end, such as "sparsity=90%"; may be None for N:M, which has its own.
    steps: how many steps the optimizer will take in all. Only those that are applied count: a step that a gradient
        scaler leaves out is none.
    pattern, criterion, allocate, ignore: as in ``prune``. Criteria that ask for ``grad_abs`` or ``grad_square`` get
        them from the training's own gradients since the last update; others that need data need ``graph`` and ``task``.
    graph: what ``analyze`` found: needed for channels and for budgets of MACs. Without it the weights of linear,
        convolution, recurrent and attention layers are pruned.
    average: a running average of the model (a copy, or torch's ``AveragedModel``), which gets the same zeros.

    Raises SpecError for wishes that cannot be read or do not go together, PlanError where the optimizer does not train
    the weights.
    """

    allowed: ClassVar[tuple[type[Pattern], ...]] = (Unstructured, Block, NM)
    why_only: ClassVar[str] = "unstructured weights, blocks and N:M"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        budget: str | None,
        steps: int,
        schedule: Sequence[Stage],
        *,
        pattern: str = "unstructured",
        ignore: Choice | Sequence[Choice] = (),
        criterion: str | Criterion = "magnitude",
        allocate: str | Strategy = "global",
        graph: Graph | None = None,
        task: Task | None = None,
        average: nn.Module | None = None,
        seed: int = 0,
    ) -> None:
        shape = patterns.parse(pattern)
        if not isinstance(shape, self.allowed):
            raise SpecError(f"{type(self).__name__} prunes {self.why_only}, not pattern {pattern!r}")
        self.model, self.optimizer, self.average = plain(model), optimizers.innermost(optimizer), average
        self.pattern, self.steps, self.seed, self.schedule = shape, steps, seed, tuple(schedule)
        self.budget = final(pattern, budget)
        self.weights: Mapping[str, Weight] = places.to_prune(self.model, graph, shape, ignore)
        self._known = None if graph is not None else frozenset(places.weights_of(self.model))
        self.applied = self.done = self._seen = 0
        self.bits: dict[str, Tensor] = {}
        self.state: dict[str, dict[str, Tensor]] = {name: {} for name in self.weights}
        self._require_owned()
        if average is not None:
            averages.require_same(average, self.model)
        self.parts: dict[str, Part] = {name: part_of(self.tensor(name), name) for name in self.weights}
        self.group = common_group(self.parts.values())
        self.wish = self._wish(graph, criterion, allocate, task, ignore)
        self.wish.require_reachable(self.budget)
        self.finished = self._stepping = False
        self._handles: list[RemovableHandle] = []
        self._attach()

    # --- what methods change -----------------------------------------------------------------------

    def before(self, name: str, weight: Tensor, grad: Tensor | None) -> None:
        """Before the optimizer's step, on what is here of a weight and its gradient."""
        if grad is not None and (mask := self.mask(name)) is not None:
            keep_(grad, mask)

    def after(self, name: str, weight: Tensor) -> None:
        """After the optimizer's step, on what is here of a weight."""
        if (mask := self.mask(name)) is not None:
            keep_(weight, mask)

    def change(self, stage: Stage) -> None:
        """Make new masks. Raises DataError where scores are not finite; nothing has changed then."""
        self.set_masks({} if stage.budget is None else self.wish.choose(self.value, stage.budget, self._means()))

    def value(self, name: str) -> Tensor:
        """What is scored: the weight, or what stands behind it; what is here of it."""
        return local(self.tensor(name)).detach()

    def settle(self) -> None:
        """At the end: leave in the parameters what the network shall compute with from now on."""

    # --- the loop's side ---------------------------------------------------------------------------

    def step(self) -> bool:
        """Call after every ``optimizer.step()``; True where masks have changed.

        Where the optimizer left its step out, nothing happens. An update that meets weights or gradients that are
        NaN or infinite is put off to the next step, with a warning. Raises PlanError after ``finish``, and for a model
        with new weights.
        """
        if self.finished:
            raise PlanError("this method let go of its optimizer (finish, detach): its zeros are no longer held")
        if self.applied == self._seen:
            return False
        self._seen, due = self.applied, self.done
        while due < len(self.schedule) and self.schedule[due].step <= self.applied:
            due += 1
        if due == self.done:
            return False
        self._require_same_weights()
        try:
            with torch.no_grad():
                self.change(self.schedule[due - 1])
        except DataError as error:
            warnings.warn(f"after step {self.applied} masks stay as they are: {error}", stacklevel=2)
            return False
        self.done = due
        self._forget_means()
        self._mask_average()
        return True

    def mask_gradients(self) -> None:
        """Zero the gradients of what is masked: call before gradients are clipped, so that their norm is right."""
        with torch.no_grad():
            for name in self.bits:
                parameter = self.tensor(name)
                if parameter.grad is not None and (mask := self.mask(name)) is not None:
                    keep_(local(parameter.grad), mask)

    @property
    def sparsity(self) -> float:
        """The part of the weights' elements, over all processes, that masks remove now."""
        gone = sum(self._removed(name) for name in self.bits if name in self.weights)
        return gone / float(sum(weight.numel for weight in self.weights.values()))

    def finish(self) -> Plan:
        """The end: let go of the optimizer, and say what stays. The model is an ordinary one with its zeros in it.

        Raises PlanError, and goes on holding the zeros, where training ended before the schedule did, or a weight
        lacks zeros of its mask: the result is never dense in silence.
        """
        if self.done < len(self.schedule):
            last = self.schedule[-1].step
            raise PlanError(
                f"{self.applied} steps were applied, and the budget {self.budget} is reached at step {last}; train on, "
                "or make the method with fewer steps"
            )
        if not self.finished:
            with torch.no_grad():
                self.settle()
        for name in self.bits:
            kept, tensor = self.mask(name), local(self.tensor(name))
            group = self.parts[name].group if name in self.parts else None
            wrong = int(total(((tensor != 0) & ~kept).sum(), group)) if kept is not None else 0
            if wrong:
                raise PlanError(f"{wrong} of {name!r} should be zero and are not: it was written to after step()")
        self._mask_average()
        plan = self.plan()
        self.detach()
        return plan

    def plan(self) -> Plan:
        """What stays now."""
        ones = {n: torch.ones(p.local_shape, dtype=torch.bool) for n, p in self.parts.items() if n not in self.bits}
        here = {name: ones[name] if name in ones else self._kept(name) for name in self.parts}
        whole = {name: gather(mask, self.parts[name]).cpu() for name, mask in here.items()}
        return self.wish.plan(whole, type(self).__name__)

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the training depends on, besides model and optimizer: tensors, numbers and texts.

        Masks are whole (and packed) whoever holds the weights; larger state is split as the parameters are.
        """
        return saving.state_of(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken, on as many processes as there are now.

        Load the model and the optimizer first. Raises DataError, and changes nothing, for the state of another
        method, model or wish.
        """
        saving.load(self, state)
        with torch.no_grad():
            self.restored()

    def restored(self) -> None:
        """After a state was loaded."""

    def detach(self) -> None:
        """Let go of the optimizer; zeros are no longer held."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.finished = [], True

    # --- for methods -------------------------------------------------------------------------------

    def tensor(self, name: str) -> Tensor:
        """The model's own parameter or buffer. It is looked up each time: wrappers replace parameters."""
        path, _, short = name.rpartition(".")
        try:
            found = getattr(self.model.get_submodule(path), short)
        except AttributeError as error:
            raise PlanError(f"{name!r} is no longer in the model: make the method anew after changing it") from error
        assert isinstance(found, Tensor)
        return found

    def mask(self, name: str) -> Tensor | None:
        """What stays of what is here of a tensor (bool); None where all does."""
        return self._kept(name) if name in self.bits else None

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Let these be the masks: what goes becomes zero, and what the optimizer remembers of it too."""
        self.bits = {name: pack(mask) for name, mask in masks.items()}
        for name, mask in masks.items():
            tensor = self.tensor(name)
            here = mask.to(tensor.device)
            keep_(local(tensor).detach(), here)
            averages.clear_moments(self.optimizer, tensor, ~here)

    def live(self) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Name, what is here of the tensor, and of its gradient: of all weights, and of what else has a mask."""
        for name in {**self.weights, **self.bits}:
            tensor = self.tensor(name)
            yield name, local(tensor).detach(), None if tensor.grad is None else local(tensor.grad)

    # --- inside ------------------------------------------------------------------------------------

    def _kept(self, name: str) -> Tensor:
        shape = self.parts[name].local_shape if name in self.parts else self.tensor(name).shape
        return unpack(self.bits[name].to(self.tensor(name).device), shape)

    def _removed(self, name: str) -> int:
        return int(total((~self._kept(name)).sum(), self.parts[name].group))

    def _wish(
        self,
        graph: Graph | None,
        criterion: str | Criterion,
        allocate: str | Strategy,
        task: Task | None,
        ignore: Choice | Sequence[Choice],
    ) -> Masks | Channels:
        strategy = resolve_strategy(allocate)
        described = describe(str(self.pattern), self.budget, criterion, allocate, self.seed)
        if isinstance(self.pattern, Channel):
            if graph is None:
                raise SpecError(
                    f"pattern {self.pattern} needs graph=sc.analyze(model, inputs), which knows the channels"
                )
            wishes = {"criterion": criterion, "allocate": allocate, "task": task, "ignore": ignore, "seed": self.seed}
            return Channels(self.model, graph, {"pattern": str(self.pattern), **wishes}, described)
        if self.budget.kind not in ("sparsity", "params") and not (self.budget.kind == "macs" and graph is not None):
            raise SpecError(
                f"budget {self.budget} cannot be met by masks here; expected sparsity, params, or macs with graph="
            )
        whole = Whole(sum(p.numel() for p in self.model.parameters()), graph.cost().macs if graph is not None else 0)
        scorer = Scorer(criterion, self.model, graph, task, self.seed, self.weights, self.group)
        return Masks(self.weights, self.parts, self.pattern, strategy, whole, scorer, described)

    def _attach(self) -> None:
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before),
            self.optimizer.register_step_post_hook(self._after),
        ]

    def _before(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> optimizers.Given | None:
        return optimizers.once_there_are_gradients(args, kwargs, self._prepare)

    def _prepare(self) -> None:
        """Once there are gradients, before the optimizer uses them."""
        if optimizers.left_out(self.optimizer):
            return
        self._require_owned()
        self._stepping = True
        with torch.no_grad():
            optimizers.unscale_(self.optimizer)
            self._gather()
            for name, weight, grad in self.live():
                self.before(name, weight, grad)

    def _after(self, *_: Any) -> None:
        if not self._stepping:
            return
        self._stepping = False
        self.applied += 1
        with torch.no_grad():
            for name, weight, _grad in self.live():
                self.after(name, weight)

    def _gather(self) -> None:
        """Add up what the criterion wants of gradients; those of a step where any are NaN or infinite do not count."""
        if not (gathered := self.wish.gathered):
            return
        grads = {n: grad for n, _, grad in self.live() if n in self.weights and grad is not None}
        if not grads or not all(finite_everywhere(grads.values(), self.group)):
            return
        for name, grad in grads.items():
            for what in gathered:
                sums = self.state[name].setdefault(what, torch.zeros_like(grad, dtype=torch.float32))
                sums.add_(GATHERED[what](grad.float()))

    def _means(self) -> dict[str, dict[str, Tensor]]:
        """What was gathered of gradients; sums rank and pool as means do."""
        return {name: {k: v for k, v in kept.items() if k in GATHERED} for name, kept in self.state.items()}

    def _forget_means(self) -> None:
        for kept in self.state.values():
            for what in GATHERED:
                kept.pop(what, None)

    def _mask_average(self) -> None:
        if self.average is not None:
            averages.mask(self.average, ((name, self._kept(name)) for name in self.bits))

    def _require_owned(self) -> None:
        optimizers.require_trained(self.optimizer, ((name, self.tensor(name)) for name in self.weights))

    def _require_same_weights(self) -> None:
        if self._known is not None and (new := places.weights_of(self.model).keys() - self._known):
            raise PlanError(f"the model has got a new weight, {min(new)!r}; make the method anew after changing it")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy holds on to the copy of its optimizer, which comes without hooks."""
        self.__dict__.update(state)
        if not self.finished:
            self._attach()


def final(pattern: str, budget: str | None) -> Budget:
    """The budget that holds in the end. Raises SpecError where there is none, BudgetError where N:M has another."""
    shape = patterns.parse(pattern)
    if isinstance(shape, NM):
        own = own_budget(shape)
        if budget is not None and stages.part(budget) != own:
            raise BudgetError(f"{budget} cannot be met by pattern {pattern}, which removes {own}; leave the budget out")
        return own
    if budget is None:
        raise SpecError(f"pattern {pattern} needs a budget, such as sparsity=90%")
    return stages.part(budget)
