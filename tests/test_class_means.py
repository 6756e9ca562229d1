"""Mean gradients by class: the two terms of the GGN, by their definition."""

import pytest
import torch
from torch import Tensor, nn

import vivit_linop as vl
from tests.cases import dense
from tests.curvature_cases import close, risk
from tests.toys import toy

float64 = torch.float64


def by_definition(
    J: Tensor, p: Tensor, y: Tensor, mass: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Means ``[D, C, C]``, weights ``[C, C]`` and the spread within, in loops."""
    (N, C), D = p.shape, J.shape[1]
    J = J.reshape(N, C, D)
    weights = torch.zeros(C, C, dtype=float64)
    means, within = torch.zeros(D, C, C, dtype=float64), torch.zeros(D, D).double()
    gradients = torch.stack(
        [J[n].T @ (p[n][:, None] - torch.eye(C, dtype=float64)) for n in range(N)]
    )
    for c in range(C):
        for k in range(C):
            mine = y == c
            w = mass[mine] * p[mine, k]
            g = gradients[mine, :, k]
            weights[c, k] = w.sum()
            if w.sum() > 0:
                means[:, c, k] = (w[:, None] * g).sum(0) / w.sum()
                spread = g - means[:, c, k]
                within += (w[:, None] * spread).T @ spread
    return means, weights, within


@pytest.mark.parametrize("dtype, rtol", [(float64, 1e-11), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", ["mlp_ce_mean", "more_columns_than_parameters"])
def test_terms_of_the_ggn(name: str, dtype: torch.dtype, rtol: float) -> None:
    of, truth = risk(name, dtype), dense(name)
    p = truth.outputs.softmax(1)
    y = torch.cat(risk(name).targets())
    mass = torch.full((truth.N,), truth.r, dtype=float64)
    means, weights, within = by_definition(truth.J, p, y, mass)
    found = vl.class_means(of)
    assert found.means.dtype == dtype
    assert close(found.weights, weights, rtol)
    assert close(found.means, means, rtol)
    W = (found.means * found.weights.sqrt()).flatten(1).double()
    assert close(W @ W.T + within, truth.G, rtol)


def test_batches_weights_and_ignored_targets() -> None:
    net, _, (X, y) = toy(12)
    class_weights = torch.tensor([1.0, 2.0, 0.5], dtype=float64)
    y = y.clone()
    y[3] = -100
    loss = nn.CrossEntropyLoss(weight=class_weights)
    of = vl.EmpiricalRisk(net, loss, [(X[:5], y[:5]), (X[5:], y[5:])])
    valid = y != -100
    mass = torch.where(valid, class_weights[y.clamp(min=0)], 0.0)
    mass = mass / mass.sum()
    J = vl.Jacobian(net, X).to_dense()
    means, weights, within = by_definition(J, net(X).detach().softmax(1), y, mass)
    found = vl.class_means(of)
    assert close(found.weights, weights)
    assert close(found.means, means)
    W = (found.means * found.weights.sqrt()).flatten(1)
    assert close(W @ W.T + within, vl.GGN(of).to_dense())


def test_means_of_the_own_class_are_mean_gradients() -> None:
    net, loss, (X, y) = toy(12)
    of = vl.EmpiricalRisk(net, loss, (X, torch.zeros_like(y)))
    means, weights = vl.class_means(of)
    assert (weights[1:] == 0).all()
    assert (means[:, 1:] == 0).all()
    # All samples in one class: weighted gradients of the loss itself.
    U, p = vl.PerSampleGradients(of).to_dense(), net(X).detach().softmax(1)[:, 0]
    assert close(means[:, 0, 0], U @ p / p.sum())


def test_what_is_refused() -> None:
    net, _, (X, _) = toy()
    squares = vl.EmpiricalRisk(net, nn.MSELoss(), (X, torch.rand(6, 3).double()))
    with pytest.raises(TypeError, match="risk: of a CrossEntropyLoss"):
        vl.class_means(squares)
    soft = torch.rand(6, 3, dtype=float64).softmax(1)
    with pytest.raises(TypeError, match="risk: its targets are soft"):
        vl.class_means(vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, soft)))
    with pytest.raises(ValueError, match="one class for each sample"):
        vl.class_means(risk("ce_sequence"))
