"""Backends for laplace-torch (Daxberger et al. 2021, arXiv:2106.14806).

``Laplace(net, "classification", "all", "kron", backend=LinopGGN)``.

All of its structures: full, Kronecker, diagonal, low-rank, over all weights, the last
layer or a subnetwork. Columns and factors come from the layers of any net, and are
checked on every batch. Everything else (priors, predictives, marginal likelihoods) is
laplace-torch's own. This module needs it; nothing else of the package does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vivit_linop.curvature import (
    GGN,
    KFAC,
    EmpiricalFisher,
    Jacobian,
    PerSampleGradients,
)
from vivit_linop.extras import extra
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.lowrank import LowRank
from vivit_linop.operators.verbs import to_dense
from vivit_linop.risk.empirical import EmpiricalRisk

with extra("laplace"):
    import laplace
    from laplace.curvature import CurvatureInterface, EFInterface, GGNInterface
    from laplace.utils import FeatureExtractor, Kron

Data = tuple[Any, Tensor]


def _called(model: nn.Module, X: Any) -> Any:
    """Call a model as laplace-torch does: with one argument, also if it is a dict."""
    return model(X)


class LinopInterface(CurvatureInterface):
    """What the backends share: curvatures of a risk, in laplace-torch's forms.

    Its losses are sums over samples, and ½ of that for regression. Arguments are those
    of :class:`LinopGGN`.
    """

    def __init__(self, *args: Any, low_rank: int = 10, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.low_rank = low_rank
        # Of curvatures and of Jacobians the risk of the largest batch so far, and the
        # modes of its modules: others of the same model follow from it. Data and
        # columns are checked on every batch.
        self._known: dict[str, tuple[EmpiricalRisk, list[bool]]] = {}
        self._last: nn.Module | None = None

    def curvature(self, risk: EmpiricalRisk) -> LowRank:
        """Return the curvature of a risk."""
        raise NotImplementedError

    def kronecker(self, risk: EmpiricalRisk, **options: Any) -> KFAC:
        """Return its Kronecker-factored approximation."""
        raise NotImplementedError

    def risk(self, batches: Iterable[Data]) -> EmpiricalRisk:
        """Return the risk of batches; of the last layer, that of its features."""
        batches, model = list(batches), self._model
        if self.last_layer:
            batches = [(self.features(x), y) for x, y in batches]
            model = self._without_recording()
        return self._risk_of("curvature", model, self.lossfunc, batches)

    def _without_recording(self) -> nn.Module:
        """Return the last layer as it is now, without laplace-torch's own hook.

        By that it records features. It leads to the whole net and to the last features,
        so that the layer would be another one after each batch.
        """
        kind: type[nn.Module] = type(self._model)
        state = dict(self._model.__dict__)
        if type(self._last) is not kind:
            self._last = nn.Module.__new__(kind)
        state["_forward_hooks"] = OrderedDict(
            (key, hook)
            for key, hook in state["_forward_hooks"].items()
            if getattr(hook, "__module__", None) != FeatureExtractor.__module__
        )
        object.__setattr__(self._last, "__dict__", state)
        assert self._last is not None
        return self._last

    def _risk_of(
        self, what: str, model: nn.Module, loss: Any, batches: list[Data]
    ) -> EmpiricalRisk:
        """Return a risk, which follows from a known one while the model stays."""
        modes = [module.training for module in model.modules()]
        # The largest batch shows the most of what mixes samples.
        if what in self._known:
            known, then = self._known[what]
            more = sum(len(y) for _, y in batches) > known.num_samples
            if not more and then == modes and known.is_current():
                return known.on(batches)
        risk = EmpiricalRisk(model, loss, batches, self.params, predict=_called)
        self._known[what] = risk, modes
        return risk

    def features(self, x: Any) -> Tensor:
        """Return what enters the last layer."""
        with torch.no_grad():
            features: Tensor = self.model.forward_with_features(x)[1]
        return features

    def jacobians(self, x: Any, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """Return Jacobians ``[n, C, D]`` and outputs ``[n, C]``.

        Args:
            x: The input.
            enable_backprop: Whether they are differentiated in x; torch.func does that.
        """
        if enable_backprop:
            return super().jacobians(x, enable_backprop)
        with torch.no_grad():
            outputs = self.model(x)
        no_targets = [(x, torch.zeros_like(outputs))]
        risk = self._risk_of("Jacobians", self.model, nn.MSELoss(), no_targets)
        J = Jacobian(risk).to_dense().unflatten(0, outputs.shape)
        return self._chosen(J), outputs

    def gradients(self, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return gradients ``[n, D]`` of the losses of samples, and their sum."""
        risk = self.risk([(x, y)])
        return self._chosen(PerSampleGradients(risk).to_dense().T), risk.value()

    def full(self, x: Any, y: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """Return the loss, and the curvature ``[D, D]``."""
        risk = self.risk([(x, y)])
        curvature: TorchLinearOperator = self.curvature(risk)
        if self.subnetwork_indices is not None:
            curvature = curvature.restrict(self.subnetwork_indices)
        return self.factor * risk.value(), self.factor * curvature.to_dense()

    def diag(self, x: Any, y: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """Return the loss, and the diagonal of the curvature, ``[D]``."""
        risk = self.risk([(x, y)])
        diagonal = self.curvature(risk).diagonal()
        return self.factor * risk.value(), self.factor * self._chosen(diagonal)

    def kron(self, x: Any, y: Tensor, N: int, **options: Any) -> tuple[Tensor, Kron]:
        """Return the loss, and Kronecker factors that add up over batches.

        Args:
            x: The input.
            y: The targets.
            N: The number of all samples.
            options: ``kfac_approx``, ``"expand"`` or ``"reduce"``.

        Raises:
            ValueError: If laplace-torch has no place for the factors of a parameter.
        """
        risk = self.risk([(x, y)])
        sharing = options.pop("kfac_approx", "expand")
        K = self.kronecker(risk, weight_sharing=sharing, **options)
        factors: dict[str, list[Tensor]] = {}
        start = 0
        for number, ((name,), block) in enumerate(zip(K.names, K.blocks, strict=True)):
            parts = [*map(to_dense, getattr(block, "factors", (block,)))]
            p, place = risk.params[name], range(start, start + block.shape[0])
            own = K.indices is None or K.indices[number].tolist() == list(place)
            sizes = [p.numel()] if p.ndim == 1 else [len(p), p[0].numel()]
            if not own or [len(part) for part in parts] != sizes:
                raise ValueError(
                    f"model: laplace-torch has no place for the Kronecker factors of "
                    f"{name!r}, {list(p.shape)}. Take another structure than 'kron', "
                    "or leave this parameter out (requires_grad=False)."
                )
            if len(parts) == 2:  # that of the inputs is a mean over samples
                parts[not K.inputs_first[number]] *= len(y) / N
            factors[name] = parts
            start += p.numel()
        kron = Kron(list(factors.values()))
        if self.factor != 1.0:
            kron = kron * self.factor
        return self.factor * risk.value(), kron

    def eig_lowrank(self, data_loader: Iterable[Data]) -> tuple[Tensor, Tensor, Tensor]:
        """Return eigenvectors ``[D, K]`` and eigenvalues of all data, and the loss.

        The batches of the loader are held in memory together.
        """
        risk = self.risk(data_loader)
        curvature = self.curvature(risk)
        pairs = curvature.eigh(k=min(self.low_rank, *curvature.factor.shape))
        evals, evecs = pairs
        positive = evals > torch.finfo(risk.dtype).eps * evals[-1]
        loss = self.factor * risk.value()
        return evecs[:, positive], self.factor * evals[positive], loss

    def _chosen(self, X: Tensor) -> Tensor:
        """Return the entries of the subnetwork, of all parameters if there is none."""
        chosen = self.subnetwork_indices
        return X if chosen is None else X[..., chosen]


class LinopGGN(LinopInterface, GGNInterface):
    """The GGN for laplace-torch: the ``backend`` of its ``Laplace``.

    Args:
        args: As of laplace-torch's own backends: the model, the likelihood,
            ``last_layer``, ``subnetwork_indices``, and the keys of inputs.
        stochastic: Whether the GGN is one of Monte-Carlo samples.
        num_samples: How many a sample.
        low_rank: How many eigenpairs ``LowRankLaplace`` has.
        kwargs: The same by name.

    Raises:
        ModuleNotFoundError: When this module is imported without laplace-torch.

    Example:
        >>> from laplace import Laplace
        >>> from torch import nn
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from vivit_linop.interop.laplace import LinopGGN
        >>> X, y = torch.rand(20, 3), torch.randint(2, (20,))
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> la = Laplace(net, "classification", "all", "full", backend=LinopGGN)
        >>> la.fit(DataLoader(TensorDataset(X, y), batch_size=10))
        >>> la(X).shape
        torch.Size([20, 2])
    """

    def curvature(self, risk: EmpiricalRisk) -> LowRank:
        return GGN(risk, mc_samples=self.num_samples if self.stochastic else 0)

    def kronecker(self, risk: EmpiricalRisk, **options: Any) -> KFAC:
        if not self.stochastic:
            return KFAC(risk, variant="exact", **options)
        options.setdefault("mc_samples", self.num_samples)
        return KFAC(risk, variant="mc", **options)


class LinopEF(LinopInterface, EFInterface):
    """The empirical Fisher matrix for laplace-torch, likewise."""

    def curvature(self, risk: EmpiricalRisk) -> LowRank:
        return EmpiricalFisher(risk)

    def kronecker(self, risk: EmpiricalRisk, **options: Any) -> KFAC:
        return KFAC(risk, variant="empirical", **options)


class LowRankLaplace(laplace.LowRankLaplace):
    """laplace-torch's ``LowRankLaplace`` with the largest eigenpairs of our backends.

    Theirs asks for an old package, asdfghjkl, whatever the backend.

    Args:
        model: The net.
        likelihood: ``"classification"`` or ``"regression"``.
        backend: :class:`LinopGGN` or :class:`LinopEF`.
        kwargs: As of theirs; ``backend_kwargs={"low_rank": K}`` says how many.
    """

    _key = ("all", "lowrank by vivit_linop")  # theirs stays what "lowrank" means

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        backend: type[LinopInterface] = LinopGGN,
        **kwargs: Any,
    ) -> None:
        laplace.ParametricLaplace.__init__(
            self, model, likelihood, backend=backend, **kwargs
        )
