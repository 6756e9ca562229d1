"""Random expressions agree with dense arithmetic; bad input is an error.

Entries are small multiples of 1/4, so that products and sums are exact in float64 and
the dense matrices are exact too; only inverses and eigenvalues round.
"""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import vivit_linop as vl
from tests import placing
from vivit_linop.operators import LowRank

DTYPES = st.sampled_from([torch.float32, torch.float64])
SIZES = st.integers(1, 4)

# The same examples in every run, and no database in the working tree.
check = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def entries(draw, *shape, dtype):
    count = int(np.prod(shape))
    quarters = draw(st.lists(st.integers(-8, 8), min_size=count, max_size=count))
    return torch.tensor(quarters, dtype=dtype).reshape(shape) / 4


def factors_of(n):
    return [(p, n // p) for p in range(1, n + 1) if n % p == 0]


@st.composite
def leaves(draw, rows, columns, dtype):
    """An operator without parts, and its matrix."""
    kinds = ["dense", "khatri_rao"]
    if rows == columns:
        kinds += ["diagonal", "identity", "undecided identity", "low_rank", "symmetric"]
    kind = draw(st.sampled_from(kinds))
    if kind == "diagonal":
        d = entries(draw, rows, dtype=dtype)
        return vl.Diagonal(d), torch.diag(d.double())
    if kind == "identity":
        unit = vl.Identity(rows, dtype, placing.device())
        return unit, torch.eye(rows, dtype=torch.float64)
    if kind == "undecided identity":
        return vl.Identity(rows), torch.eye(rows, dtype=torch.float64)
    if kind == "khatri_rao":
        p, q = draw(st.sampled_from(factors_of(rows)))
        B, A = (entries(draw, m, columns, dtype=dtype) for m in (p, q))
        product = B.double()[:, None, :] * A.double()[None, :, :]
        return vl.KhatriRao(B, A), product.reshape(rows, columns)
    A = entries(draw, rows, draw(SIZES) if kind == "low_rank" else columns, dtype=dtype)
    if kind == "low_rank":
        return LowRank(vl.Dense(A)), A.double() @ A.double().T
    if kind == "symmetric":
        A = A + A.T
    return vl.Dense(A), A.double()


@st.composite
def operators(draw, rows=None, columns=None, dtype=None, depth=2):
    """An expression over operators, and the same expression over their matrices."""
    rows = draw(SIZES) if rows is None else rows
    columns = draw(SIZES) if columns is None else columns
    dtype = draw(DTYPES) if dtype is None else dtype
    if depth == 0:
        return draw(leaves(rows, columns, dtype))

    def part(m, n):
        return draw(operators(m, n, dtype, depth - 1))

    kinds = ["leaf", "scaled", "sum", "difference", "product", "adjoint", "kronecker"]
    if rows == columns:
        kinds += ["damped", "outer", "gram", "sandwich"]
    if min(rows, columns) > 1:
        kinds += ["blocks"]
    kind = draw(st.sampled_from(kinds))
    if kind == "leaf":
        return draw(leaves(rows, columns, dtype))
    if kind == "scaled":
        op, A = part(rows, columns)
        c = draw(st.sampled_from([2.0, -1.0, 0.5, 1.0, 0.0, -4.0]))
        return c * op, c * A
    if kind in ("sum", "difference"):
        (a, A), (b, B) = part(rows, columns), part(rows, columns)
        if draw(st.booleans()):
            b, B = a, A  # rules recognise the same operator
        return (a + b, A + B) if kind == "sum" else (a - b, A - B)
    if kind == "product":
        inner = draw(SIZES)
        (a, A), (b, B) = part(rows, inner), part(inner, columns)
        return a @ b, A @ B
    if kind == "adjoint":
        op, A = part(columns, rows)
        return op.T, A.T
    if kind == "damped":
        op, A = part(rows, rows)
        c = draw(st.sampled_from([0.5, 1.0, 2.0, -1.0]))
        unit = vl.Identity(rows)
        together = op + c * unit if draw(st.booleans()) else c * unit + op
        return together, A + c * torch.eye(rows, dtype=torch.float64)
    if kind == "outer":
        op, A = part(rows, draw(SIZES))
        return op @ op.T, A @ A.T
    if kind == "gram":
        op, A = part(draw(SIZES), rows)
        return op.T @ op, A.T @ A
    if kind == "sandwich":
        inner = draw(SIZES)
        (a, A), (b, B) = part(rows, inner), part(inner, inner)
        return a @ b @ a.T, A @ B @ A.T
    if kind == "kronecker":
        p, q = draw(st.sampled_from(factors_of(rows)))
        r, s = draw(st.sampled_from(factors_of(columns)))
        (a, A), (b, B) = part(p, r), part(q, s)
        # torch.kron fails on some strides of axes of one.
        return vl.Kronecker(a, b), torch.from_numpy(np.kron(A, B))
    split = draw(st.integers(1, rows - 1)), draw(st.integers(1, columns - 1))
    (a, A) = part(*split)
    (b, B) = part(rows - split[0], columns - split[1])
    return vl.BlockDiagonal([a, b]), torch.block_diag(A, B)


square = SIZES.flatmap(lambda n: operators(n, n))


def close(got, expected, A, dtype=torch.float64):
    """Compare up to rounding in the precision, relative to the largest entries."""
    expected = expected.to(got.device)  # the CPU's, where nothing has decided
    scale = max(1.0, A.abs().max().item(), *expected.abs().reshape(-1).tolist())
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    return got.shape == expected.shape and bool(
        ((got.double() - expected).abs() <= rtol * scale).all()
    )


# Products ----------------------------------------------------------------------------


@given(operators(depth=3), st.data())
@check
def test_expressions_agree_with_dense_arithmetic(built, data):
    op, A = built
    rows, columns = A.shape
    assert op.shape == (rows, columns)
    dtype = op.torch_dtype
    for shape in ((columns,), (columns, 1), (columns, 3)):
        x = entries(data.draw, *shape, dtype=dtype)
        copy = x.clone()
        product = op @ x
        assert product.dtype == dtype
        assert close(product, A @ x.double(), A, dtype)
        assert torch.equal(x, copy)
        assert np.array_equal(op @ x.numpy(), product.numpy())
    for shape in ((rows,), (3, rows)):
        y = entries(data.draw, *shape, dtype=dtype)
        product = y @ op
        assert product.dtype == dtype
        assert close(product, y.double() @ A, A, dtype)
        assert np.array_equal(y.numpy() @ op, product.numpy())
    assert close(op.to_dense(), A, A, dtype)
    assert close(op.T.to_dense(), A.T, A, dtype)
    assert op.to_dense().dtype == dtype


@given(square)
@check
def test_diagonals_and_traces(built):
    op, A = built
    diagonal, trace = op.diagonal(), op.trace()
    assert diagonal.dtype == trace.dtype == op.torch_dtype
    assert close(diagonal, A.diagonal(), A, op.torch_dtype)
    assert close(trace, A.trace(), 4 * A, op.torch_dtype)
    assert close(vl.linalg.row_norms_squared(op), A.square().sum(1), A, op.torch_dtype)


@given(
    operators(3, 2, torch.float64, 1),
    operators(2, 3, torch.float64, 1),
    operators(3, 2, torch.float64, 1),
)
@check
def test_laws_of_arithmetic(a, b, c):
    (a, A), (b, B), (c, _) = a, b, c

    def same(left, right):
        scale = 64 * max(1.0, A.abs().max().item() ** 2, B.abs().max().item() ** 2)
        assert (left.to_dense() - right.to_dense()).abs().max() <= 1e-13 * scale

    same((a @ b) @ c, a @ (b @ c))
    same((a @ b).T, b.T @ a.T)
    same((a + c).T, a.T + c.T)
    same((a + c) @ b, a @ b + c @ b)
    same(2 * (a + c), 2 * a + 2 * c)
    same(a + c, c + a)
    same(a - c, -(c - a))
    same((a + c) - c, a)


@given(operators(depth=1), st.data())
@check
def test_gradients_are_those_of_dense_products(built, data):
    op, A = built
    x = entries(data.draw, A.shape[1], 2, dtype=op.torch_dtype).requires_grad_()
    y = entries(data.draw, A.shape[0], 2, dtype=op.torch_dtype)
    (op @ x).backward(y)
    assert close(x.grad, A.T @ y.double(), A, op.torch_dtype)


# Verbs -------------------------------------------------------------------------------


def solvable(A):
    return torch.linalg.cond(A.cpu()) < 1e3


@given(SIZES.flatmap(lambda n: operators(n, n, torch.float64)), st.data())
@check
def test_inverses_are_right_or_refused(built, data):
    op, A = built
    try:
        inverse = op.inv()
    except (TypeError, ValueError) as error:
        assert str(error).startswith(("inv", "damping"))
        return
    assume(solvable(A))  # what is nearly singular has an inverse by luck
    expected = torch.linalg.inv(A)
    assert close(inverse.to_dense(), expected, expected)
    assert close(inverse.inv().to_dense(), A, 100 * A)
    b = entries(data.draw, len(A), dtype=torch.float64)
    assert close(op.solve(b), expected @ b, expected)


@given(SIZES.flatmap(lambda n: operators(n, n, torch.float64)))
@check
def test_log_determinants_are_right_or_refused(built):
    op, A = built
    try:
        logdet = op.logdet()
    except (TypeError, ValueError) as error:
        assert str(error).startswith(("logdet", "eigh", "eigvalsh"))
        return
    if solvable(A):
        expected = torch.linalg.slogdet(A).logabsdet
        assert abs(logdet - expected) <= 1e-11 * max(1.0, abs(expected))
    elif torch.linalg.matrix_rank(A.cpu()) < len(A):
        scale = np.log(max(1.0, torch.linalg.matrix_norm(A, 2).item()))
        assert logdet <= (len(A) - 1) * scale - 20  # rounding is no determinant


@given(SIZES.flatmap(lambda n: operators(n, n, torch.float64)), st.data())
@check
def test_eigenpairs_are_right_or_refused(built, data):
    op, A = built
    try:
        evals = op.eigvalsh()
    except TypeError as error:
        assert str(error).startswith(("eigvalsh", "eigh"))
        return
    assert torch.equal(A, A.T) or (A - A.T).abs().max() <= 1e-12 * A.abs().max()
    expected = torch.linalg.eigvalsh(A)
    zeros = evals.new_zeros(len(A) - len(evals))  # of low-rank nodes
    assert close(torch.cat([evals, zeros]).sort().values, expected, A)
    try:
        pairs = op.eigh()
    except TypeError as error:
        assert str(error).startswith("eigh")
        return
    evals, evecs = (part.to(A.device) for part in pairs)
    unit = torch.eye(len(evals), dtype=torch.float64)
    assert (evecs.T @ evecs - unit).norm() <= 1e-13
    assert close(A @ evecs, evecs * evals, A)
    k = data.draw(st.integers(1, len(A)))
    try:
        pairs = op.eigh(k=k)
    except ValueError as error:
        assert str(error).startswith("k: ")
        return
    assert close(pairs.eigenvalues, expected[-k:], A)


@given(SIZES, SIZES, DTYPES, st.data())
@check
def test_eigenpairs_of_low_rank_operators(rows, columns, dtype, data):
    V = entries(data.draw, rows, columns, dtype=dtype)
    G, A = LowRank(vl.Dense(V)), V.double() @ V.double().T
    order = data.draw(st.permutations(range(min(rows, columns))))
    evals, evecs = G.eigh(select=lambda evals: list(order))
    unit = torch.eye(len(order), dtype=torch.float64)
    assert close(evecs.double().T @ evecs.double(), unit, unit, dtype)
    assert close(A @ evecs.double(), evecs.double() * evals.double(), A, dtype)
    known = torch.linalg.eigvalsh(A)[-len(order) :]
    assert close(evals, known[list(order)], A, dtype)
    assert len(G.eigh()) == torch.linalg.matrix_rank(V.double().cpu())


# Bad input ---------------------------------------------------------------------------

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@given(operators(depth=1), SHAPES)
@check
def test_shapes_fit_or_are_refused(built, shape):
    op, A = built
    rows, columns = A.shape
    x = torch.ones(shape, dtype=op.torch_dtype)
    if shape and len(shape) < 3 and shape[0] == columns:
        assert (op @ x).shape == (A @ x.double()).shape
        assert (op @ x.numpy()).shape == (A @ x.double()).shape
    else:
        with pytest.raises(ValueError):
            op @ x
        # SciPy 1.18 multiplies batches of arrays.
        if len(shape) < 3:
            with pytest.raises(ValueError):
                op @ x.numpy()
    if shape and len(shape) < 3 and shape[-1] == rows:
        assert (x @ op).shape == (x.double() @ A).shape
        assert (x.numpy() @ op).shape == (x.double() @ A).shape
    else:
        for left in (x, x.numpy()):
            with pytest.raises(ValueError):
                left @ op


KINDS = [torch.bool, torch.uint8, torch.int64, torch.complex64, torch.complex128]


@given(operators(depth=1), st.sampled_from(KINDS), st.data())
@check
def test_numbers_of_any_kind(built, kind, data):
    op, A = built
    dtype = op.torch_dtype
    x, y = (entries(data.draw, n, dtype=torch.float64) for n in A.T.shape)
    if kind.is_complex:
        x, y = torch.complex(x, 1 - x), torch.complex(y, 1 - y)
    x, y = x.to(kind), y.to(kind)
    A = A.to(torch.complex128)
    right, left = A @ x.to(A), A.T @ y.to(A)
    for got, expected in (
        (op @ x, right),
        (y @ op, left),
        (op.matvec(x), right),
        (torch.as_tensor(op @ x.numpy()), right),
        (torch.as_tensor(y.numpy() @ op), left),
    ):
        assert got.is_complex() == kind.is_complex
        got, expected = torch.view_as_real(got.to(A)), torch.view_as_real(expected)
        scale = 256 * A.abs() if kind == torch.uint8 else A.abs()
        assert close(got, expected, scale, dtype)


@given(operators(depth=1))
@check
def test_what_is_no_number_is_refused(built):
    op, A = built
    for bad in (np.full(A.shape[1], None), np.full(A.shape[1], "1")):
        for expression in (lambda x=bad: op @ x, lambda x=bad: op.matvec(x)):
            with pytest.raises(TypeError, match="must be numbers"):
                expression()


@given(operators(depth=1), operators(depth=1))
@check
def test_operators_fit_or_are_refused(left, right):
    (a, A), (b, B) = left, right
    assume(a.torch_dtype == b.torch_dtype)
    if A.shape == B.shape:
        assert close((a + b).to_dense(), A + B, A.abs() + B.abs(), a.torch_dtype)
    else:
        for expression in (lambda: a + b, lambda: a - b):
            with pytest.raises(ValueError, match="Shapes do not match"):
                expression()
    if A.shape[1] == B.shape[0]:
        scale = A.abs() @ B.abs()
        assert close((a @ b).to_dense(), A @ B, scale, a.torch_dtype)
    else:
        with pytest.raises(ValueError, match="Shapes do not match"):
            a @ b


@given(
    st.one_of(
        st.none(),
        st.text(max_size=3),
        st.binary(max_size=3),
        st.dictionaries(st.integers(), st.integers(), max_size=2),
        st.lists(st.text(max_size=2), min_size=1, max_size=3),
        st.complex_numbers(allow_nan=False).filter(lambda z: z.imag),
        st.sampled_from(
            [float("nan"), float("inf"), object(), len, (), [[1.0], [1, 2]]]
        ),
    )
)
@check
def test_what_is_no_array_and_no_number_is_refused(other):
    op = vl.Dense(torch.eye(3))
    for expression in (
        lambda: op @ other,
        lambda: op * other,
        lambda: other * op,
        lambda: other @ op,
        lambda: op + other,
        lambda: op - other,
        lambda: op / other,
        lambda: op.solve(other),
    ):
        with pytest.raises((TypeError, ValueError)):
            expression()


CONSTRUCTORS = {
    "matrix": (vl.Dense, 2),
    "entries": (vl.Diagonal, 1),
    "left": (lambda left: vl.KhatriRao(left, np.ones((2, 3))), 2),
    "right": (lambda right: vl.KhatriRao(np.ones((2, 3)), right), 2),
}


@given(st.sampled_from(sorted(CONSTRUCTORS)), SHAPES)
@check
def test_constructors_check_shapes(name, shape):
    build, axes = CONSTRUCTORS[name]
    assume(len(shape) != axes or 0 in shape)
    for array in (torch.ones(shape), np.ones(shape)):
        with pytest.raises(ValueError, match=rf"^{name}: "):
            build(array)


@pytest.mark.parametrize("name", CONSTRUCTORS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.complex128], ids=str)
def test_constructors_check_dtypes(name, dtype):
    build, axes = CONSTRUCTORS[name]
    for array in (
        torch.ones((2, 3)[:axes], dtype=dtype),
        torch.ones((2, 3)[:axes], dtype=dtype).numpy(),
    ):
        with pytest.raises(TypeError, match=rf"^{name}: "):
            build(array)


def test_half_precision_is_refused():
    half = torch.ones(2, 3, dtype=torch.float16)
    for build in (
        lambda: vl.Dense(half),
        lambda: vl.Diagonal(half[0]),
        lambda: vl.KhatriRao(half, half),
        lambda: vl.Identity(3, torch.float16),
        lambda: vl.Dense(half.numpy()),
    ):
        with pytest.raises(TypeError, match=r"^dtype: .*float16.*\.float\(\)"):
            build()


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_constructors_take_arrays_of_any_layout(name):
    build, axes = CONSTRUCTORS[name]
    array = np.arange(6.0).reshape(2, 3) if axes == 2 else np.arange(3.0)
    expected = build(array).to_dense()
    frozen = array.copy()
    frozen.flags.writeable = False
    table = np.zeros(array.shape, dtype=[("tag", "i1"), ("x", "f8")])
    table["x"] = array
    for same in (
        table["x"],
        np.asfortranarray(array),
        array[::-1].copy()[::-1],
        np.repeat(array, 2, axis=-1)[..., ::2],
        array.astype(">f8"),
        frozen,
        array.tolist(),
    ):
        torch.testing.assert_close(build(same).to_dense().double(), expected.double())


@given(st.one_of(st.integers(-5, 0), st.floats(), st.text(max_size=2), st.none()))
@check
def test_sizes_of_identities(n):
    with pytest.raises((TypeError, ValueError), match=r"^n: "):
        vl.Identity(n)


@pytest.mark.parametrize(
    ("indices", "match"),
    [
        ([[0, 1]], "one index tensor a block"),
        ([[0, 1], [2], [3]], "one index tensor a block"),
        ([[0, 1], [2, 3]], r"indices\[1\]"),
        ([[0], [1, 2]], r"indices\[0\]"),
        ([[0, 1], [1]], r"range\(3\)"),
        ([[0, 0], [1]], r"range\(3\)"),
        ([[0, 1], [3]], r"range\(3\)"),
        ([[0, -1], [1]], r"range\(3\)"),
        ([[0.0, 1.0], [2.0]], "indices"),
        ([[True, False], [True]], "indices"),
        ([[[0], [1]], [[2]]], "indices"),
    ],
)
def test_indices_of_blocks(indices, match):
    blocks = [torch.eye(2), torch.eye(1)]
    with pytest.raises((TypeError, ValueError), match=match):
        vl.BlockDiagonal(blocks, [torch.tensor(index) for index in indices])


@pytest.mark.parametrize(
    "kind", [list, np.array, torch.tensor], ids=["list", "array", "tensor"]
)
def test_indices_of_any_kind(kind):
    blocks = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0]])]
    op = vl.BlockDiagonal(blocks, [kind([2, 0]), kind([1])])
    expected = [[4.0, 0.0, 3.0], [0.0, 5.0, 0.0], [2.0, 0.0, 1.0]]
    assert op.to_dense().tolist() == expected
    assert (op @ torch.ones(3)).tolist() == [7.0, 5.0, 3.0]


def test_indices_need_square_blocks():
    with pytest.raises(ValueError, match=r"indices\[0\]"):
        vl.BlockDiagonal([torch.ones(2, 3)], [torch.tensor([0, 1])])


def test_composites_need_parts():
    with pytest.raises(ValueError, match=r"^blocks: "):
        vl.BlockDiagonal([])
    with pytest.raises(ValueError, match=r"^factors: "):
        vl.Kronecker()
    with pytest.raises(ValueError, match=r"^left, right: "):
        vl.KhatriRao(torch.ones(2, 3), torch.ones(2, 4))
