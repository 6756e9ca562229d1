"""Monte-Carlo draws: those of a sample depend on the seed and the sample only."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vivit_linop as vl
from vivit_linop.risk.losses.draws import Draws, categories, counts

N = 13


class Positions(nn.Module):
    """Five classes at three positions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 15)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(x).unflatten(1, (5, 3))
        return logits


def problem(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A net, a loss and the targets of N samples."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    real = torch.rand(N, 3, dtype=torch.float64)
    losses: dict[str, tuple[nn.Module, Tensor]] = {
        "mse": (nn.MSELoss(), real),
        "ce": (nn.CrossEntropyLoss(), torch.randint(3, (N,))),
        "ce ignored": (
            nn.CrossEntropyLoss(ignore_index=1, label_smoothing=0.1),
            torch.randint(3, (N,)),
        ),
        "positions": (nn.CrossEntropyLoss(), torch.randint(5, (N, 3))),
        "bce": (nn.BCEWithLogitsLoss(), real),
        "gaussian": (nn.GaussianNLLLoss(), torch.stack([real, real + 0.1], dim=-1)),
        "poisson": (nn.PoissonNLLLoss(), torch.randint(9, (N, 3)).double()),
    }
    loss, y = losses[name]
    return (Positions() if name == "positions" else net), loss, y


NAMES = ["mse", "ce", "ce ignored", "positions", "bce", "gaussian", "poisson"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_draws_do_not_depend_on_the_cut(name: str, dtype: torch.dtype) -> None:
    net, loss, y = problem(name)
    net, X = net.to(dtype), torch.rand(N, 4).to(dtype)
    loader = DataLoader(TensorDataset(X, y), batch_size=5)
    cuts = [[1, 3, 9], [1] * N, [12, 1]]
    data = [loader, *(list(zip(X.split(c), y.split(c), strict=True)) for c in cuts)]

    def factor(data: object, seed: int = 3) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        S = vl.LossHessian(net, loss, data).sqrt(3, generator)
        return S.to_dense()

    whole = factor((X, y))
    for cut in data:
        # Batches of other sizes are multiplied by other kernels, with other rounding.
        torch.testing.assert_close(factor(cut), whole)
    assert (factor((X, y), seed=4) - whole).norm() > 0.1 * whole.norm()
    # Nor on the precision.
    torch.testing.assert_close(
        vl.LossHessian(net.double(), loss, (X.double(), y))
        .sqrt(3, torch.Generator().manual_seed(3))
        .to_dense()
        .to(dtype),
        whole,
        rtol=1e-4,
        atol=1e-6,
    )


def test_all_that_is_drawn_does_not_depend_on_the_cut() -> None:
    net, loss, y = problem("mse")
    net, X = net.double(), torch.rand(N, 4, dtype=torch.float64)
    halves = [(X[:7], y[:7]), (X[7:], y[7:])]

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    for make in (
        lambda data: vl.GGN(net, loss, data, mc_samples=2, generator=seeded()),
        lambda data: vl.KFAC(net, loss, data, variant="mc", generator=seeded()),
        lambda data: vl.EKFAC(net, loss, data, variant="mc", generator=seeded()),
    ):
        torch.testing.assert_close(make(halves).to_dense(), make((X, y)).to_dense())


def test_the_generator_advances_once_a_draw() -> None:
    net, loss, y = problem("ce")
    risk = vl.EmpiricalRisk(net, loss, (torch.rand(N, 4), y))
    generator = torch.Generator().manual_seed(0)
    first, second = (vl.LossHessian(risk).sqrt(1, generator) for _ in range(2))
    assert not torch.equal(first.to_dense(), second.to_dense())
    state = torch.random.get_rng_state()
    torch.manual_seed(5)
    drawn = vl.LossHessian(risk).sqrt(2).to_dense()
    torch.manual_seed(5)
    again = vl.LossHessian(risk).sqrt(2).to_dense()
    torch.random.set_rng_state(state)
    assert torch.equal(drawn, again)


@pytest.mark.host("numbers are drawn on the host")
def test_distributions() -> None:
    """Moments to five standard errors, and what is drawn at the ends of (0, 1)."""
    n = 40000
    draws = Draws(1)
    uniform, normal = draws.uniform(n, 3), draws.normal(n, 3)
    assert ((uniform.mean(0) - 0.5).abs() < 5 * (1 / 12 / n) ** 0.5).all()
    assert (normal.mean(0).abs() < 5 / n**0.5).all()
    assert ((normal.square().mean(0) - 1).abs() < 5 * (2 / n) ** 0.5).all()
    assert (torch.corrcoef(normal.T) - torch.eye(3)).abs().max() < 5 / n**0.5
    for mean in (0.0, 0.3, 40.0, 2e5, 3e7, 1e13):
        rate = torch.full((n,), mean, dtype=torch.float64)
        drawn = counts(rate, uniform[:, 0].contiguous())
        assert (drawn.mean() - mean).abs() <= 5 * (mean / n) ** 0.5
        spread = ((3 * mean**2 + mean - mean**2) / n) ** 0.5  # of the fourth moment
        assert ((drawn - mean).square().mean() - mean).abs() <= 5 * spread
    p = torch.tensor([0.0, 0.2, 0.0, 0.7, 0.1, 0.0])
    ends = [2.0**-54, 0.19, 0.21, 0.89, 0.91, 1 - 2.0**-53]
    assert categories(p, torch.tensor(ends, dtype=torch.float64)).tolist() == [
        1,
        1,
        3,
        3,
        4,
        4,
    ]
    frequency = categories(p, uniform[:, 1]).bincount(minlength=6) / n
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()
