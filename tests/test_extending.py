"""Operators that users write: the battery finds their faults, verbs take rules."""

import re

import numpy as np
import pytest
import torch
from torch import Tensor

import vivit_linop as vl
from vivit_linop.curvature.output_space import OutputOperator
from vivit_linop.operators import LowRank, Product, verbs
from vivit_linop.operators.dispatch import BinaryVerb
from vivit_linop.testing import check_operator

# The battery finds faults ----------------------------------------------------------


class Sound(vl.TorchLinearOperator):
    """What the operators below would be without their fault."""

    def __init__(self, matrix):
        self.matrix = matrix
        super().__init__(tuple(matrix.shape), matrix.dtype, matrix.device)

    def _multiply(self, X):
        return self.matrix @ X

    def _multiply_adjoint(self, X):
        return self.matrix.T @ X


class WrongProduct(Sound):
    def _multiply(self, X):
        return self.matrix @ X * (1 + 1e-4)


class SlightlyWrongProduct(Sound):
    def _multiply(self, X):
        return (self.matrix.float() @ X.float()).to(X.dtype)


class WrongAdjoint(Sound):
    def _multiply_adjoint(self, X):
        return self.matrix @ X


class ClaimsToBeSelfAdjoint(Sound):
    self_adjoint = True


class OnlyTheFirstColumn(Sound):
    def _multiply(self, X):
        return (self.matrix @ X[:, :1]).expand(-1, X.shape[1]).clone()


class NotANumber(Sound):
    def _multiply(self, X):
        return torch.nan * (self.matrix @ X)


class Mutates(Sound):
    def _multiply(self, X):
        product = self.matrix @ X
        X.zero_()
        return product


class MutatesInTheAdjoint(Sound):
    def _multiply_adjoint(self, X):
        product = self.matrix.T @ X
        X.zero_()
        return product


class DtypesThatDisagree(Sound):
    def __init__(self, matrix):
        super().__init__(matrix)
        other = np.float64 if matrix.dtype == torch.float32 else np.float32
        self.dtype = np.dtype(other)


class IgnoresShapes(Sound):
    def _product(self, x):
        return super()._product(x[: self.shape[1]])


class IgnoresLongArrays(Sound):
    def dot(self, x):
        vector = isinstance(x, np.ndarray) and x.ndim == 1
        return super().dot(x[: self.shape[1]] if vector else x)


class IgnoresAxes(Sound):
    def _product(self, x):
        return super()._product(x.squeeze(-1) if x.ndim == 3 else x)


class DropsImaginaryPartsOfTensors(Sound):
    def _product(self, x):
        return super()._product(x.real if x.is_complex() else x)


class DropsImaginaryPartsOfArrays(Sound):
    def dot(self, x):
        return super().dot(x.real if isinstance(x, np.ndarray) else x)


class WrongForIntegers(Sound):
    def _product(self, x):
        return super()._product(2 * x if x.dtype == torch.long else x)


class CutsTheGraph(Sound):
    def _product(self, x):
        return super()._product(x.detach())


class GivesArraysForTensors(Sound):
    def _product(self, x):
        return super()._product(x).detach().numpy()


class GivesTensorsForArrays(Sound):
    def dot(self, x):
        product = super().dot(x)
        return torch.as_tensor(product) if isinstance(x, np.ndarray) else product


class WrongForArrays(Sound):
    def _product_numpy(self, X):
        return 2 * super()._product_numpy(X)


class WrongForReversedArrays(Sound):
    def _product_numpy(self, X):
        return super()._product_numpy(X if min(X.strides) > 0 else X[::-1])


class WrongDiagonal(Sound):
    pass


@vl.linalg.diagonal.register
def wrong_diagonal(op: WrongDiagonal) -> Tensor:
    return op.matrix.diagonal() + 1e-3


class WrongTrace(Sound):
    pass


@vl.linalg.trace.register
def wrong_trace(op: WrongTrace) -> Tensor:
    return op.matrix.diagonal().sum() * 1.1


