"""A market of operators, each with its matrix computed densely in float64.

``MARKET`` maps names to builders; ``build(name, dtype, device)`` returns the operator
and its matrix. The matrix is made of the very numbers that the operator holds, so that
what they differ by is the operator's arithmetic alone.
"""

from . import composed, low_rank, plain  # noqa: F401  (entries)
from .market import MARKET, Draw, build, entry, khatri_rao_of

__all__ = ["MARKET", "Draw", "build", "entry", "khatri_rao_of"]
