"""The rewrite rules: what type an expression becomes, and that its value stays."""

import numpy as np
import pytest
import torch

import vivit_linop as vl
from tests.operator_market import Draw
from tests.rule_cases import operands
from vivit_linop.operators import (
    Adjoint,
    BlockDiagonal,
    CorrectedKronecker,
    Damped,
    Dense,
    DenseInverse,
    Diagonal,
    Gram,
    HStack,
    Identity,
    Kronecker,
    LowRank,
    Product,
    Scaled,
    Sum,
    Woodbury,
)


def inv(x):
    return torch.linalg.inv(x) if isinstance(x, torch.Tensor) else x.inv()


# An expression, over operators and over matrices alike, and the node it becomes.
RULES = {
    # products
    "A B, dense": (lambda o: o.A @ o.B, Dense),
    "A B, other": (lambda o: o.K @ o.D, Product),
    "products are flat": (lambda o: (o.K @ o.D) @ (o.S @ o.K), Product),
    "D E, diagonal": (lambda o: o.D @ o.E, Diagonal),
    "K L, Kronecker": (lambda o: o.K @ o.L, Kronecker),
    "K M, factors that do not match": (lambda o: o.K @ o.M, Product),
    "K.T, Kronecker": (lambda o: o.K.T, Kronecker),
    "R R.T, Kronecker": (lambda o: o.R @ o.R.T, Kronecker),
    "R.T R, Kronecker": (lambda o: o.R.T @ o.R, Kronecker),
    "block-diagonal product": (lambda o: o.BD @ o.BE, BlockDiagonal),
    "blocks that do not match": (lambda o: o.BD @ o.BF, Product),
    "blocks at the same places": (lambda o: o.BI @ o.BJ, BlockDiagonal),
    "blocks at other places": (lambda o: o.BI @ o.BD, Product),
    "block-diagonal adjoint": (lambda o: o.T.T, BlockDiagonal),
    "T T.T, block-diagonal": (lambda o: o.T @ o.T.T, BlockDiagonal),
    "T.T T, block-diagonal": (lambda o: o.T.T @ o.T, BlockDiagonal),
    "I A": (lambda o: o.I @ o.K, Kronecker),
    "A I": (lambda o: o.K @ o.I, Kronecker),
    "I I": (lambda o: o.I @ o.I, Identity),
    "(2 A) B": (lambda o: (2 * o.K) @ o.D, Scaled),
    "A (2 B)": (lambda o: o.K @ (2 * o.L), Scaled),
    # adjoints
    "A.T": (lambda o: o.A.T, Adjoint),
    "A.T.T": (lambda o: o.A.T.T, Dense),
    "S.T, symmetric": (lambda o: o.S.T, Dense),
    "(V V.T).T": (lambda o: (o.V @ o.V.T).T, LowRank),
    "(2 K).T": (lambda o: (2 * o.K).T, Scaled),
    "(K D).T": (lambda o: (o.K @ o.D).T, Product),
    "(K + D).T": (lambda o: (o.K + o.D).T, Adjoint),
    # sums
    "A + B, dense": (lambda o: o.A + o.B, Dense),
    "D + E, diagonal": (lambda o: o.D + o.E, Diagonal),
    "A + B, other": (lambda o: o.K + o.D, Sum),
    "A + A": (lambda o: o.K + o.K, Scaled),
    "A - A": (lambda o: o.K - o.K, Scaled),
    "sums are flat": (lambda o: (o.K + o.D) + (o.L + o.A), Sum),
    "block-diagonal sum": (lambda o: o.BD + o.BE, BlockDiagonal),
    "sum of blocks at the same places": (lambda o: o.BI + o.BJ, BlockDiagonal),
    "sum of blocks at other places": (lambda o: o.BI + o.BD, Sum),
    "sum of blocks of other sizes": (lambda o: o.BD + o.BF, Sum),
    "I + I": (lambda o: o.I + o.I, Scaled),
    "2 I + I": (lambda o: 2 * o.I + o.I, Scaled),
    "I + 2 I": (lambda o: o.I + 2 * o.I, Scaled),
    "2 I + 3 I": (lambda o: 2 * o.I + 3 * o.I, Scaled),
    "2 I - I": (lambda o: 2 * o.I - o.I, Identity),
    # scalings
    "2 K": (lambda o: 2 * o.K, Scaled),
    "2 (3 K)": (lambda o: 2 * (3 * o.K), Scaled),
    "0.5 (2 K)": (lambda o: 0.5 * (2 * o.K), Kronecker),
    "-(-K)": (lambda o: -1 * (-o.K), Kronecker),
    "2 D": (lambda o: 2 * o.D, Diagonal),
    "2 BD": (lambda o: 2 * o.BD, BlockDiagonal),
    # low rank
    "V V.T": (lambda o: o.V @ o.V.T, LowRank),
    "Z Z.T": (lambda o: o.Z @ o.Z.T, LowRank),
    "P P.T": (lambda o: o.P @ o.P.T, LowRank),
    "V W.T": (lambda o: o.V @ o.W.T, Product),
    "K V V.T": (lambda o: (o.K @ o.V) @ o.V.T, Product),
    "K (V V.T) meets in a product": (lambda o: (o.K @ o.P) @ (o.P.T @ o.K), Product),
    "V.T V": (lambda o: o.V.T @ o.V, Gram),
    "V.T W": (lambda o: o.V.T @ o.W, Product),
    "P.T P": (lambda o: o.P.T @ o.P, Dense),
    "P.T Q": (lambda o: o.P.T @ o.Q, Dense),
    "P.T O, heights that do not match": (lambda o: o.P.T @ o.O, Product),
    "2 (V V.T)": (lambda o: 2 * (o.V @ o.V.T), LowRank),
    "-2 (V V.T)": (lambda o: -2 * (o.V @ o.V.T), Scaled),
    "-(-2 (V V.T))": (lambda o: -(-2 * (o.V @ o.V.T)), LowRank),
    "(2 P) P.T": (lambda o: (2 * o.P) @ o.P.T, LowRank),
    "2 P P.T / 3": (lambda o: 2 * o.P @ o.P.T / 3, LowRank),
    "(2 P).T (2 P)": (lambda o: (2 * o.P).T @ (2 * o.P), Dense),
    "V V.T + 2 V V.T": (lambda o: o.V @ o.V.T + 2 * (o.V @ o.V.T), LowRank),
    "V V.T + W W.T": (lambda o: o.V @ o.V.T + o.W @ o.W.T, LowRank),
    # damping
    "V V.T + 2 I": (lambda o: o.V @ o.V.T + 2 * o.I, Damped),
    "2 I + V V.T": (lambda o: 2 * o.I + o.V @ o.V.T, Damped),
    "V V.T + I": (lambda o: o.V @ o.V.T + o.I, Damped),
    "I + V V.T": (lambda o: o.I + o.V @ o.V.T, Damped),
    "V V.T - 2 I": (lambda o: o.V @ o.V.T - 2 * o.I, Damped),
    "2 K + I": (lambda o: 2 * o.K + o.I, Damped),
    "damping adds up": (lambda o: o.V @ o.V.T + 2 * o.I + 0.5 * o.I, Damped),
    "damping cancels": (lambda o: o.V @ o.V.T + 2 * o.I - 2 * o.I, LowRank),
    "scaled damping": (lambda o: 3 * (o.V @ o.V.T + 2 * o.I), Damped),
    "damped + A": (lambda o: (o.V @ o.V.T + 2 * o.I) + o.K, Damped),
    "A + damped": (lambda o: o.K + (o.V @ o.V.T + 2 * o.I), Damped),
    "damped + damped": (
        lambda o: (o.V @ o.V.T + 2 * o.I) + (o.V @ o.V.T + o.I),
        Damped,
    ),
    "damped, adjoint": (lambda o: (o.K + 2 * o.I).T, Adjoint),
    # inverses
    "inv A": (lambda o: inv(o.A), DenseInverse),
    "inv inv A": (lambda o: inv(inv(o.A)), Dense),
    "inv A.T": (lambda o: inv(o.A.T), Adjoint),
    "inv I": (lambda o: inv(o.I), Identity),
    "inv (2 I)": (lambda o: inv(2 * o.I), Scaled),
    "inv D": (lambda o: inv(o.D), Diagonal),
    "inv (2 K)": (lambda o: inv(2 * o.K), Scaled),
    "inv K": (lambda o: inv(o.K), Kronecker),
    "inv (K D)": (lambda o: inv(o.K @ o.D), Product),
    "inv BI": (lambda o: inv(o.BI), BlockDiagonal),
    "inv (V V.T + 2 I)": (lambda o: inv(o.V @ o.V.T + 2 * o.I), Woodbury),
    "inv (Z Z.T + 2 I)": (lambda o: inv(o.Z @ o.Z.T + 2 * o.I), Woodbury),
    "inv inv (V V.T + 2 I)": (lambda o: inv(inv(o.V @ o.V.T + 2 * o.I)), Damped),
    "inv (3 V V.T + 2 I)": (lambda o: inv(3 * (o.V @ o.V.T) + 2 * o.I), Woodbury),
    "-inv (V V.T + 2 I)": (lambda o: -inv(o.V @ o.V.T + 2 * o.I), Scaled),
    "inv (-V V.T - 2 I)": (lambda o: inv(-(o.V @ o.V.T) - 2 * o.I), Scaled),
    "inv (A + I)": (lambda o: inv(o.A + o.I), DenseInverse),
    "inv (D + 9 I)": (lambda o: inv(o.D + 9 * o.I), Diagonal),
    "inv (2 A + I)": (lambda o: inv(2 * o.A + o.I), DenseInverse),
    "inv (0 K + 2 I)": (lambda o: inv(0 * o.K + 2 * o.I), Scaled),
    "inv (BI + I)": (lambda o: inv(o.BI + o.I), BlockDiagonal),
    "inv (R R.T + I)": (lambda o: inv(o.R @ o.R.T + o.I), CorrectedKronecker),
    "inv (T T.T + I)": (lambda o: inv(o.T @ o.T.T + 1.0 * o.I), BlockDiagonal),
}


