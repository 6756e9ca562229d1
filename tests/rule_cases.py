"""Operands of expressions, small and of every kind, and their matrices."""

import functools
from types import SimpleNamespace

import torch

import vivit_linop as vl
from tests.operator_market import Draw, khatri_rao_of


@functools.cache
def operands(dtype=torch.float64, device=None):
    """Operators by name, and their matrices by the same names.

    All are 6 × 6, but for the factors V, W (6 × 2), Z (6 × 9) and P, Q (Khatri–Rao,
    6 × 2), and R, T (6 × 4): Kronecker and block-diagonal, rectangular.
    """
    draw = Draw(dtype, device)
    a, b, c, d = draw.regular(2), draw.regular(3), draw.regular(2), draw.regular(3)
    e, f, g, h = draw(2, 2), draw(3, 2), draw(2, 3), draw(4, 1)
    sym = draw.symmetric(6)
    places = [torch.tensor(rows, device=device) for rows in ([5, 0], [3, 1, 4], [2])]
    one, two = draw.regular(1), draw.regular(1)
    ops = SimpleNamespace(
        I=vl.Identity(6),
        A=vl.Dense(draw.regular(6)),
        B=vl.Dense(draw.regular(6)),
        S=vl.Dense(sym),
        D=vl.Diagonal(draw.entries(6)),
        E=vl.Diagonal(draw.entries(6)),
        K=vl.Kronecker(a, b),
        L=vl.Kronecker(c, d),
        M=vl.Kronecker(b, a),
        BD=vl.BlockDiagonal([a, b, one]),
        BE=vl.BlockDiagonal([c, d, two]),
        BF=vl.BlockDiagonal([b, a, one]),
        BI=vl.BlockDiagonal([a, b, one], places),
        BJ=vl.BlockDiagonal([c, d, two], [place.clone() for place in places]),
        V=vl.Dense(draw(6, 2)),
        W=vl.Dense(draw(6, 2)),
        Z=vl.Dense(draw(6, 9)),
        P=vl.KhatriRao(e, f),
        Q=vl.KhatriRao(draw(2, 2), draw(3, 2)),
        O=vl.KhatriRao(draw(3, 2), draw(2, 2)),
        R=vl.Kronecker(e, f),
        T=vl.BlockDiagonal([g, h]),
    )
    dense = {name: op.to_dense().double() for name, op in vars(ops).items()}
    # Not by the code under test, where it matters; undecided nodes lie on the CPU.
    dense["I"] = draw.eye(6)
    dense["K"] = torch.kron(a.double(), b.double())
    dense["BD"] = torch.block_diag(a.double(), b.double(), one.double())
    dense["P"] = khatri_rao_of(e, f)
    return ops, SimpleNamespace(**dense)
