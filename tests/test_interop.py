"""Operators of SciPy, curvlinops and BackPACK in our algebra, and ours in theirs."""

import copy
from typing import Any

import curvlinops
import numpy as np
import pytest
import torch
from backpack import extensions as bp
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import LinearOperator, aslinearoperator, cg, eigsh
from torch import Tensor, nn
from torch.fx import symbolic_trace

import vivit_linop as vl
from tests import backpack_peer
from tests.backpack_peer import KRONECKER, REDUCTIONS, peer_risk
from tests.comparing import close, draw
from tests.curvature_cases import risk
from vivit_linop.testing import check_operator

# SciPy ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_from_scipy(dtype: Any) -> None:
    array = draw(4, 6).numpy().astype(dtype)
    matrix = torch.from_numpy(array).double()

    class Rectangular(LinearOperator):
        def __init__(self) -> None:
            super().__init__(dtype, (4, 6))

        def _matvec(self, x: np.ndarray) -> np.ndarray:
            return array @ x

        def _rmatvec(self, x: np.ndarray) -> np.ndarray:
            return array.T @ x

    for given in (aslinearoperator(array), csr_matrix(array), array, Rectangular()):
        check_operator(vl.from_scipy(given), matrix)


def test_from_scipy_in_expressions() -> None:
    array = draw(5, 5).numpy()
    array = array @ array.T
    A = vl.from_scipy(aslinearoperator(array), self_adjoint=True)
    assert A.T is A
    mixed = A + 0.5 * vl.Dense(torch.from_numpy(array)) + vl.Identity(5)
    expected = torch.from_numpy(1.5 * array + np.eye(5))
    check_operator(mixed, expected)
    solution, info = cg(mixed, np.ones(5), rtol=1e-12)
    assert info == 0
    assert close(expected @ torch.from_numpy(solution), torch.ones(5).double())
    assert vl.from_scipy(mixed) is mixed
    assert close(A.diagonal(), torch.from_numpy(array).diagonal().to(A.device))


@pytest.mark.parametrize("dtype", [np.float16, np.int32, np.uint8, bool, np.longdouble])
def test_other_real_dtypes_of_scipy_become_float64(dtype: Any) -> None:
    array = np.arange(12).reshape(3, 4).astype(dtype)
    A = vl.from_scipy(aslinearoperator(array))
    check_operator(A, torch.from_numpy(array.astype(np.float64)))


def test_from_scipy_of_what_it_cannot_take() -> None:
    with pytest.raises(ValueError, match=r"^self_adjoint: .*\(2, 3\) is not square"):
        vl.from_scipy(np.ones((2, 3)), self_adjoint=True)
    turned = LinearOperator((3, 3), matvec=lambda x: 1j * x, dtype=float)
    with pytest.raises(TypeError, match=r"^op: its products are complex"):
        vl.from_scipy(turned) @ torch.ones(3)
    with pytest.raises(TypeError, match="complex"):
        vl.from_scipy(np.eye(3, dtype=complex))
    with pytest.raises(TypeError):
        vl.from_scipy("matrix")


# curvlinops -------------------------------------------------------------------------


def _theirs(name: str, kind: str) -> Any:
    net, loss, data = backpack_peer.built(name, "mean")
    constructor = getattr(curvlinops, kind)
    arguments = [net, loss, list(net.parameters()), [data]]
    if "Jacobian" in kind:
        arguments.pop(1)
    return constructor(*arguments, check_deterministic=False)


@pytest.mark.parametrize(
    "kind, ours",
    [
        ("GGNLinearOperator", vl.GGN),
        ("HessianLinearOperator", vl.Hessian),
        ("EFLinearOperator", vl.EmpiricalFisher),
        ("JacobianLinearOperator", vl.Jacobian),
    ],
)
def test_from_curvlinops(kind: str, ours: Any) -> None:
    theirs = vl.from_curvlinops(_theirs("mlp_ce", kind))
    matrix = ours(peer_risk("mlp_ce")).to_dense()
    check_operator(theirs, matrix)
    assert theirs.self_adjoint == ("Jacobian" not in kind)


def test_from_curvlinops_in_expressions() -> None:
    of = peer_risk("mlp_ce")
    G, D = vl.GGN(of), of.num_params
    theirs = vl.from_curvlinops(_theirs("mlp_ce", "GGNLinearOperator"))
    total = G + theirs + 0.1 * vl.Identity(D)
    expected = 2 * G.to_dense() + 0.1 * torch.eye(D).double()
    check_operator(total, expected)
    evals = torch.from_numpy(np.sort(eigsh(theirs, k=3)[0]))
    assert close(evals, G.eigvalsh()[-3:])
    assert close((G - theirs).to_dense() + G.to_dense(), G.to_dense())
    solution, info = cg(total, np.ones(D), rtol=1e-12)
    assert info == 0
    assert close(expected @ torch.from_numpy(solution), torch.ones(D).double(), 1e-8)


