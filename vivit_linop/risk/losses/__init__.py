"""Losses as functions of outputs, with their derivatives in output space.

A loss without a closed form here is differentiated by autograd. :class:`Loss` and
:func:`register` give it one: the page *A loss with a closed-form Hessian* shows how.
"""

from vivit_linop.risk.losses.base import OutputLoss
from vivit_linop.risk.losses.derived import Weighted
from vivit_linop.risk.losses.draws import LabelDraws
from vivit_linop.risk.losses.elementwise import ElementwiseLoss
from vivit_linop.risk.losses.own import Loss
from vivit_linop.risk.losses.registry import register

__all__ = [
    "ElementwiseLoss",
    "LabelDraws",
    "Loss",
    "OutputLoss",
    "Weighted",
    "register",
]
