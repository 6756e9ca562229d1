"""Kronecker approximations: BackPACK's, curvlinops', and where they are exact."""

from typing import Any

import curvlinops
import pytest
import torch
from backpack import extensions as bp
from torch import Tensor, nn

import vivit_linop as vl
from tests import backpack_peer, cases
from tests.backpack_peer import KRONECKER, REDUCTIONS, peer_risk
from tests.cases import Problem, dense, dense_of, problem
from tests.comparing import close, draw
from tests.curvature_cases import risk, risk_of
from tests.pairs import pairwise
from vivit_linop.operators import DampedRoot, Gram, LowRank
from vivit_linop.testing import check_operator

RTOL = 1e-10


def block_diagonal_of(matrix: Tensor, sizes: list[int]) -> Tensor:
    parts, start = [], 0
    for size in sizes:
        parts.append(matrix[start : start + size, start : start + size])
        start += size
    return torch.block_diag(*parts)


# As BackPACK ------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", KRONECKER)
def test_kflr_as_backpack(name: str, reduction: str) -> None:
    parameters = backpack_peer.run(name, reduction, bp.KFLR())
    K = vl.KFAC(peer_risk(name, reduction), variant="exact", weight_sharing="backpack")
    assert len(K.blocks) == len(parameters)
    for block, p in zip(K.blocks, parameters, strict=True):
        factors = block.factors if isinstance(block, vl.Kronecker) else (block,)
        for factor, theirs in zip(factors, p.kflr, strict=True):
            assert close(factor.to_dense(), theirs)


def test_kfac_is_kflr_in_expectation() -> None:
    """The mean of 40 times 50 draws is within 5 standard errors, entry by entry."""
    of = peer_risk("cnn_ce", "mean")
    exact = vl.KFAC(of, variant="exact")
    generator = torch.Generator().manual_seed(0)
    draws = [vl.KFAC(of, mc_samples=50, generator=generator) for _ in range(40)]
    for place in (0, 2, 4):  # the weights
        B = exact.blocks[place].factors[0].matrix
        drawn = torch.stack([K.blocks[place].factors[0].matrix for K in draws])
        error = drawn.std(0) / len(draws) ** 0.5
        assert ((drawn.mean(0) - B).abs() <= 5 * error + 1e-14).all()
        assert error.norm() <= 0.05 * B.norm()


def test_empirical_is_of_the_gradients() -> None:
    of, truth = risk("mlp_ce_mean"), dense("mlp_ce_mean")
    K = vl.KFAC(of, variant="empirical")
    (X, _) = problem("mlp_ce_mean").batches()[0]
    # Of the first layer, b is the gradient in its bias.
    b = truth.U[20:25]
    B, A = K.blocks[0].factors
    assert K.names[:2] == [["0.weight"], ["0.bias"]]
    assert close(B.to_dense(), truth.r * b @ b.T)
    assert close(A.to_dense(), X.T @ X / truth.N)
    assert close(K.blocks[1].to_dense(), truth.F[20:25, 20:25])


# As curvlinops ----------------------------------------------------------------------


@pytest.mark.parametrize("joint_bias", [True, False])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["mlp_ce", "cnn_ce"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_as_curvlinops(
    name: str, reduction: str, sharing: str, joint_bias: bool
) -> None:
    of = peer_risk(name, reduction)
    net, loss, data = backpack_peer.built(name, reduction)
    theirs = curvlinops.KFACLinearOperator(
        net,
        loss,
        list(net.parameters()),
        [data],
        fisher_type=curvlinops.FisherType.TYPE2,
        kfac_approx=sharing,
        separate_weight_and_bias=not joint_bias,
        check_deterministic=False,
    )
    K = vl.KFAC(of, variant="exact", weight_sharing=sharing, joint_bias=joint_bias)
    assert len(K.blocks) == (3 if joint_bias else 6)
    x = draw(of.num_params, 3)
    got, expected = K @ x, theirs @ x
    if sharing == "expand" and not joint_bias and name == "cnn_ce":
        # Its bias blocks leave out what positions have in common; ours are exact.
        G = vl.GGN(of).block_diagonal("parameter").blocks
        for place, (ours, exact) in enumerate(zip(K.blocks, G, strict=True)):
            if place % 2:
                assert close(ours.to_dense(), exact.to_dense())
        weights = [n.endswith("weight") for n in of.params]
        keep = torch.cat(
            [torch.full((s,), w) for s, w in zip(of.sizes, weights, strict=True)]
        )
        got, expected = got[keep], expected[keep]
    assert close(got, expected)


# Where it is exact ------------------------------------------------------------------


def _deep_linear() -> Problem:
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 2)).double()
    return Problem(net, nn.MSELoss(), (draw(7, 4), draw(7, 2)))