def test_curvlinops_estimators_on_ours() -> None:
    of = peer_risk("cnn_ce")
    G, V = vl.GGN(of), vl.GGNFactor(of)
    view = G.to_curvlinops()
    assert vl.from_curvlinops(view) is G
    x = draw(of.num_params)
    assert close(V.to_curvlinops().adjoint() @ x, V.T @ x)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        rank = V.shape[1]
        # With more products than the rank, what is estimated is known.
        for estimate in (
            curvlinops.hutchpp_trace(view, num_matvecs=3 * rank + 3),
            curvlinops.xtrace(view, num_matvecs=4 * rank),
        ):
            assert close(estimate, G.trace(), rtol=1e-6)
        norm = curvlinops.hutchinson_squared_fro(view, num_matvecs=150)
        assert close(norm, G.to_dense().square().sum(), rtol=0.5)
        diagonal = curvlinops.xdiag(view, num_matvecs=4 * rank)
        assert close(diagonal, G.diagonal(), rtol=1e-6)
        boundaries = (0.0, 1.1 * G.eigvalsh()[-1].item())
        grid, density = curvlinops.lanczos_approximate_spectrum(
            view, ncv=20, num_points=200, num_repeats=2, boundaries=boundaries
        )
        mass = torch.trapezoid(density, grid)
        assert 0.9 < mass < 1.1
        curvlinops.lanczos_approximate_spectrum(view, ncv=20)  # by view.to_scipy()


def test_from_curvlinops_of_what_it_cannot_take() -> None:
    with pytest.raises(TypeError, match=r"op: .*got ndarray without"):
        vl.from_curvlinops(np.eye(3))


@pytest.mark.parametrize("kind", ["KFACLinearOperator", "EKFACLinearOperator"])
def test_damped_inverses_of_curvlinops_kfac(kind: str) -> None:
    net, loss, data = backpack_peer.built("mlp_ce", "mean")
    theirs = getattr(curvlinops, kind)(
        net, loss, list(net.parameters()), [data], fisher_type="type-2"
    )
    E = vl.from_curvlinops(theirs)
    unit = torch.eye(E.shape[0], dtype=torch.float64)
    inverse = (E + 0.1 * vl.Identity(len(unit))).inv()
    assert close(inverse @ unit, torch.linalg.inv(E @ unit + 0.1 * unit))
    with pytest.raises(TypeError, match="no closed form"):
        (vl.from_curvlinops(theirs.adjoint() @ theirs) + vl.Identity(len(unit))).inv()


# BackPACK ---------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", [name for name in KRONECKER if name != "bce"])
def test_kfra(name: str, reduction: str) -> None:
    net = backpack_peer.run_on_net(name, reduction, bp.KFRA())
    K = vl.KFRA(peer_risk(name, reduction))
    assert len(K.blocks) == len(K.names) == len(list(net.parameters()))
    assert close(K.to_dense(), backpack_peer.from_factors(net, "kfra"))
    check_operator(K, K.to_dense())
    D = K.shape[0]
    unit = torch.eye(D, dtype=torch.float64)
    damped = (K + 0.1 * vl.Identity(D)).inv() @ unit
    assert close(damped, torch.linalg.inv(K.to_dense() + 0.1 * unit))


def test_kfra_is_exact_for_deep_linear_nets() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    of = vl.EmpiricalRisk(net, nn.MSELoss(), (draw(6, 4), draw(6, 3)))
    exact = vl.GGN(of).block_diagonal("parameter").to_dense()
    assert close(vl.KFRA(of).to_dense(), exact)


def test_from_parameters() -> None:
    of = peer_risk("cnn_ce")
    G, V = vl.GGN(of), vl.GGNFactor(of).to_dense()
    parameters = backpack_peer.run(
        "cnn_ce",
        "mean",
        bp.KFLR(),
        bp.DiagGGNExact(),
        bp.SqrtGGNExact(),
        bp.BatchGrad(),
        bp.GGNMP(),
        bp.BatchDiagGGNExact(),
    )
    K = vl.KFAC(of, variant="exact", weight_sharing="backpack")
    assert close(vl.from_backpack(parameters, "kflr").to_dense(), K.to_dense())
    diagonal = vl.from_backpack(parameters, "diag_ggn_exact")
    assert isinstance(diagonal, vl.Diagonal)
    assert close(diagonal.entries, G.diagonal())
    root = vl.from_backpack(iter(parameters), "sqrt_ggn_exact")
    assert isinstance(root, vl.Dense) and root.shape == (of.num_params, 12)
    assert close((root @ root.T).to_dense(), V @ V.T)
    # Sample-major: the columns of one sample follow each other.
    first = root.matrix[:, :3]
    sample = vl.GGN(of.subset([0])).to_dense() / of.num_samples
    assert close(first @ first.T, sample)
    U = vl.PerSampleGradients(of).to_dense()
    assert close(4 * vl.from_backpack(parameters, "grad_batch").to_dense(), U)
    by_sample = vl.from_backpack(parameters, "diag_ggn_exact_batch")
    assert close(4 * by_sample.to_dense().T, G.sample_diagonals())
    product = vl.from_backpack(parameters, "ggnmp")
    blocks = G.block_diagonal("parameter").to_dense()
    check_operator(product, blocks)
    assert isinstance(product, vl.BlockDiagonal)


