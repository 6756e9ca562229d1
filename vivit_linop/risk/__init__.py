"""Risks: a model, a loss and data, and what the loss's derivatives are."""

from vivit_linop.risk.empirical import EmpiricalRisk

__all__ = ["EmpiricalRisk"]
