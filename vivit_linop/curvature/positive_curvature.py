"""The positive-curvature Hessian as a sum over elementwise functions.

The recursion of Chen, Chou & Chang (2018, arXiv:1802.06502) is linear in what it
propagates: each elementwise function φ_k at z_k adds a diagonal, and what follows only
multiplies Jacobians. So its blocks are those of

    G + Σ_k J_kᵀ diag(p(φ_k''(z_k) ∂L/∂φ_k)) J_k,

with J_k the Jacobian of z_k in the parameters and p the positive part or the absolute
value. This gives blocks of several parameters, which BackPACK does not have.

BackPACK 1.7.1 multiplies by the slope ∂L/∂φ_k twice: its ``PCHMP`` has
p(φ_k''(z_k) (∂L/∂φ_k)²), since its ``hessian_diagonal`` has the slope in it already.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

from vivit_linop.curvature.loss_hessian import LossHessian
from vivit_linop.curvature.output_space import OfRisk
from vivit_linop.modes import as_guest
from vivit_linop.risk.empirical import EmpiricalRisk
from vivit_linop.risk.model.original import Params

# Functions with second derivatives, that BackPACK has rules for.
CURVED = (nn.Sigmoid, nn.Tanh, nn.ELU, nn.SELU, nn.LogSigmoid)


class PositiveCurvature:
    """G + Σ_k J_kᵀ diag(p_k) J_k of a net whose curved functions are modules.

    Slopes come squared as in BackPACK, or as published.
    """

    def __init__(self, risk: EmpiricalRisk, modify: str, squared: bool) -> None:
        module = risk.model.copied_module(risk.model.params)
        assert module is not None
        self.risk, self._module, self._hessian = risk, module, LossHessian(risk)
        self._curved = [m for m in module.modules() if isinstance(m, CURVED)]
        self._modify, self._squared = modify, squared
        with risk.ranks.together("slopes"), as_guest(risk.device):
            seen = zip(risk.passes.batches(), risk.all_targets, strict=True)
            self._diagonals = [self._diagonals_of(X, y) for (X, _), y in seen]

    @contextmanager
    def _watched(self) -> Iterator[tuple[list[nn.Module], list[Tensor], list[Tensor]]]:
        """Collect the curved modules that are called, their inputs and outputs."""
        called: list[nn.Module] = []
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            called.append(module)
            inputs.append(args[0].clone())  # it may be written to

        def after(module: nn.Module, args: Any, output: Tensor) -> None:
            outputs.append(output)

        handles = [m.register_forward_pre_hook(before) for m in self._curved]
        handles += [m.register_forward_hook(after) for m in self._curved]
        try:
            yield called, inputs, outputs
        finally:
            for handle in handles:
                handle.remove()

    def _diagonals_of(self, X: Tensor, y: Tensor) -> list[Tensor]:
        """p(φ''(z) ∂L/∂φ) for each use of a curved module."""
        own = self.risk.model.private_input(X)
        with self._watched() as (called, inputs, outputs):
            output = functional_call(self._module, self.risk.model.params, (own,))
        total = self.risk.loss.total(output, y) * self.risk.scale
        slopes = torch.autograd.grad(total, outputs) if outputs else ()
        found = []
        for module, z, slope in zip(called, inputs, slopes, strict=True):
            z = z.detach().requires_grad_()
            (first,) = torch.autograd.grad(
                module(z.clone()).sum(), z, create_graph=True
            )
            (second,) = torch.autograd.grad(first.sum(), z)
            term = (second * (slope.square() if self._squared else slope)).detach()
            found.append(term.clamp(min=0.0) if self._modify == "clip" else term.abs())
        return found

    def multiply_block(self, chosen: Sequence[str], X: Tensor) -> Tensor:
        """Multiply the diagonal block of some parameters, ``[d, K] -> [d, K]``."""
        # The hooks are on one module: threads take turns.
        with self.risk.kept.making:
            return self.risk.ranks.summed(partial(self._own_product, chosen=chosen), X)

    def _own_product(self, X: Tensor, chosen: Sequence[str]) -> Tensor:
        """Over this process's samples."""
        risk, result = self.risk, torch.zeros_like(X)
        fixed = {name: p.detach() for name, p in risk.params.items()}
        params = {name: fixed.pop(name) for name in chosen}
        sizes = [p.numel() for p in params.values()]
        for batch, (data, _) in enumerate(risk.passes.batches("product")):

            def everything(params: Params, data: Any = data) -> list[Tensor]:
                with self._watched() as (_, inputs, _):
                    state = {**fixed, **params}
                    own = risk.model.private_input(data)
                    output = functional_call(self._module, state, (own,))
                return [output, *inputs]

            with as_guest(risk.device), torch.no_grad():
                pull_back = vjp(everything, params)[1]
                for column, total in zip(X.T, result.T, strict=True):
                    parts = column.split(sizes)
                    direction = {
                        name: part.view_as(p)
                        for (name, p), part in zip(params.items(), parts, strict=True)
                    }
                    image, *at_functions = jvp(everything, (params,), (direction,))[1]
                    rows = self._hessian.apply_batch(batch, image.reshape(-1, 1))
                    pulled = [rows.view_as(image)]
                    diagonals = self._diagonals[batch]
                    pulled += [
                        d * t for d, t in zip(diagonals, at_functions, strict=True)
                    ]
                    (gradients,) = pull_back(pulled)
                    total += torch.cat([gradients[n].reshape(-1) for n in params])
        return result


class PositiveCurvatureBlock(OfRisk):
    """A diagonal block of several parameters."""

    self_adjoint = True

    def __init__(self, whole: PositiveCurvature, names: Sequence[str]) -> None:
        self.whole, self.names, self.risk = whole, list(names), whole.risk
        size = sum(whole.risk.params[name].numel() for name in names)
        super().__init__((size, size), whole.risk.dtype, whole.risk.device)

    def _multiply(self, X: Tensor) -> Tensor:
        return self.whole.multiply_block(self.names, X)
