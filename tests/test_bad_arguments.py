"""What stands for no number, no count, no yes or no: errors that name the argument."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import nn

import vivit_linop as vl
from vivit_linop.operators import verbs


def problem(reduction: str = "mean") -> vl.EmpiricalRisk:
    torch.manual_seed(0)
    X, y = torch.rand(6, 3).double(), torch.randint(2, (6,))
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return vl.EmpiricalRisk(net, nn.CrossEntropyLoss(reduction=reduction), (X, y))


def test_start_vectors_of_few_rows() -> None:
    A = vl.GGN(problem())
    for v0 in (torch.zeros(26), torch.ones(3), torch.full((26,), float("nan"))):
        with pytest.raises(ValueError, match=r"^v0: a vector of 26"):
            A.eigh(k=2, v0=v0)


@pytest.mark.parametrize("damping", [1j, torch.tensor([0.1, 1j]), np.array([1j])])
def test_dampings_and_priors_are_real(damping: Any) -> None:
    risk = problem("sum")
    for A in (vl.GGN(risk), vl.KFAC(risk), vl.Identity(3)):
        with pytest.raises(TypeError, match=r"^damping: must be real"):
            A.logdet(damping)
    with pytest.raises(TypeError, match=r"^prior_precision: must be real"):
        vl.posterior_precision(risk, vl.GGN(risk), damping)


@pytest.mark.parametrize("k", [0, -1, 27, 1.5, True, "3", torch.tensor(2)])
def test_explanations_of_as_many_pairs_as_there_are(k: Any) -> None:
    risk = problem()
    H = vl.Hessian(risk)
    for A in (H, H + vl.Identity(26), vl.KFAC(risk), vl.GGN(risk)):
        with pytest.raises((TypeError, ValueError), match=r"^k: "):
            A.explain(k)


def test_densities() -> None:
    spectrum = vl.LanczosSpectrum(vl.Diagonal(torch.linspace(1.0, 2.0, 9)), ncv=3)
    assert re.match(r"<LanczosSpectrum of <9x9 Diagonal, .*>, ncv=3>", repr(spectrum))
    for density in (spectrum.density, spectrum.log_density):
        with pytest.raises(ValueError, match=r"^num_points: "):
            density(num_points=0)
        with pytest.raises(ValueError, match=r"^kappa: "):
            density(kappa=1.0)


def test_spectra_of_one_point() -> None:
    """Iterations end at once, and there is nothing between the ends."""
    for one, boundaries in (
        (vl.Identity(9), None),
        (vl.Diagonal(torch.full((9,), 0.3)), None),
        (0.0 * vl.Diagonal(torch.linspace(1.0, 2.0, 9)), (0.0, 1.0)),
        (vl.Diagonal(torch.linspace(1.0, 2.0, 9)), (3.0, None)),
    ):
        spectrum = vl.LanczosSpectrum(one, ncv=4, boundaries=boundaries)
        for density in (spectrum.density, spectrum.log_density):
            with pytest.raises(ValueError, match=r"^(ncv|boundaries): "):
                density()
    negative = vl.LanczosSpectrum(vl.Diagonal(torch.arange(9.0) - 4), 3, (-4.0, 4.0))
    with pytest.raises(ValueError, match=r"^boundaries: .*not negative"):
        negative.log_density()
    assert negative.density()[1].isfinite().all()


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    "boundaries",
    [(1.0, 0.0), "ab", (0.0, "a"), (0.0,), 3, (None, NAN), (NAN, None), (-INF, 1.0)],
)
def test_boundaries_of_spectra(boundaries: Any) -> None:
    A = vl.Diagonal(torch.linspace(1.0, 2.0, 9))
    with pytest.raises((TypeError, ValueError), match=r"^boundaries: "):
        vl.LanczosSpectrum(A, ncv=3, boundaries=boundaries)


@pytest.mark.parametrize("w", ["a", None, [1.0] * 6])
def test_weights_that_are_no_tensor(w: Any) -> None:
    X, y = torch.rand(6, 3), torch.randint(2, (6,))
    loss = vl.losses.Weighted(nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match=r"^data: .* a tensor w of weights"):
        vl.EmpiricalRisk(nn.Linear(3, 2), loss, (X, (y, w)))


def test_rules_are_of_classes() -> None:
    with pytest.raises(TypeError, match=r"^left: a class"):
        verbs.add.commuting("a", vl.Dense)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^right: a class"):
        verbs.matmul.rule(vl.Dense, vl.Identity(3))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), "a", None])
def test_costs_of_devices_are_positive(value: Any) -> None:
    for name in ("rate", "bandwidth", "all_pairs"):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
            replace(vl.DeviceCosts.default("cpu"), **{name: value})


@pytest.mark.parametrize("make", [np.ones, torch.ones], ids=["array", "tensor"])
@pytest.mark.parametrize("shape", [(3,), (1, 26), (27, 2)])
def test_vectors_of_other_lengths(make: Any, shape: tuple[int, ...]) -> None:
    risk = problem()
    G = vl.GGN(risk)
    A = G + 0.1 * vl.Identity(26)
    calls = [lambda x: G @ x, G.dot, G.matvec, G.matmat, A.solve, lambda x: A.inv() @ x]
    for call in [*calls, lambda x: vl.GGNFactor(risk).T @ x]:
        with pytest.raises(ValueError, match=r"^x: an operator of shape \(\d+, 26\)"):
            call(make(shape))
    with pytest.raises(ValueError, match=r"^x: an operator of shape"):
        G @ [1.0, 2.0]


def test_parameters_before_the_data() -> None:
    """The order of arguments that curvlinops has."""
    X, y = torch.rand(6, 3), torch.randint(2, (6,))
    net, loss = nn.Linear(3, 2), nn.CrossEntropyLoss()
    for params in (list(net.parameters()), dict(net.named_parameters())):
        for operator in (vl.GGN, vl.Hessian, vl.KFAC):
            with pytest.raises(TypeError, match=r"\(model, loss, data, params\)"):
                operator(net, loss, params, [(X, y)])
    with pytest.raises(TypeError, match=r"^params: .* Number 0 is of type str"):
        vl.EmpiricalRisk(net, loss, (X, y), params=["weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_of_another_precision(dtype: torch.dtype) -> None:
    other = torch.float64 if dtype == torch.float32 else torch.float32
    X, y = torch.rand(6, 3, dtype=other), torch.randint(2, (6,))
    net, loss = nn.Linear(3, 2).to(dtype), nn.CrossEntropyLoss()
    named: Any = {"input": X}
    for inputs in (X, named):
        with pytest.raises(
            TypeError, match=f"^data: the inputs of batch 0 are {other}"
        ):
            vl.EmpiricalRisk(net, loss, (inputs, y))
    with pytest.raises(TypeError, match=f"of batch 1 are {other}"):
        vl.EmpiricalRisk(net, loss, [(X.to(dtype), y), (X, y)])
    images = torch.rand(6, 3, 4, 4, dtype=other)
    net_of_images = nn.Sequential(nn.Conv2d(3, 2, 4), nn.Flatten()).to(dtype)
    with pytest.raises(TypeError, match=r"^data: the inputs of batch 0"):
        vl.EmpiricalRisk(net_of_images, loss, (images, y))
    for wrong in (torch.int64, torch.uint8, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=f"of batch 0 are {wrong}"):
            vl.EmpiricalRisk(net, loss, (X.to(wrong), y))
    with pytest.raises(ValueError, match=r"^data: batch 0 is on device 'meta'"):
        vl.EmpiricalRisk(net, loss, (X.to("meta"), y))
    with pytest.raises(RuntimeError, match="mat1"):  # the model's own
        vl.EmpiricalRisk(net, loss, (torch.rand(6, 5, dtype=dtype), y))


@pytest.mark.parametrize("given", [0.1, 2, np.float64(0.1), torch.tensor(0.1), True])
def test_numbers_are_no_terms(given: Any) -> None:
    G = vl.GGN(problem())
    for A in (G, vl.Jacobian(problem()), G + 0.1 * vl.Identity(26)):
        calls: list[Callable[[], Any]] = [
            *(lambda A=A: A + given, lambda A=A: given + A),
            *(lambda A=A: A - given, lambda A=A: given - A),
        ]
        for call in calls:
            with pytest.raises(TypeError, match=r"the number -?[0-9.]+\. .*Identity\("):
                call()


@pytest.mark.parametrize("rows", [26, 3])
def test_matrices_are_no_terms(rows: int) -> None:
    G, array = vl.GGN(problem()), np.eye(rows)
    others = [array, torch.eye(rows), array[0], scipy.sparse.csr_array(array)]
    for x in others:
        calls: list[Callable[[], Any]] = [
            *(lambda x=x: G + x, lambda x=x: x + G),
            *(lambda x=x: G - x, lambda x=x: x - G),
        ]
        for call in calls:
            with pytest.raises(
                TypeError, match=r"shape \[.*\]\. .*Dense\(.*Identity\("
            ):
                call()


def test_terms_of_other_kinds_have_their_say() -> None:
    class Other:
        def __radd__(self, x: Any) -> str:
            return "added"

        def __rsub__(self, x: Any) -> str:
            return "subtracted"

    G = vl.GGN(problem())
    x, dense = torch.rand(26).double(), G.to_dense()
    assert (G + Other(), G - Other()) == ("added", "subtracted")
    for A, sign in ((sum([G]), 1), (G - 0, 1), (0 - G, -1), (0.0 + G, 1)):
        torch.testing.assert_close(A @ x, sign * (dense @ x))
    with pytest.raises(TypeError, match="unsupported operand"):
        G + object()
    for other in (nn.Linear(2, 2), None, object()):
        with pytest.raises(TypeError, match=f"^x: .* got {type(other).__name__}\\."):
            G @ other


@pytest.mark.parametrize("dtype", [np.dtype("float64"), np.float32, "float64"])
def test_a_dtype_that_is_not_of_torch_is_told_from_those_that_are(dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"torch\.float64, got .*op\.torch_dtype is"):
        vl.Identity(3, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.complex128])
def test_a_dtype_of_no_operator_is_named(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"got {dtype}\. Convert the model"):
        vl.Identity(3, dtype)