@pytest.mark.parametrize("name", RULES)
def test_rule(name, device):
    expression, node = RULES[name]
    ops, dense = operands(torch.float64, device)
    result = expression(ops)
    assert type(result) is node
    vl.testing.check_operator(result, expression(dense))


@pytest.mark.parametrize("name", RULES)
def test_rule_in_float32(name, device):
    # What has no dtype of its own is float64 when asked, and must not decide here.
    expression, node = RULES[name]
    ops, dense = operands(torch.float32, device)
    result = expression(ops)
    assert type(result) is node
    assert result._own_dtype in (None, torch.float32)
    expected = expression(dense).to(result.device)
    error = (result.to_dense().double() - expected).norm()
    assert error <= 1e-5 * expected.norm()


def test_adjoint_of_adjoint_is_the_operator():
    ops, _ = operands()
    assert ops.A.T.T is ops.A
    assert ops.P.T.T is ops.P
    assert ops.S.T is ops.S


def test_products_are_flat():
    ops, _ = operands()
    product = (ops.K @ ops.D) @ (ops.A @ ops.K)
    assert product.factors == (ops.K, ops.D, ops.A, ops.K)
    assert ((ops.K @ ops.D) @ ops.A).factors == (ops.K, ops.D, ops.A)


def test_sums_are_flat():
    ops, _ = operands()
    assert ((ops.K + ops.D) + (ops.L + ops.A)).terms == (ops.K, ops.D, ops.L, ops.A)


