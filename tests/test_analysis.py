"""Directional derivatives and Newton steps against per-sample dense matrices."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import vivit_linop as vl
from tests import placing
from tests.cases import CONVEX, Dense, Lambda, converted, dense, dense_of, mlp, problem
from tests.curvature_cases import fresh, risk_of
from vivit_linop.curvature import output_space
from vivit_linop.linalg.decompositions import GramEigenpairs

FEW = [
    "mlp_ce_mean",
    "mlp_mse_sum",
    "mlp_bce_weighted",
    "ce_everything",
    "ce_sequence",
    "coupled_function_loss",
    "uneven_batches",
    "repeated_samples",
    "more_columns_than_parameters",
    "overdetermined_and_singular",
    "callable_model",
    "outputs_without_channel",
    "cnn",
    "tokens",
    "layers_without_samples",
    "control_flow",
]


def make(name: str, dtype: torch.dtype = torch.float64) -> vl.EmpiricalRisk:
    return risk_of(problem(name, dtype))


def every(evals: Tensor) -> list[int]:
    return list(range(len(evals)))


def orthonormal(D: int, K: int) -> Tensor:
    noise = torch.randn(D, K, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(noise.double()).Q


def reference(truth: Dense, E: Tensor) -> tuple[Tensor, Tensor]:
    """γ and λ by definition."""
    E = E.double()
    lambdas = torch.einsum("dk,nde,ek->nk", E, truth.per_sample_ggn(), E)
    return truth.U.T @ E, lambdas


def check_derivatives(got: Any, truth: Dense, E: Tensor, rtol: Any) -> None:
    gammas, lambdas = got
    slopes, curvatures = reference(truth, E)
    assert gammas.shape == slopes.shape and lambdas.shape == curvatures.shape
    if not E.shape[1]:
        return
    per_sample = torch.linalg.matrix_norm(truth.per_sample_ggn(), 2).max()
    assert (gammas - slopes).abs().max() <= rtol * truth.U.norm()
    assert (lambdas - curvatures).abs().max() <= rtol * per_sample
    assert (lambdas >= 0).all()


# Derivatives --------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONVEX)
def test_along_eigenpairs(name: str) -> None:
    risk, truth = make(name), dense(name)
    G = vl.GGN(risk)
    pairs = G.eigh(k=min(3, *G.factor.shape))
    if not (pairs.eigenvalues > 1e-12 * truth.G.norm()).all():
        pairs = G.eigh()
    got = vl.directional_derivatives(risk, pairs)
    check_derivatives(got, truth, pairs.eigenvectors, 1e-10)
    # With eigenpairs of this risk, the mean (for a sum: the sum) of λ are they.
    total = truth.r * got[1].sum(0)
    scale = truth.G.norm()
    assert len(pairs) == 0 or (total - pairs.eigenvalues).abs().max() <= 1e-11 * scale
    slope = truth.r * got[0].sum(0)
    expected = truth.gradient @ pairs.eigenvectors
    assert torch.allclose(slope, expected, rtol=0, atol=1e-10 * truth.U.norm())


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("K", [1, 3])
def test_along_any_directions(name: str, K: int) -> None:
    risk, truth = make(name), dense(name)
    E = orthonormal(truth.D, K)
    before = E.clone()
    check_derivatives(vl.directional_derivatives(risk, E), truth, E, 1e-12)
    assert torch.equal(E, before)
    # Also where they are wanted in no orthonormal form, and with gradients.
    skew = (3.0 * E + 0.5).requires_grad_()
    got = vl.directional_derivatives(risk, skew)
    check_derivatives(got, truth, skew.detach(), 1e-11 * skew.detach().norm() ** 2)
    # The same for the vectors of eigenpairs, without the way over the Gram matrix.
    pairs = vl.GGN(risk).eigh(k=1)
    for with_pairs, with_vectors in zip(
        vl.directional_derivatives(risk, pairs),
        vl.directional_derivatives(risk, pairs.eigenvectors),
        strict=True,
    ):
        scale = 1.0 + with_vectors.abs().max()
        assert (with_pairs - with_vectors).abs().max() <= 1e-11 * scale


@pytest.mark.parametrize("ignored", [(), (0, 3), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("positions", [(), (3, 2)])
def test_slopes_along_pairs_come_from_the_gram_matrix(
    ignored: tuple[int, ...], positions: tuple[int, ...]
) -> None:
    """Also of positions, and where targets count for nothing: no run of the net."""
    kind: Any = (lambda a, b: nn.Conv2d(a, b, 1)) if positions else nn.Linear
    net = nn.Sequential(kind(2, 30), nn.Tanh(), kind(30, 3)).double()
    runs: list[int] = []
    net.register_forward_hook(lambda *_: runs.append(1))
    X, y = torch.randn(6, 2, *positions).double(), torch.randint(3, (6, *positions))
    y.reshape(6, -1)[list(ignored), -1] = -100
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, y))
    pairs = vl.GGN(risk).eigh(k=2, route="dense Gram")
    slopes = vl.PerSampleGradients(risk).to_dense().T @ pairs.eigenvectors
    runs.clear()
    gammas, _ = vl.directional_derivatives(risk, pairs)
    assert not runs
    assert (gammas - slopes).abs().max() <= 1e-11 * slopes.abs().max()


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("keep", ["default", "everything"])
def test_with_all_pairs(name: str, keep: str) -> None:
    """Finite and right also for zeros: N·R > D, repeated samples, no curvature."""
    risk, truth = make(name), dense(name)
    pairs = vl.GGN(risk).eigh(select=every if keep == "everything" else None)
    gammas, lambdas = vl.directional_derivatives(risk, pairs)
    assert gammas.isfinite().all() and lambdas.isfinite().all()
    # Right for the vectors that these pairs have (a null space has many bases).
    check_derivatives((gammas, lambdas), truth, pairs.eigenvectors, 1e-8)
    total = truth.r * lambdas.sum(0)
    assert (total - pairs.eigenvalues).abs().max() <= 1e-10 * truth.G.norm()
    step = vl.damped_newton_step(risk, pairs, 0.1)
    assert step.isfinite().all()
    if keep == "everything" and len(pairs) == truth.D:
        # The span is all of the space: the full-space step.
        unit = torch.eye(truth.D, dtype=torch.float64)
        full = -torch.linalg.solve(truth.G + 0.1 * unit, truth.gradient)
        assert (step - full).norm() <= 1e-8 * full.norm()


def test_eigenpairs_of_other_operators() -> None:
    name = "mlp_ce_mean"
    risk, truth = make(name), dense(name)
    G = vl.GGN(risk)
    generator = torch.Generator().manual_seed(0)
    sampled = vl.GGN(risk, mc_samples=2, generator=generator)
    for op in (
        2.0 * G,
        G + 0.5 * vl.Identity(truth.D),
        vl.EmpiricalFisher(risk),
        sampled,
        vl.Jacobian(risk).T @ vl.Jacobian(risk),
        vl.Dense(truth.G),
        G.block_diagonal("parameter"),
    ):
        pairs = op.eigh(k=3)
        got = vl.directional_derivatives(risk, pairs)
        check_derivatives(got, truth, pairs.eigenvectors, 1e-9)
        step = vl.damped_newton_step(risk, pairs, 0.1)
        assert close_step(step, truth, truth, pairs.eigenvectors, 0.1)


@pytest.mark.parametrize("route", ["ARPACK on K", "ARPACK on G"])
@pytest.mark.parametrize(
    "name", ["mlp_ce_mean", "repeated_samples", "mlp_mse_sum", "uneven_batches"]
)
def test_pairs_by_arpack(name: str, route: str) -> None:
    """The route that is taken for few pairs of a large net gives the same pairs."""
    risk, truth = make(name), dense(name)
    expected = torch.linalg.eigvalsh(truth.G)
    for k in (1, 4):
        pairs = vl.GGN(risk).eigh(k=k, route=route)
        assert pairs.route == route
        evals, evecs = pairs
        assert (evals - expected[-k:]).abs().max() <= 1e-10 * expected[-1]
        unit = torch.eye(k, dtype=torch.float64)
        assert (evecs.T @ evecs - unit).abs().max() <= 1e-10
        residuals = (truth.G @ evecs - evals * evecs).norm(dim=0)
        assert residuals.max() <= 1e-10 * expected[-1]
        got = vl.directional_derivatives(risk, pairs)
        check_derivatives(got, truth, evecs, 1e-9)


@pytest.mark.parametrize("name", ["mlp_ce_mean", "ce_sequence"])
def test_pairs_where_the_root_does_not_fit(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products with G need no root of the loss Hessian, and eigenpairs only these."""
    monkeypatch.setattr(output_space, "free_memory", lambda _: 0)
    G, truth = vl.GGN(make(name)), dense(name)
    expected = torch.linalg.eigvalsh(truth.G)
    with pytest.raises(MemoryError, match="mc_samples="):
        G.eigvalsh()
    for k in (1, min(G.factor.shape) - 2):
        pairs = G.eigh(k=k)
        assert pairs.route == placing.krylov("G")
        evals, evecs = pairs
        assert (evals - expected[-k:]).abs().max() <= 1e-10 * expected[-1]
        residuals = (truth.G @ evecs - evals * evecs).norm(dim=0)
        assert residuals.max() <= 1e-10 * expected[-1]


