"""L0: gates that are open or shut by chance, and learn how often."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Unpack

import torch
from torch import Tensor, nn

from secateur.errors import SpecError
from secateur.patterns import Block, Unstructured
from secateur.train import stages
from secateur.train.latent import LATENT, Latent, adam_, require_own_scores
from secateur.train.pruner import Common, final
from secateur.train.shards import local, total
from secateur.train.stages import Stage

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
LOG_ALPHA, FIRST, SECOND = "log_alpha", "first", "second"


class L0(Latent):
    """Hard concrete gates (Louizos et al. 2018), one for each weight or block, under a budget (CoFi, Xia et al. 2022).

        w' = z w,   z = clip(s (zeta - gamma) + gamma, 0, 1),   s = sigmoid((ln u - ln(1 - u) + a) / beta)
        P(z != 0) = sigmoid(a - beta ln(-gamma / zeta)),   e = the mean of P(z = 0) over all elements
        a <- Adam(w z'(a) dL/dw' + d/da (l1 (e - t) + l2 (e - t)^2))
        l1 <- l1 + multiplier_rate (e - t),   l2 <- l2 + multiplier_rate (e - t)^2

    with beta = 2/3, gamma = -0.1, zeta = 1.1, and u of (0, 1) drawn anew with every step, from ``seed``, the step and
    the weight's name alone. The target t rises from 0 at ``begin`` to the budget halfway to ``end``, and stays there.
    At ``end`` the gates of largest a, exactly as many as the budget leaves, are fixed as they are without chance, and
    what they let through trains on. As a choice is made in the end, a is not clamped, as it is in CoFi's code: gates at
    the bound would all be alike. Gale et al. (2019) found no setting that works well for single weights of ResNet-50.

    Between two steps the network computes with gates as they were drawn; to evaluate it, and to save it for use,

        with pruner.settled():
            ...

    initial: a at first; 3 is a gate that is shut once in a hundred times.
    rate: Adam's for a. At 1e-2 a gate takes at least 460 steps until it is shut half of the time; short trainings need
        more.
    multiplier_rate: how fast the multipliers l1 and l2 climb: slower, and e lags behind t; faster, and it swings about
        t. ``expected`` and ``target`` say where both are.
    begin, end: by default a tenth and 8 tenths of ``steps``.

    Steps whose gradients are NaN or infinite anywhere do not count for gates. See ``Latent`` and ``Pruner`` for
    everything else. Raises SpecError for a schedule that ends before it begins, and for a criterion: gates are learned.
    """

    allowed = (Unstructured, Block)
    why_only = "unstructured weights and blocks, which have a gate each"
    from_start = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        budget: str | None = None,
        steps: int = 0,
        *,
        initial: float = 3.0,
        rate: float = 1e-2,
        multiplier_rate: float = 1.0,
        begin: int | None = None,
        end: int | None = None,
        **common: Unpack[Common],
    ) -> None:
        steps = stages.number(steps)
        require_own_scores("L0", common)
        if not (math.isfinite(initial) and 0 < rate < math.inf and 0 <= multiplier_rate < math.inf):
            raise SpecError(
                f"initial is {initial}, rate {rate} and multiplier_rate {multiplier_rate}; expected a number, more "
                "than 0, and 0 or more"
            )
        first = steps // 10 if begin is None else begin
        last = max(first, steps * 8 // 10) if end is None else end
        stages.between(first, last, 1, steps)
        wish = final(common.get("pattern", "unstructured"), budget)
        super().__init__(model, optimizer, budget, steps, (Stage(last, wish),), **common)
        self.initial, self.rate, self.multiplier_rate, self.begin = initial, rate, multiplier_rate, first
        self._force: Tensor | float = 0.0

    # --- gates -------------------------------------------------------------------------------------

    def project(self, name: str, latent: Tensor) -> Tensor:
        return latent * self.drawn(name)[0].to(latent.dtype)

    def lasting(self, name: str, latent: Tensor) -> Tensor:
        return latent * self.gates(name).to(latent.dtype)

    def gates(self, name: str) -> Tensor:
        """The gates without chance, on each element that is here (float32)."""
        return (self.log_alpha(name).sigmoid() * (ZETA - GAMMA) + GAMMA).clamp_(0, 1)

    def drawn(self, name: str) -> tuple[Tensor, Tensor]:
        """The gates of this step and their derivatives by log alpha, on each element that is here (float32)."""
        odds = torch.logit(self.masks.noise(name, f"{self.seed} {self.applied}", self.value(name).device), eps=1e-6)
        s = ((odds + self.log_alpha(name)) / BETA).sigmoid_()
        stretched = s * (ZETA - GAMMA) + GAMMA
        slope = (s * (1 - s)).mul_((ZETA - GAMMA) / BETA).masked_fill_((stretched <= 0) | (stretched >= 1), 0)
        return stretched.clamp_(0, 1), slope

    def log_alpha(self, name: str) -> Tensor:
        state = self.state[name]
        if LOG_ALPHA not in state:
            state[LOG_ALPHA] = torch.full_like(self.value(name), self.initial, dtype=torch.float32)
        return state[LOG_ALPHA]

    def open(self, name: str) -> Tensor:
        """How probable it is that each element's gate is not shut."""
        return (self.log_alpha(name) - BETA * math.log(-GAMMA / ZETA)).sigmoid_()

    @property
    def expected(self) -> float:
        """The part of the weights' elements, over all processes, that is shut out by an average draw."""
        return float(self._expected())

    @property
    def target(self) -> float:
        """What ``expected`` is to be now."""
        wish, count = self.budget, sum(weight.numel for weight in self.weights.values())
        gone = float(wish.removed) * (self.masks.whole.params / count if wish.kind == "params" else 1)
        middle = (self.begin + self.schedule[-1].step) / 2
        risen = (self.applied - self.begin) / max(1.0, middle - self.begin)
        return min(gone, 1.0) * min(1.0, max(0.0, risen))

    @contextmanager
    def settled(self) -> Iterator[None]:
        """For evaluation: gates without chance inside, those that were drawn again afterwards. Take no step inside."""
        with torch.no_grad():
            for name, kept in self.state.items():
                if LATENT in kept:
                    local(self.tensor(name)).detach().copy_(self.lasting(name, kept[LATENT]))
        try:
            yield
        finally:
            with torch.no_grad():
                self.show()

    # --- learning ----------------------------------------------------------------------------------

    def pull(self, name: str, latent: Tensor, grad: Tensor) -> None:
        if LATENT not in self.state[name]:
            return
        gates, slope = self.drawn(name)
        if self.learning:
            probable, count = self.open(name), sum(weight.numel for weight in self.weights.values())
            own = slope.mul_(latent.float()).mul_(grad.float())
            own.sub_(probable * (1 - probable) * (self._force / count))
            adam_(self.log_alpha(name), self.per_unit(name, own), self.state[name], self.rate, self.applied)
        grad.mul_(gates.to(grad.dtype))

    def score(self, name: str) -> Tensor:
        return self.log_alpha(name)

    def before(self, name: str, weight: Tensor, grad: Tensor | None) -> None:
        if name == next(iter(self.weights)) and self.learning and LATENT in self.state[name]:
            self._push(name)
        super().before(name, weight, grad)

    def _push(self, name: str) -> None:
        """Let the multipliers climb, and see what one more gate that is shut is worth to them.

        They are kept with the first weight, before any gate of this step has learned.
        """
        state, beyond = self.state[name], self._expected() - self.target
        first, second = (state.setdefault(which, torch.zeros_like(beyond)) for which in (FIRST, SECOND))
        self._force = first + 2 * second * beyond
        first.add_(beyond, alpha=self.multiplier_rate)
        second.add_(beyond * beyond, alpha=self.multiplier_rate)

    def _expected(self) -> Tensor:
        names = list(self.weights)
        shut = [total((1 - self.open(n)).sum(), self.parts[n].group).to(self.value(names[0]).device) for n in names]
        return torch.stack(shut).sum() / sum(weight.numel for weight in self.weights.values())