class WrongDense(Sound):
    pass


@vl.linalg.to_dense.register
def wrong_matrix(op: WrongDense) -> Tensor:
    return op.matrix.T.clone()


class WrongScaling(Sound):
    pass


@verbs.scale.register
def wrong_multiple(op: WrongScaling, factor: float) -> vl.TorchLinearOperator:
    return Sound(abs(factor) * op.matrix)


class WrongTranspose(Sound):
    def _transpose(self):
        return Sound(self.matrix)


FAULTS = {
    WrongProduct: "op @ torch vector: relative error",
    SlightlyWrongProduct: "op @ torch vector: relative error",
    WrongAdjoint: "relative error",
    ClaimsToBeSelfAdjoint: "relative error",
    OnlyTheFirstColumn: "op @ torch matrix: relative error",
    NotANumber: "relative error nan",
    Mutates: "op @ torch vector",
    MutatesInTheAdjoint: "torch vector @ op",
    DtypesThatDisagree: "dtype and torch_dtype do not match",
    IgnoresShapes: "a vector too long raises no ValueError",
    IgnoresLongArrays: "an array too long raises no ValueError",
    IgnoresAxes: "three axes raises no ValueError",
    DropsImaginaryPartsOfTensors: "op @ complex numbers has dtype torch.float64",
    DropsImaginaryPartsOfArrays: "op @ complex numbers has dtype torch.float64",
    WrongForIntegers: "op @ torch.int64: relative error",
    CutsTheGraph: "cuts the graph",
    GivesArraysForTensors: "is ndarray",
    GivesTensorsForArrays: "is Tensor",
    WrongForArrays: "numpy",
    WrongForReversedArrays: "negative strides",
    WrongDiagonal: "diagonal: relative error",
    WrongTrace: "trace: relative error",
    WrongDense: "to_dense: relative error",
    WrongScaling: "relative error",
    WrongTranspose: "relative error",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_battery_passes_a_sound_operator(dtype):
    matrix = torch.randn(4, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    check_operator(Sound(matrix), matrix)
    check_operator(Sound(matrix), matrix.numpy())


@pytest.mark.parametrize("wrong", FAULTS, ids=lambda fault: fault.__name__)
def test_battery_finds(wrong):
    matrix = torch.randn(
        4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    with pytest.raises(AssertionError, match=re.escape(FAULTS[wrong])):
        check_operator(wrong(matrix), matrix)


class MutatesByProjecting(Sound):
    """Where A A = A, a product that is left in its input is still a right one."""

    def _multiply(self, X):
        return X.copy_(self.matrix @ X).clone()


class MutatesByProjectingInTheAdjoint(Sound):
    def _multiply_adjoint(self, X):
        return X.copy_(self.matrix.T @ X).clone()


@pytest.mark.parametrize(
    "wrong", [MutatesByProjecting, MutatesByProjectingInTheAdjoint]
)
def test_battery_finds_changed_inputs(wrong):
    projection = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    with pytest.raises(AssertionError, match="changed"):
        check_operator(wrong(projection), projection)


class Aliases(Sound):
    """Where A = I, the input is a right result."""

    def _multiply(self, X):
        return X


class AliasesInTheAdjoint(Sound):
    def _multiply_adjoint(self, X):
        return X


@pytest.mark.parametrize("wrong", [Aliases, AliasesInTheAdjoint])
def test_battery_finds_results_that_alias_their_input(wrong):
    with pytest.raises(AssertionError, match=r"aliased|changed"):
        check_operator(wrong(torch.eye(4)), torch.eye(4))


class DoublesSingles(Sound):
    """Exact, so that nothing but the dtype can tell."""

    def _product(self, x):
        return super()._product(x).double()


class DoublesSinglesOfArrays(Sound):
    def _product_numpy(self, X):
        return super()._product_numpy(X).astype(np.float64)


class DoublesSinglesInTheAdjoint(Sound):
    def _transpose(self):
        return Sound(self.matrix.T.double())


@pytest.mark.parametrize(
    "wrong", [DoublesSingles, DoublesSinglesOfArrays, DoublesSinglesInTheAdjoint]
)
def test_battery_finds_results_of_another_precision(wrong):
    with pytest.raises(AssertionError, match="has dtype"):
        check_operator(wrong(torch.eye(4).cumsum(0)), torch.eye(4).cumsum(0))


def test_battery_compares_shapes():
    with pytest.raises(AssertionError, match="shape"):
        check_operator(Sound(torch.ones(2, 3)), torch.ones(3, 2))


def test_battery_takes_a_tolerance():
    A = torch.eye(3, dtype=torch.float64)
    op = Sound(A * (1 + 1e-8))
    check_operator(op, A, rtol=1e-7)
    with pytest.raises(AssertionError, match=r"> 1e-09"):
        check_operator(op, A, rtol=1e-9)


def test_battery_allows_nothing_where_zero_is_right():
    class Tiny(Sound):
        def _multiply(self, X):
            return torch.full((3, X.shape[1]), 1e-300, dtype=X.dtype)

    with pytest.raises(AssertionError):
        check_operator(Tiny(torch.zeros(3, 3).double()), torch.zeros(3, 3))


# What a subclass needs --------------------------------------------------------------


class FlatMatrices(Sound):
    def _multiply(self, X):
        return (self.matrix @ X).reshape(-1, 1)


class OneColumnOfMany(Sound):
    def _multiply(self, X):
        return self.matrix @ X[:, 0]


class FewerRows(Sound):
    def _multiply(self, X):
        return self.matrix[1:] @ X


@pytest.mark.parametrize("wrong", [FlatMatrices, OneColumnOfMany, FewerRows])
def test_products_of_another_shape_are_refused(wrong):
    """A vector for each of two columns would pass for a product with one."""
    op, X = wrong(torch.rand(3, 3).double()), torch.rand(3, 2).double()
    for multiply in (lambda: op @ X, lambda: X.numpy().T @ op.T, op.to_dense):
        with pytest.raises(
            ValueError, match=r"^_multiply: of \[3, .\] <3x3 .* returned"
        ):
            multiply()


def test_undefined_products_are_named():
    class Empty(vl.TorchLinearOperator):
        pass

    class Half(Empty):
        def _multiply(self, X):
            return X.clone()

    x = torch.ones(3, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"Empty does not define _multiply\."):
        Empty((3, 3), torch.float64) @ x
    with pytest.raises(NotImplementedError, match=r"Half .* _multiply_adjoint\."):
        x @ Half((3, 3), torch.float64)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.complex64, torch.long]
)
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match="dtype"):
        vl.Identity(3, dtype)


