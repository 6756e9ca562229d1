"""The Laplace approximation of a net's posterior, as a thin face of the expressions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from vivit_linop.analysis.evidence import (
    PriorPrecision,
    log_marginal_likelihood,
    posterior_precision,
    prior_entries,
)
from vivit_linop.analysis.inner_products import predictive_covariance
from vivit_linop.arguments import check_choice, check_flag
from vivit_linop.curvature import EKFAC, GGN, KFAC, Jacobian
from vivit_linop.graphs import met_first
from vivit_linop.modes import as_guest, ordinary_mode, recorded
from vivit_linop.operators import Diagonal, TorchLinearOperator
from vivit_linop.risk.data.containers import leaves
from vivit_linop.risk.empirical import EmpiricalRisk, check_risk
from vivit_linop.risk.kept import run_of
from vivit_linop.risk.losses.base import OutputLoss

STRUCTURES: dict[str, Callable[[EmpiricalRisk], TorchLinearOperator]] = {
    "full": GGN,
    "kfac": lambda risk: KFAC(risk, variant="exact"),
    "ekfac": lambda risk: EKFAC(risk, variant="exact"),
    "diag": lambda risk: Diagonal(GGN(risk).diagonal()),
    "last_layer": GGN,
}
# Precisions that an optimum is looked for among.
_RANGE = (1e-8, 1e8)


@dataclass(frozen=True)
class Predictive:
    """The distribution of the outputs of a linearised net; unpacks to its moments.

    Attributes:
        mean: ``[N*, C]``.
        covariance: ``[N*, C, C]``.
        loss: What says which probabilities outputs stand for.
        shape: That of a sample's outputs, ``[C]`` or with C entries.
    """

    mean: Tensor
    covariance: Tensor
    loss: OutputLoss
    shape: torch.Size

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.mean, self.covariance))

    def probabilities(self, link: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return the probabilities ``[N*, C]`` that outputs stand for.

        By MacKay's (1992) approximation: those of m / √(1 + π v / 8) with the mean m
        and the variance v of each logit. They are in the shape of the outputs, classes
        of a cross-entropy on axis 1.

        Args:
            link: A function from logits to probabilities, such as ``torch.sigmoid``. By
                default that of the loss: the softmax of cross-entropies, the sigmoid of
                ``nn.BCEWithLogitsLoss``.

        Raises:
            TypeError: Without a link, for a loss whose outputs are not known to be
                logits.
        """
        variances = self.covariance.diagonal(dim1=1, dim2=2)
        logits = self.mean / (1.0 + math.pi / 8.0 * variances).sqrt()
        logits = logits.reshape(len(logits), *self.shape)
        return (link or self.loss.probabilities)(logits)


