"""The Hessian of the empirical risk, its diagonal and its blocks."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap

from vivit_linop.curvature.blocks import ParameterBlocks, parameter_groups, places_of
from vivit_linop.curvature.output_space import LossGradient, LossHessian
from vivit_linop.curvature.positive_curvature import (
    PositiveCurvature,
    PositiveCurvatureBlock,
)
from vivit_linop.curvature.second_derivatives import (
    Certificate,
    differentiable_twice,
    gradient_of,
)
from vivit_linop.interop import (
    CURVED,
    backpack_diagonal_hessian,
    backpack_positive_curvature,
)
from vivit_linop.modes import ordinary_mode
from vivit_linop.net.blocks import memory_budget
from vivit_linop.net.costs import layer_costs
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.kronecker import BlockDiagonal
from vivit_linop.operators.verbs import diagonal
from vivit_linop.risk.data import copied, take
from vivit_linop.risk.empirical import EmpiricalRisk, as_risk
from vivit_linop.risk.losses.certificates import certify_curvature, check_curvature
from vivit_linop.risk.model import Params, as_guest, strided

# Products that are taken together where a pass over the data is so short that most of
# it is overhead (in floating-point operations); else there is nothing to gain by it.
_TOGETHER = 16
_SHORT_PASS = 3e7
# How far apart ways that differ in the order of summation may be, in eps^¾.
_ROUNDING = 100
_ROUTES = ("backpack", "products")


class Hessian(TorchLinearOperator):
    """The Hessian ∇²L(θ), ``[D, D]``; symmetric, in general indefinite.

    A product is the derivative of the gradient along a vector (Pearlmutter 1994): one
    backward pass through the graph of the gradient, which is kept for the first batch
    and made anew for the others.

    Args:
        risk: An :class:`EmpiricalRisk`, or a model, followed by ``loss``, ``data`` and
            ``params`` as for :class:`EmpiricalRisk`.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from torch import nn
        >>> data = (torch.rand(4, 3), torch.rand(4, 1))
        >>> risk = vl.EmpiricalRisk(nn.Linear(3, 1), nn.MSELoss(), data)
        >>> x = torch.ones(4)  # for a linear model the GGN is the Hessian
        >>> torch.allclose(vl.Hessian(risk) @ x, vl.GGN(risk) @ x, atol=1e-5)
        True
    """

    self_adjoint = True

    def __init__(
        self,
        risk: EmpiricalRisk | Any,
        loss: Any = None,
        data: Any = None,
        params: Any | None = None,
    ) -> None:
        self.risk = as_risk(risk, loss, data, params)
        check_curvature(self.risk.loss, self.risk.outputs[0], self.risk.targets()[0])
        for output, target in zip(self.risk.outputs, self.risk.targets(), strict=True):
            certify_curvature(self.risk.loss, output, target)
        D = self.risk.num_params
        super().__init__((D, D), self.risk.dtype, self.risk.device)
        self._kept: list[Tensor] | None = None
        self._certified = False
        self._batched = True  # until torch refuses, or is wrong
        self._compared: set[tuple[Any, ...]] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Graphs do not travel: a copy makes its own, of its own parameters."""
        return {**self.__dict__, "_kept": None}

    # Products -----------------------------------------------------------------------

    def _gradient(self, index: int, X: Any) -> list[Tensor]:
        """The gradient on a batch, with its graph."""
        risk = self.risk
        output = risk.model(risk.params, X)
        risk.check_outputs(index, output)
        total = risk.loss.total(output, risk.targets()[index]) * risk.scale
        return self._gradient_of(total)

    def _gradient_of(self, total: Tensor) -> list[Tensor]:
        return gradient_of(total, list(self.risk.params.values()), graph=True)

    def _multiply(self, X: Tensor) -> Tensor:
        return self.multiply_block(range(len(self.risk.sizes)), X)

    def multiply_block(self, chosen: Sequence[int], X: Tensor) -> Tensor:
        """Multiply the diagonal block of some parameters, ``[d, K] -> [d, K]``.

        Args:
            chosen: The numbers of the parameters.
            X: Their entries.
        """
        if not self._certified:
            Certificate(self.risk).check()
            self._certified = True
        return self._block_product(chosen, X)

    def _block_product(self, chosen: Sequence[int], X: Tensor) -> Tensor:
        result = torch.zeros_like(X)
        single = len(self.risk.batch_sizes) == 1
        with as_guest(self.risk.device):
            if single and self._kept is not None:
                return self._differentiate(self._kept, chosen, X, 0)
            for index, (inputs, _) in enumerate(self.risk.batches("product")):
                gradient = self._gradient(index, copied(inputs) if single else inputs)
                if single:
                    self._kept = gradient
                result += self._differentiate(gradient, chosen, X, index)
        return result

    def _differentiate(
        self,
        gradient: list[Tensor],
        chosen: Sequence[int],
        X: Tensor,
        batch: int | None,
    ) -> Tensor:
        """Differentiate the gradient in some parameters along each column.

        Args:
            gradient: The gradient, with its graph.
            chosen: The numbers of the parameters.
            X: The columns, entries of these parameters.
            batch: Which batch the gradient is of; None for a single sample.
        """
        # The loss may be linear in some parameters.
        curved = [index for index in chosen if gradient[index].requires_grad]
        if not curved:
            return torch.zeros_like(X)
        parameters = list(self.risk.params.values())
        sizes = [self.risk.sizes[index] for index in chosen]
        columns = []
        size = self._together if X.shape[1] > 1 else 1
        for part in X.split(size, dim=1):
            count = part.shape[1]
            vectors = {
                # Contiguous, as vectors come from torch's own backward passes: there
                # are kernels that take that for granted.
                index: rows.T.contiguous().view(count, *parameters[index].shape)
                for index, rows in zip(chosen, part.split(sizes), strict=True)
            }
            products = self._pull_back(
                [gradient[index] for index in curved],
                [parameters[index] for index in chosen],
                [vectors[index] for index in curved],
                None if batch is None else (batch, *chosen),
            )
            rows_of_parts = [
                part.new_zeros(size, part.shape[1])
                if product is None
                else product.reshape(part.shape[1], size).T
                for size, product in zip(sizes, products, strict=True)
            ]
            columns.append(torch.cat(rows_of_parts))
        return torch.cat(columns, dim=1)

    @property
    def _together(self) -> int:
        """How many products are taken together."""
        return _TOGETHER if self._batched and self._short else 1

    @cached_property
    def _short(self) -> bool:
        """Whether a pass over the data is short."""
        costs = layer_costs(self.risk, 1)
        return sum(cost.forward_flops for cost in costs) < _SHORT_PASS

    def _pull_back(
        self,
        outputs: list[Tensor],
        inputs: list[Tensor],
        vectors: list[Tensor],
        place: tuple[int, ...] | None,
    ) -> list[Tensor | None]:
        """Backward passes for ``[K, *p]`` vectors, together if torch can.

        Args:
            outputs: What is differentiated.
            inputs: In what.
            vectors: Along what.
            place: The batch and parameters, None if they will not come again.
        """
        count = len(vectors[0])
        with differentiable_twice():
            if count > 1 and self._batched_is_right(outputs, inputs, vectors, place):
                together = self._pull_back_together(outputs, inputs, vectors)
                if together is not None and (
                    place is not None
                    or self._is_right(together, outputs, inputs, vectors)
                ):
                    return together
            each = [
                _pulled_back(outputs, inputs, [v[k] for v in vectors])
                for k in range(count)
            ]
        return [
            None if products[0] is None else torch.stack(products)
            for products in zip(*each, strict=True)
        ]

    def _batched_is_right(
        self,
        outputs: list[Tensor],
        inputs: list[Tensor],
        vectors: list[Tensor],
        place: tuple[int, ...] | None,
    ) -> bool:
        """Whether to take passes together; tried once a place, on random vectors.

        Those that are multiplied may have zeros where a fault would show. At no place,
        each result is to be looked at.
        """
        if place is None or not self._batched:
            return self._batched
        key = (*place, len(vectors[0]))
        if key not in self._compared:
            generator = torch.Generator("cpu").manual_seed(0)
            probe = [
                torch.randn(
                    v.shape, generator=generator, dtype=v.dtype, device="cpu"
                ).to(v.device)
                for v in vectors
            ]
            together = self._pull_back_together(outputs, inputs, probe)
            if together is None or not self._is_right(together, outputs, inputs, probe):
                return False
            self._compared.add(key)
        return True

    def _pull_back_together(
        self, outputs: list[Tensor], inputs: list[Tensor], vectors: list[Tensor]
    ) -> list[Tensor | None] | None:
        """Backward passes in one, None if torch cannot."""
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop")
                return _pulled_back(outputs, inputs, vectors, is_grads_batched=True)
        # Some operations have no batched backward pass.
        except (RuntimeError, NotImplementedError) as error:
            # Less may fit at another time.
            self._batched = isinstance(error, torch.OutOfMemoryError)
            return None

    def _is_right(
        self,
        together: list[Tensor | None],
        outputs: list[Tensor],
        inputs: list[Tensor],
        vectors: list[Tensor],
    ) -> bool:
        """Whether batched backward passes are what single ones are.

        For some shapes torch's batching of an operation is wrong. A random combination
        of the passes is that of the combined vectors; where not, they are taken singly
        from now on.
        """
        generator = torch.Generator("cpu").manual_seed(0)
        noise = torch.randn(
            len(vectors[0]), generator=generator, dtype=torch.float64, device="cpu"
        )
        weights = noise.to(vectors[0])
        combined = [torch.tensordot(weights, v, dims=1) for v in vectors]
        alone = _pulled_back(outputs, inputs, combined)
        error = size = torch.zeros((), dtype=weights.dtype, device=weights.device)
        for many, one in zip(together, alone, strict=True):
            if many is not None and one is not None:
                combination = torch.tensordot(weights, many, dims=1)
                error = error + (combination - one).square().sum()
                size = size + many.square().sum()
        tolerance = _ROUNDING * torch.finfo(self.torch_dtype).eps ** 0.75
        self._batched = bool(error.sqrt() <= tolerance * size.sqrt() * weights.norm())
        return self._batched

    # Blocks --------------------------------------------------------------------------

    def block_diagonal(self, blocks: ParameterBlocks) -> BlockDiagonal:
        """Return the block-diagonal of the Hessian over blocks of parameters.

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

    # Diagonals ------------------------------------------------------------------------

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
        recursion = self._recursion(route, by_sample=False)
        if recursion is not None:
            return recursion
        with ordinary_mode():
            return diagonal.dispatch(TorchLinearOperator)(self)

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
        recursion = self._recursion(route, by_sample=True)
        if recursion is not None:
            return recursion / self.risk.reduction_factor
        with ordinary_mode():
            return self._sample_diagonals()

    def explain_diagonal(self) -> DiagonalCost:
        """Print what the diagonal by products will cost, and whether BackPACK can.

        Takes a few products, to measure them.

        Returns:
            What is printed.
        """
        D = self.shape[0]
        count = min(D, self._together)
        unit = torch.eye(D, count, dtype=self.torch_dtype, device=self.device)
        self.apply(unit)  # makes the graph
        start = time.perf_counter()
        self.apply(unit)[0, 0].item()  # waits for the device
        seconds = (time.perf_counter() - start) / count
        N, start = self.risk.num_samples, time.perf_counter()
        try:
            one = self.risk.subset([0])
            backpack_diagonal_hessian(one, False, memory_budget(self.risk) // N)
            recursion = None
        except ValueError as error:
            recursion = str(error)
        one_sample = time.perf_counter() - start
        cost = DiagonalCost(D, seconds * D, N * one_sample, recursion)
        print(cost)
        return cost

    def _recursion(self, route: str | None, by_sample: bool) -> Tensor | None:
        """BackPACK's diagonal if it is right, None if products are to be used."""
        if route is not None and route not in _ROUTES:
            raise ValueError(f"route: one of {', '.join(_ROUTES)}, got {route!r}.")
        if route == "products":
            return None
        try:
            found = backpack_diagonal_hessian(
                self.risk, by_sample, memory_budget(self.risk)
            )
            self._check_diagonal(found, by_sample)
        except ValueError:
            if route == "backpack":
                raise
            return None
        return found

    def _check_diagonal(self, found: Tensor, by_sample: bool) -> None:
        """Raise an error if some entries are not those of products.

        Of each parameter the largest entry and a random one; of three samples too.
        """
        generator = torch.Generator("cpu").manual_seed(0)
        total = found.sum(0) if by_sample else found
        entries = []
        first = 0
        for part in total.split(self.risk.sizes):
            if len(part):
                some = _drawn(len(part), generator)
                entries += [first + int(part.abs().argmax()), first + some]
            first += len(part)
        unit = torch.zeros(
            len(total), len(entries), dtype=found.dtype, device=found.device
        )
        unit[entries, torch.arange(len(entries), device=found.device)] = 1.0
        pairs = [(total[entries], (self.apply(unit) * unit).sum(0))]
        if by_sample:
            N = len(found)
            some = _drawn(N, generator)
            r = self.risk.reduction_factor
            for number in {0, some, N - 1}:
                image = r * next(self._of_samples(unit, [number]))
                pairs.append((found[number, entries], (image * unit).sum(0)))
        eps = torch.finfo(found.dtype).eps
        for ours, exact in pairs:
            size = exact.abs() + ours.abs()
            tolerance = eps**0.5 * size + _ROUNDING * eps * size.max()
            if not ((ours - exact).abs() <= tolerance).all():
                raise ValueError(
                    "model: BackPACK and products give different diagonals of its "
                    "Hessian. Use route='products'."
                )

    def _sample_diagonals(self) -> Tensor:
        """By forward mode, or sample by sample."""
        risk, D = self.risk, self.shape[0]
        generator = torch.Generator("cpu").manual_seed(0)
        noise = torch.randn(
            D, 1, generator=generator, dtype=torch.float64, device="cpu"
        )
        x = noise.to(self.device, self.torch_dtype)
        image = self.apply(x)  # certified
        try:
            # Along one random direction all samples together are the Hessian's.
            total = self._second_derivatives(x).sum() * risk.reduction_factor
            expected = (x * image).sum()
            tolerance = 10 * torch.finfo(self.torch_dtype).eps ** 0.5
            size = expected.abs() + x.norm() * image.norm()
            floor = x.norm() * self._rounding
            if (total - expected).abs() <= tolerance * size + x.norm() * floor:
                found = self._second_derivatives_in_parts()
                if found is not None:
                    return found
        # Operations without forward mode, or that cannot be vectorised.
        except (RuntimeError, NotImplementedError):
            pass
        return self._diagonals_one_by_one(x, image)

    @property
    def _rounding(self) -> float:
        """What rounding leaves of entries that cancel, by the size of the outputs."""
        outputs = sum(
            float(o.reshape(len(o), -1).norm(dim=1).sum()) for o in self.risk.outputs
        )
        eps = torch.finfo(self.torch_dtype).eps
        return _ROUNDING * eps * self.risk.reduction_factor * outputs

    def _second_derivatives_in_parts(self) -> Tensor | None:
        """Those along each entry, None if they are others when taken together."""
        unit = torch.eye(self.shape[0], dtype=self.torch_dtype, device=self.device)
        tolerance = 10 * torch.finfo(self.torch_dtype).eps ** 0.5
        parts = []
        for number, U in enumerate(unit.split(self._together, dim=1)):
            part = self._second_derivatives(U)
            some = number % U.shape[1]
            alone = self._second_derivatives(U[:, some : some + 1]).squeeze(1)
            size = part.abs().max()
            if not (part[:, some] - alone).abs().max() <= tolerance * size:
                return None
            parts.append(part)
        return torch.cat(parts, dim=1)

    def _diagonals_one_by_one(self, x: Tensor, image: Tensor) -> Tensor:
        """D products with the Hessian of each sample.

        Args:
            x: A vector, ``[D, 1]``.
            image: The Hessian's product with it, which all samples' must give.
        """
        D = self.shape[0]
        unit = torch.eye(D, dtype=self.torch_dtype, device=self.device)
        rows, total = [], torch.zeros_like(image)
        for matrix in self._of_samples(unit):
            rows.append(matrix.diagonal())
            total += self.risk.reduction_factor * (matrix @ x)
        tolerance = _ROUNDING * torch.finfo(self.torch_dtype).eps ** 0.75
        size = image.norm() + self.risk.reduction_factor * x.norm() * sum(
            row.norm() for row in rows
        )
        floor = x.norm() * self._rounding
        if not (total - image).norm() <= tolerance * size + floor:
            raise ValueError(
                "model: the second derivatives of its samples alone are not those of "
                "the batch; a sample is computed in another way when it is alone."
            )
        return torch.stack(rows)

    def _of_samples(
        self, U: Tensor, numbers: Sequence[int] | None = None
    ) -> Iterator[Tensor]:
        """Multiply the Hessians of single samples, ``[D, K] -> [D, K]`` each.

        Args:
            U: What by.
            numbers: Of which samples; None for all.
        """
        risk = self.risk
        factor = risk.scale / risk.reduction_factor
        everything, start = range(len(risk.sizes)), 0
        for (X, y), targets in zip(risk.batches(), risk.targets(), strict=True):
            for n in range(len(y)):
                if numbers is not None and start + n not in numbers:
                    continue
                with as_guest(risk.device):
                    sample = take(X, torch.tensor([n], device="cpu"), risk.by_sample)
                    output = risk.model(risk.params, sample)
                    total = risk.loss.total(output, targets[n : n + 1]) * factor
                    gradient = self._gradient_of(total)
                    image = self._differentiate(gradient, everything, U, None)
                yield image
            start += len(y)

    def _second_derivatives(self, U: Tensor) -> Tensor:
        """The second derivatives of ℓ_n along columns, ``[N, K]``.

        uᵀ ∇²ℓ_n u = (J_n u)ᵀ H_n (J_n u) + ⟨∇_f ℓ_n, ∂²f_n/∂u²⟩.
        """
        risk, count = self.risk, U.shape[1]
        gradient, curvature = LossGradient(risk), LossHessian(risk)
        directions = dict(zip(risk.params, risk.unflatten(U), strict=True))
        params = {name: p.detach() for name, p in risk.params.items()}
        rows = []
        for batch, (X, _) in enumerate(risk.batches()):

            def derivatives(direction: Params, X: Any = X) -> tuple[Tensor, Tensor]:
                def slope(params: Params) -> Tensor:
                    def f(params: Params) -> Tensor:
                        return risk.model(params, X)

                    derivative: Tensor = jvp(f, (params,), (direction,))[1]
                    return derivative

                both: tuple[Tensor, Tensor] = jvp(slope, (params,), (direction,))[:2]
                return both

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


