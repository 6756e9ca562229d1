"""What ViViT has beyond its four computations, in the algebra."""

from __future__ import annotations

import curvlinops
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vivit_linop as vl
from tests import placing
from tests.cases import Problem, dense_of
from tests.comparing import close
from tests.vivit_cases import ggn, setting_of
from vivit_linop.vivit import EigvalshComputation

# BackPACK's hooks, on a first layer whose input needs no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
F64 = torch.float64
N, C = 8, 3


def problem() -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, C)).double()
    X, y = torch.rand(N, 5, dtype=F64), torch.randint(C, (N,))
    return Problem(model, nn.CrossEntropyLoss(), (X, y))


P = problem()
DENSE = dense_of(P)
SIZES = [p.numel() for p in P.model.parameters()]
D = sum(SIZES)


def risk() -> vl.EmpiricalRisk:
    return vl.EmpiricalRisk(P.model, P.loss, P.data)


# Gram matrices of per-sample gradients ------------------------------------------------


def test_gram_matrix_of_gradients_centred_and_not() -> None:
    U = vl.PerSampleGradients(risk())
    assert close((U.T @ U).to_dense(), DENSE.U.T @ DENSE.U)
    noise = DENSE.U - DENSE.U.mean(1, keepdim=True)
    assert close(vl.centered_gram(U), noise.T @ noise)
    with pytest.raises(TypeError, match="columns"):
        vl.centered_gram(DENSE.U)


@pytest.mark.parametrize("blocks, width", [("module", 2), ("parameter", 1)])
def test_gram_matrices_by_layer(blocks, width) -> None:
    F = vl.EmpiricalFisher(risk()).block_diagonal(blocks)
    sizes = torch.tensor(SIZES).view(-1, width).sum(1).tolist()
    total = torch.zeros(N, N, dtype=F64)
    for block, rows in zip(F.blocks, DENSE.U.split(sizes), strict=True):
        assert close(block.gram.to_dense(), rows.T @ rows)
        noise = rows - rows.mean(1, keepdim=True)
        assert close(vl.centered_gram(block.factor), noise.T @ noise)
        assert close(block.to_dense(), rows @ rows.T / N)
        total += block.gram.to_dense()
    assert close(total, DENSE.U.T @ DENSE.U)


# Over a data loader -------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_operators_value_and_gradient_over_a_loader(reduction) -> None:
    loader = DataLoader(TensorDataset(*P.data), batch_size=3)
    loss = nn.CrossEntropyLoss(reduction=reduction)
    calls: list[int] = []
    handle = P.model.register_forward_hook(lambda *_: calls.append(1))
    R = vl.EmpiricalRisk(P.model, loss, loader)  # with the hooks of this moment
    handle.remove()
    weight = 1 if reduction == "mean" else N
    x = torch.rand(D, dtype=F64)
    assert close(vl.GGN(R) @ x, weight * DENSE.G @ x)
    assert close(vl.Hessian(R) @ x, weight * DENSE.hessian @ x)
    calls.clear()
    value, gradient = R.value_and_gradient()
    assert len(calls) == len(loader)  # both from one pass
    assert close(value, weight * DENSE.value)
    assert close(gradient, weight * DENSE.gradient)
    assert not value.requires_grad and not gradient.requires_grad


# Low-rank operators and projectors ----------------------------------------------------


def test_projectors_onto_leading_eigenvectors_and_the_complement() -> None:
    G = vl.GGN(risk())
    pairs = G.eigh(k=4)
    E = pairs.eigenvectors
    span, rest = vl.projector(pairs), vl.projector(pairs, complement=True)
    identity = torch.eye(D, dtype=F64)
    assert close(span.to_dense(), E @ E.T)
    assert close(rest.to_dense(), identity - E @ E.T)
    assert close((span + rest).to_dense(), identity)
    assert close((span @ span).to_dense(), E @ E.T)
    assert close((rest @ rest).to_dense(), identity - E @ E.T)
    assert close(span.trace(), torch.tensor(4.0, dtype=F64))
    x = torch.rand(D, dtype=F64)
    assert (span @ (rest @ x)).norm() <= 1e-12
    # The GGN without its leading eigenvalues.
    deflated = rest @ G @ rest
    evals = torch.linalg.eigvalsh(deflated.to_dense())
    remaining = torch.linalg.eigvalsh(DENSE.G)[:-4]
    assert close(evals[-len(remaining) :].relu(), remaining.relu(), 1e-8)


def test_projectors_make_columns_orthonormal() -> None:
    A = torch.rand(D, 3, dtype=F64)
    P_A = vl.projector(A).to_dense()
    assert close(P_A @ A, A)
    assert close(P_A, A @ torch.linalg.solve(A.T @ A, A.T))