class Laplace:
    """The Laplace approximation: the posterior N(θ, (A/r + P)⁻¹) of a net's parameters.

    θ are the parameters of the risk L = r Σ_n ℓ_n, which should be at a minimum of
    L/r + ½ θᵀPθ; A is a curvature of L, ℓ_n a negative log-likelihood and N(0, P⁻¹) the
    prior (MacKay 1992; Daxberger et al. 2021, arXiv:2106.14806). Everything is an
    expression over operators: :func:`posterior_precision`,
    :func:`log_marginal_likelihood`, :func:`predictive_covariance`, ``A.sample``. With
    ``nn.MSELoss`` the observations have the variance C/2, or ½ for
    ``reduction="sum"``.

    Args:
        risk: The risk.
        prior_precision: The diagonal of P: a number; one for each parameter, in order
            or by name; or one for each entry.
        structure: A: ``"full"``, the GGN as a low-rank operator, never formed;
            ``"kfac"``, ``"ekfac"``, ``"diag"``, of the exact GGN; or ``"last_layer"``,
            the GGN of the parameters that outputs meet first, going back through the
            net, the others fixed: a last layer, or several heads. Others are named:
            ``vl.Laplace(risk.over(names))``.

    Attributes:
        risk: The risk; for ``"last_layer"`` as a function of that layer.
        curvature: A, which costs what its class says; it is made when first needed.
        prior_precision: P.

    Raises:
        TypeError: If ``risk`` is none.
        ValueError: If the structure is unknown, or a precision not positive; if the
            last layer is not seen, whose weights are computed from parameters.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> data = (torch.rand(20, 3), torch.randint(2, (20,)))
        >>> risk = vl.EmpiricalRisk(nn.Linear(3, 2), nn.CrossEntropyLoss(), data)
        >>> la = vl.Laplace(risk, prior_precision=1.0)
        >>> la.optimize_prior().shape
        torch.Size([])
        >>> la.predictive(torch.rand(5, 3)).probabilities().shape
        torch.Size([5, 2])
        >>> la.sample(10).shape  # columns; risk.unflatten has the shapes of parameters
        torch.Size([8, 10])
    """

    def __init__(
        self,
        risk: EmpiricalRisk,
        prior_precision: PriorPrecision = 1.0,
        structure: str = "full",
    ) -> None:
        check_risk(risk)
        with risk.ranks.together(f"Laplace {structure}"):
            check_choice(structure, "structure", STRUCTURES)
        self.risk = risk.over(last_used(risk)) if structure == "last_layer" else risk
        self.structure, self.prior_precision = structure, prior_precision
        unit = Diagonal(torch.ones_like(self.mean))
        posterior_precision(self.risk, unit, prior_precision)  # which checks it

    def __repr__(self) -> str:
        """Say what it is made of."""
        return f"<Laplace {self.structure!r} of {self.risk!r}>"

    @cached_property
    def curvature(self) -> TorchLinearOperator:
        """A."""
        return STRUCTURES[self.structure](self.risk)

    @property
    def mean(self) -> Tensor:
        """θ, ``[D]``."""
        return self.risk.flatten(self.risk.params).detach()

    @property
    def precision(self) -> TorchLinearOperator:
        """A/r + P."""
        return posterior_precision(self.risk, self.curvature, self.prior_precision)

    @property
    def covariance(self) -> TorchLinearOperator:
        """(A/r + P)⁻¹."""
        return self.precision.inv()

    def log_marginal_likelihood(
        self, prior_precision: PriorPrecision | None = None
    ) -> Tensor:
        """Return the approximate log evidence, a scalar, differentiable in P.

        Costs one decomposition of the Gram matrix for all precisions that are one
        number; a Gram matrix with weights for each P by layer or entry.

        Args:
            prior_precision: Another P; see :func:`log_marginal_likelihood`.

        Raises:
            ValueError: If a precision is not positive, or has another shape.

        Example:
            >>> import torch, vivit_linop as vl
            >>> from torch import nn
            >>> data = (torch.rand(8, 3), torch.rand(8, 1))
            >>> risk = vl.EmpiricalRisk(nn.Linear(3, 1), nn.MSELoss(), data)
            >>> la = vl.Laplace(risk, prior_precision=1.0)
            >>> before = la.log_marginal_likelihood()
            >>> tau = la.optimize_prior()
            >>> bool(la.log_marginal_likelihood() >= before), la.sample(3).shape
            (True, torch.Size([4, 3]))
        """
        given = self.prior_precision if prior_precision is None else prior_precision
        return log_marginal_likelihood(self.risk, self.curvature, given)

    @ordinary_mode()
    def optimize_prior(self, per_parameter: bool = False) -> Tensor:
        """Set P to a maximum of the marginal likelihood, and return it.

        By SciPy's L-BFGS-B in log P, between 1e-8 and 1e8, from the present P. For a
        full GGN and one number, K is decomposed once, and each step costs nothing.

        Args:
            per_parameter: Whether each parameter gets its own precision,
                ``[len(risk.params)]``, else one number for all.

        Returns:
            P; :meth:`log_marginal_likelihood` has an example.
        """
        check_flag(per_parameter, "per_parameter")
        count = len(self.risk.params) if per_parameter else 1
        present = prior_entries(self.risk, self.prior_precision).double().log().mean()
        value = np.full(count, np.clip(float(present), *np.log(_RANGE)))

        def negative(x: np.ndarray) -> tuple[float, np.ndarray]:
            log = torch.from_numpy(x).to(self.mean).requires_grad_()
            with recorded():
                precision = log.exp()
                evidence = self.log_marginal_likelihood(
                    precision if per_parameter else precision.squeeze(0)
                )
                (slope,) = torch.autograd.grad(evidence, log)
            # All processes go the same way, also where they round in another one.
            both = -evidence.item(), -slope.double().cpu().numpy()
            return self.risk.ranks.sent(both)

        bounds = [tuple(np.log(_RANGE))] * count
        found = minimize(negative, value, jac=True, method="L-BFGS-B", bounds=bounds)
        precision = torch.from_numpy(np.exp(found.x)).to(self.mean)
        self.prior_precision = precision if per_parameter else precision.squeeze(0)
        return self.prior_precision

    def sample(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """Return parameters drawn from the posterior, as columns ``[D, num]``.

        Costs a root of the covariance, once, and ``num`` products with it;
        :meth:`log_marginal_likelihood` has an example.

        Args:
            num: How many.
            generator: For reproducible ones.

        Raises:
            ValueError: If ``num`` is below 1.
        """
        return self.mean[:, None] + self.covariance.sample(num, generator)

    def predictive(self, X: Any, **options: Any) -> Predictive:
        """Return mean ``[N*, C]`` and covariance ``[N*, C, C]`` of the net's outputs.

        Those of the linearised net. Costs a forward pass over X, and what
        :func:`predictive_covariance` does: C backward passes over it.

        Args:
            X: A batch of inputs, or a list or loader of batches; without targets.
            options: What else :class:`EmpiricalRisk` takes by name, of how to read X.
                Without any, samples are along the axes along which the risk's are.

        Example:
            >>> import torch, vivit_linop as vl
            >>> from torch import nn
            >>> data = (torch.rand(8, 3), torch.rand(8, 2))
            >>> risk = vl.EmpiricalRisk(nn.Linear(3, 2), nn.MSELoss(), data)
            >>> mean, covariance = vl.Laplace(risk).predictive(torch.rand(5, 3))
            >>> mean.shape, covariance.shape
            (torch.Size([5, 2]), torch.Size([5, 2, 2]))
        """
        model, sums = self.risk.model, self.risk._sums
        known = len(sums[0]) if sums else None

        def outputs(params: dict[str, Tensor], x: Any) -> Tensor:
            found = len([*leaves(x)]) if isinstance(x, (tuple, list)) else 0
            if known is not None and found > known:
                raise ValueError(
                    f"X: a batch has {found} tensors, the risk's inputs have {known}. "
                    "Give inputs without targets, such as [x for x, y in loader]."
                )
            return model(params, x)

        with self.risk.ranks.together("predictive"):
            if X is None or callable(X):
                raise TypeError(f"X: inputs of the model, got {type(X).__name__}.")
            own = next(iter(self.risk.passes.batches()), None)  # none without samples
            if own and not options and any(self.risk.samples.axes(own[0]) or ()):
                found = self.risk.samples
                options = {"take": found.take, "count": found.number}
            J = Jacobian(outputs, X, params=self.risk.params, **options)
        mean = torch.cat([f.reshape(len(f), -1) for f in J.risk.outputs])
        covariance = predictive_covariance(J, self.covariance)
        return Predictive(mean, covariance, self.risk.loss, J.risk.example[0][0].shape)


def last_used(risk: EmpiricalRisk) -> list[str]:
    """Return the parameters that outputs meet first, going back through the net.

    Raises:
        ValueError: If the net does not show them.
    """
    names: list[str] = risk.ranks.led(_met_first, risk)
    if not names:
        raise ValueError(
            "structure: which layer is the last is not seen in this net, whose last "
            "weights are computed from parameters. Name them: "
            "vl.Laplace(risk.over(names), …)."
        )
    return names


def _met_first(risk: EmpiricalRisk) -> list[str]:
    X, _ = next(iter(risk.passes.batches()))
    with as_guest(risk.device):
        run = run_of(risk.model, X, risk.batch_sizes[0])
    found = {id(leaf) for leaf in met_first(run.output) or ()}
    return [name for name, p in risk.model.params.items() if id(p) in found]
