"""Where ranks could part: other arguments, other solvers, errors of one rank alone."""

import contextlib
import operator
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import scipy.linalg
import torch
import torch.distributed as dist
from torch import Tensor, nn

import vivit_linop as vl
from tests.ranks_cases import Check
from tests.ranks_setting import (
    DELTA,
    FAILURES,
    C,
    Moody,
    N,
    Setting,
    agreement,
    loss,
    net,
    raised,
)
from vivit_linop.linalg import krylov

ONE = torch.ones(1)


class Parting(Setting):
    """Ranks that would part if nobody looked."""

    def other_arguments(self) -> Iterator[Check]:
        """What one rank alone is told is an error on all, at once."""
        mine, x, eye = self.rank == self.size - 1, self.x, vl.Identity(self.D)
        G = vl.GGN(self.risk)
        W = vl.GGN(self.risk.over(["3.weight"]))  # more columns than parameters
        small = vl.Identity(W.shape[0])

        def option(**wrong: Any) -> Callable[[], Any]:
            return lambda: self.over(net(), self.data, **(wrong if mine else {}))

        def last(theirs: Any, others: Any) -> Any:
            return theirs if mine else others

        def prior(number: float) -> Callable[[], Tensor]:
            return lambda: vl.log_marginal_likelihood(self.risk, G, last(number, 1.0))

        cases: dict[str, tuple[Callable[[], Any], str]] = {
            "memory": (option(memory=-1), "memory"),
            "a flag": (option(check="no"), "check: True or False"),
            "a function": (option(take=3, count=3), "take: a function"),
            "numbers": (lambda: self.risk.subset(last([N], [0])), "must lie in"),
            "no numbers": (lambda: self.risk.subset(last([], [0])), "at least one"),
            "samples": (lambda: self.risk.subset(last([0, N - 1], [0, 1])), "differ"),
            "rows": (lambda: G @ x[: last(5, self.D)], "multiplies a vector"),
            "vectors": (
                lambda: (W + DELTA * small).inv() @ (last(2.0, 1.0) * x[: W.shape[0]]),
                "differ",
            ),
            "a damping": (
                lambda: (G + last(0.1, 0.2) * eye).inv(),
                "ranks do not do the same",
            ),
            "k": (lambda: G.eigh(k=last(2, 3)), "ranks do not do the same"),
            "k of ARPACK": (
                lambda: G.eigh(k=last(2, 3), route="ARPACK on G"),
                "ranks do not do the same",
            ),
            "an end": (
                lambda: vl.Hessian(self.risk).eigh(k=2, which=last("LA", "SA")),
                "ranks do not do the same",
            ),
            "draws": (
                lambda: vl.GGN(self.risk, mc_samples=last(1, 2)),
                "ranks do not do the same",
            ),
            "a prior": (prior(2.0), "differ"),
            "a wrong prior": (prior(-2.0), "must be positive"),
            "a variant": (
                lambda: vl.KFAC(self.risk, variant=last("exact", "empirical")),
                "ranks do not do the same",
            ),
            "a joint bias": (
                lambda: vl.KFAC(self.risk, variant="exact", joint_bias=mine),
                "ranks do not do the same",
            ),
            "a structure": (
                lambda: vl.Laplace(self.risk, 1.0, last("ful", "full")),
                "structure: one of",
            ),
            "test data": (
                lambda: vl.Laplace(self.risk).predictive(self.X * last(torch.nan, 1.0)),
                "NaN",
            ),
        }
        wanted = vl.GGN(self.one) @ x
        for what, (fail, text) in cases.items():
            yield what, lambda f=fail, t=text: raised(f, t), ONE, 0.0
            yield f"after: {what}", lambda: G @ x, wanted, 1e-12

    def arguments_of_analyses(self) -> Iterator[Check]:
        """The same of what is read off operators, and of files."""
        mine, x, eye = self.rank == self.size - 1, self.x, vl.Identity(self.D)
        risk, G = self.risk, vl.GGN(self.risk)
        U, S, pairs = vl.PerSampleGradients(risk), (G + DELTA * eye).inv(), G.eigh(k=3)
        J, path = vl.Jacobian(net(), self.X[:3]), self.folder / "G.pt"
        vl.save(G, path, risk)
        torch.manual_seed(0)
        line = nn.Linear(6, C).double()
        squares = [(X, X[:, :C].sin()) for X, _ in self.data]
        fit = vl.EmpiricalRisk(line, nn.MSELoss(), squares, process_group=self.group)

        def last(theirs: Any, others: Any) -> Any:
            return theirs if mine else others

        def unseen(first: int) -> vl.PerSampleGradients:
            some = slice(first, first + 4)
            test = vl.EmpiricalRisk(net(), loss(), (self.X[some], self.y[4:8]))
            return vl.PerSampleGradients(test)

        differ, other = "differ", "ranks do not do the same"
        cases: dict[str, tuple[Callable[[], Any], str]] = {
            "rows": (lambda: G.restrict(last([self.D], [0, 1])), "must lie in"),
            "other rows": (lambda: S.restrict(last([0, 2], [0, 1])), differ),
            "how many": (lambda: S.sample(last(0, 2)), "num: at least 1"),
            "a word": (lambda: G.logdet(last("a", 1.0)), "damping: numbers"),
            "other dampings": (lambda: G.logdet(last([2.0], [1.0])), differ),
            "rcond": (lambda: G.pinv(last(0.5, 1e-3)), other),
            "S": (lambda: vl.influence(unseen(0), last(3, S), U), "S: a self-adjoint"),
            "U": (lambda: vl.self_influence(S, last(3, U)), "U: an operator"),
            "test data": (lambda: vl.influence(unseen(last(4, 0)), S, U), differ),
            "J": (lambda: vl.predictive_covariance(last(3, J), S), "J_test: a vl.J"),
            "variances": (lambda: vl.predictive_covariance(J, S, mine), other),
            "other inputs": (
                lambda: vl.Laplace(risk).predictive(self.X[last(2, 0) :][:3]),
                differ,
            ),
            "outputs": (lambda: vl.Laplace(risk).sample(last("a", 2)), "num: an int"),
            "M": (lambda: vl.Hessian(risk).solve(x, M=last(3, None)), "M: an approx"),
            "a route": (lambda: G.eigvalsh(last("x", None)), "route: found"),
            "which pairs": (lambda: G.eigh(select=last(3, _each)), "select: a fun"),
            "blocks": (lambda: U.squared_norms(last("x", "module")), "blocks: 'param"),
            "other blocks": (
                lambda: G.block_diagonal(last("module", "parameter")),
                differ,
            ),
            "names": (lambda: risk.over(last(["0.bias"], ["3.bias"])), other),
            "runs": (lambda: vl.LanczosSpectrum(G, last(5, 4)), other),
            "products": (lambda: vl.estimate_trace(G, last(1, 3)), "num_products: at"),
            "a solver": (lambda: vl.led(last(3, len), G), "function: a function"),
            "directions": (
                lambda: vl.directional_derivatives(risk, last(3, pairs)),
                "directions: what eigh returned",
            ),
            "a damping": (
                lambda: vl.damped_newton_step(risk, x, last("a", 0.1)),
                "damping: a number",
            ),
            "another damping": (
                lambda: vl.damped_newton_step(risk, x, last(0.2, 0.1)),
                differ,
            ),
            "A": (lambda: vl.trust_region_step(risk, last(3, G), 0.1), "A: a self-adj"),
            "sigma": (lambda: vl.covariance(fit, mine), other),
            "a result": (lambda: vl.save(last(3, G), path, risk), "result: eigenpairs"),
            "a kind": (lambda: vl.load(path, risk, last("a", object)), "kind: a class"),
        }
        wanted = vl.GGN(self.one) @ x
        for what, (fail, text) in cases.items():
            yield what, lambda f=fail, t=text: raised(f, t), ONE, 0.0
            yield f"after: {what}", lambda: G @ x, wanted, 1e-12

    def caught_errors(self) -> Iterator[Check]:
        """Errors for which there is another way on one rank only; stopped helpers."""
        mine, model = self.rank == self.size - 1, Moody()
        risk = self.over(model, self.data)
        G, H = vl.GGN(risk), vl.Hessian(risk)
        uses: dict[str, Callable[[], Any]] = {
            "ARPACK": lambda: G.eigh(k=2, route="ARPACK on G"),
            "Lanczos": lambda: H.eigh(k=2, route="Lanczos"),
            "sample diagonals": H.sample_diagonals,
        }
        for what, use in uses.items():

            def fail(use: Callable[[], Any] = use) -> None:
                FAILURES.extend([KeyboardInterrupt("stopped")] if mine else [])
                use()

            yield what, lambda f=fail: raised(f, "stopped"), ONE, 0.0
        # What products do without, one by one, is of all ranks.
        diagonals = vl.Hessian(self.one).sample_diagonals()

        def spared(error: Exception) -> Tensor:
            FAILURES.extend([error] if mine else [])
            return H.sample_diagonals()

        for error in (ValueError("oh"), MemoryError("full")):
            name = type(error).__name__
            yield name, lambda e=error: spared(e), diagonals, 1e-12
        wanted = vl.GGN(self.one) @ self.x
        yield "after", lambda: G @ self.x, wanted, 1e-12

    def two_threads(self) -> Iterator[Check]:
        """A thread for each of two groups: their votes are apart."""
        wanted = [vl.GGN(self.one) @ self.x, vl.GGN(self.one).eigvalsh()] * 5
        mine, models = self.rank == self.size - 1, (net(), net())
        # The other threads come to a vote while one of them is not there yet.
        models[0].register_forward_hook(lambda *_: time.sleep(0.02 * mine))

        def used(group: Any, model: nn.Module) -> Tensor:
            data, found = self.data, []
            risk = vl.EmpiricalRisk(model, loss(), data, process_group=group, memory=0)
            G = vl.GGN(risk)
            for _ in range(5):
                with contextlib.suppress(ValueError):
                    G @ (self.x[:5] if mine else self.x)
                found += [G @ self.x, vl.GGN(risk).eigvalsh()]
            apart = zip(found, wanted, strict=True)
            return torch.stack([(f - w).norm() / w.norm() for f, w in apart])

        groups = self.group, dist.new_group()
        with ThreadPoolExecutor(2) as pool:
            tasks = [*map(pool.submit, [used] * 2, groups, models)]
        for number, task in enumerate(tasks):
            yield f"thread {number}", task.result, torch.zeros(10), 1e-12

    def current(self) -> Iterator[Check]:
        """Whether all models are what they were is one answer."""
        model = net()
        risk = self.over(model, self.data)
        yield "current", lambda: torch.tensor([float(risk.is_current())]), ONE, 0.0
        if self.rank == self.size - 1:
            with torch.no_grad():
                model[0].bias += 1.0  # type: ignore[index,operator]
        no = torch.tensor([float(risk.is_current())])
        yield "changed on one rank", lambda: no, torch.zeros(1), 0.0

    def other_vectors(self) -> Iterator[Check]:
        """Each rank's LAPACK and ARPACK would find other vectors of a space."""
        x, eye, every = self.x, vl.Identity(self.D), range(100)
        results: dict[str, Callable[[vl.EmpiricalRisk], Tensor]] = {
            "followed": lambda r: _followed(r).eigenvectors,
            "followed, damped": lambda r: _followed(r, DELTA).eigenvectors,
            "null space": lambda r: (
                vl.GGN(r.subset([1, 3, N - 1])).eigh(select=_each).eigenvectors
            ),
            "dense": lambda r: vl.Hessian(r.over(["0.bias"])).eigh(k=2).eigenvectors,
            "root": lambda r: _mirrored(r, x).sqrt().to_dense(),
            "kernel": lambda r: _whitened(vl.Jacobian(r) @ vl.Jacobian(r).T),
            "restricted KFAC": lambda r: _whitened(
                vl.KFAC(r, variant="exact").restrict([0, 9, 50])
            ),
            "D x D": lambda r: (
                (vl.GGN(r.over(["3.weight"])) + vl.Diagonal(x[:32, 0].abs() + 1.0))
                .eigh(k=2)
                .eigenvectors
            ),
            "pseudoinverse": lambda r: (
                vl.GGN(r.over(["3.weight"])).pinv().eigh(k=2).eigenvectors
            ),
        }
        S = (vl.GGN(self.one) + DELTA * eye).inv().restrict(every)
        wanted = {what: _outer(compute(self.one)) for what, compute in results.items()}
        product = S.inv().inv() @ x[:100]
        with _other_solvers(self.rank != self.risk.ranks.leader):
            found = {what: compute(self.risk) for what, compute in results.items()}
            S = (vl.GGN(self.risk) + DELTA * eye).inv().restrict(every)
            wanted["restricted"], found["restricted"] = product, S.inv().inv() @ x[:100]
        for what, value in found.items():
            yield f"{what}, bits", lambda v=value: agreement([v]), ONE, 0.0
            right = value if what == "restricted" else _outer(value)
            if what != "null space":
                yield what, lambda v=right: v, wanted[what], 1e-5
        Q = found["null space"]
        identity = torch.eye(Q.shape[1], dtype=Q.dtype)
        yield "orthonormal", lambda: Q.T @ Q, identity, 1e-10

    def other_rounding(self) -> Iterator[Check]:
        """An optimiser goes the same way where ranks round in other ways."""
        last = self.risk.over(["3.weight", "3.bias"])  # few steps, each by messages
        la, evidence = vl.Laplace(last, 1.5), vl.Laplace.log_marginal_likelihood
        factor = 1.0 + 1e-6 * self.rank

        def rounded(self: vl.Laplace, given: Any = None) -> Tensor:
            return factor * evidence(self, given)

        vl.Laplace.log_marginal_likelihood = rounded  # type: ignore[method-assign]
        for each in (False, True):
            found = la.optimize_prior(per_parameter=each)
            yield f"by parameter: {each}", lambda f=found: agreement([f]), ONE, 0.0
        vl.Laplace.log_marginal_likelihood = evidence  # type: ignore[method-assign]


