"""Products with the Hessian of the empirical risk: derivatives of its gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vivit_linop.curvature import plan
from vivit_linop.curvature.loss_hessian import certify_loss
from vivit_linop.curvature.output_space import OfRisk
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
from vivit_linop.risk.data.batches import some_targets
from vivit_linop.risk.data.containers import copied
from vivit_linop.risk.empirical import EmpiricalRisk, as_risk

# How far apart ways that differ in the order of summation may be, in eps^¾.
ROUNDING = 100


class HessianProducts(OfRisk):
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
        self.risk = risk = as_risk(risk, loss, data, params, **options)
        certify_loss(risk, "Hessian")
        super().__init__((risk.num_params,) * 2, risk.dtype, risk.device)
        self._kept: list[Tensor] | None = None
        self._certified = self._rewritten = False
        self._batched = True  # until torch refuses, or is wrong
        self._room = Room(risk.device)
        self._compared: set[tuple[Any, ...]] = set()

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
        total = risk.loss.total(output, risk.all_targets[index]) * risk.scale
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
            passes = _Passes(
                [gradient[index] for index in curved],
                [parameters[index] for index in chosen],
                [vectors[index] for index in curved],
            )
            try:
                products = self._pull_back(
                    passes, None if batch is None else (batch, *chosen)
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
        if not self._batched:
            return 1
        return plan.products_together(layer_costs(self.risk, 1), self.device)

    def _pull_back(
        self, passes: _Passes, place: tuple[int, ...] | None
    ) -> list[Tensor | None]:
        """Take backward passes, together if torch can.

        The place is the batch and the parameters, None if they will not come again.
        """
        with differentiable_twice():
            count = len(passes.vectors[0])
            if count > 1 and (together := self._together(passes, place)) is not None:
                return together
            each = [passes.of([v[k] for v in passes.vectors]) for k in range(count)]
        return [
            None if products[0] is None else torch.stack(products)
            for products in zip(*each, strict=True)
        ]

    def _together(
        self, passes: _Passes, place: tuple[int, ...] | None
    ) -> list[Tensor | None] | None:
        """Take all in one; None if torch cannot, or is wrong.

        That is tried once a place, on random vectors: those that are multiplied may
        have zeros where a fault would show. At no place, each result is looked at.
        """
        if not self._batched:
            return None
        key = None if place is None else (*place, len(passes.vectors[0]))
        if key is not None and key not in self._compared:
            probe = passes._replace(vectors=[*map(Noise().like, passes.vectors)])
            if not self._is_right(self._in_one(probe), probe):
                return None
            self._compared.add(key)
        together = self._in_one(passes)
        is_right = key is not None or self._is_right(together, passes)
        return together if is_right else None

    def _in_one(self, passes: _Passes) -> list[Tensor | None] | None:
        try:
            return batched_gradients(*passes)
        # Some operations have no batched backward pass.
        except (RuntimeError, NotImplementedError) as error:
            if is_out_of_memory(error):
                raise
            self._batched = False
            return None

    def _is_right(self, together: list[Tensor | None] | None, passes: _Passes) -> bool:
        """Whether batched backward passes are what single ones are.

        For some shapes torch's batching of an operation is wrong. A random combination
        of the passes is that of the combined vectors; where not, they are taken singly
        from now on.
        """
        if together is None:
            return False
        weights = Noise()(len(passes.vectors[0]), like=passes.vectors[0])
        alone = passes.of([torch.tensordot(weights, v, dims=1) for v in passes.vectors])
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
            risk.passes.batches(), risk.all_targets, risk.batch_sizes, strict=True
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


class _Passes(NamedTuple):
    """Backward passes for K vectors ``[K, *p]`` of each output; the graph is kept."""

    outputs: list[Tensor]
    inputs: list[Tensor]
    vectors: list[Tensor]

    def of(self, vectors: list[Tensor]) -> list[Tensor | None]:
        """Pull back one vector of each output."""
        products = torch.autograd.grad(
            self.outputs, self.inputs, vectors, retain_graph=True, allow_unused=True
        )
        return [strided(product) for product in products]