class Householder(vl.TorchLinearOperator):
    """I − 2 v vᵀ for a unit vector v, with the rules that its structure allows."""

    self_adjoint = True

    def __init__(self, v):
        self.v = v / v.norm()
        super().__init__((len(v), len(v)), v.dtype, v.device)

    def _multiply(self, X):
        return X - 2 * torch.outer(self.v, self.v @ X)

    def matrix(self):
        unit = torch.eye(len(self.v), dtype=torch.float64)
        return unit - 2 * torch.outer(self.v, self.v)


@vl.linalg.inv.register
def inverse_of_householder(op: Householder) -> vl.TorchLinearOperator:
    return op


@vl.linalg.logdet.register
def logdet_of_householder(op: Householder) -> Tensor:
    return torch.zeros((), dtype=op.torch_dtype, device=op.device)


@vl.linalg.eigendecomposition.register
def decomposition_of_householder(op: Householder) -> vl.linalg.Eigendecomposition:
    return vl.linalg.eigendecomposition(vl.Dense(op.matrix()))


@verbs.matmul.rule(Householder, Householder)
def product_of_householders(A: Householder, B: Householder) -> vl.TorchLinearOperator:
    return vl.Identity(A.shape[0], A.torch_dtype) if A is B else NotImplemented


@pytest.fixture
def reflection():
    return Householder(torch.tensor([1.0, 2.0, -2.0], dtype=torch.float64))