def _each_position_alone() -> Problem:
    net = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False))
    return Problem(net.double(), nn.MSELoss(), (draw(4, 6, 4), draw(4, 6, 3)))


def _averaged_over_positions() -> Problem:
    net = cases.Lambda(
        lambda self, X: self.second(self.first(X)).mean(1),
        first=nn.Linear(4, 5),
        second=nn.Linear(5, 3),
    ).double()
    return Problem(net, nn.MSELoss(), (draw(4, 6, 4), draw(4, 3)))


def _convolutions_averaged_over_positions() -> Problem:
    net = nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).double()
    return Problem(net, nn.MSELoss(reduction="sum"), (draw(4, 2, 3, 3), draw(4, 2)))


def _transposed_convolution_of_one_output() -> Problem:
    net = nn.Sequential(
        nn.ConvTranspose1d(3, 2, 2, padding=2, bias=False),
        nn.Flatten(),
        nn.Linear(2, 2, bias=False),
    ).double()
    return Problem(net, nn.MSELoss(), (draw(5, 3, 4), draw(5, 2)))


def _transposed_convolutions_averaged() -> Problem:
    net = nn.Sequential(
        nn.ConvTranspose2d(2, 3, 2, stride=2, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).double()
    return Problem(net, nn.MSELoss(), (draw(4, 2, 2, 3), draw(4, 3)))


def _embedding() -> Problem:
    net = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2, bias=False)).double()
    index = torch.tensor([0, 2, 1, 2, 0])
    return Problem(net, nn.MSELoss(), (index, draw(5, 2)))


def _one_sample() -> Problem:
    net = cases.mlp(4, 5, 3)
    return Problem(net, nn.CrossEntropyLoss(), (draw(1, 4), torch.tensor([1])))


EXACT = {
    "deep_linear": (_deep_linear, ["expand", "reduce", "backpack"]),
    "each_position_alone": (_each_position_alone, ["expand"]),
    "averaged_over_positions": (_averaged_over_positions, ["reduce"]),
    "convolutions_averaged": (_convolutions_averaged_over_positions, ["reduce"]),
    "one_sample": (_one_sample, ["expand", "reduce", "backpack"]),
    "transposed_convolution": (
        _transposed_convolution_of_one_output,
        ["expand", "reduce", "backpack"],
    ),
    "transposed_convolutions_averaged": (_transposed_convolutions_averaged, ["reduce"]),
    "embedding": (_embedding, ["expand", "reduce", "backpack"]),
}


@pytest.mark.parametrize("joint_bias", [True, False])
@pytest.mark.parametrize("name", EXACT)
def test_equals_the_ggn(name: str, joint_bias: bool) -> None:
    build, sharings = EXACT[name]
    built = build()
    of, truth = risk_of(built), dense_of(built)
    blocks = of.sizes
    if joint_bias and len(blocks) > 2:
        blocks = [w + b for w, b in zip(blocks[::2], blocks[1::2], strict=True)]
    expected = block_diagonal_of(truth.G, blocks)
    for sharing in vl.curvature.kfac.WEIGHT_SHARINGS:
        K = vl.KFAC(of, variant="exact", weight_sharing=sharing, joint_bias=joint_bias)
        # One sample has several columns, and b depends on them only.
        assert close(K.to_dense(), expected) == (sharing in sharings)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize(
    "name", ["residual", "normalisations", "recurrent_gru", "convolutions", "attention"]
)
def test_what_is_not_a_layer_is_exact(name: str, sharing: str) -> None:
    of, truth = risk(name), dense(name)
    K = vl.KFAC(of, variant="exact", weight_sharing=sharing)
    places = dict(zip(of.params, torch.arange(truth.D).split(of.sizes), strict=True))
    matrix = K.to_dense()
    seen = 0
    for names, block in zip(K.names, K.blocks, strict=True):
        if not isinstance(block, vl.Kronecker):
            index = places[names[0]]
            exact = truth.G[index][:, index]
            assert close(block.to_dense(), exact) or not exact.any()
            seen += 1
    assert seen
    check_operator(K, matrix)
    evals = torch.linalg.eigvalsh(matrix)
    assert evals.min() >= -1e-12 * evals.max()
    assert close(K.trace(), matrix.trace())