def _followed(risk: vl.EmpiricalRisk, damping: float = 0.0) -> vl.Eigenpairs:
    """Pairs two steps further."""
    theta, pairs = risk.flatten(risk.params), vl.GGN(risk).eigh(k=3)
    eye = vl.Identity(risk.num_params)
    for step in (1.001, 1.002):
        G = vl.GGN(risk.at(step * theta))
        pairs = (G + damping * eye if damping else G).eigh(k=3, start=pairs)
    return pairs


def _each(eigenvalues: Tensor) -> range:
    """Those that are zero too."""
    return range(len(eigenvalues))


def _outer(columns: Tensor) -> Tensor:
    return columns @ columns.T


def _whitened(A: vl.TorchLinearOperator) -> Tensor:
    """A root of the damped inverse."""
    return (A + DELTA * vl.Identity(A.shape[0])).inv().sqrt().to_dense()


def _mirrored(risk: vl.EmpiricalRisk, x: Tensor) -> vl.TorchLinearOperator:
    """A B Aᵀ with an indefinite B, and no part of A where B is negative."""
    A = vl.Dense(torch.cat([x.T, torch.zeros(3, 2, dtype=x.dtype)], dim=1))
    return A @ vl.BlockDiagonal([vl.GGN(risk), -1.0 * vl.Identity(2)]) @ A.T