# Different samples for gradient and curvature ---------------------------------------


def subset_of(name: str, indices: list[int]) -> Dense:
    """The matrices of a problem of some samples only."""
    case = problem(name)
    batches = case.batches()
    X = torch.cat([X for X, _ in batches])[indices]
    y = torch.cat([y for _, y in batches])[indices]
    return dense_of(type(case)(case.model, case.loss, (X, y), case.params))


@pytest.mark.parametrize("name", ["mlp_ce_mean", "mlp_mse_sum", "uneven_batches"])
def test_subsets_for_gradient_and_curvature(name: str) -> None:
    risk = make(name)
    first, second = [0, 1, 2], [3, 0]  # of different size, in any order
    for_slopes, for_curvature = risk.subset(first), risk.subset(second)
    A, B = subset_of(name, first), subset_of(name, second)
    everywhere = vl.GGN(risk).eigh(k=3)
    local = vl.GGN(for_curvature).eigh(k=2)
    for pairs in (everywhere, local, orthonormal(A.D, 2)):
        E = pairs if isinstance(pairs, Tensor) else pairs.eigenvectors
        gammas, lambdas = vl.directional_derivatives(for_slopes, pairs, for_curvature)
        assert gammas.shape == (3, E.shape[1]) and lambdas.shape == (2, E.shape[1])
        expected = reference(A, E)[0], reference(B, E)[1]
        torch.testing.assert_close(gammas, expected[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(lambdas, expected[1], rtol=1e-10, atol=1e-12)
        step = vl.damped_newton_step(for_slopes, pairs, 0.3, for_curvature)
        assert close_step(step, A, B, E, 0.3)
    _, lambdas = vl.directional_derivatives(for_slopes, local, for_curvature)
    total = lambdas.sum(0) * B.r
    torch.testing.assert_close(total, local.eigenvalues, rtol=1e-11, atol=0)
    # Without curvature_risk, both are of the first.
    gammas, lambdas = vl.directional_derivatives(for_slopes, local)
    assert lambdas.shape == (3, 2)
    torch.testing.assert_close(
        lambdas, reference(A, local.eigenvectors)[1], rtol=1e-9, atol=1e-12
    )


def test_mean_and_sum_differ_in_the_step_only_as_they_must() -> None:
    # γ and λ are of single samples (of MSE, with and without its 1/C); the step with
    # damping δ for the mean is that with N C δ for the sum.
    case = problem("mlp_mse_mean")
    N, C = 6, 3
    mean = make("mlp_mse_mean")
    total = vl.EmpiricalRisk(case.model, nn.MSELoss(reduction="sum"), case.data)
    E = orthonormal(mean.num_params, 2)
    for a, b in zip(
        vl.directional_derivatives(mean, E),
        vl.directional_derivatives(total, E),
        strict=True,
    ):
        torch.testing.assert_close(C * a, b, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        vl.damped_newton_step(mean, E, 0.5),
        vl.damped_newton_step(total, E, 0.5 * N * C),
        rtol=1e-12,
        atol=1e-14,
    )


def test_other_loss_and_data_for_curvature() -> None:
    # A curvature risk shares parameters with the first, nothing else.
    case = problem("mlp_ce_mean")
    X = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double()
    other = (X, X[:, :3].clone())
    A, B = make("mlp_ce_mean"), vl.EmpiricalRisk(case.model, nn.MSELoss(), other)
    truth_B = dense_of(type(case)(case.model, nn.MSELoss(), other))
    pairs = vl.GGN(A).eigh(k=2)
    gammas, lambdas = vl.directional_derivatives(A, pairs, B)
    truth_A = dense("mlp_ce_mean")
    E = pairs.eigenvectors
    torch.testing.assert_close(gammas, truth_A.U.T @ E, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        lambdas, reference(truth_B, E)[1], rtol=1e-10, atol=1e-12
    )


# Newton steps -------------------------------------------------------------------------


def formula(A: Dense, B: Dense, E: Tensor, damping: Any) -> Tensor:
    slope = A.r * reference(A, E)[0].sum(0)
    curvature = B.r * reference(B, E)[1].sum(0)
    return E @ (-slope / (curvature + damping))


def close_step(step: Tensor, A: Dense, B: Dense, E: Tensor, damping: Any) -> bool:
    expected = formula(A, B, E, damping)
    assert step.shape == (A.D,)
    return bool((step - expected).norm() <= 1e-9 * (expected.norm() + 1e-6))


@pytest.mark.parametrize("name", FEW)
def test_newton_step(name: str) -> None:
    risk, truth = make(name), dense(name)
    pairs = vl.GGN(risk).eigh(k=3)
    E = orthonormal(truth.D, 2)
    for damping in (1e-2, 1, 100.0):
        step = vl.damped_newton_step(risk, pairs, damping)
        assert close_step(step, truth, truth, pairs.eigenvectors, damping)
        along = vl.damped_newton_step(risk, E, damping)
        assert close_step(along, truth, truth, E, damping)
    tensors = risk.unflatten(step)
    assert [t.shape for t in tensors] == [p.shape for p in risk.params.values()]


NUMBERS = [np.float32(0.25), np.array(0.25), torch.tensor(0.25), torch.tensor(1)]


@pytest.mark.parametrize("damping", NUMBERS, ids=repr)
def test_newton_step_with_a_number_of_any_kind(damping: Any) -> None:
    risk, truth = make("mlp_ce_mean"), dense("mlp_ce_mean")
    E = orthonormal(truth.D, 2)
    step = vl.damped_newton_step(risk, E, damping)
    assert close_step(step, truth, truth, E, float(damping))
    with pytest.raises(TypeError, match=r"^damping: found a tensor that requires grad"):
        vl.damped_newton_step(risk, E, torch.tensor(0.1, requires_grad=True))


@pytest.mark.parametrize("name", FEW)
def test_newton_step_with_a_function(name: str) -> None:
    risk, truth = make(name), dense(name)
    G = vl.GGN(risk)
    pairs = G.eigh(k=2)
    seen: dict[str, Tensor] = {}

    def damping(evals: Tensor, gram_evecs: Tensor, g: Tensor, h: Tensor) -> Tensor:
        seen.update(evals=evals, gram_evecs=gram_evecs, gammas=g, lambdas=h)
        return 0.1 + evals + g.square().mean(0) + h.amax(0)

    step = vl.damped_newton_step(risk, pairs, damping)
    E = pairs.eigenvectors
    slopes, curvatures = reference(truth, E)
    expected = 0.1 + pairs.eigenvalues + slopes.square().mean(0) + curvatures.amax(0)
    assert close_step(step, truth, truth, E, expected)
    # The arguments are what they are called.
    torch.testing.assert_close(seen["evals"], pairs.eigenvalues)
    torch.testing.assert_close(seen["gammas"], slopes, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(seen["lambdas"], curvatures, rtol=1e-8, atol=1e-10)
    q = seen["gram_evecs"]
    assert q.shape == (G.factor.shape[1], 2)
    unit = torch.eye(2, dtype=torch.float64)
    assert (q.T @ q - unit).abs().max() <= 1e-9
    lifted = G.factor.to_dense() @ q / pairs.eigenvalues.sqrt()
    torch.testing.assert_close(lifted, E, rtol=0, atol=1e-8)


def test_newton_step_in_an_order_of_its_own() -> None:
    # Dampings belong to the directions as the criterion has ordered them.
    name = "mlp_ce_mean"
    risk, truth = make(name), dense(name)
    pairs = vl.GGN(risk).eigh(select=lambda evals: [-1, -3, -2])
    assert pairs.eigenvalues[0] > pairs.eigenvalues[2] > pairs.eigenvalues[1]
    dampings = torch.tensor([0.1, 1.0, 10.0]).double()
    step = vl.damped_newton_step(risk, pairs, lambda *_: dampings)
    assert close_step(step, truth, truth, pairs.eigenvectors, dampings)


def test_no_direction_gives_no_step() -> None:
    risk = make("mlp_ce_mean")
    pairs = vl.GGN(risk).eigh(select=lambda evals: [])
    assert len(pairs) == 0 and pairs.eigenvectors.shape == (43, 0)
    gammas, lambdas = vl.directional_derivatives(risk, pairs)
    assert gammas.shape == lambdas.shape == (6, 0)
    step = vl.damped_newton_step(risk, pairs, 1.0)
    assert torch.equal(step, torch.zeros(43, dtype=torch.float64))
    step = vl.damped_newton_step(risk, torch.zeros(43, 0).double(), 1.0)
    assert torch.equal(step, torch.zeros(43, dtype=torch.float64))


@pytest.mark.parametrize("name", FEW)
def test_in_float32(name: str) -> None:
    risk, truth = make(name, torch.float32), dense(name)
    rtol = 10 * problem(name).rtol32
    pairs = vl.GGN(risk).eigh(k=2)
    got = vl.directional_derivatives(risk, pairs)
    assert {t.dtype for t in got} == {torch.float32}
    check_derivatives(got, truth, pairs.eigenvectors, rtol)
    step = vl.damped_newton_step(risk, pairs, 0.1)
    expected = formula(truth, truth, pairs.eigenvectors.double(), 0.1)
    assert step.dtype == torch.float32
    assert (step - expected).norm() <= 10 * rtol * truth.gradient.norm() / 0.1
    # All pairs, though the small ones are noise.
    everything = vl.GGN(risk).eigh(select=every)
    gammas, lambdas = vl.directional_derivatives(risk, everything)
    step = vl.damped_newton_step(risk, everything, 0.1)
    assert all(t.isfinite().all() for t in (gammas, lambdas, step))


def test_float64_directions_for_a_float32_risk() -> None:
    risk, truth = make("mlp_ce_mean", torch.float32), dense("mlp_ce_mean")
    E = orthonormal(truth.D, 2)
    got = vl.directional_derivatives(risk, E)
    assert {t.dtype for t in got} == {torch.float32}
    check_derivatives(got, truth, E, 1e-5)
    pairs = vl.GGN(make("mlp_ce_mean")).eigh(k=2)
    try:
        got = vl.directional_derivatives(risk, pairs)
    except (TypeError, ValueError) as error:
        assert "directions" in str(error)
    else:
        check_derivatives(got, truth, pairs.eigenvectors, 1e-5)


# Memory -------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Records the largest number of entries of anything that torch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.numel = max(self.numel, storage)
        return result


def several_layers() -> vl.EmpiricalRisk:
    """Five layers of one size and a head: D = 13,005 and N·R = 64."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = mlp(50, *[50] * 5, 5).float()
        data = (torch.randn(16, 50), torch.randint(5, (16,)))
    return vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), data)


def test_recorder_sees_dense_columns() -> None:
    # Else the tests below would pass whatever is computed.
    risk = several_layers()
    with Largest() as largest:
        vl.GGNFactor(risk).to_dense()
    assert largest.numel >= risk.num_params * 64


@pytest.mark.parametrize("select", [None, lambda evals: [-1, -2, -3]])
def test_nothing_of_the_size_of_the_factor_is_formed(select: Any) -> None:
    risk = several_layers()
    D, columns = risk.num_params, 64
    with Largest() as largest:
        G = vl.GGN(risk)
        G.eigvalsh()
        pairs = G.eigh(select=select)
        assert isinstance(pairs, GramEigenpairs)
        vl.directional_derivatives(risk, pairs)
        vl.damped_newton_step(risk, pairs, 0.1)
        part = risk.subset(range(8))
        vl.damped_newton_step(part, pairs, 0.1, risk.subset(range(4, 16)))
        (G + 0.1 * vl.Identity(D)).solve(risk.gradient())
        (G + 0.1 * vl.Identity(D)).logdet()
        G.block_diagonal("parameter").eigvalsh()
    # Not even what a single parameter's columns take.
    assert largest.numel < 50 * 50 * columns
    with Largest() as largest:
        G.trace()
        G.diagonal()
    assert largest.numel <= 51 * 50 * columns


@pytest.mark.parametrize("memory", [2**20])
def test_fallback_columns_stay_within_the_budget(memory: int) -> None:
    # A parameter without layer structure has dense columns, some samples at a time.
    def forward(m: Any, x: Tensor) -> Tensor:
        for w in (m.a, m.b, m.c):
            x = (x @ (w * w)).tanh()
        return m.head(x)

    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = Lambda(
            forward,
            **{k: nn.Parameter(0.3 * torch.randn(60, 60)) for k in "abc"},
            head=nn.Linear(60, 5),
        )
        data = (torch.randn(24, 60), torch.randint(5, (24,)))
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), data, memory=memory)
    D, columns = risk.num_params, 96
    with Largest() as largest:
        pairs = vl.GGN(risk).eigh()
        vl.damped_newton_step(risk, pairs, 0.1)
    assert largest.numel < D * columns
    assert 4 * largest.numel <= 2 * memory


def test_casting_copies_are_independent() -> None:
    # The market's own copies: changing one leaves the other.
    a = problem("mlp_ce_mean")
    b = converted(a, torch.float64)
    b.model[0].weight.data.zero_()
    assert a.model[0].weight.norm() > 0


def test_a_damping_function_may_write() -> None:
    risk = fresh("mlp_ce_mean")
    pairs = vl.GGN(risk).eigh(k=2)

    def damping(evals: Tensor, vectors: Tensor, *derivatives: Tensor) -> Tensor:
        for given in (vectors, *derivatives):
            given.zero_()
        return evals.mul_(0.1)

    expected = vl.damped_newton_step(risk, pairs, lambda evals, *_: 0.1 * evals)
    for _ in range(2):
        step = vl.damped_newton_step(risk, pairs, damping)
        torch.testing.assert_close(step, expected, rtol=1e-12, atol=0.0)


def test_eigenvalues_that_are_written_to() -> None:
    risk = fresh("mlp_ce_mean")
    expected = vl.directional_derivatives(risk, vl.GGN(risk).eigh(k=2))[1]
    pairs = vl.GGN(risk).eigh(k=2)
    pairs.eigenvalues.sqrt_()
    lambdas = vl.directional_derivatives(risk, pairs)[1]
    torch.testing.assert_close(lambdas, expected, rtol=1e-10, atol=1e-14)
    assert (pairs.eigenvectors.norm(dim=0) - 1.0).abs().max() <= 1e-12
