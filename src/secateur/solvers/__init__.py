"""Solvers write new weights for what a plan keeps, so that a layer's outputs stay what they were."""

from secateur.solvers.least_squares import Moments, solve

__all__ = ["Moments", "solve"]
