"""Risks: a model, a loss and data as one function of the parameters.

:mod:`vivit_linop.risk.data` knows batches and where samples are,
:mod:`vivit_linop.risk.model` runs the user's model as a guest,
:mod:`vivit_linop.risk.losses` differentiates losses in output space. What stands beside
them joins the three: passes over the data, the first of which checks everything, and
the risk that operators are made of.
"""

from vivit_linop.risk.empirical import EmpiricalRisk

__all__ = ["EmpiricalRisk"]
