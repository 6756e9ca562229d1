"""Losses as functions of outputs, with their derivatives in output space.

A loss without a closed form here is differentiated by autograd. :func:`register` gives
it one: the page *A loss with a closed-form Hessian* shows how.
"""

from vivit_linop.risk.losses.base import OutputLoss
from vivit_linop.risk.losses.elementwise import ElementwiseLoss
from vivit_linop.risk.losses.registry import register

__all__ = ["ElementwiseLoss", "OutputLoss", "register"]