def test_groups_and_transposed_convolutions() -> None:
    """A block for each group; the exact trace of single positions and samples."""
    of = peer_risk("grouped_and_transposed", "mean")
    K = vl.KFAC(of, variant="exact", joint_bias=True)
    assert K.names == [
        ["0.weight", "0.bias"],
        ["0.weight", "0.bias"],
        ["2.weight", "2.bias"],
        ["5.weight", "5.bias"],
    ]
    check_operator(K, K.to_dense())
    # B and A of each group are those of a convolution of that group alone.
    net, loss, (X, y) = backpack_peer.built("grouped_and_transposed", "mean")
    first = net[0]

    def grouped(params: dict[str, Tensor], X: Tensor) -> Tensor:
        parts = [
            nn.functional.conv2d(X[:, 2 * g : 2 * g + 2], params[f"w{g}"])
            for g in range(2)
        ]
        hidden = torch.cat(parts, dim=1) + first.bias.detach()[:, None, None]
        return net[1:](hidden)

    params = {f"w{g}": first.weight.detach()[3 * g : 3 * g + 3] for g in range(2)}
    apart = vl.KFAC(vl.EmpiricalRisk(grouped, loss, (X, y), params), variant="exact")
    together = vl.KFAC(of, variant="exact")
    for g in range(2):
        assert close(together.blocks[g].to_dense(), apart.blocks[g].to_dense())


@pytest.mark.parametrize("kind", [vl.KFAC, vl.EKFAC])
def test_a_row_for_padding_has_no_curvature(kind: Any) -> None:
    """Positions of padding use no row; another call may look the same row up."""
    index, table = torch.tensor([[0, 2, 2], [3, 2, 1], [2, 2, 2]]), draw(4, 3)

    def net(params: dict[str, Tensor], X: Tensor) -> Tensor:
        table = params["table"]
        found = nn.functional.embedding(X, table, padding_idx=2).tanh()
        if params.get("again") is not None:
            found = found + nn.functional.embedding(X, table, padding_idx=-1)
        return found.sum(1)

    loss, y = nn.MSELoss(), draw(3, 3)
    alone = vl.EmpiricalRisk(net, loss, (index, y), {"table": table})
    K = kind(alone, variant="exact").to_dense().view(4, 3, 4, 3)
    assert not K[2].any() and K[[0, 1, 3]].any(3).any(2).any(1).all()
    twice = {"table": table, "again": draw(1)}
    A = kind(vl.EmpiricalRisk(net, loss, (index, y), twice), variant="exact").blocks[0]
    if kind is vl.KFAC:
        # Rows 2 and 3 are looked up by one of the two calls only, of 18 positions.
        counts = torch.tensor([2, 2, 6, 1]).double()
        assert close(A.factors[0].to_dense(), torch.diag(counts) / 18)


def test_large_blocks_of_others_are_low_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vl.curvature.plan, "LARGEST_DENSE_BLOCK", 4)
    of = risk("mlp_ce_mean")
    K = vl.KFAC(of, variant="exact")
    assert isinstance(K.blocks[1], LowRank)
    assert close(K.blocks[1].to_dense(), dense("mlp_ce_mean").G[20:25, 20:25])


# EKFAC --------------------------------------------------------------------------------