def test_scalings_are_collected():
    ops, _ = operands()
    product = (2 * ops.K) @ (3 * ops.D.T) @ (5 * ops.K)
    assert isinstance(product, Scaled)
    assert product.factor == 10  # 3 goes into the diagonal
    assert isinstance(product.operator, Product)
    assert (4 * (ops.K / 2)).operator is ops.K


def test_where_products_meet_rules_apply():
    ops, _ = operands()
    middle = (ops.K @ ops.P) @ (ops.P.T @ ops.K)
    assert [type(factor) for factor in middle.factors] == [
        Kronecker,
        LowRank,
        Kronecker,
    ]
    assert middle.factors[1].factor is ops.P
    middle = (ops.K @ ops.D) @ (ops.E @ ops.L)
    assert [type(factor) for factor in middle.factors] == [
        Kronecker,
        Diagonal,
        Kronecker,
    ]
    # What comes of two factors may meet the next one: K (D I) L.
    assert isinstance((ops.K @ ops.I) @ (ops.I @ ops.L), Kronecker)


def test_low_rank_keeps_its_factor():
    ops, _ = operands()
    G = ops.V @ ops.V.T
    assert G.factor is ops.V
    assert (G.scale, (3 * G).scale, (G + 2 * G).scale, (G / 4).scale) == (1, 3, 3, 0.25)
    assert (3 * G).factor is ops.V


