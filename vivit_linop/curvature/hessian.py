"""The Hessian of the empirical risk, and its blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vivit_linop.curvature.blocks import ParameterBlocks, parameter_groups, places_of
from vivit_linop.curvature.hessian_diagonal import (
    DiagonalCost,
    cost_of_diagonal,
    diagonal_by_recursion,
    sample_diagonals,
)
from vivit_linop.curvature.hessian_products import HessianProducts
from vivit_linop.linalg.reductions import diagonal_of_operator
from vivit_linop.modes import ordinary_mode
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.kronecker import BlockDiagonal
from vivit_linop.operators.verbs import diagonal


class Hessian(HessianProducts):
    """The Hessian ∇²L(θ), ``[D, D]``; symmetric, in general indefinite.

    A product is the derivative of the gradient along a vector (Pearlmutter 1994): one
    backward pass through the graph of the gradient, which is kept for the first batch
    and made anew for the others.

    Args:
        risk: An :class:`EmpiricalRisk`, or its arguments, ``model, loss, data, …``.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from torch import nn
        >>> data = (torch.rand(4, 3), torch.rand(4, 1))
        >>> risk = vl.EmpiricalRisk(nn.Linear(3, 1), nn.MSELoss(), data)
        >>> x = torch.ones(4)  # for a linear model the GGN is the Hessian
        >>> torch.allclose(vl.Hessian(risk) @ x, vl.GGN(risk) @ x, atol=1e-5)
        True
    """

    def block_diagonal(self, blocks: ParameterBlocks) -> BlockDiagonal:
        """Return the Hessian's block-diagonal over blocks of parameters, ``[D, D]``.

        A product with a block is a backward pass that goes through the part of the
        graph that belongs to its parameters. BackPACK's ``HMP`` is that for
        ``"parameter"``.

        Args:
            blocks: As for :meth:`vivit_linop.GGN.block_diagonal`.

        Raises:
            ValueError: If a parameter is missing, foreign or listed twice.

        Example:
            >>> import torch, vivit_linop as vl
            >>> from torch import nn
            >>> data = (torch.rand(4, 3), torch.rand(4, 1))
            >>> H = vl.Hessian(nn.Linear(3, 1), nn.MSELoss(), data)
            >>> H.block_diagonal("parameter").blocks
            [<3x3 HessianBlock, torch.float32, cpu>, <1x1 HessianBlock, torch.float32, \
cpu>]
        """
        risk = self.risk
        groups = parameter_groups(risk, blocks)
        names = list(risk.params)
        chosen = [[names.index(name) for name in group] for group in groups]
        return BlockDiagonal(
            [HessianBlock(self, numbers) for numbers in chosen],
            places_of(risk, groups),
        )

    def diagonal(self, route: str | None = None) -> Tensor:
        """Return the exact diagonal, ``[D]``.

        Args:
            route: ``"backpack"``: BackPACK's recursion over layers (Dangel, Kunstner &
                Hennig 2020, arXiv:1912.10985), a backward pass of
                matrices with C columns and more after each elementwise function, for
                nets of the modules that it has rules for; ``"products"``: D products
                with the Hessian, for every model. None for the former where it can be
                done in the memory budget and its result stands up to a check, else the
                latter. :meth:`explain_diagonal` says what it will cost. Where that is
                too much, :func:`vivit_linop.estimate_diagonal` estimates.

        Raises:
            ValueError: If BackPACK cannot do the model and ``route`` demands it.

        Example:
            >>> import torch, vivit_linop as vl
            >>> from torch import nn
            >>> data = (torch.rand(4, 3), torch.rand(4, 1))
            >>> H = vl.Hessian(nn.Sequential(nn.Linear(3, 1)), nn.MSELoss(), data)
            >>> by_products = H.diagonal("products")
            >>> torch.allclose(H.diagonal("backpack"), by_products)
            True
        """
        recursion = diagonal_by_recursion(self, route, by_sample=False)
        if recursion is not None:
            return recursion
        with ordinary_mode():
            return diagonal_of_operator(self)

    def sample_diagonals(self, route: str | None = None) -> Tensor:
        """Return the diagonals of the samples' Hessians ∇²ℓ_n, ``[N, D]``.

        Without r, as all quantities of single samples: r Σ_n of them is
        ``H.diagonal()``. BackPACK's ``BatchDiagHessian`` is r times this.

        Args:
            route: ``"backpack"`` as for :meth:`diagonal`; ``"products"``: second
                derivatives of the outputs along each parameter entry by forward mode,
                D passes over the data; for models without forward mode, D products
                with the Hessian of each sample. None for the first that works.

        Raises:
            ValueError: If BackPACK cannot do the model and ``route`` demands it.

        Example:
            >>> import torch, vivit_linop as vl
            >>> from torch import nn
            >>> data = (torch.rand(4, 3), torch.rand(4, 1))
            >>> H = vl.Hessian(nn.Linear(3, 1), nn.MSELoss(), data)
            >>> H.sample_diagonals().shape
            torch.Size([4, 4])
        """
        recursion = diagonal_by_recursion(self, route, by_sample=True)
        if recursion is not None:
            return recursion / self.risk.reduction_factor
        with ordinary_mode():
            return sample_diagonals(self)

    def explain_diagonal(self) -> DiagonalCost:
        """Print what the diagonal by products will cost, and whether BackPACK can.

        Takes a few products, to measure them.

        Returns:
            What is printed: the number of products, and seconds of both ways.

        Example:
            >>> import torch, vivit_linop as vl
            >>> from torch import nn
            >>> data = (torch.rand(4, 3), torch.rand(4, 1))
            >>> H = vl.Hessian(nn.Linear(3, 1), nn.MSELoss(), data)
            >>> cost = H.explain_diagonal()
            4 products: about ...
            >>> cost.products
            4
        """
        cost = cost_of_diagonal(self)
        print(cost)
        return cost


class HessianBlock(TorchLinearOperator):
    """A diagonal block of the Hessian; made by :meth:`Hessian.block_diagonal`."""

    self_adjoint = True

    def __init__(self, hessian: Hessian, chosen: Sequence[int]) -> None:
        self.hessian, self._chosen = hessian, chosen
        size = sum(hessian.risk.sizes[number] for number in chosen)
        super().__init__((size, size), hessian.torch_dtype, hessian.device)

    def _made_of(self) -> tuple[Hessian]:
        return (self.hessian,)

    def _multiply(self, X: Tensor) -> Tensor:
        return self.hessian.multiply_block(self._chosen, X)


@diagonal.register
def diagonal_of_hessian(op: Hessian) -> Tensor:
    """By BackPACK's recursion, or by products."""
    return op.diagonal()
