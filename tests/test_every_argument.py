"""Each argument of each public function and method, given what it is not.

An error begins with the name of the argument. What is public is read from the package,
so that a new argument stands here or the last test fails.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import aslinearoperator
from torch import nn

import vivit_linop as vl
from vivit_linop.operators.methods import VerbMethods

D = 26
NAN, WORD = float("nan"), "misspelt"
ARRAY, CALL = np.ones(3), nn.Tanh()

WRONG: dict[str, list[Any]] = {
    "yes or no": ["no", 1, None, torch.ones(2)],
    "count": [-1, 1.5, True, "a", NAN],
    "word": [WORD, 3, ARRAY, []],
    "function": [3, "a", int],
    "device": ["gpu0", 3, ARRAY, "cuda:7"],
    "dtype": [torch.int64, torch.complex64, "float32", []],
    "generator": [0, "a", np.random.default_rng(0)],
    "operator": [None, 3, "a", torch.ones(3), CALL],
    "risk": [None, 3, "a", CALL],
    "tolerance": ["a", True, NAN, -1.0, ARRAY],
    "positive": ["a", True, NAN, -1.0, 0.0],
    "numbers": ["a", object(), [0.5, None], {1, 2}, {0.1: 1}, slice(0, 3)],
    "matrix": ["a", None, torch.ones(3), torch.eye(2).long(), torch.zeros(0, 2)],
    "vector": ["a", None, 3, torch.ones(3), ARRAY],
    "indices": [
        *("a", 3, None, {1, 2}, {0.1: 1}, slice(0, 3), [0.1, None], torch.eye(2)),
        *([], [0.5], [0, 0], [99], [-1, 3], [-7], [[0, 1]], [True], [False] * 6),
        *(torch.tensor(given) for given in ([-1, 3], [0, 0], [6.0], [[0, 1]])),
    ],
    "list": [3, None, torch.tensor(1.0), "a", [None]],
    "groups": [WORD, 3, [["0.weight"]], [0.5], torch.tensor(1.0), [["a"]]],
    "damping": ["a", None, True, NAN, torch.tensor(1j)],
    "name or None": [3, ARRAY, WORD],
    "data": [None, 3, "a", CALL],
    "pairs": [None, 3, "a", torch.ones(3, 2), torch.full((D, 2), NAN)],
    "axis": ["a", 1.5, True, 9, [0]],
    # A question mark allows None, which stands for the default.
    "function?": [3, "a"],
    "list?": [3, 1.5, torch.tensor(1.0)],
    "operator?": [3, "a", torch.ones(3)],
    "class": [3, "a", None],
    "name": ["gpu0", 3, ARRAY],
    "inputs": [None, CALL],
    "vector of tensors": ["a", None, 3, [1.0]],
    "vector of parameters": ["a", 3, torch.ones(3), torch.full((D,), NAN), ARRAY],
    "vector of any kind": ["a", None, torch.ones(3), ARRAY, {}],
    "pairs without a risk": [None, 3, "a", torch.full((D, 2), NAN)],
}


class Case(NamedTuple):
    """A call, what it is given, and what kind of argument each is."""

    function: Callable[..., Any]
    given: dict[str, Any]
    kinds: dict[str, str]


@functools.cache
def cases() -> dict[str, Case]:
    torch.manual_seed(0)
    X, y = torch.rand(6, 3).double(), torch.randint(2, (6,))
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    made_of = {"model": net, "loss": nn.CrossEntropyLoss(), "data": (X, y)}
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(reduction="sum"), (X, y))
    squares = vl.EmpiricalRisk(
        nn.Linear(3, 1).double(), nn.MSELoss(), (X, X[:, :1].sin())
    )
    own = {"risk": risk}
    of_risk = {"risk": "risk"}
    G, U, J = vl.GGN(risk), vl.PerSampleGradients(risk), vl.Jacobian(risk)
    H, A = vl.Hessian(risk), G + 0.5 * vl.Identity(D)
    S, pairs, spread = A.inv(), G.eigh(k=2), vl.Diagonal(torch.linspace(1.0, 2.0, 9))
    spectrum, posterior = vl.LanczosSpectrum(spread, ncv=3), vl.Laplace(risk)
    x, three, square = torch.rand(D).double(), torch.ones(3), torch.eye(3)
    monte_carlo = {
        "mc_samples": "count",
        "generator": "generator",
        "positive_part": "yes or no",
    }
    kfac = {
        **{"variant": "word", "weight_sharing": "word", "joint_bias": "yes or no"},
        **(of_risk | monte_carlo),
    }
    grid = {"num_points": 9, "num_repeats": 1, "kappa": 3.0, "margin": 0.1}
    of_grid = {
        **{"num_points": "count", "num_repeats": "count"},
        **{"kappa": "positive", "margin": "tolerance"},
    }
    table: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, str]]] = {
        "EmpiricalRisk": (
            vl.EmpiricalRisk,
            made_of,
            {
                **{
                    "model": "class",
                    "loss": "class",
                    "data": "data",
                    "params": "list?",
                },
                **{"reduction": "name or None", "predict": "function?"},
                **{"target": "function", "take": "function", "count": "function"},
                **{"sample_axis": "axis", "check": "yes or no", "memory": "tolerance"},
                **{"check_data": "yes or no", "progress": "yes or no"},
                **{"dtype": "dtype", "process_group": "list?"},
            },
        ),
        "Jacobian": (vl.Jacobian, own, of_risk),
        "Hessian": (vl.Hessian, own, of_risk),
        "EmpiricalFisher": (vl.EmpiricalFisher, own, of_risk),
        "PerSampleGradients": (vl.PerSampleGradients, own, of_risk),
        "KFRA": (vl.KFRA, own, of_risk),
        "LossHessian": (
            vl.LossHessian,
            own,
            of_risk | {"positive_part": "yes or no"},
        ),
        "GGN": (vl.GGN, own, of_risk | monte_carlo),
        "GGNFactor": (vl.GGNFactor, own, of_risk | monte_carlo),
        "KFAC": (vl.KFAC, own, kfac),
        "EKFAC": (vl.EKFAC, own, kfac),
        "PositiveCurvatureHessian": (
            vl.PositiveCurvatureHessian,
            own,
            of_risk
            | {"modify": "word", "blocks": "groups", "as_published": "yes or no"},
        ),
        "BlockDiagonal": (
            vl.BlockDiagonal,
            {"blocks": [square, square]},
            {"blocks": "list", "indices": "list?"},
        ),
        "Dense": (vl.Dense, {}, {"matrix": "matrix"}),
        "Diagonal": (vl.Diagonal, {}, {"entries": "numbers"}),
        "Identity": (
            vl.Identity,
            {"n": 3},
            {"n": "count", "dtype": "dtype", "device": "device"},
        ),
        "KhatriRao": (
            vl.KhatriRao,
            {"left": square, "right": square},
            {"left": "matrix", "right": "matrix"},
        ),
        "Kronecker": (
            lambda factors: vl.Kronecker(square, factors),
            {},
            {"factors": "matrix"},
        ),
        "RandomProjection": (
            vl.RandomProjection,
            {"D": 9, "k": 3, "seed": 0},
            {"D": "count", "k": "count", "seed": "count"}
            | {"dtype": "dtype", "device": "device"},
        ),
        "TorchLinearOperator": (
            vl.TorchLinearOperator,
            {"shape": (2, 2), "dtype": None},
            {"dtype": "dtype", "device": "device"},
        ),
        "DeviceCosts.default": (vl.DeviceCosts.default, {}, {"device": "name"}),
        "DeviceCosts.on": (vl.DeviceCosts.on, {}, {"device": "name"}),
        "calibrate": (vl.calibrate, {}, {"device": "device"}),
        "Eigenpairs": (
            vl.Eigenpairs,
            {"eigenvalues": three, "eigenvectors": square},
            {"eigenvalues": "vector of tensors", "eigenvectors": "matrix"},
        ),
        "Eigenpairs.combine": (pairs.combine, {}, {"weights": "vector"}),
        "Eigenpairs.components": (pairs.components, {}, {"factor": "operator"}),
        "LanczosSpectrum": (
            vl.LanczosSpectrum,
            {"operator": spread, "ncv": 3},
            {"operator": "operator", "ncv": "count", "seed": "count"}
            | {"boundaries": "list?"},
        ),
        "LanczosSpectrum.density": (spectrum.density, grid, of_grid),
        "LanczosSpectrum.log_density": (
            spectrum.log_density,
            grid,
            of_grid | {"epsilon": "positive"},
        ),
        "Laplace": (
            vl.Laplace,
            own,
            {"risk": "risk", "prior_precision": "positive", "structure": "word"},
        ),
        "Laplace.log_marginal_likelihood": (
            posterior.log_marginal_likelihood,
            {},
            {"prior_precision": "positive"},
        ),
        "Laplace.optimize_prior": (
            posterior.optimize_prior,
            {},
            {"per_parameter": "yes or no"},
        ),
        "Laplace.sample": (
            posterior.sample,
            {"num": 2},
            {"num": "count", "generator": "generator"},
        ),
        "Laplace.predictive": (posterior.predictive, {}, {"X": "inputs"}),
        "Loss": (
            vl.Loss,
            {"value": lambda f, y: (f - y).square().sum(1)},
            {
                **{"value": "class", "gradient": "function?", "hessian": "function?"},
                **{"sqrt": "function?", "sample": "function?"},
                **{"reduction": "word", "coupled": "word"},
            },
        ),
        "losses.Weighted": (
            vl.losses.Weighted,
            {"loss": nn.MSELoss()},
            {"loss": "function", "reduction": "name or None"},
        ),
        "losses.register": (vl.losses.register, {}, {"kind": "class"}),
        "EmpiricalRisk.subset": (risk.subset, {}, {"indices": "indices"}),
        "EmpiricalRisk.over": (risk.over, {}, {"names": "list"}),
        "EmpiricalRisk.at": (
            risk.at,
            {},
            {"parameters": "vector of parameters"},
        ),
        "EmpiricalRisk.add_to_": (
            risk.add_to_,
            {"model": {name: p.clone() for name, p in risk.params.items()}, "step": x},
            {"model": "list", "step": "vector of parameters"},
        ),
        "EmpiricalRisk.flatten": (risk.flatten, {}, {"tensors": "list"}),
        "EmpiricalRisk.unflatten": (risk.unflatten, {}, {"vec": "vector"}),
        "@": (G.__matmul__, {}, {"x": "vector of any kind"}),
        "eigh": (
            G.eigh,
            {},
            {
                **{"k": "count", "select": "function?", "rcond": "tolerance"},
                **{"route": "word", "start": "operator?", "tol": "tolerance"},
                **{"which": "word", "v0": "numbers"},
            },
        ),
        "eigvalsh": (G.eigvalsh, {}, {"route": "word"}),
        "inv": (A.inv, {}, {"route": "word"}),
        "pinv": (G.pinv, {}, {"rcond": "tolerance"}),
        "logdet": (A.logdet, {}, {"damping": "numbers"}),
        "explain": (G.explain, {}, {"k": "count"}),
        "solve": (
            H.solve,
            {"b": x},
            {"rtol": "tolerance", "M": "operator?"},
        ),
        "restrict": (G.restrict, {}, {"index": "indices"}),
        "sample": (
            A.sample,
            {"num": 2},
            {"num": "count", "generator": "generator"},
        ),
        "GGN.block_diagonal": (G.block_diagonal, {}, {"blocks": "groups"}),
        "EmpiricalFisher.block_diagonal": (
            vl.EmpiricalFisher(risk).block_diagonal,
            {},
            {"blocks": "groups"},
        ),
        "Hessian.block_diagonal": (H.block_diagonal, {}, {"blocks": "groups"}),
        "Hessian.sample_diagonals": (H.sample_diagonals, {}, {"route": "word"}),
        "PerSampleGradients.squared_norms": (
            U.squared_norms,
            {},
            {"blocks": "groups"},
        ),
        "KFAC.pi_damped": (vl.KFAC(risk).pi_damped, {}, {"damping": "positive"}),
        "centered_gram": (vl.centered_gram, {}, {"columns": "operator"}),
        "class_means": (vl.class_means, {}, of_risk),
        "covariance": (
            vl.covariance,
            {"risk": squares},
            of_risk | {"absolute_sigma": "yes or no"},
        ),
        "damped_newton_step": (
            vl.damped_newton_step,
            {**own, "directions": pairs, "damping": 0.1},
            {
                **{"risk": "risk", "directions": "pairs", "damping": "damping"},
                **{"curvature_risk": "operator?"},
            },
        ),
        "directional_derivatives": (
            vl.directional_derivatives,
            {**own, "directions": pairs},
            {"risk": "risk", "directions": "pairs", "curvature_risk": "operator?"},
        ),
        "estimate_diagonal": (
            vl.estimate_diagonal,
            {"op": G, "num_products": 3},
            {"op": "operator", "num_products": "count", "seed": "count"},
        ),
        "estimate_trace": (
            vl.estimate_trace,
            {"op": G, "num_products": 3},
            {"op": "operator", "num_products": "count", "seed": "count"},
        ),
        "from_curvlinops": (vl.from_curvlinops, {}, {"op": "operator"}),
        "from_scipy": (
            vl.from_scipy,
            {"op": aslinearoperator(np.eye(3))},
            {"op": "operator", "self_adjoint": "yes or no", "device": "device"},
        ),
        "hstack": (vl.hstack, {}, {"parts": "list"}),
        "vstack": (vl.vstack, {}, {"parts": "list"}),
        "influence": (
            vl.influence,
            {"U_test": U, "S": S, "U_train": U},
            {"U_test": "operator", "S": "operator", "U_train": "operator"},
        ),
        "self_influence": (
            vl.self_influence,
            {"S": S, "U": U},
            {"S": "operator", "U": "operator"},
        ),
        "led": (
            vl.led,
            {"function": lambda operator: 1, "operator": G},
            {"function": "list", "operator": "operator"},
        ),
        "load": (
            vl.load,
            {"path": "none.pt", "risk": risk},
            {"risk": "risk", "kind": "word"},
        ),
        "save": (
            vl.save,
            {"result": pairs, "path": "none.pt", "risk": risk},
            {"result": "data", "risk": "risk"},
        ),
        "log_marginal_likelihood": (
            vl.log_marginal_likelihood,
            {**own, "curvature": G, "prior_precision": 1.0},
            {"risk": "risk", "curvature": "operator", "prior_precision": "positive"},
        ),
        "posterior_precision": (
            vl.posterior_precision,
            {**own, "curvature": G, "prior_precision": 1.0},
            {"risk": "risk", "curvature": "operator", "prior_precision": "positive"},
        ),
        "predictive_covariance": (
            vl.predictive_covariance,
            {"J_test": J, "S": S},
            {"J_test": "operator", "S": "operator", "diagonal": "yes or no"},
        ),
        "projector": (
            vl.projector,
            {"directions": pairs},
            {"directions": "pairs without a risk", "complement": "yes or no"},
        ),
        "trust_region_step": (
            vl.trust_region_step,
            {**own, "A": G, "damping": 0.1},
            {"risk": "risk", "A": "operator", "damping": "damping"},
        ),
    }
    return {name: Case(*case) for name, case in table.items()}


@pytest.mark.parametrize("name", [*cases()])
def test_errors_name_the_argument(name: str) -> None:
    case = cases()[name]
    for argument, kind in case.kinds.items():
        for wrong in WRONG[kind]:
            with pytest.raises((TypeError, ValueError)) as caught:
                case.function(**{**case.given, argument: wrong})
            message = str(caught.value)
            named = re.match(rf"(\w+, )*{argument}\b", message)
            assert named, f"{name}({argument}={wrong!r}): {message}"
            if kind == "yes or no":
                assert "True or False, got" in message, message


# Any value is one, or the argument goes to EmpiricalRisk or to matplotlib as it is.
FREE = {
    "shape",
    "loss",
    "data",
    "params",
    "file",
    "path",
    "eigenvectors",
    "indices",
    "dtype",
}
NO_CALLS = {"DeviceCosts", "from_backpack"}  # numbers; tested with its peer


@pytest.mark.parametrize("name", sorted({*vl.__all__} - NO_CALLS))
def test_no_argument_is_left_out(name: str) -> None:
    exported = getattr(vl, name)
    if not callable(exported):
        return  # a module
    arguments = inspect.signature(exported).parameters.values()
    listed = [a.name for a in arguments if a.kind is not a.VAR_KEYWORD]
    missing = {*listed} - {*cases()[name].kinds} - FREE
    assert not missing, f"{name}: {missing}"


def test_no_verb_is_left_out() -> None:
    for name, method in vars(VerbMethods).items():
        if name.startswith("_") or not inspect.isfunction(method):
            continue
        arguments = [*inspect.signature(method).parameters][1:]
        missing = {*arguments} - {*(cases()[name].kinds if arguments else ())}
        assert missing <= {"b"}, f"{name}: {missing}"
