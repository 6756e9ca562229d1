"""What is made of the spectrum of the GGN: eigenpairs, inverses, diagonals, blocks."""

import pytest
import torch
from torch import Tensor

import vivit_linop as vl
from tests.cases import CONVEX, dense, problem
from tests.curvature_cases import (
    FEW,
    blocks_of,
    check_pairs,
    check_products,
    close,
    risk,
)
from vivit_linop.operators import Damped, Woodbury

EPS = torch.finfo(torch.float64).eps


# The spectrum -------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONVEX)
def test_eigenvalues_and_vectors(name: str) -> None:
    of, truth = risk(name), dense(name)
    G = vl.GGN(of)
    count = min(G.factor.shape)
    expected = torch.linalg.eigvalsh(truth.G)
    largest = expected[-1].clamp(min=0.0)
    evals = G.eigvalsh()
    assert evals.shape == (count,)
    assert (evals.diff() >= 0).all()
    top = expected[-count:]
    assert (evals - top).abs().max() <= 1e-10 * largest

    pairs = G.eigh()
    check_pairs(pairs, truth.G)
    # What is left out is zero to rounding, what is kept is not.
    assert (pairs.eigenvalues > 0).all()
    left_out = top[: count - len(pairs)]
    assert (left_out.abs() <= 1e-12 * largest).all()
    kept = top[count - len(pairs) :]
    assert ((pairs.eigenvalues - kept).abs() <= 1e-10 * largest).all()

    everything = G.eigh(select=lambda evals: list(range(len(evals))))
    assert len(everything) == count
    check_pairs(everything, truth.G)
    few = G.eigh(k=min(2, count))
    check_pairs(few, truth.G)
    assert (few.eigenvalues - top[-min(2, count) :]).abs().max() <= 1e-10 * largest
    # In the order of the criterion, with indices from the end.
    order = [-1, 0] if count > 1 else [0]
    chosen = G.eigh(select=lambda evals: order)
    check_pairs(chosen, truth.G)
    assert torch.equal(chosen.eigenvalues, evals[order]) or close(
        chosen.eigenvalues, evals[order], EPS * 100, largest
    )


@pytest.mark.parametrize("name", FEW)
def test_spectrum_in_float32(name: str) -> None:
    of, truth = risk(name, torch.float32), dense(name)
    expected = torch.linalg.eigvalsh(truth.G)
    evals = vl.GGN(of).eigvalsh().double()
    rtol = problem(name).rtol32
    assert (evals - expected[-len(evals) :]).abs().max() <= rtol * expected[-1]
    for pairs in (
        vl.GGN(of).eigh(),
        vl.GGN(of).eigh(select=lambda evals: range(len(evals))),
    ):
        values, vectors = pairs
        unit = torch.eye(len(values))
        assert (vectors.T @ vectors - unit).abs().max() <= 1e-5
        residual = truth.G @ vectors.double() - values.double() * vectors.double()
        assert residual.norm(dim=0).max() <= 10 * rtol * expected[-1]


@pytest.mark.parametrize("name", ["linear_loss_of_linear_net", "ce_one_class"])
def test_zero_curvature(name: str) -> None:
    G = vl.GGN(risk(name))
    assert G.eigvalsh().abs().max() == 0.0
    assert len(G.eigh()) == 0  # no pair is numerically nonzero
    evals, evecs = G.eigh(k=1)
    assert evals.item() == 0.0 and abs(evecs.norm().item() - 1.0) < 1e-12
    x = torch.ones(G.shape[0], dtype=torch.float64)
    assert close((G + 0.5 * vl.Identity(len(x))).solve(x), 2.0 * x)


def test_wide_range_of_eigenvalues() -> None:
    # Those above the rounding of λ_max in the Gram matrix have correct digits.
    name = "wide_range_of_scales"
    expected = torch.linalg.eigvalsh(dense(name).G)
    evals = vl.GGN(risk(name)).eigvalsh()
    errors = (evals - expected[-len(evals) :]).abs()
    assert errors.max() <= 100 * EPS * expected[-1]
    # Half of the columns are kept by default: those with digits.
    kept = vl.GGN(risk(name)).eigh()
    check_pairs(kept, dense(name).G, 1e-12)