def test_what_is_known_of_the_factor_is_kept():
    ops, _ = operands()
    G = ops.V @ ops.V.T
    K = G.gram.matrix
    for other in (3 * G, 2 * (G / 7), G + G):
        assert other.gram.matrix is K
    torch.testing.assert_close((3 * G).small_side, 3 * K)
    torch.testing.assert_close((2 * (3 * G)).small_side, 6 * K)


def test_the_same_factor_is_decided_by_identity():
    ops, _ = operands()
    V = vl.Dense(ops.V.matrix)  # equal numbers, another operator
    assert isinstance(ops.V @ V.T, Product)
    assert isinstance(ops.V.T @ V, Product)
    # In a sum they are one if their numbers are so in memory.
    both = ops.V @ ops.V.T + V @ V.T
    assert both.factor is ops.V and both.scale == 2
    V = vl.Dense(ops.V.matrix.clone())
    assert isinstance((ops.V @ ops.V.T + V @ V.T).factor, HStack)


def test_damping_adds_up():
    ops, _ = operands()
    G = ops.V @ ops.V.T
    damped = 3 * (G + ops.I / 2 + 0.25 * ops.I) - ops.I
    assert isinstance(damped, Damped)
    assert damped.damping == 1.25
    assert isinstance(damped.operator, LowRank)
    assert damped.operator.scale == 3
    together = (G + ops.I) + (ops.K + 2 * ops.I)
    assert isinstance(together.operator, Sum)
    assert together.damping == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dense_and_diagonal_stay_so_when_damped(dtype):
    draw = Draw(dtype)
    matrix, entries = draw(4, 4), draw(4)
    unit, live = vl.Identity(4), torch.tensor(0.5, dtype=dtype, requires_grad=True)
    for delta in (2, 0.5, live):
        for op, node in ((Dense(matrix), Dense), (Diagonal(entries), Diagonal)):
            expected = op.to_dense() + delta * torch.eye(4).to(dtype)
            for damped in (op + delta * unit, delta * unit + op, op + unit * delta):
                assert isinstance(damped, node)
                torch.testing.assert_close(damped.to_dense(), expected)
                torch.testing.assert_close(damped @ matrix, expected @ matrix)
                torch.testing.assert_close(
                    (damped @ op).to_dense(), expected @ op.to_dense()
                )
                assert (damped @ op).requires_grad == isinstance(delta, torch.Tensor)
            assert type(op + delta * unit - delta * unit) is node or delta is live


def test_a_damping_below_the_rounding_of_a_dense_matrix_counts():
    """The float32 matrix of ones is singular; with 1e-9 I it is not."""
    ones, unit = torch.ones(3, 3), vl.Identity(3)
    damped = Dense(ones) + 1e-9 * unit
    expected = torch.logdet(ones.double() + 1e-9 * torch.eye(3).double())
    torch.testing.assert_close(damped.logdet().double(), expected, rtol=1e-5, atol=0)
    inverse = torch.linalg.inv(ones.double() + 1e-9 * torch.eye(3).double())
    torch.testing.assert_close(
        damped.inv().to_dense().double(), inverse, rtol=1e-5, atol=0
    )
    twice = (damped + 1e-9 * unit).logdet().double()
    torch.testing.assert_close(
        twice, expected + 2 * torch.log(torch.tensor(2.0)).double(), rtol=1e-4, atol=0
    )


