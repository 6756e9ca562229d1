"""The Hessian of the empirical risk, its blocks, and its diagonals.

Diagonals come by BackPACK's recursion over layers, or by products.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap

from vivit_linop.arguments import check_choice
from vivit_linop.curvature.blocks import ParameterBlocks, parameter_groups, places_of
from vivit_linop.curvature.hessian_products import ROUNDING, HessianProducts
from vivit_linop.curvature.loss_hessian import LossGradient, LossHessian
from vivit_linop.curvature.output_space import OfRisk
from vivit_linop.curvature.recursions import own_backpack_results
from vivit_linop.devices import is_out_of_memory
from vivit_linop.extras import extra
from vivit_linop.linalg.reductions import diagonal_of_operator
from vivit_linop.modes import as_guest, ordinary_mode
from vivit_linop.noise import Noise
from vivit_linop.operators.kronecker import BlockDiagonal
from vivit_linop.operators.verbs import diagonal
from vivit_linop.risk.empirical import EmpiricalRisk
from vivit_linop.risk.model.original import Params

_ROUTES = ("backpack", "products")


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
            [HessianBlock(self, numbers) for numbers in chosen], places_of(risk, groups)
        )

    @cached_property
    def diagonal_of_blocks(self) -> Tensor | None:
        """The diagonal by BackPACK's recursion for all blocks; None if by products."""
        return diagonal_by_recursion(self, None, by_sample=False)

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


class HessianBlock(OfRisk):
    """A diagonal block of the Hessian; made by :meth:`Hessian.block_diagonal`."""

    self_adjoint = True

    def __init__(self, hessian: Hessian, chosen: Sequence[int]) -> None:
        self.hessian, self.chosen, self.risk = hessian, chosen, hessian.risk
        size = sum(hessian.risk.sizes[number] for number in chosen)
        super().__init__((size, size), hessian.torch_dtype, hessian.device)

    def _multiply(self, X: Tensor) -> Tensor:
        return self.hessian.multiply_block(self.chosen, X)


@diagonal.register
def diagonal_of_hessian(op: Hessian) -> Tensor:
    """By BackPACK's recursion, or by products."""
    return op.diagonal()


@diagonal.register
def diagonal_of_hessian_block(op: HessianBlock) -> Tensor:
    """By one recursion for all blocks, or by products with each."""
    found = op.hessian.diagonal_of_blocks
    if found is None:
        return diagonal_of_operator(op)
    parts = found.split(op.hessian.risk.sizes)
    return torch.cat([parts[number] for number in op.chosen])


# Diagonals --------------------------------------------------------------------------


@dataclass(frozen=True)
class DiagonalCost:
    """What the Hessian's diagonal will cost.

    Attributes:
        products: The number of products with the Hessian, D.
        seconds: What they take, as estimated from some of them.
        recursion_seconds: What BackPACK's recursion takes at most, as estimated from
            one sample.
        refusal: Why it cannot be used, or None.
    """

    products: int
    seconds: float
    recursion_seconds: float
    refusal: str | None

    def __str__(self) -> str:
        """Say it in two lines."""
        recursion = self.refusal or f"about {self.recursion_seconds:.2g} s"
        return (
            f"{self.products} products: about {self.seconds:.2g} s\n"
            f"recursion over layers by BackPACK: {recursion}"
        )