def test_subclass_passes_the_battery(reflection):
    check_operator(reflection, reflection.matrix())


def test_subclass_takes_rules_of_unary_verbs(reflection):
    assert reflection.inv() is reflection
    assert reflection.logdet() == 0.0
    evals, evecs = reflection.eigh()
    torch.testing.assert_close(evals, evals.new([-1.0, 1.0, 1.0]))
    torch.testing.assert_close(evecs * evals @ evecs.T, reflection.matrix())
    x = torch.arange(3.0, dtype=torch.float64)
    torch.testing.assert_close(
        reflection.solve(x), torch.linalg.solve(reflection.matrix(), x)
    )


def test_subclass_takes_rules_of_binary_verbs(reflection):
    assert isinstance(reflection @ reflection, vl.Identity)
    assert isinstance(reflection**2, vl.Identity)
    other = Householder(torch.ones(3, dtype=torch.float64))
    assert isinstance(reflection @ other, Product)
    # Also where it meets itself inside a longer product.
    A = vl.Kronecker(torch.ones(3, 2, dtype=torch.float64))
    longer = (A.T @ reflection) @ (reflection @ other)
    assert [type(factor) for factor in longer.factors] == [vl.Kronecker, Householder]


def test_commuting_rules_get_operands_in_their_own_order(reflection):
    verb, dense = BinaryVerb("meet"), vl.Dense(torch.eye(3, dtype=torch.float64))

    @verb.rule(vl.TorchLinearOperator, vl.TorchLinearOperator)
    def meeting_of_operators(A, B):
        return "general"

    @verb.commuting(Householder, vl.Dense)
    def meeting_of_householder_and_dense(A, B):
        assert isinstance(A, Householder)
        return "special" if B is dense else NotImplemented

    assert verb(reflection, dense) == verb(dense, reflection) == "special"
    other = vl.Dense(dense.matrix)
    assert verb(reflection, other) == verb(other, reflection) == "general"
    # A newer rule of one order is asked before.
    verb.rule(vl.Dense, Householder)(lambda A, B: "newer")
    assert verb(dense, reflection) == "newer"
    assert verb(reflection, dense) == "special"


def test_nodes_made_of_a_subclass_use_its_rules(reflection):
    A = torch.diag(torch.tensor([2.0, 4.0], dtype=torch.float64))
    for op, dense in (
        (3 * reflection, 3 * reflection.matrix()),
        (
            vl.BlockDiagonal([reflection, A]),
            torch.block_diag(reflection.matrix(), A),
        ),
        (vl.Kronecker(reflection, A), torch.kron(reflection.matrix(), A)),
    ):
        check_operator(op.inv(), torch.linalg.inv(dense))
        torch.testing.assert_close(op.logdet(), torch.linalg.slogdet(dense)[1])
        torch.testing.assert_close(op.eigvalsh(), torch.linalg.eigvalsh(dense))


def test_rules_hold_for_subclasses():
    class Named(vl.Diagonal):
        pass

    op = Named(torch.tensor([1.0, 4.0]))
    assert type(op.inv()) is vl.Diagonal
    assert type(op @ op) is vl.Diagonal
    torch.testing.assert_close(op.logdet(), torch.tensor(4.0).log())


class OnlyItsGram(vl.TorchLinearOperator):
    """A factor with a Gram matrix, of which no product can be formed."""

    def __init__(self, gram):
        self.gram = gram
        super().__init__((1_000_000, len(gram)), gram.dtype)


@verbs.gram_matrix.register
def gram_matrix_of_its_gram(left: OnlyItsGram, right: vl.TorchLinearOperator) -> Tensor:
    assert left is right
    return left.gram