def test_identities_are_absorbed():
    ops, _ = operands()
    total = 2 * ops.I + 3 * ops.I
    assert isinstance(total.operator, Identity)
    assert total.factor == 5


def test_inverse_of_woodbury_is_the_damped_node():
    ops, _ = operands()
    damped = ops.V @ ops.V.T + 2 * ops.I
    again = damped.inv().inv()
    assert isinstance(again, Damped)
    assert again.operator is damped.operator
    assert again.damping == damped.damping


def test_inverses_undo():
    ops, _ = operands()
    assert ops.A.inv().inv() is ops.A
    assert ops.A.T.inv().T.inv() is ops.A


def test_sandwich_of_a_self_adjoint_operator_is_self_adjoint(device):
    ops, _ = operands(device=device)
    for middle in (
        ops.S,
        ops.D,
        vl.BlockDiagonal([ops.S.matrix[:2, :2], ops.D.inv().to_dense()[:4, :4]]),
        vl.Kronecker(ops.S.matrix[:2, :2], torch.eye(3).to(ops.S.matrix)),
        -2 * (ops.V @ ops.V.T),
        ops.W @ ops.W.T + 2 * ops.I,
    ):
        assert middle.self_adjoint
        assert (ops.P.T @ middle @ ops.P).self_adjoint
        assert (ops.P.T @ (middle @ ops.P)).self_adjoint
    assert not (ops.P.T @ ops.A @ ops.P).self_adjoint
    assert not (ops.P.T @ ops.S @ ops.Q).self_adjoint


# What is no expression ---------------------------------------------------------------


def test_shapes_that_do_not_match():
    ops, _ = operands()
    with pytest.raises(ValueError, match=r"Shapes do not match.*6x2.*6x2"):
        ops.V @ ops.W
    with pytest.raises(ValueError, match=r"Shapes do not match.*6x2.*6x6"):
        ops.V + ops.A
    with pytest.raises(ValueError, match="Shapes do not match"):
        ops.V - ops.A
    with pytest.raises(ValueError, match="power: needs a square operator"):
        ops.V**2


@pytest.mark.parametrize("power", [-1, np.int64(-2), 0.5, 2.0, "2", None])
def test_powers_are_integers_of_at_least_zero(power):
    ops, _ = operands()
    with pytest.raises(ValueError, match="power"):
        ops.A**power


@pytest.mark.parametrize(
    ("scalar", "error"),
    [
        (1j, TypeError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (torch.tensor(1j), TypeError),
        (torch.tensor(torch.inf), ValueError),
    ],
)
def test_scalars_are_real_and_finite(scalar, error):
    ops, _ = operands()
    for expression in (
        lambda: scalar * ops.K,
        lambda: ops.K * scalar,
        lambda: ops.K / scalar,
    ):
        with pytest.raises(error, match="scaled by a"):
            expression()


@pytest.mark.parametrize("scalar", [0.0, 1e-320])
def test_division_by_what_has_no_finite_reciprocal(scalar):
    ops, _ = operands()
    with pytest.raises((ValueError, ZeroDivisionError)):
        ops.K / scalar


@pytest.mark.parametrize("other", [1.0, torch.ones(6, 6), torch.ones(()), None, "a"])
def test_sums_are_of_operators(other):
    ops, _ = operands()
    for expression in (
        lambda: ops.K + other,
        lambda: other + ops.K,
        lambda: ops.K - other,
        lambda: other - ops.K,
    ):
        with pytest.raises(TypeError):
            expression()


@pytest.mark.parametrize("other", [2.0, torch.tensor(2.0)])
def test_scalars_are_no_operands_of_a_matrix_product(other):
    ops, _ = operands()
    for expression in (lambda: ops.K @ other, lambda: other @ ops.K):
        with pytest.raises((ValueError, RuntimeError), match=r"[Ss]calar|at least 1D"):
            expression()


@pytest.mark.parametrize("other", [None, "abc", b"abc", object(), [None] * 6, {}])
def test_products_with_what_is_no_array(other):
    ops, _ = operands()
    for expression in (
        lambda: ops.K @ other,
        lambda: ops.K * other,
        lambda: other @ ops.K,
    ):
        with pytest.raises((TypeError, ValueError)):
            expression()