def cost_of_diagonal(H: HessianProducts) -> DiagonalCost:
    """Measure what D products take, and BackPACK's recursion for one sample."""
    D = H.shape[0]
    count = min(D, H.ranks.led(attrgetter("together"), H))
    unit = torch.eye(D, count, dtype=H.torch_dtype, device=H.device)
    H.apply(unit)  # makes the graph
    start = time.perf_counter()
    H.apply(unit)[0, 0].item()  # waits for the device
    seconds = (time.perf_counter() - start) / count
    N, start = H.risk.num_samples, time.perf_counter()
    try:
        one = H.risk.subset([0])
        _by_backpack(one, False, H.risk.kept.columns_budget() // N)
        recursion = None
    except (ValueError, ModuleNotFoundError) as error:
        recursion = str(error)
    one_sample = time.perf_counter() - start
    return DiagonalCost(D, seconds * D, N * one_sample, recursion)


def diagonal_by_recursion(
    H: HessianProducts, route: str | None, by_sample: bool
) -> Tensor | None:
    """BackPACK's diagonal if it is right, None if products are to be used."""
    if route is not None:
        check_choice(route, "route", _ROUTES)
    if route == "products":
        return None
    try:
        found = _by_backpack(H.risk, by_sample, H.risk.kept.columns_budget())
        _check_diagonal(H, found, by_sample)
    except Exception as error:
        # It is impossible, or products do with less memory.
        impossible = isinstance(error, (ValueError, ModuleNotFoundError))
        if route == "backpack" or not (impossible or is_out_of_memory(error)):
            raise
        return None
    return found


def _check_diagonal(H: HessianProducts, found: Tensor, by_sample: bool) -> None:
    """Raise an error if some entries are not those of products.

    Of each parameter the largest entry and a random one; of three samples too.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    total = found.sum(0) if by_sample else found
    entries = []
    first = 0
    for part in total.split(H.risk.sizes):
        if len(part):
            some = _drawn(len(part), generator)
            entries += [first + int(part.abs().argmax()), first + some]
        first += len(part)
    unit = torch.zeros(len(total), len(entries), dtype=found.dtype, device=found.device)
    unit[entries, torch.arange(len(entries), device=found.device)] = 1.0
    pairs = [(total[entries], (H.apply(unit) * unit).sum(0))]
    if by_sample:
        N = len(found)
        some = _drawn(N, generator)
        r = H.risk.reduction_factor
        for number in sorted({0, some, N - 1}):
            image = r * _product_of_sample(H, unit, number)
            pairs.append((found[number, entries], (image * unit).sum(0)))
    eps = torch.finfo(found.dtype).eps
    for ours, exact in pairs:
        size = exact.abs() + ours.abs()
        tolerance = eps**0.5 * size + ROUNDING * eps * size.max()
        if not ((ours - exact).abs() <= tolerance).all():
            raise ValueError(
                "model: BackPACK and products give different diagonals of its "
                "Hessian. Use route='products'."
            )


def _product_of_sample(H: HessianProducts, unit: Tensor, number: int) -> Tensor:
    """Multiply the Hessian of one sample, on the rank that has it."""
    own, part = number - H.ranks.first, torch.zeros_like(unit)
    with H.ranks.together("the Hessian of a sample"):
        if 0 <= own < sum(H.risk.batch_sizes):
            part = next(H.of_samples(unit, [own]))
    return H.ranks.total(part)


def sample_diagonals(H: HessianProducts) -> Tensor:
    """By forward mode, or sample by sample."""
    risk, D = H.risk, H.shape[0]
    x = Noise()(D, 1, like=risk.example[0])
    image = H.apply(x)  # certified
    try:
        # Along one random direction all samples together are the Hessian's.
        total = _second_derivatives(H, x).sum() * risk.reduction_factor
        expected = (x * image).sum()
        # Forward mode is exact but for rounding. It does not know that rows of padding
        # are constants, and what they would add may be small.
        tolerance = ROUNDING * torch.finfo(H.torch_dtype).eps ** 0.75
        size = expected.abs() + x.norm() * image.norm()
        floor = x.norm() * _rounding(H)
        if (total - expected).abs() <= tolerance * size + x.norm() * floor:
            unit = torch.eye(D, dtype=H.torch_dtype, device=H.device)
            together = H.ranks.led(attrgetter("together"), H)  # the same on all ranks
            parts = [_second_derivatives(H, U) for U in unit.split(together, dim=1)]
            found = torch.cat(parts, dim=1)
            _check_diagonal(H, risk.reduction_factor * found.sum(0), by_sample=False)
            return found
    # Operations without forward mode, or that cannot be vectorised, or are wrong then;
    # one by one also takes less memory.
    except (RuntimeError, NotImplementedError, ValueError):
        pass
    return diagonals_one_by_one(H, x, image)


def _rounding(H: HessianProducts) -> float:
    """What rounding leaves of entries that cancel, by the size of the outputs."""
    own = sum(float(o.reshape(len(o), -1).norm(dim=1).sum()) for o in H.risk.outputs)
    outputs = sum(H.ranks.gathered(own))
    eps = torch.finfo(H.torch_dtype).eps
    return ROUNDING * eps * H.risk.reduction_factor * outputs


def diagonals_one_by_one(H: HessianProducts, x: Tensor, image: Tensor) -> Tensor:
    """D products with the Hessian of each sample.

    Together they must give the Hessian's product with x, ``[D, 1]``, its image.
    """
    D = H.shape[0]
    unit = torch.eye(D, dtype=H.torch_dtype, device=H.device)
    total = torch.zeros_like(image)

    def own_rows() -> Tensor:
        found = []
        for matrix in H.of_samples(unit):
            found.append(matrix.diagonal())
            total.add_(H.risk.reduction_factor * (matrix @ x))
        return torch.stack(found)

    rows = H.ranks.listed(own_rows)
    total = H.ranks.total(total)
    tolerance = ROUNDING * torch.finfo(H.torch_dtype).eps ** 0.75
    size = image.norm() + H.risk.reduction_factor * x.norm() * sum(
        row.norm() for row in rows
    )
    floor = x.norm() * _rounding(H)
    if not (total - image).norm() <= tolerance * size + floor:
        raise ValueError(
            "model: the second derivatives of its samples alone are not those of "
            "the batch; a sample is computed in another way when it is alone."
        )
    return rows


def _second_derivatives(H: HessianProducts, U: Tensor) -> Tensor:
    """The second derivatives of ℓ_n along columns, ``[N, K]``.

    uᵀ ∇²ℓ_n u = (J_n u)ᵀ H_n (J_n u) + ⟨∇_f ℓ_n, ∂²f_n/∂u²⟩.
    """
    both = LossGradient(H.risk), LossHessian(H.risk)
    return H.ranks.listed(partial(_own_second_derivatives, H, *both), U)


def _own_second_derivatives(
    H: HessianProducts, gradient: LossGradient, curvature: LossHessian, U: Tensor
) -> Tensor:
    """Those of this rank's samples."""
    risk, count = H.risk, U.shape[1]
    directions = risk.unflatten_real(U)
    params = {name: p.detach() for name, p in risk.params.items()}
    rows = []
    for batch, (X, _) in enumerate(risk.passes.batches()):

        def derivatives(direction: Params, X: Any = X) -> tuple[Tensor, Tensor]:
            def slope(params: Params) -> Tensor:
                return jvp(lambda p: risk.model(p, X), (params,), (direction,))[1]

            return jvp(slope, (params,), (direction,))[:2]

        with as_guest(risk.device), torch.no_grad():
            first, second = vmap(derivatives)(directions)
        n = first.shape[1]
        f1 = first.reshape(count, -1).T  # [n C, K]
        f2 = second.reshape(count, n, -1)
        curved = f1 * curvature.apply_batch(batch, f1) / risk.reduction_factor
        linear = torch.einsum("knc,nc->nk", f2, gradient.blocks(batch)[:, :, 0, 0])
        rows.append(curved.reshape(n, -1, count).sum(1) + linear)
    return torch.cat(rows).detach()


def _drawn(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=generator, device="cpu"))


