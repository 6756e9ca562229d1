"""What BackPACK leaves on parameters, as operators: to be inverted and composed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vivit_linop.curvature.recursions import (
    BackpackProduct,
    Left,
    backpack_results,
    kronecker_blocks,
    layers_of,
)
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.elementary import Dense, Diagonal
from vivit_linop.operators.kronecker import BlockDiagonal
from vivit_linop.risk.empirical import EmpiricalRisk


def from_backpack(source: Any, quantity: Any) -> TorchLinearOperator:
    """Return what BackPACK computes as an operator.

    - Kronecker factors (``KFAC``, ``KFLR``, ``KFRA``) become a ``BlockDiagonal`` of
      ``Kronecker`` operators, one block a parameter. Those of a transposed convolution
      are of ``weight.transpose(0, 1)``: the operator has the block at the places
      (``indices``) that its entries have in the parameter;
    - diagonals (``DiagGGNExact``, ``DiagHessian``, ``Variance``, …) a ``Diagonal``;
    - products with blocks (``HMP``, ``GGNMP``, ``PCHMP``) a ``BlockDiagonal``;
    - quantities with axes before the parameter's (``BatchGrad``, ``SqrtGGNExact``, …)
      a ``Dense`` with these as columns, sample-major, ``[D, N]`` or ``[D, N·C]``.

    Scalings are BackPACK's: quantities of single samples have its r = 1/N in them.

    Args:
        source: A module, or an iterable of parameters, that BackPACK has left its
            results on; or an :class:`EmpiricalRisk`, for which BackPACK runs on a copy
            of the model, on all samples at once.
        quantity: For parameters the name of the attribute, ``"kflr"`` or whatever
            ``savefield`` says; for a risk an extension, such as
            ``backpack.extensions.KFLR()``.

    Raises:
        TypeError: For arguments of a wrong type, or a quantity that is none of these.
        ValueError: If a parameter has no such attribute; if BackPACK cannot do the
            model, with the module that it has no rule for; if the shape of a kernel
            leaves open whether it is of a transposed convolution, and no module tells.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from backpack.extensions import KFRA
        >>> from torch import nn
        >>> data = (torch.rand(4, 3), torch.rand(4, 1))
        >>> risk = vl.EmpiricalRisk(nn.Sequential(nn.Linear(3, 1)), nn.MSELoss(), data)
        >>> K = vl.from_backpack(risk, KFRA())
        >>> (K + 0.1 * vl.Identity(4)).inv()
        <4x4 BlockDiagonal, torch.float32, cpu>
    """
    if isinstance(source, EmpiricalRisk):
        return _of_results(backpack_results(source, quantity))
    if isinstance(source, Tensor) or not isinstance(source, Iterable | nn.Module):
        raise TypeError(
            "source: an EmpiricalRisk, a module or an iterable of Parameters, got "
            f"{type(source).__name__}."
        )
    if not isinstance(quantity, str):
        raise TypeError(
            f"quantity: the name of an attribute of the parameters, got {quantity!r}."
        )
    layers = layers_of(source) if isinstance(source, nn.Module) else {}
    results = []
    parameters = source.parameters() if isinstance(source, nn.Module) else source
    for position, p in enumerate(parameters):
        if not hasattr(p, quantity):
            raise ValueError(
                f"source: parameter {position} has no {quantity!r}. Run backward() "
                "inside of `with backpack(extension):` first; parameters of modules "
                "that BackPACK has no rule for get none."
            )
        results.append(Left(p, getattr(p, quantity), layers.get(id(p))))
    if not results:
        raise ValueError("source: is empty, there is not one parameter.")
    return _of_results(results)


def _of_results(results: Sequence[Left]) -> TorchLinearOperator:
    """Decide by what BackPACK left on the parameters."""
    values = [value for _, value, _ in results]
    if all(callable(value) and not isinstance(value, Tensor) for value in values):
        return BlockDiagonal([BackpackProduct(f, p) for p, f, _ in results])
    if all(isinstance(value, (list, tuple)) for value in values):
        return kronecker_blocks(results)
    if all(isinstance(value, Tensor) for value in values):
        leading = {value.ndim - p.ndim for p, value, _ in results}
        shapes_match = all(
            value.shape[value.ndim - p.ndim :] == p.shape for p, value, _ in results
        )
        if shapes_match and leading == {0}:
            return Diagonal(torch.cat([value.detach().flatten() for value in values]))
        if shapes_match and leading in ({1}, {2}):
            rows = [value.detach() for value in values]
            if leading == {2}:  # samples come second
                rows = [value.transpose(0, 1).flatten(0, 1) for value in rows]
            return Dense(torch.cat([value.flatten(1) for value in rows], dim=1).T)
    p, value, _ = results[0]
    kind = type(value).__name__
    held = f"tensor {list(value.shape)}" if isinstance(value, Tensor) else kind
    raise TypeError(
        "quantity: is neither a diagonal, columns, Kronecker factors nor a product "
        f"with a block; parameter {list(p.shape)} holds a {held}."
    )
