"""A sample's columns are pulled back together, and one by one where that fails."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

import vivit_linop as vl
from vivit_linop.graphs import batched_gradients
from vivit_linop.modes import as_guest
from vivit_linop.net.capture import Capture
from vivit_linop.net.certified import find_structure


class Tripled(torch.autograd.Function):
    """Of a single tensor it is right; of several together it is off, or fails."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 3.0 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, in_dims, x):
        wrong = x.clone()
        wrong.movedim(in_dims[0], 0)[-1] *= 0.5
        return 3.0 * wrong, in_dims[0]


class Unbatched(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 3.0 * x


class Odd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tripled):
        ctx.tripled = tripled
        return 3.0 * x

    @staticmethod
    def backward(ctx, gradient):
        return ctx.tripled.apply(gradient), None


class Layer(nn.Module):
    def __init__(self, tripled):
        super().__init__()
        self.tripled = tripled

    def forward(self, x):
        return Odd.apply(x, self.tripled) if self.tripled else 3.0 * x


def problem(middle):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), middle, nn.Tanh(), nn.Linear(4, 3)).double()
    return net, (torch.rand(6, 5).double(), torch.tensor([0, 1, 2, 0, 1, 2]))


@pytest.mark.parametrize("tripled", [Tripled, Unbatched, None])
def test_wrong_and_missing_rules_cost_nothing_but_time(tripled):
    net, data = problem(Layer(tripled))
    V = vl.GGNFactor(net, nn.CrossEntropyLoss(), data)
    (plain, (X, y)), loss = problem(Layer(None)), nn.CrossEntropyLoss()
    theta = {name: p.detach() for name, p in plain.named_parameters()}
    jacobians = jacrev(lambda t: functional_call(plain, t, X))(theta)
    J = torch.cat([j.flatten(2) for j in jacobians.values()], dim=2).flatten(0, 1)
    H = hessian(lambda f: loss(f, y))(plain(X).detach()).reshape(len(J), len(J))
    expected = torch.linalg.eigvalsh(J.T @ H @ J)[-12:]
    torch.testing.assert_close(torch.linalg.eigvalsh(V.gram.to_dense()), expected)
    structure = find_structure(V.risk)
    assert not structure.opaque
    assert structure.variants[0].together == (tripled is None)


def test_gradients_of_several_vectors_are_those_of_each():
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    unused = torch.rand(2, requires_grad=True)
    layers = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Softmax(1)
    net = nn.Sequential(*layers)
    y, vectors = net(x), torch.rand(5, 2, 36)
    found, nothing = batched_gradients(y, [x, unused], [vectors])
    each = [torch.autograd.grad(y, x, v, retain_graph=True)[0] for v in vectors]
    torch.testing.assert_close(found, torch.stack(each))
    assert nothing is None


def jacobians_and_hessians(net: nn.Module, X: Tensor) -> tuple[Tensor, Tensor]:
    """``[n, C, D]``, and those of cross-entropy ``[n, C, C]``."""
    params = {name: p.detach() for name, p in net.named_parameters()}
    jacobians = jacrev(lambda p: functional_call(net, p, (X,)))(params)
    p = net(X).detach().softmax(1)
    H = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    return torch.cat([part.flatten(2) for part in jacobians.values()], 2), H


@pytest.mark.parametrize(("n", "in_parts"), [(3, False), (96, True)])
def test_columns_of_convolutions_come_in_parts_where_they_leave_the_caches(n, in_parts):
    layers = nn.Conv2d(1, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    net = nn.Sequential(*layers, nn.Linear(16, 10)).double()
    X, y = torch.randn(n, 1, 18, 18, dtype=torch.float64), torch.arange(n) % 10
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, y))
    with as_guest(risk.device):
        assert Capture(risk, X, n).comes_in_parts(9) == in_parts
    J, H = jacobians_and_hessians(net, X)
    truth = torch.einsum("ncd,nce,nef->df", J, H, J) / n
    torch.testing.assert_close(vl.GGN(risk).diagonal(), truth.diagonal())
    E = vl.EKFAC(risk, variant="exact")
    places = torch.arange(len(truth)).split(risk.sizes)
    for block, place in zip(E.blocks, places, strict=True):
        own = truth[place][:, place]
        torch.testing.assert_close(block.trace(), own.trace())
        Q = block.eigh().eigenvectors
        in_basis = (Q.T @ own @ Q).diagonal()
        torch.testing.assert_close(block.eigvalsh(), in_basis)


class Images(nn.Module):
    """Convolutions with more positions than inputs; one of them is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, groups=2)
        self.shift = nn.Parameter(torch.randn(4, 1, 1))
        self.twice = nn.Conv2d(4, 4, 1, bias=False)
        self.last = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x) + self.shift)
        hidden = self.twice(torch.tanh(self.twice(hidden)))
        return self.last(nn.functional.adaptive_avg_pool2d(hidden, 2).flatten(1))


def test_columns_that_are_formed_in_any_case_are_formed_as_cotangents_come():
    n, net = 64, Images().double()
    X, y = torch.randn(n, 2, 18, 18, dtype=torch.float64), torch.arange(n) % 10
    factor = vl.GGNFactor(net, nn.CrossEntropyLoss(), (X, y))
    J, H = jacobians_and_hessians(net, X)
    G = torch.einsum("ncd,nce,nef->df", J, H, J) / n
    evals = torch.linalg.eigvalsh(G)
    K = factor.gram.to_dense()
    torch.testing.assert_close(torch.linalg.eigvalsh(K)[-len(G) :], evals)
    risk = factor.risk
    names = risk.params.keys()
    parts = J.split(risk.sizes, dim=2)
    with as_guest(risk.device):
        capture, (variant, *_) = Capture(risk, X, n), find_structure(risk).variants
        cotangents = torch.randn(n, 10, 5, dtype=torch.float64)
        for takes in ("pairs", "columns"):
            columns = capture.columns(cotangents, variant, names, takes)
            assert not capture.together
            for name, jacobian in zip(names, parts, strict=True):
                rows = torch.einsum("ncr,ncd->nrd", cotangents, jacobian)
                torch.testing.assert_close(columns[name].rows(), rows.flatten(0, 1))
    chosen = [3, 40, 41]
    V = vl.GGNFactor(risk.subset(chosen)).to_dense()
    own = torch.einsum("ncd,nce,nef->df", J[chosen], H[chosen], J[chosen])
    torch.testing.assert_close(V @ V.T, own / 3)