def _pulled_back(
    outputs: list[Tensor],
    inputs: list[Tensor],
    vectors: list[Tensor],
    is_grads_batched: bool = False,
) -> list[Tensor | None]:
    """A backward pass, or several in one; the graph is kept."""
    products = torch.autograd.grad(
        outputs,
        inputs,
        vectors,
        retain_graph=True,
        allow_unused=True,
        is_grads_batched=is_grads_batched,
    )
    return [strided(product) for product in products]


class HessianBlock(TorchLinearOperator):
    """A diagonal block of the Hessian; made by :meth:`Hessian.block_diagonal`.

    Args:
        hessian: The Hessian.
        chosen: The numbers of the parameters that it is of.
    """

    self_adjoint = True

    def __init__(self, hessian: Hessian, chosen: Sequence[int]) -> None:
        self.hessian, self._chosen = hessian, chosen
        size = sum(hessian.risk.sizes[number] for number in chosen)
        super().__init__((size, size), hessian.torch_dtype, hessian.device)

    def _multiply(self, X: Tensor) -> Tensor:
        return self.hessian.multiply_block(self._chosen, X)


class PositiveCurvatureHessian(BlockDiagonal):
    """The block-diagonal positive-curvature Hessian, from BackPACK; ``[D, D]``.

    A recursion over layers like that of the Hessian, in which the term of
    each elementwise function, diag(φ''(z) ∂L/∂φ), is made positive before it is
    propagated further (Chen, Chou & Chang 2018, BDA-PCH, arXiv:1802.06502). It is *not*
    the Hessian projected on the positive semi-definite matrices; for piecewise linear
    functions it is the GGN's block-diagonal. The recursion defines it, so it exists for
    nets of the modules that BackPACK has rules for only: Linear, Conv2d, ReLU, Sigmoid,
    Tanh, pooling, padding, Flatten, Dropout, with MSELoss or CrossEntropyLoss.

    Args:
        risk: An :class:`EmpiricalRisk`, or a model, followed by ``loss``, ``data`` and
            ``params`` as for :class:`EmpiricalRisk`. All samples are one batch.
        modify: ``"clip"`` sets negative terms to zero, ``"abs"`` takes their absolute
            value.
        blocks: As for :meth:`vivit_linop.GGN.block_diagonal`. ``"parameter"`` is
            BackPACK's; a product with blocks of several parameters is a forward-mode
            and a backward pass a column, with the same terms.
        as_published: Whether the terms are those above. By default they are BackPACK's:
            its version 1.7.1 multiplies by the slope ∂L/∂φ once more, before it makes
            the terms positive, so that the signs are those of φ''.

    Attributes:
        risk: The risk.

    Raises:
        ValueError: If BackPACK cannot do the model, with the module at fault; for
            another ``modify``; if a parameter is missing in ``blocks``, foreign or
            listed twice.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
        >>> data = (torch.rand(4, 3), torch.rand(4, 1))
        >>> P = vl.PositiveCurvatureHessian(net, nn.MSELoss(), data, modify="abs")
        >>> P.shape, len(P.blocks)
        ((11, 11), 4)
        >>> P = vl.PositiveCurvatureHessian(net, nn.MSELoss(), data, blocks="module")
        >>> [block.shape for block in P.blocks]
        [(8, 8), (3, 3)]
    """

    def __init__(
        self,
        risk: EmpiricalRisk | Any,
        loss: Any = None,
        data: Any = None,
        params: Any | None = None,
        *,
        modify: str = "clip",
        blocks: ParameterBlocks = "parameter",
        as_published: bool = False,
    ) -> None:
        if modify not in ("clip", "abs"):
            raise ValueError(f"modify: 'clip' or 'abs', got {modify!r}.")
        self.risk = as_risk(risk, loss, data, params)
        groups = parameter_groups(self.risk, blocks)
        by_parameter = backpack_positive_curvature(self.risk, modify).blocks
        if blocks == "parameter" and not as_published:
            super().__init__(by_parameter)
            return
        with ordinary_mode():
            whole = PositiveCurvature(
                self.risk, CURVED, modify, squared=not as_published
            )
        super().__init__(
            [PositiveCurvatureBlock(whole, group) for group in groups],
            places_of(self.risk, groups),
        )


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


@diagonal.register
def _(op: Hessian) -> Tensor:
    return op.diagonal()
