"""Monte-Carlo factors are one draw, unbiased, and of the generator that was given."""

import pytest
import torch

import vivit_linop as vl
from tests.cases import NAMES, dense, problem
from tests.curvature_cases import check_pairs, check_products, close, fresh, risk

# Monte-Carlo --------------------------------------------------------------------------

LIKELIHOODS = [name for name in NAMES if problem(name).likelihood]


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_sampled_factor_is_one_draw(name: str) -> None:
    of, truth = risk(name), dense(name)

    def sampled(seed: int) -> vl.GGN:
        return vl.GGN(of, mc_samples=2, generator=torch.Generator().manual_seed(seed))

    G = sampled(0)
    V = G.factor
    assert V.shape == (truth.D, 2 * truth.N) and V.mc_samples == 2
    S = V.output.to_dense()
    dense_V = truth.J.T @ S
    check_products(V, dense_V, 1e-12)
    check_products(G, dense_V @ dense_V.T, 1e-12)
    assert close((V.T @ V).to_dense(), dense_V.T @ dense_V)
    evals = torch.linalg.eigvalsh(dense_V @ dense_V.T)
    got = G.eigvalsh()
    assert (got - evals[-len(got) :]).abs().max() <= 1e-10 * evals[-1]
    check_pairs(G.eigh(), dense_V @ dense_V.T)
    # The same from the same seed through every way there is; another from another.
    x = torch.ones(truth.D, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for other in (
        sampled(0),
        (lambda W: W @ W.T)(
            vl.GGNFactor(of, mc_samples=2, generator=torch.Generator().manual_seed(0))
        ),
        (lambda J, R: J.T @ R @ R.T @ J)(
            vl.Jacobian(of), vl.LossHessian(of).sqrt(2, generator)
        ),
    ):
        assert close(other @ x, G @ x, 1e-13, scale=dense_V.norm() ** 2 * x.norm())
    if name != "ce_saturated":  # hardly anything is left to chance there
        # A few labels may be drawn alike by chance, but not again and again.
        assert not all(close(sampled(seed) @ x, G @ x, 1e-3) for seed in range(1, 6))


def test_sampled_factor_takes_the_global_generator_by_default() -> None:
    of = risk("mlp_ce_mean")
    x = torch.ones(of.num_params, dtype=torch.float64)
    torch.manual_seed(7)
    first, second = vl.GGN(of, mc_samples=1), vl.GGN(of, mc_samples=1)
    torch.manual_seed(7)
    again = vl.GGN(of, mc_samples=1)
    assert torch.equal(first @ x, again @ x)
    assert not close(first @ x, second @ x, 1e-3)
    assert torch.equal(first @ x, first @ x)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_sampled_root_is_unbiased(name: str) -> None:
    """E[S Sᵀ] = H to five standard errors, which are estimated from the samples."""
    of, truth = risk(name), dense(name)
    M = 4000
    S = vl.LossHessian(of).sqrt(M, torch.Generator().manual_seed(0))
    blocks = S.blocks
    N, C = truth.N, truth.C
    roots = torch.cat(
        [blocks(b).reshape(n, C, M) for b, n in enumerate(of.batch_sizes)]
    )
    products = M * torch.einsum("ncm,ndm->ncdm", roots, roots)
    mean, spread = products.mean(-1), products.std(-1) / M**0.5
    H = truth.H.reshape(N, C, N, C).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    scale = H.abs().max()
    # A class of probability p is not drawn at all with probability (1 − p)^M, so that
    # its spread is not seen: an entry may be off by what p < 10/M contributes.
    assert ((mean - H).abs() <= 5 * spread + 10 / M * scale * (spread == 0)).all()
    # Without bias in sum: the trace, which averages over all entries.
    traces = products.diagonal(dim1=1, dim2=2).sum((0, 2))
    error = 5 * traces.std() / M**0.5 + 1e-9 * H.diagonal(dim1=1, dim2=2).sum()
    if name not in ("ce_saturated", "bce_saturated"):
        assert abs(traces.mean() - H.diagonal(dim1=1, dim2=2).sum()) <= error


def test_sampled_mse_is_unbiased_through_the_net() -> None:
    name = "linear_mse"
    of, truth = risk(name), dense(name)
    draws = torch.stack(
        [
            vl.GGN(of, mc_samples=1, generator=torch.Generator().manual_seed(seed))
            .to_dense()
            .flatten()
            for seed in range(300)
        ]
    )
    error = (draws.mean(0) - truth.G.flatten()).norm()
    # The mean of independent draws is off by the root of the sum of their variances.
    assert error <= 3 * draws.var(0).sum().sqrt() / 300**0.5


# Forms of construction ----------------------------------------------------------------


def test_diagonal_of_sampled_loss_hessian() -> None:
    of = fresh("ce_sequence")
    S = vl.LossHessian(of).sqrt(2, torch.Generator().manual_seed(0))
    H = S @ S.T
    torch.testing.assert_close(H.diagonal(), H.to_dense().diagonal())