def corrected(K: vl.KFAC, matrix: Tensor) -> Tensor:
    """KFAC's matrix, its Kronecker blocks with the diagonal of a matrix in their Q."""
    places = torch.arange(len(matrix)).split([b.shape[0] for b in K.blocks])
    result = K.to_dense()
    for block, index in zip(K.blocks, K.indices or places, strict=True):
        if isinstance(block, vl.Kronecker):
            Q = torch.kron(*(evecs for _, evecs in block.factor_eigenpairs))
            evals = (Q.T @ matrix[index][:, index] @ Q).diagonal()
            result[index[:, None], index] = (Q * evals) @ Q.T
    return result


@pytest.mark.parametrize(
    ("name", "sharing", "joint_bias"),
    pairwise(
        ["mlp_ce_mean", "cnn", "convolutions", "reused_and_tied", "attention"],
        ["expand", "reduce", "backpack"],
        [True, False],
    ),
)
def test_ekfac_has_the_diagonal_of_the_ggn(
    name: str, sharing: str, joint_bias: bool
) -> None:
    of, truth = risk(name), dense(name)
    E, K = (
        kind(of, variant="exact", weight_sharing=sharing, joint_bias=joint_bias)
        for kind in (vl.EKFAC, vl.KFAC)
    )
    expected = corrected(K, truth.G)
    assert E.names == K.names
    assert close(E.to_dense(), expected)
    assert not close(expected, K.to_dense())
    check_operator(E, expected)
    # Nearer to the GGN than KFAC, and with its trace.
    G = expected - (expected - truth.G) * (K.to_dense() != 0)
    assert (G - expected).norm() < (G - K.to_dense()).norm()
    assert close(E.trace(), truth.G.trace())


def test_ekfac_of_embeddings_and_transposed_convolutions() -> None:
    for build in (_embedding, _transposed_convolution_of_one_output):
        built = build()
        of, truth = risk_of(built), dense_of(built)
        E = vl.EKFAC(of, variant="exact")
        assert close(E.to_dense(), block_diagonal_of(truth.G, of.sizes))
    of = peer_risk("grouped_and_transposed", "mean")
    E, K = (kind(of, variant="exact", joint_bias=True) for kind in (vl.EKFAC, vl.KFAC))
    assert close(E.to_dense(), corrected(K, vl.GGN(of).to_dense()))


def test_ekfac_of_other_curvatures() -> None:
    """The draws of both passes are the same."""
    of, truth = risk("cnn"), dense("cnn")
    E, K = (kind(of, variant="empirical") for kind in (vl.EKFAC, vl.KFAC))
    assert close(E.to_dense(), corrected(K, truth.F))
    drawn = {"mc_samples": 2, "generator": torch.Generator().manual_seed(3)}
    E = vl.EKFAC(of, **drawn)
    drawn["generator"].manual_seed(3)
    K = vl.KFAC(of, **drawn)
    drawn["generator"].manual_seed(3)
    assert close(E.to_dense(), corrected(K, vl.GGN(of, **drawn).to_dense()))


@pytest.mark.parametrize("joint_bias", [True, False])
@pytest.mark.parametrize("name", ["mlp_ce", "mlp_mse"])
def test_ekfac_as_curvlinops(name: str, joint_bias: bool) -> None:
    net, loss, data = backpack_peer.built(name, "mean")
    theirs = curvlinops.EKFACLinearOperator(
        net,
        loss,
        list(net.parameters()),
        [data],
        fisher_type="type-2",
        separate_weight_and_bias=not joint_bias,
        check_deterministic=False,
    )
    of = peer_risk(name, "mean")
    E = vl.EKFAC(of, variant="exact", joint_bias=joint_bias)
    x = draw(of.num_params, 3)
    got, expected = E @ x, theirs @ x
    if not joint_bias:  # theirs of biases are diagonal in an eigenbasis, ours exact
        keep = torch.cat(
            [torch.full((p.numel(),), p.ndim > 1) for p in of.params.values()]
        )
        got, expected = got[keep], expected[keep]
    assert close(got, expected)


# Verbs ------------------------------------------------------------------------------