def test_eigenpairs_of_scaled_damped_and_fisher() -> None:
    name = "mlp_ce_mean"
    of, truth = risk(name), dense(name)
    G, D = vl.GGN(of), truth.D
    unit = torch.eye(D, dtype=torch.float64)
    check_pairs((3.0 * G).eigh(), 3.0 * truth.G)
    check_pairs((3.0 * G).eigh(k=4), 3.0 * truth.G)
    check_pairs((G + 0.5 * vl.Identity(D)).eigh(), truth.G + 0.5 * unit)
    check_pairs(vl.EmpiricalFisher(of).eigh(), truth.F)
    lowest = (-2.0 * G).eigh(select=lambda evals: [0, 1])
    check_pairs(lowest, -2.0 * truth.G)
    expected = torch.linalg.eigvalsh(-2.0 * truth.G)[:2]
    assert close(lowest.eigenvalues, expected, 1e-11)
    evals = (G + 0.5 * vl.Identity(D)).eigvalsh()
    expected = torch.linalg.eigvalsh(truth.G + 0.5 * unit)
    assert close(evals, expected[-len(evals) :], 1e-11)
    assert len(evals) == D


# Inverses, diagonals, blocks ----------------------------------------------------------


@pytest.mark.parametrize("name", CONVEX)
def test_damped_inverse(name: str) -> None:
    of, truth = risk(name), dense(name)
    largest = torch.linalg.matrix_norm(truth.G, 2).item() or 1.0
    unit = torch.eye(truth.D, dtype=torch.float64)
    b = torch.randn(truth.D, 2, generator=torch.Generator().manual_seed(2)).double()
    G = vl.GGN(of)
    for delta in [largest * 10.0**e for e in (-6, -3, 0, 3)]:
        damped = G + delta * vl.Identity(truth.D)
        assert isinstance(damped, Damped)
        inverse = damped.inv()
        assert isinstance(inverse, Woodbury) and isinstance(inverse.inv(), Damped)
        expected = torch.linalg.solve(truth.G + delta * unit, b)
        assert close(inverse @ b, expected, 1e-9), delta
        assert close(damped.solve(b[:, 0]), expected[:, 0], 1e-9)
        logdet = torch.linalg.slogdet(truth.G + delta * unit).logabsdet
        assert abs(damped.logdet() - logdet) <= 1e-9 * truth.D
        assert abs(inverse.logdet() + logdet) <= 1e-9 * truth.D
    check_products(inverse, torch.linalg.inv(truth.G + delta * unit), 1e-9)


@pytest.mark.parametrize("name", FEW)
def test_damped_inverse_in_float32(name: str) -> None:
    of, truth = risk(name, torch.float32), dense(name)
    delta = 1e-2 * torch.linalg.matrix_norm(truth.G, 2).item()
    inverse = (vl.GGN(of) + delta * vl.Identity(truth.D)).inv()
    unit = torch.eye(truth.D, dtype=torch.float64)
    expected = torch.linalg.inv(truth.G + delta * unit)
    # λ_max/δ = 100 multiplies what float32 rounds.
    check_products(inverse, expected, 100 * problem(name).rtol32)


@pytest.mark.parametrize("name", CONVEX)
def test_diagonal_and_trace(name: str) -> None:
    of, truth = risk(name), dense(name)
    for op, matrix in (
        (vl.GGN(of), truth.G),
        (vl.EmpiricalFisher(of), truth.F),
        (vl.GGN(of).factor.gram, None),
        (vl.LossHessian(of), truth.H),
    ):
        matrix = op.to_dense() if matrix is None else matrix
        assert close(op.diagonal(), matrix.diagonal(), scale=matrix.norm())
        scale = matrix.diagonal().abs().sum()
        assert abs(op.trace() - matrix.trace()) <= 1e-12 * scale