@contextlib.contextmanager
def _other_solvers(other: bool) -> Iterator[None]:
    """Let vectors come with other signs, which are as right."""
    places: list[tuple[Any, str]] = [
        (torch.linalg, "eigh"),
        (torch.linalg, "qr"),
        (scipy.linalg, "eigh"),
        (krylov, "eigsh"),
    ]
    known = [getattr(*place) for place in places]
    for (module, name), solve in zip(places, known, strict=True):
        if other:
            setattr(module, name, _turned(solve, first=name == "qr"))
    try:
        yield
    finally:
        for (module, name), solve in zip(places, known, strict=True):
            setattr(module, name, solve)


def _turned(solve: Callable[..., Any], first: bool) -> Callable[..., Any]:
    """Vectors are what comes first, as of QR, or last; the triangle turns with Q."""

    def found(*args: Any, **keywords: Any) -> Any:
        result = solve(*args, **keywords)
        if not isinstance(result, tuple):
            return result  # no vectors
        both = [-part if first or place else part for place, part in enumerate(result)]
        return Turned(*both)

    return found


class Turned(tuple[Any, Any]):
    """Two results, as torch names them."""

    def __new__(cls, *both: Any) -> "Turned":
        return super().__new__(cls, both)

    Q = property(operator.itemgetter(0))
    R = property(operator.itemgetter(1))