@pytest.mark.parametrize("joint_bias", [True, False])
@pytest.mark.parametrize("name", ["cnn_ce", "grouped_and_transposed"])
@pytest.mark.parametrize("kind", [vl.KFAC, vl.EKFAC])
def test_verbs(kind: Any, name: str, joint_bias: bool) -> None:
    of = peer_risk(name, "mean")
    K = kind(of, variant="exact", joint_bias=joint_bias)
    matrix, D = K.to_dense(), of.num_params
    unit = torch.eye(D, dtype=torch.float64)
    delta = 0.03
    damped, dense_damped = K + delta * vl.Identity(D), matrix + delta * unit
    inverse = damped.inv()
    assert close(inverse @ unit, torch.linalg.inv(dense_damped))
    assert close(damped.logdet(), torch.logdet(dense_damped))
    assert close(K.diagonal(), matrix.diagonal())
    assert close(K.eigvalsh(), torch.linalg.eigvalsh(matrix))
    evals, evecs = K.eigh(k=5)
    assert (matrix @ evecs - evecs * evals).norm() <= RTOL * evals.max()
    for op, truth in [
        (K, matrix),
        (damped, dense_damped),
        (inverse, torch.linalg.inv(dense_damped)),
        (3 * K, 3 * matrix),
    ]:
        root = op.sqrt().to_dense()
        assert close(root @ root.T, truth)


def test_pi_damping() -> None:
    of = peer_risk("mlp_ce", "mean")
    K = vl.KFAC(of, variant="exact")
    delta = 0.02
    damped = K.pi_damped(delta)
    for block, plain in zip(damped.blocks, K.blocks, strict=True):
        matrix = plain.to_dense()
        if not isinstance(plain, vl.Kronecker):
            unit = torch.eye(len(matrix), dtype=torch.float64)
            assert close(block.to_dense(), matrix + delta * unit)
            continue
        B, A = (factor.to_dense() for factor in plain.factors)
        pi = ((A.trace() / len(A)) / (B.trace() / len(B))).sqrt()
        left = B + delta**0.5 / pi * torch.eye(len(B)).double()
        right = A + delta**0.5 * pi * torch.eye(len(A)).double()
        expected = torch.kron(left, right)
        assert close(block.to_dense(), expected)
        inverse = block.inv()
        assert isinstance(inverse, vl.Kronecker)
        assert close(inverse.to_dense(), torch.linalg.inv(expected))
        # Both damp by δ I, and this one more.
        unit = torch.eye(len(matrix)).double()
        more = torch.linalg.eigvalsh(expected - matrix - delta * unit)
        assert more.min() >= -1e-12
    unit = torch.eye(of.num_params, dtype=torch.float64)
    check_operator(damped.inv(), torch.linalg.inv(damped @ unit))


def test_samples_have_the_covariance() -> None:
    """20,000 samples of N(0, (K + δI)⁻¹) on random directions, 5 standard errors."""
    of = peer_risk("mlp_mse", "mean")
    K = vl.KFAC(of, variant="exact")
    posterior = (K + 0.1 * vl.Identity(of.num_params)).inv()
    samples = posterior.sqrt() @ draw(of.num_params, 20_000)
    directions = draw(of.num_params, 5, seed=1)
    variances = (directions.T @ samples).square().mean(1)
    expected = (directions * (posterior @ directions)).sum(0)
    assert ((variances / expected - 1).abs() < 5 * (2 / 20_000) ** 0.5).all()


# Square roots of other operators ------------------------------------------------------


def _positive(n: int, seed: int = 0) -> Tensor:
    A = draw(n, n + 2, seed=seed)
    return A @ A.T