@pytest.mark.parametrize("sizes", [(1e-30, 1.0), (1e30, 1e-30), (1e35, 1e35)], ids=str)
def test_projectors_of_columns_of_any_size(sizes) -> None:
    """Of float32, whose squares of these are zero or infinite."""
    A = torch.randn(D, 2, generator=torch.Generator().manual_seed(0))
    wide = A.double()
    expected = wide @ torch.linalg.solve(wide.T @ wide, wide.T)
    found = vl.projector(A * torch.tensor(sizes)).to_dense()
    assert close(found.double(), expected, 1e-5)


def test_wrong_directions_of_projectors() -> None:
    column = torch.rand(D, 1, dtype=F64)
    for wrong in (column[:, :0], column * torch.nan, column * torch.inf):
        with pytest.raises(ValueError, match=r"^directions: "):
            vl.projector(wrong)
    with pytest.raises(TypeError, match=r"^directions: float32 or float64"):
        vl.projector(column.half())
    with pytest.raises(ValueError, match="linearly dependent"):
        vl.projector(torch.cat([column, 2 * column], dim=1))
    with pytest.raises(ValueError, match="directions"):
        vl.projector(column.T)
    with pytest.raises(TypeError, match="directions"):
        vl.projector(column.numpy())
    with pytest.raises(TypeError, match="directions"):
        vl.projector(torch.ones(D, 1, dtype=torch.long))


# Spectral densities -------------------------------------------------------------------


@pytest.mark.parametrize("make", [vl.GGN, vl.Hessian])
def test_densities_are_those_of_curvlinops_on_its_own_operators(make) -> None:
    theirs = {
        vl.GGN: curvlinops.GGNLinearOperator,
        vl.Hessian: curvlinops.HessianLinearOperator,
    }[make](P.model, P.loss, list(P.model.parameters()), [P.data])
    evals = torch.linalg.eigvalsh(DENSE.G if make is vl.GGN else DENSE.hessian)
    bounds = evals.min().item(), evals.max().item()
    spectrum = vl.LanczosSpectrum(make(risk()), 6, bounds, seed=3)
    grid, density = spectrum.density(100, num_repeats=2)
    torch.manual_seed(3)
    reference = curvlinops.lanczos_approximate_spectrum(theirs, 6, 100, 2, 3.0, bounds)
    assert close(grid, reference[0])
    assert close(density, reference[1], 1e-6)

    low, high = evals.abs().min().item(), evals.abs().max().item()
    spectrum = vl.LanczosSpectrum(make(risk()), 6, (low, high), seed=3)
    grid, density = spectrum.log_density(100, num_repeats=2)
    torch.manual_seed(3)
    reference = curvlinops.lanczos_approximate_log_spectrum(
        theirs, 6, 100, 2, 1.04, (low, high)
    )
    assert close(grid, reference[0])
    assert close(density, reference[1], 1e-6)


def test_a_density_is_that_of_the_eigenvalues() -> None:
    """Moments of the estimate, over many runs, are those of the spectrum."""
    evals = torch.cat([torch.linspace(0, 1, 150), torch.linspace(3, 4, 50)]).double()
    spectrum = vl.LanczosSpectrum(vl.Diagonal(evals), 40, (0.0, 4.0))
    grid, density = spectrum.density(num_repeats=20)
    assert 0.97 < torch.trapezoid(density, grid) < 1.03
    mean = torch.trapezoid(grid * density, grid)
    assert (mean - evals.mean()).abs() < 0.1 * evals.mean()
    gap = (grid > 1.5) & (grid < 2.5)
    assert torch.trapezoid(density[gap], grid[gap]) < 0.02
    upper = grid > 2.5
    assert (torch.trapezoid(density[upper], grid[upper]) - 0.25).abs() < 0.05


def test_low_rank_operators_know_the_ends_of_their_spectrum() -> None:
    G = vl.GGN(risk())
    assert G.factor.shape[1] < D
    largest = torch.linalg.eigvalsh(DENSE.G)[-1].item()
    for method in ("density", "log_density"):
        known = getattr(vl.LanczosSpectrum(G, 6), method)(64)
        given = getattr(vl.LanczosSpectrum(G, 6, (0.0, largest)), method)(64)
        assert close(known[0], given[0])
        assert close(known[1], given[1])


def test_runs_are_kept_and_random_numbers_left_alone() -> None:
    products: list[int] = []

    class Counting(vl.TorchLinearOperator):
        self_adjoint = True

        def _multiply(self, X: Tensor) -> Tensor:
            products.append(X.shape[1])
            return torch.linspace(0, 1, 50, dtype=F64)[:, None] * X

    state = torch.get_rng_state()
    op = Counting((50, 50), F64, placing.device())
    spectrum = vl.LanczosSpectrum(op, 10, (0.0, 1.0))
    spectrum.density(num_repeats=2)
    assert sum(products) == 20
    spectrum.density(num_repeats=2, num_points=10, kappa=2.0)
    assert sum(products) == 20
    further = spectrum.density(num_repeats=3)
    assert sum(products) == 30
    assert torch.equal(state, torch.get_rng_state())
    anew = vl.LanczosSpectrum(op, 10, (0.0, 1.0)).density(num_repeats=3)
    assert close(further[1], anew[1])