def test_exact_verbs_of_low_rank_operators_need_the_gram_matrix_alone():
    gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    V = OnlyItsGram(gram)
    G = V @ V.T
    torch.testing.assert_close(G.eigvalsh(), gram.new([1.0, 3.0]))
    torch.testing.assert_close(G.eigh(k=1).eigenvalues, gram.new([3.0]))
    damped = 2 * G + 4 * vl.Identity(1_000_000)
    expected = gram.new([4.0]).log() * 999_998 + gram.new([6.0 * 10.0]).log()
    torch.testing.assert_close(damped.logdet(), expected[0], rtol=1e-15, atol=0)
    torch.testing.assert_close(damped.inv().logdet(), -expected[0], rtol=1e-15, atol=0)
    trace = 999_998 / 4 + 1 / 6 + 1 / 10
    torch.testing.assert_close(
        damped.inv().trace(), gram.new([trace])[0], rtol=1e-14, atol=0
    )


def test_verbs_without_a_rule_say_so():
    class Opaque(Sound):
        self_adjoint = True

    op, large = Opaque(torch.eye(3)), Opaque(torch.eye(2001))
    for A, verb in (
        (op, "inv"),
        (large, "eigh"),
        (large, "eigvalsh"),
        (large, "logdet"),
    ):
        with pytest.raises(TypeError, match=r"Opaque.*Dense\(op\.to_dense\(\)\)"):
            getattr(A, verb)()
    torch.testing.assert_close(op.eigvalsh(), torch.ones(3))  # of the matrix
    with pytest.raises(TypeError, match="inv: no closed form for a damped Opaque"):
        (op + vl.Identity(3)).inv()
    # These need products only.
    torch.testing.assert_close(op.diagonal(), torch.ones(3))
    torch.testing.assert_close(op.trace(), torch.tensor(3.0))
    assert isinstance(op @ op, Product)
    assert isinstance(LowRank(op).gram.to_dense(), Tensor)


# Operators in output space -----------------------------------------------------------


class Mixed(OutputOperator):
    """One matrix ``[C, C]`` for each sample."""

    def __init__(self, risk, matrix):
        self.matrix = matrix
        super().__init__(risk, len(matrix))

    def apply_batch(self, batch, X):
        return (self.matrix @ X.unflatten(0, (-1, len(self.matrix)))).flatten(0, 1)

    def dense_batch(self, batch):
        return self.matrix.expand(self.risk.batch_sizes[batch], -1, -1)


class MixedBothWays(Mixed):
    def apply_adjoint_batch(self, batch, X):
        return Mixed(self.risk, self.matrix.T).apply_batch(batch, X)


class MixedSymmetrically(Mixed):
    self_adjoint = True


def test_output_operators_that_are_not_symmetric_say_their_adjoint():
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2).double()
    data = torch.rand(4, 3, dtype=torch.float64), torch.rand(4, 2, dtype=torch.float64)
    risk = vl.EmpiricalRisk(net, torch.nn.MSELoss(), data)
    J, M = vl.Jacobian(risk), torch.tensor([[1.0, 2.0], [-3.0, 0.5]]).double()
    dense, x = J.to_dense(), torch.arange(8.0, dtype=torch.float64)
    for of, matrix in ((MixedBothWays, M), (MixedSymmetrically, M + M.T)):
        B, whole = of(risk, matrix), torch.block_diag(*[matrix] * 4)
        V = J.T @ B
        torch.testing.assert_close(B.T @ x, whole.T @ x)
        torch.testing.assert_close(V @ x, dense.T @ (whole @ x))
        torch.testing.assert_close(V.T @ (V @ x), whole.T @ dense @ dense.T @ whole @ x)
        torch.testing.assert_close(V.to_dense(), dense.T @ whole)
    B = Mixed(risk, M)
    torch.testing.assert_close(B @ x, torch.block_diag(*[M] * 4) @ x)
    for product in (lambda: B.T @ x, lambda: (J.T @ B).T @ (dense.T @ x)):
        with pytest.raises(NotImplementedError, match="define apply_adjoint_batch"):
            product()
