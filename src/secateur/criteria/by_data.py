"""Criteria that look at calibration data too."""

from __future__ import annotations

from torch import Tensor

from secateur.criteria.form import in_loss_units, needs, of_outputs
from secateur.stats import Stats


@in_loss_units
@needs("grad_abs")
def taylor(weight: Tensor, stats: Stats) -> Tensor:
    """|w| * mean |dL/dw|: the first-order change of the loss when w goes (Molchanov et al. 2019), taken per batch
    and per weight, absolute values averaged over the calibration batches."""
    return weight.abs() * stats["grad_abs"]


@needs("activation")
def activation(weight: Tensor, stats: Stats) -> Tensor:
    """The mean of |output| over the calibration data, which all weights of an output share (see ``of_outputs``).

    Outputs are taken where they leave the operator, before its bias where that is an operator of its own.
    """
    return of_outputs(stats["activation"], weight, stats)


@needs("active")
def apoz(weight: Tensor, stats: Stats) -> Tensor:
    """1 - APoZ: the share of calibration outputs that are not zero behind the nonlinearity (Hu et al. 2016).

    All weights of an output share it (see ``of_outputs``). ``stats.outputs.follow`` says what is behind an output.
    """
    return of_outputs(stats["active"], weight, stats)


@in_loss_units
@needs("grad_square")
def fisher(weight: Tensor, stats: Stats) -> Tensor:
    """w² E[(dL/dw)²] / 2: the second-order rise of the loss, with the diagonal of the empirical Fisher matrix, over
    single examples, in the place of the Hessian (Theis et al. 2018)."""
    return weight.square() * stats["grad_square"] / 2


@in_loss_units
@needs("fisher_inverse")
def block_fisher(weight: Tensor, stats: Stats) -> Tensor:
    """w² / (2 [F⁻¹]_qq): the rise of the loss when w goes and the other weights of its block make up for it as well as
    they can (Hassibi & Stork 1993), with the block-diagonal empirical Fisher matrix (Kurtic et al. 2022, oBERT)."""
    return weight.square() / (2 * stats["fisher_inverse"])


@in_loss_units
@needs("curvature")
def obd(weight: Tensor, stats: Stats) -> Tensor:
    """w² h / 2 with the diagonal h of the Gauss-Newton matrix (LeCun et al. 1990, optimal brain damage).

    Like LeCun et al., and unlike Hutchinson's estimate of the Hessian itself: that one has the whole matrix for noise,
    and from the few batches of a calibration split it ranked worse than chance. This one is never negative, needs no
    second derivative of the model, and where the outputs are piecewise linear in each single weight (networks of ReLU)
    it is the Hessian's diagonal.
    """
    return weight.square() * stats["curvature"] / 2
