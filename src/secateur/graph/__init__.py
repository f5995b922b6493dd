"""Tracing a model into axes: which channels can only be removed together, and which not at all."""

from secateur.graph.analyze import analyze
from secateur.graph.graph import Graph
from secateur.graph.types import Axis, Cost, Member, Weight

__all__ = ["Axis", "Cost", "Graph", "Member", "Weight", "analyze"]