IDENTITY = vl.Identity(5)
SQUARE_ROOTS = {
    "identity": lambda: vl.Identity(4, torch.float64),
    "diagonal": lambda: vl.Diagonal(draw(4).square()),
    "damped_diagonal": lambda: vl.Diagonal(draw(4).square()) + 2 * vl.Identity(4),
    "dense": lambda: vl.Dense(_positive(4)),
    "singular_dense": lambda: vl.Dense(draw(4, 2) @ draw(4, 2).T),
    "damped_dense": lambda: vl.Dense(_positive(4)) + 0.5 * vl.Identity(4),
    "inverse": lambda: vl.Dense(_positive(4)).inv(),
    "scaled": lambda: 3.0 * vl.Kronecker(_positive(2), _positive(3)),
    "low_rank": lambda: LowRank(vl.Dense(draw(5, 2)), 2.0),
    "gram": lambda: Gram(*2 * (vl.Dense(draw(5, 2)),)),
    "kronecker": lambda: vl.Kronecker(_positive(2), _positive(3)),
    "scattered": lambda: vl.BlockDiagonal(
        [_positive(2), _positive(3)], [torch.tensor([0, 3]), torch.tensor([1, 2, 4])]
    ),
    "damped_low_rank": lambda: LowRank(vl.Dense(draw(5, 2)), 2.0) + 0.1 * IDENTITY,
    "damped_wide": lambda: LowRank(vl.Dense(draw(5, 7)), 2.0) + 0.1 * IDENTITY,
    "damped_singular": lambda: (
        LowRank(vl.Dense(draw(5, 1) @ draw(1, 3))) + 0.1 * IDENTITY
    ),
    "woodbury": lambda: (LowRank(vl.Dense(draw(5, 2)), 2.0) + 0.1 * IDENTITY).inv(),
    "damped_gram": lambda: Gram(*2 * (vl.Dense(draw(5, 5)),)) + 0.1 * IDENTITY,
    "damped_low_rank_blocks": lambda: (
        vl.BlockDiagonal(
            [LowRank(vl.Dense(draw(3, 1))), _positive(2)],
            [torch.tensor([0, 2, 4]), torch.tensor([1, 3])],
        )
        + 0.1 * IDENTITY
    ),
    "low_rank_blocks": lambda: vl.BlockDiagonal(
        [LowRank(vl.Dense(draw(5, 2))), vl.Dense(_positive(2))]
    ),
}


@pytest.mark.parametrize("name", SQUARE_ROOTS)
def test_square_roots(name: str) -> None:
    op = SQUARE_ROOTS[name]()
    root = op.sqrt().to_dense()
    assert close(root @ root.T, op.to_dense())


def test_roots_of_a_damped_ggn() -> None:
    """Of D × D, as operators: from the Gram matrix's eigenpairs."""
    of, truth = risk("cnn"), dense("cnn")
    damped, unit = vl.GGN(of) + 0.01 * vl.Identity(truth.D), torch.eye(truth.D).double()
    root = damped.sqrt()
    assert isinstance(root, DampedRoot) and root.self_adjoint
    matrix = truth.G + 0.01 * unit
    evals, evecs = torch.linalg.eigh(matrix)
    assert close(root @ unit, (evecs * evals.sqrt()) @ evecs.T)
    for inverse in (root.inv(), damped.inv().sqrt()):
        assert isinstance(inverse, DampedRoot)
        assert close(inverse @ unit, (evecs / evals.sqrt()) @ evecs.T)
    assert close(root.inv().inv() @ unit, root @ unit)
    assert close(root.logdet(), torch.logdet(matrix) / 2)
    assert close(root.inv().logdet(), -torch.logdet(matrix) / 2)
    blocks = vl.GGN(of).block_diagonal("parameter") + 0.01 * vl.Identity(truth.D)
    got = blocks.sqrt() @ unit
    assert close(got @ got.T, block_diagonal_of(truth.G, of.sizes) + 0.01 * unit)


def test_square_roots_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="not positive semi-definite"):
        vl.Diagonal(torch.tensor([1.0, -1.0])).sqrt()
    with pytest.raises(ValueError, match=r"below 0|the eigenvalue -"):
        (-1.0 * vl.Kronecker(_positive(2))).sqrt()
    with pytest.raises(TypeError, match="self-adjoint"):
        vl.Dense(draw(3, 3)).sqrt()
    with pytest.raises(TypeError, match="no closed form"):
        vl.Hessian(risk("mlp_ce_mean")).sqrt()
    with pytest.raises(ValueError, match="damping > 0"):
        (vl.GGN(risk("cnn")) - vl.Identity(dense("cnn").D)).sqrt()
    scattered = vl.BlockDiagonal(
        [LowRank(vl.Dense(draw(2, 1))), vl.Dense(_positive(1))],
        [torch.tensor([0, 2]), torch.tensor([1])],
    )
    with pytest.raises(TypeError, match="one by one"):
        scattered.sqrt()


# Bad input ----------------------------------------------------------------------------
