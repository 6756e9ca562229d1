"""What type checkers know of the library; mypy checks it in `make lint`."""

from __future__ import annotations

from typing import Any, assert_type

import numpy as np
from scipy.sparse.linalg import cg, eigsh
from torch import Tensor

import vivit_linop as vl
from vivit_linop.operators import verbs


def products(G: vl.GGN, x: Tensor, X: np.ndarray[Any, np.dtype[np.float64]]) -> None:
    assert_type(G @ x, Tensor)
    assert_type(isinstance(G @ X, np.ndarray), bool)
    assert_type(x @ G, Tensor)
    assert_type(G @ G, vl.TorchLinearOperator)
    assert_type(G.matvec(x), Tensor)
    assert_type(G.solve(x), Tensor)


def algebra(G: vl.GGN) -> None:
    assert_type(2 * G, vl.TorchLinearOperator)
    assert_type(G * 2.0, vl.TorchLinearOperator)
    assert_type(-G, vl.TorchLinearOperator)
    assert_type(G / 3, vl.TorchLinearOperator)
    assert_type(G**2, vl.TorchLinearOperator)
    assert_type(G - G, vl.TorchLinearOperator)
    assert_type(G + 0.1 * vl.Identity(8), vl.TorchLinearOperator)
    assert_type((G + 0.1 * vl.Identity(8)).inv(), vl.TorchLinearOperator)
    assert_type(G.T, vl.TorchLinearOperator)
    assert_type(G.factor.T @ G.factor, vl.TorchLinearOperator)
    assert_type(G.shape, tuple[int, int])


def verbs_of_a_risk(G: vl.GGN, risk: vl.EmpiricalRisk) -> None:
    assert_type(G.diagonal(), Tensor)
    assert_type(G.logdet(), Tensor)
    assert_type(G.eigvalsh(), Tensor)
    assert_type(G.eigh(k=2), vl.Eigenpairs)
    assert_type(G.eigh(k=2).eigenvectors, Tensor)
    assert_type(vl.load("pairs", risk, vl.Eigenpairs), vl.Eigenpairs)
    assert_type(risk.gradient(), Tensor)


class Own(vl.TorchLinearOperator):
    """An operator with rules."""


@verbs.adjoint.register
def adjoint_of_own(A: Own) -> Own:
    return A


@verbs.matmul.rule(Own, Own)
def product_of_own(A: Own, B: Own) -> vl.TorchLinearOperator:
    return vl.Identity(len(A.diagonal() + B.diagonal()))


class OwnOutput(vl.losses.OutputLoss):
    """A loss whose arguments have names of its own."""

    def total(self, f: Tensor, y: Tensor) -> Tensor:
        return (f - y).square().sum()


def solvers_of_scipy(G: vl.GGN, b: np.ndarray[Any, np.dtype[np.float64]]) -> None:
    eigsh(G, k=3)
    cg(G, b)
