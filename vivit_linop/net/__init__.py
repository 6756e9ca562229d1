"""What a net does with its parameters: linearisations, layers, columns.

A linearisation multiplies by J and Jᵀ (``linearization``, ``linearized``, ``tracing``).
Columns of Jᵀ B are made in the structure of layers: the net is recorded (``recorder``),
its calls are layers of some kind (``kinds``, ``layers``), those on a batch a capture
(``capture``). What comes of it is certified (``certified``), held in ``pieces`` and
summed (``column_passes``, ``totals``).
"""

from vivit_linop.net import layers as layers  # the built-in kinds are registered