def _by_backpack(risk: EmpiricalRisk, by_sample: bool, memory: int) -> Tensor:
    """Return the Hessian's diagonal by BackPACK, ``[D]``, or by sample ``[N, D]``.

    By sample with its r.

    Raises:
        ModuleNotFoundError: If BackPACK is not installed.
        ValueError: If BackPACK cannot do the model, or not in that memory.
    """
    with risk.ranks.together("BackPACK"), extra("backpack"):
        from backpack.extensions import BatchDiagHessian, DiagHessian

    extension = BatchDiagHessian() if by_sample else DiagHessian()
    leading = 1 if by_sample else 0

    def own() -> Tensor:
        share = _own_share(risk)
        if share == 0.0:  # every target is ignored, and a mean over them is no number
            rows = [sum(risk.batch_sizes)] if by_sample else []
            return risk.outputs[0].new_zeros(*rows, risk.num_params)
        results = own_backpack_results(risk, extension, memory)
        parts = [result.value.detach().flatten(leading) for result in results]
        whole = torch.cat(parts, dim=leading)
        return whole if share == 1.0 else share * whole

    return risk.ranks.listed(own) if by_sample else risk.ranks.summed(own)


def _own_share(risk: EmpiricalRisk) -> float:
    """What a mean over this rank's samples counts in that over all."""
    if not risk.ranks.is_many or risk.reduction != "mean":
        return 1.0
    seen = zip(risk.outputs, risk.all_targets, strict=True)
    return risk.scale * sum(risk.loss.weight(*pair).item() for pair in seen)