@pytest.mark.parametrize("make", [vl.GGN, vl.Hessian])
def test_ends_come_from_the_runs_themselves(make) -> None:
    op = make(risk())
    products: list[int] = []
    multiply = op._multiply
    op._multiply = lambda X: products.append(X.shape[1]) or multiply(X)
    spectrum = vl.LanczosSpectrum(op, 9)
    grid, density = spectrum.density(num_repeats=2)
    log_grid, log_density = spectrum.log_density(num_repeats=2)
    assert sum(products) == 18  # one product a Lanczos vector, for both densities
    evals = torch.linalg.eigvalsh(DENSE.G if make is vl.GGN else DENSE.hessian)
    # The grid is 5 % longer on each side, and the ends are seen from inside.
    low, high = evals[0].clamp(max=0.0), evals[-1]
    length = high - low
    assert high <= grid[-1] <= high + 0.05 * length * 1.001
    assert low - 0.05 * length * 1.001 <= grid[0] <= low
    sizes = evals.abs()
    assert (density.isfinite() & log_density.isfinite()).all()
    assert sizes.max() <= log_grid[-1] <= 2 * sizes.max()


def test_clusters_away_from_zero_and_one_end_given() -> None:
    evals = torch.cat([torch.linspace(-4, -3, 80), torch.linspace(1, 2, 40)]).double()
    grid, density = vl.LanczosSpectrum(vl.Diagonal(evals), 30).density(num_repeats=5)
    assert (grid[0] - (-4 - 0.05 * 6)).abs() < 0.05
    assert (grid[-1] - (2 + 0.05 * 6)).abs() < 0.05
    below = grid < 0
    assert (torch.trapezoid(density[below], grid[below]) - 2 / 3).abs() < 0.1
    given = vl.LanczosSpectrum(vl.Diagonal(evals), 30, (None, 5.0)).density()[0]
    assert (given[-1] - (5 + 0.05 * 9)).abs() < 0.05
    log_grid, _ = vl.LanczosSpectrum(vl.Diagonal(evals), 30).log_density()
    assert log_grid[0] <= 1.0
    assert log_grid[-1] >= 4.0


def test_wrong_arguments_of_spectra() -> None:
    G = vl.GGN(risk())
    for ncv in (1, G.factor.shape[1] + 2):
        with pytest.raises(ValueError, match="ncv"):
            vl.LanczosSpectrum(G, ncv)
    with pytest.raises(TypeError, match="operator"):
        vl.LanczosSpectrum(vl.Jacobian(risk()), 5)
    with pytest.raises(ValueError, match="num_repeats"):
        vl.LanczosSpectrum(G, 5).density(num_repeats=0)


# Approximations and block structures --------------------------------------------------


@pytest.mark.parametrize("structure", ["net", "module", "parameter"])
@pytest.mark.parametrize("mc_samples", [0, 2])
@pytest.mark.parametrize("subsampling", [None, [0, 3, 6]], ids=str)
def test_approximations_and_block_structures(
    subsampling, mc_samples, structure
) -> None:
    """Mini-batch or sub-sampled, exact or Monte Carlo, by net, layer or parameter."""
    R = risk() if subsampling is None else risk().subset(subsampling)
    generator = torch.Generator().manual_seed(0)
    G = vl.GGN(R, mc_samples=mc_samples, generator=generator)
    whole = G.to_dense()
    if not mc_samples:
        assert close(whole, ggn(DENSE, torch.arange(D), subsampling))
    width = {"net": 4, "module": 2, "parameter": 1}[structure]
    names = list(R.params)
    parts = [names[at : at + width] for at in range(0, 4, width)]
    blocks = G.block_diagonal(parts if structure == "net" else structure)
    places = torch.arange(D).split(torch.tensor(SIZES).view(-1, width).sum(1).tolist())
    assert len(blocks.blocks) == len(places)
    case = setting_of(P)
    params = list(case.model.parameters())
    groups = [{"params": params[at : at + width]} for at in range(0, 4, width)]
    drop_in = case.run(EigvalshComputation(subsampling, mc_samples), groups)
    samples = N if subsampling is None else len(subsampling)
    for block, place, evals in zip(blocks.blocks, places, drop_in, strict=True):
        reference = torch.linalg.eigvalsh(whole[place][:, place])
        found = block.eigvalsh()
        assert close(found, reference[-len(found) :], 1e-8)
        pairs = block.eigh(k=2)
        assert close(pairs.eigenvalues, reference[-2:], 1e-8)
        assert len(evals) == samples * (mc_samples or C)
        if not mc_samples:
            assert close(evals[-2:], reference[-2:], 1e-8)
