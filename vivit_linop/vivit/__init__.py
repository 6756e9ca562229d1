"""ViViT's four computations, as a drop-in on BackPACK's backward pass.

The classes have the constructors, methods and results of ViViT 1.0.0 (Dangel, Tatzel &
Hennig 2022), so that a script needs another import line only::

    from vivit_linop.vivit import EigvalshComputation

What BackPACK backpropagates becomes columns in the structure of the layers; Gram
matrices, eigenpairs, derivatives and steps are those of the rest of this package.
This package imports BackPACK (the extra ``backpack``), so it is not imported with
``vivit_linop``.
"""

from vivit_linop.extras import extra

with extra("backpack"):
    from vivit_linop.vivit.computations import (
        DirectionalDampedNewtonComputation,
        DirectionalDerivativesComputation,
        EighComputation,
        EigvalshComputation,
    )

__all__ = [
    "DirectionalDampedNewtonComputation",
    "DirectionalDerivativesComputation",
    "EighComputation",
    "EigvalshComputation",
]
