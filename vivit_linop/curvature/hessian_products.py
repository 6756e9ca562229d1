"""Products with the Hessian of the empirical risk: derivatives of its gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from vivit_linop.curvature import plan
from vivit_linop.curvature.loss_hessian import certify_loss
from vivit_linop.curvature.second_derivatives import (
    Certificate,
    differentiable_twice,
    rewriting,
)
from vivit_linop.devices import Room, is_out_of_memory
from vivit_linop.graphs import batched_gradients, gradients, strided
from vivit_linop.modes import as_guest
from vivit_linop.net.costs import layer_costs
from vivit_linop.noise import Noise
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.ranks.alone import Ranks
from vivit_linop.risk.data.batches import some_targets
from vivit_linop.risk.data.containers import copied
from vivit_linop.risk.empirical import EmpiricalRisk, as_risk

# How far apart ways that differ in the order of summation may be, in eps^¾.
ROUNDING = 100


class HessianProducts(TorchLinearOperator):
    """What :class:`vivit_linop.Hessian` and its blocks multiply by.

    The graph of the gradient is kept for a single batch, and made anew for several.
    Backward passes for several vectors are taken together where torch can and does it
    right.
    """

    self_adjoint = True

    def __init__(
        self,
        risk: EmpiricalRisk | Any,
        loss: Any = None,
        data: Any = None,
        params: Any | None = None,
        **options: Any,
    ) -> None:
        self.risk = as_risk(risk, loss, data, params, **options)
        certify_loss(self.risk, "Hessian")
        D = self.risk.num_params
        super().__init__((D, D), self.risk.dtype, self.risk.device)
        self._kept: list[Tensor] | None = None
        self._certified = self._rewritten = False
        self._batched = True  # until torch refuses, or is wrong
        self._room = Room(self.risk.device)
        self._compared: set[tuple[Any, ...]] = set()

    @property
    def ranks(self) -> Ranks:
        """Those of the risk."""
        return self.risk.ranks

    def __getstate__(self) -> dict[str, Any]:
        """Graphs do not travel: a copy makes its own, of its own parameters."""
        return super().__getstate__() | {"_kept": None}

    def _gradient(self, index: int, X: Any) -> list[Tensor]:
        """The gradient on a batch, with its graph."""
        risk = self.risk
        differ = risk.inputs_differ(index, X)
        with rewriting(self._rewritten):
            output = risk.model(risk.model.params, X)
        risk.check_outputs(index, output, differ)
        total = risk.loss.total(output, risk.targets[index]) * risk.scale
        return self._gradient_of(total)

    def _gradient_of(self, total: Tensor) -> list[Tensor]:
        parameters = [*self.risk.model.params.values()]
        return gradients(total, parameters, create_graph=True)

    def _multiply(self, X: Tensor) -> Tensor:
        return self.multiply_block(range(len(self.risk.sizes)), X)

    def multiply_block(self, chosen: Sequence[int], X: Tensor) -> Tensor:
        """Multiply the diagonal block of some parameters, ``[d, K] -> [d, K]``."""
        return self.risk.ranks.summed(partial(self._own_product, chosen=chosen), X)

    def _certify(self) -> None:
        """See whether torch's second derivatives are right, or else in other words."""
        if self._certified:
            return
        try:
            Certificate(self.risk).check()
        except ValueError as error:
            try:
                Certificate(self.risk, rewritten=True).check()
            except ValueError:
                raise error from None
            self._rewritten = True
        self._certified = True

    def _own_product(self, X: Tensor, chosen: Sequence[int]) -> Tensor:
        """Multiply the block of this rank's samples."""
        self._certify()
        result = torch.zeros_like(X)
        single = len(self.risk.batch_sizes) == 1
        with as_guest(self.risk.device):
            if single and self._kept is not None:
                self.risk.model.foreign.check()
                self.risk.loss.check_memory()
                return self._differentiate(self._kept, chosen, X, 0)
            for index, (inputs, _) in enumerate(self.risk.passes.batches("product")):
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
        """Differentiate the gradient in the chosen parameters along each column.

        It is that of a batch, or of a single sample for None.
        """
        # The loss may be linear in some parameters.
        curved = [index for index in chosen if gradient[index].requires_grad]
        if not curved:
            return torch.zeros_like(X)
        parameters = list(self.risk.model.params.values())
        sizes = [self.risk.sizes[index] for index in chosen]
        columns, start = [], 0
        wanted = self.together if X.shape[1] > 1 else 1
        while start < X.shape[1]:
            part = X[:, start : start + self._room.most(wanted)]
            count = part.shape[1]
            vectors = {
                # Contiguous, as vectors come from torch's own backward passes: there
                # are kernels that take that for granted.
                index: rows.T.contiguous().view(count, *parameters[index].shape)
                for index, rows in zip(chosen, part.split(sizes), strict=True)
            }
            try:
                products = self._pull_back(
                    [gradient[index] for index in curved],
                    [parameters[index] for index in chosen],
                    [vectors[index] for index in curved],
                    None if batch is None else (batch, *chosen),
                )
            except RuntimeError as error:
                if count == 1 or not is_out_of_memory(error):
                    raise
                self._room.shrink(count)
                continue
            rows_of_parts = [
                part.new_zeros(size, count)
                if product is None
                else product.reshape(count, size).T
                for size, product in zip(sizes, products, strict=True)
            ]
            columns.append(torch.cat(rows_of_parts))
            start += count
        return torch.cat(columns, dim=1)

    @property
    def together(self) -> int:
        """How many products are taken together."""
        return self._together if self._batched else 1

    @cached_property
    def _together(self) -> int:
        return plan.products_together(layer_costs(self.risk, 1), self.device)

    def _pull_back(
        self,
        outputs: list[Tensor],
        inputs: list[Tensor],
        vectors: list[Tensor],
        place: tuple[int, ...] | None,
    ) -> list[Tensor | None]:
        """Backward passes for ``[K, *p]`` vectors, together if torch can.

        The place is the batch and the parameters, None if they will not come again.
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
            probe = [*map(Noise().like, vectors)]
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
            return batched_gradients(outputs, inputs, vectors)
        # Some operations have no batched backward pass.
        except (RuntimeError, NotImplementedError) as error:
            if is_out_of_memory(error):
                raise
            self._batched = False
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
        weights = Noise()(len(vectors[0]), like=vectors[0])
        combined = [torch.tensordot(weights, v, dims=1) for v in vectors]
        alone = _pulled_back(outputs, inputs, combined)
        error = size = torch.zeros((), dtype=weights.dtype, device=weights.device)
        for many, one in zip(together, alone, strict=True):
            if many is not None and one is not None:
                combination = torch.tensordot(weights, many, dims=1)
                error = error + (combination - one).square().sum()
                size = size + many.square().sum()
        tolerance = ROUNDING * torch.finfo(self.torch_dtype).eps ** 0.75
        self._batched = bool(error.sqrt() <= tolerance * size.sqrt() * weights.norm())
        return self._batched

    def of_samples(
        self, U: Tensor, numbers: Sequence[int] | None = None
    ) -> Iterator[Tensor]:
        """Multiply the Hessians of single samples, ``[D, K] -> [D, K]`` each.

        Those that are numbered; None for all.
        """
        self._certify()
        risk = self.risk
        factor = risk.scale / risk.reduction_factor
        everything, start = range(len(risk.sizes)), 0
        batches = zip(
            risk.passes.batches(), risk.targets, risk.batch_sizes, strict=True
        )
        for (X, _), targets, samples in batches:
            for n in range(samples):
                if numbers is not None and start + n not in numbers:
                    continue
                with as_guest(risk.device):
                    own = torch.tensor([n], device="cpu")
                    sample = risk.samples.take(X, own)
                    with rewriting(self._rewritten):
                        output = risk.model(risk.model.params, sample)
                    total = risk.loss.total(output, some_targets(targets, own)) * factor
                    gradient = self._gradient_of(total)
                    image = self._differentiate(gradient, everything, U, None)
                yield image
            start += samples


def _pulled_back(
    outputs: list[Tensor],
    inputs: list[Tensor],
    vectors: list[Tensor],
) -> list[Tensor | None]:
    """A backward pass; the graph is kept."""
    products = torch.autograd.grad(
        outputs, inputs, vectors, retain_graph=True, allow_unused=True
    )
    return [strided(product) for product in products]
