"""Products with the Hessian of the empirical risk: derivatives of its gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vivit_linop.curvature import plan
from vivit_linop.curvature.loss_hessian import certify_loss
from vivit_linop.curvature.output_space import OfRisk
from vivit_linop.curvature.second_derivatives import (
    Certificate,
    differentiable_twice,
    has_other_words,
    rewriting,
)
from vivit_linop.graphs import batched_gradients, gradients
from vivit_linop.modes import as_guest
from vivit_linop.net.costs import layer_costs
from vivit_linop.net.linearization import Chunks
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
        self._chunks = Chunks(risk.device)

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
            if not has_other_words(self.risk):
                raise
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
        parameters = [*self.risk.model.params.values()]
        sizes = [self.risk.sizes[index] for index in chosen]
        outputs = [gradient[index] for index in curved]
        inputs = [parameters[index] for index in chosen]

        def product(rows: Tensor) -> Tensor:
            """Of a vector ``[d]``, or of several at once."""
            leading, parts = rows.shape[:-1], rows.split(sizes, dim=-1)
            of = dict(zip(chosen, parts, strict=True))
            vectors = [
                # Contiguous, as vectors come from torch's own backward passes: there
                # are kernels that take that for granted.
                of[index].contiguous().view((*leading, *parameters[index].shape))
                for index in curved
            ]
            found: Sequence[Tensor | None]
            if leading:
                found = batched_gradients(outputs, inputs, vectors)
            else:
                found = gradients(outputs, inputs, vectors, retain_graph=True)
            flat = [
                rows.new_zeros(*leading, size) if g is None else g.reshape(*leading, -1)
                for g, size in zip(found, sizes, strict=True)
            ]
            return torch.cat(flat, dim=-1)

        few = self.together if X.shape[1] > 1 else 1
        place = None if batch is None else (batch, *chosen)
        with differentiable_twice():
            return self._chunks.apply(product, X, len(X), few, place)

    @property
    def together(self) -> int:
        """How many products are taken together."""
        if not self._chunks.possible:
            return 1
        return plan.products_together(layer_costs(self.risk, 1), self.device)

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