def test_user_model_is_untouched() -> None:
    net, loss, data = backpack_peer.built("mlp_ce", "mean")
    net = copy.deepcopy(net)
    before = {name: p.clone() for name, p in net.named_parameters()}
    of = vl.EmpiricalRisk(net, loss, data)
    kfra = vl.KFRA(of).to_dense()
    for name, p in net.named_parameters():
        assert p.grad is None and p.requires_grad and torch.equal(p, before[name])
        assert not hasattr(p, "kfra")
    for module in [*net.modules(), loss]:
        assert not module._forward_hooks and not module._backward_hooks
        assert not hasattr(module, "input0")
    # A risk stays what it is when training goes on.
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1.0)
    assert torch.equal(vl.KFRA(of).to_dense(), kfra)


def test_parts_of_a_model_and_batches() -> None:
    net, loss, (X, y) = backpack_peer.built("mlp_ce", "mean")
    whole = vl.KFRA(net, loss, (X, y))
    some = vl.EmpiricalRisk(
        net, loss, [(X[:2], y[:2]), (X[2:], y[2:])], list(net[2:].parameters())
    )
    K = vl.KFRA(some)
    assert K.names == [["2.weight"], ["2.bias"], ["4.weight"], ["4.bias"]]
    assert close(K.to_dense(), whole.to_dense()[48:, 48:])


class _OwnForward(nn.Sequential):
    def forward(self, X: Tensor) -> Tensor:
        return 2 * super().forward(X)


class _Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, X: Tensor) -> Tensor:
        return self.f(self.f(X))


class _Residual(_Reused):
    def forward(self, X: Tensor) -> Tensor:
        return X + self.f(X)


def _twice() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.GELU()), "GELU"),
        (lambda: _OwnForward(nn.Linear(4, 3)), "forward pass of its own"),
        (_twice, "share a parameter"),
        (lambda: symbolic_trace(_Reused()), "used 2 times"),
        (lambda: symbolic_trace(_Residual()), "calls of functions"),
        (_Residual, "_Residual"),
    ],
)
def test_models_that_backpack_cannot_do(build: Any, message: str) -> None:
    net = build().double()
    outputs = net(draw(5, 4)).shape[1]
    of = vl.EmpiricalRisk(net, nn.MSELoss(), (draw(5, 4), draw(5, outputs)))
    with pytest.raises(ValueError, match=f"BackPACK cannot .*{message}.*vl.KFAC"):
        vl.KFRA(of)


def test_shared_parameters_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    net[2].weight = net[0].weight
    of = vl.EmpiricalRisk(net, nn.MSELoss(), (draw(5, 4), draw(5, 4)))
    with pytest.raises(ValueError, match="share a parameter"):
        vl.KFRA(of)


def test_from_backpack_of_what_it_cannot_take() -> None:
    of = peer_risk("mlp_ce")
    parameters = backpack_peer.run("mlp_ce", "mean", bp.BatchL2Grad())
    with pytest.raises(ValueError, match="parameter 0 has no 'kfra'"):
        vl.from_backpack(parameters, "kfra")
    with pytest.raises(TypeError, match="neither a diagonal"):
        vl.from_backpack(parameters, "batch_l2")
    with pytest.raises(TypeError, match="quantity"):
        vl.from_backpack(of, "kfra")
    with pytest.raises(TypeError, match="quantity"):
        vl.from_backpack(of, bp.KFRA)
    with pytest.raises(TypeError, match="quantity"):
        vl.from_backpack(parameters, bp.KFRA())
    with pytest.raises(TypeError, match="source"):
        vl.from_backpack(torch.ones(2), "kfra")
    with pytest.raises(ValueError, match="source: parameter 0 has no 'kfra'"):
        vl.from_backpack(nn.Linear(2, 2), "kfra")
    with pytest.raises(ValueError, match="empty"):
        vl.from_backpack([], "kfra")
    with pytest.raises(ValueError, match=r"model: KFRA needs an nn\.Module"):
        vl.KFRA(risk("callable_model"))
    with pytest.raises(ValueError, match="loss: KFRA needs a module"):
        vl.KFRA(risk("function_cross_entropy"))
    with pytest.raises(ValueError, match="data: BackPACK computes KFRA for one tensor"):
        vl.KFRA(risk("tuple_input"))