def check_blocks(
    op: vl.BlockDiagonal, G: Tensor, sizes: list[int], groups: list[list[int]]
) -> None:
    expected = blocks_of(G, sizes, groups)
    places = torch.arange(len(G)).split(sizes)
    whole = torch.zeros_like(G)
    for group, block in zip(groups, expected, strict=True):
        index = torch.cat([places[i] for i in group])
        whole[index[:, None], index] = block
    assert isinstance(op, vl.BlockDiagonal) and len(op.blocks) == len(groups)
    # Relative to all of G: a block may be small because signals cancel in the net.
    size = whole.norm()
    x = torch.randn(len(G), 2, generator=torch.Generator().manual_seed(5)).double()
    for block, matrix in zip(op.blocks, expected, strict=True):
        part = x[: len(matrix)]
        assert close(block @ part, matrix @ part, scale=size * part.norm())
        assert close(block.to_dense(), matrix, scale=size)
        evals = block.eigvalsh()
        top = torch.linalg.eigvalsh(matrix)[-len(evals) :]
        assert (evals - top).abs().max() <= 1e-12 * size
        values, vectors = block.eigh()
        unit = torch.eye(len(values), dtype=torch.float64)
        assert ((vectors.T @ vectors - unit).abs() <= 1e-10).all()
        residuals = matrix @ vectors - values * vectors
        assert (residuals.norm(dim=0) <= 1e-10 * size).all()
        assert close(block.diagonal(), matrix.diagonal(), scale=size)
    check_products(op, whole, 1e-12)
    assert close(op.to_dense(), whole)
    delta = 0.1 * torch.linalg.matrix_norm(whole, 2).item() or 1.0
    inverse = (op + delta * vl.Identity(len(G))).inv()
    unit = torch.eye(len(G), dtype=torch.float64)
    check_products(inverse, torch.linalg.inv(whole + delta * unit), 1e-10)
    logdet = torch.linalg.slogdet(whole + delta * unit).logabsdet
    assert abs((op + delta * vl.Identity(len(G))).logdet() - logdet) <= 1e-9 * len(G)
    check_pairs(op.eigh(), whole)


@pytest.mark.parametrize("name", [n for n in CONVEX if n != "zero_size_parameter"])
def test_block_diagonal(name: str) -> None:
    of, truth = risk(name), dense(name)
    names = list(of.params)
    op = vl.GGN(of).block_diagonal("parameter")
    each = [[i] for i in range(len(names))]
    if name in FEW:
        check_blocks(op, truth.G, of.sizes, each)
    blocks = blocks_of(truth.G, of.sizes, each)
    for block, matrix in zip(op.blocks, blocks, strict=True):
        assert close(block.to_dense(), matrix, scale=truth.G.norm())
    modules: dict[str, list[int]] = {}
    for i, key in enumerate(names):
        modules.setdefault(key.rpartition(".")[0], []).append(i)
    by_module = vl.GGN(of).block_diagonal("module")
    assert [b.shape[0] for b in by_module.blocks] == [
        sum(of.sizes[i] for i in group) for group in modules.values()
    ]
    expected = blocks_of(truth.G, of.sizes, list(modules.values()))
    for block, matrix in zip(by_module.blocks, expected, strict=True):
        # Blocks may be all cancellation: relative to the whole.
        assert close(block.to_dense(), matrix, scale=truth.G.norm())


def test_block_diagonal_of_groups() -> None:
    name = "residual"  # first, inner, last: weight and bias each
    net, of, truth = problem(name).model, risk(name), dense(name)
    groups = [[3, 0], [5, 1, 2, 4]]  # not contiguous, not in order
    parameters = list(net.parameters())
    lists = [[parameters[i] for i in group] for group in groups]
    dicts = [{"params": members, "lr": 0.1} for members in lists]
    optimizer = torch.optim.SGD(
        [{"params": members, "lr": 0.1 * i} for i, members in enumerate(lists, 1)]
    )
    for blocks in (lists, dicts, optimizer.param_groups):
        op = vl.GGN(of).block_diagonal(blocks)
        check_blocks(op, truth.G, of.sizes, groups)
        # Blocks have the order in which their parameters were given.
        expected = blocks_of(truth.G, of.sizes, groups)
        assert close(op.blocks[0].to_dense(), expected[0])


def test_block_diagonal_of_scaled_and_sampled() -> None:
    name = "mlp_ce_mean"
    of, truth = risk(name), dense(name)
    groups = [[i] for i in range(4)]
    check_blocks(
        (3.0 * vl.GGN(of)).block_diagonal("parameter"), 3.0 * truth.G, of.sizes, groups
    )
    sampled = vl.GGN(of, mc_samples=2, generator=torch.Generator().manual_seed(0))
    op = sampled.block_diagonal("parameter")
    check_blocks(op, sampled.to_dense(), of.sizes, groups)


def test_block_of_a_parameter_without_entries() -> None:
    of, truth = risk("zero_size_parameter"), dense("zero_size_parameter")
    op = vl.GGN(of).block_diagonal("module")
    matrix = torch.zeros_like(truth.G)
    for block in blocks_of(truth.G, of.sizes, [[0], [1, 2]]):
        matrix[-len(block) :, -len(block) :] = block if len(block) else matrix
    check_products(op, matrix, 1e-12)
