"""Tracing a model into axes: which channels can only be removed together, and which not at all."""
