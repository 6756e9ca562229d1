"""Every operator of the market is its matrix, in every way that it can be used."""

import copy
import pickle

import numpy as np
import pytest
import scipy
import torch
from torch.autograd import forward_ad

import vivit_linop as vl
from tests.operator_market import MARKET, build

DTYPES = {"float32": torch.float32, "float64": torch.float64}
every_operator = pytest.mark.parametrize("name", MARKET)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@every_operator
@every_dtype
def test_battery(name, dtype, device):
    op, dense = build(name, dtype, device)
    assert op.torch_dtype == dtype
    assert op.device.type == device.type
    vl.testing.check_operator(op, dense)


@every_operator
def test_adjoint_battery(name, device):
    op, dense = build(name, torch.float64, device)
    vl.testing.check_operator(op.T, dense.T)


@every_operator
def test_self_adjoint_is_claimed_of_symmetric_matrices_only(name, device):
    op, dense = build(name, torch.float64, device)
    if op.self_adjoint:
        assert (dense - dense.T).norm() <= 1e-14 * dense.norm()


@every_operator
def test_adjoint_of_adjoint(name):
    op, _ = build(name, torch.float64)
    assert type(op.T.T) is type(op)


@every_operator
def test_results_do_not_share_memory_with_the_operator(name):
    op, dense = build(name, torch.float64)
    results = [op.to_dense, lambda: op.T.to_dense()]
    if op.shape[0] == op.shape[1]:
        results += [op.diagonal, op.trace]
    for result in results:
        result().fill_(torch.nan)
    for got, expected in ((op.to_dense(), dense), (op.T.to_dense(), dense.T)):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    if op.shape[0] == op.shape[1]:
        torch.testing.assert_close(op.diagonal(), dense.diagonal())


@every_operator
@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda op: pickle.loads(pickle.dumps(op))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies(name, duplicate, device):
    op, dense = build(name, torch.float64, device)
    again = duplicate(op)
    assert type(again) is type(op)
    x = torch.ones(op.shape[1], dtype=torch.float64, device=device)
    torch.testing.assert_close(again @ x, op @ x, rtol=0, atol=0)
    torch.testing.assert_close(again.to_dense(), dense, rtol=1e-12, atol=1e-12)


@every_operator
def test_the_hook_of_scipy_takes_batches(name):
    # SciPy 1.18 hands [..., n] to `_matvec` and [..., n, k] to `_matmat`.
    op, dense = build(name, torch.float64)
    rows, columns = op.shape
    x = np.random.default_rng(0).standard_normal((2, 3, columns))
    product = op._matvec(x)
    assert product.shape == (2, 3, rows)
    np.testing.assert_allclose(product, x @ dense.numpy().T, rtol=1e-11, atol=1e-11)
    X = np.moveaxis(x, 1, 2)
    product = op._matmat(X)
    assert product.shape == (2, rows, 3)
    np.testing.assert_allclose(product, dense.numpy() @ X, rtol=1e-11, atol=1e-11)


@pytest.mark.skipif(
    tuple(map(int, scipy.__version__.split(".")[:2])) < (1, 18),
    reason="SciPy multiplies batches since 1.18",
)
@every_operator
def test_scipy_multiplies_batches(name):
    op, dense = build(name, torch.float64)
    rows, columns = op.shape
    x = np.random.default_rng(0).standard_normal((2, 3, columns))
    if columns > 1:  # [..., 1] is a column to be reshaped, as before
        np.testing.assert_allclose(op.matvec(x), x @ dense.numpy().T, atol=1e-11)
    X = np.moveaxis(x, 1, 2)
    np.testing.assert_allclose(op @ X, dense.numpy() @ X, atol=1e-11)
    y = np.random.default_rng(1).standard_normal((2, 4, rows))
    np.testing.assert_allclose(op.rdot(y[0]), y[0] @ dense.numpy(), atol=1e-11)


def test_column_vectors_of_matvec():
    op, dense = build("dense_tall", torch.float64)
    x, y = np.ones((3, 1)), np.ones((6, 1))
    if tuple(map(int, scipy.__version__.split(".")[:2])) < (1, 18):
        # Later, SciPy warns of this use.
        assert op.matvec(x).shape == (6, 1)
        assert op.rmatvec(y).shape == (3, 1)
    np.testing.assert_allclose(op @ x, dense.numpy() @ x, rtol=1e-14)
    np.testing.assert_allclose(op.T @ y, dense.numpy().T @ y, rtol=1e-14)


@pytest.mark.parametrize("name", ["dense_wide", "low_rank_tall", "identity"])
def test_methods_of_scipy_take_tensors(name, device):
    op, dense = build(name, torch.float64, device)
    rows, columns = op.shape
    x = torch.ones(columns, 2, dtype=torch.float64, device=device)
    y = torch.ones(rows, 2, dtype=torch.float64, device=device)
    for got, expected in (
        (op.matmat(x), dense @ x),
        (op.matvec(x[:, 0]), dense @ x[:, 0]),
        (op.dot(x), dense @ x),
        (op(x), dense @ x),
        (op.rmatmat(y), dense.T @ y),
        (op.rmatvec(y[:, 0]), dense.T @ y[:, 0]),
        (op.transpose() @ y, dense.T @ y),
        (op.adjoint() @ y, dense.T @ y),
    ):
        assert isinstance(got, torch.Tensor)
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)


def test_products_with_tensors_come_back_on_the_device(device):
    op, dense = build("low_rank_tall", torch.float64, device)
    x = torch.ones(6, dtype=torch.float64, device="cpu")
    assert (op @ x).device == op.device
    torch.testing.assert_close((op @ x).cpu(), dense.cpu() @ x)


def test_no_graph_unless_the_vector_asks_for_one(device):
    op, _ = build("low_rank_tall", torch.float32, device)
    x = torch.ones(6, device=device)
    assert not (op @ x).requires_grad
    x.requires_grad_()
    with torch.no_grad():
        assert not (op @ x).requires_grad


def test_second_derivatives_through_a_product():
    op, dense = build("dense", torch.float64)
    x = torch.ones(5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: op @ x, (x,))
    torch.autograd.gradgradcheck(lambda x: (op @ x) ** 2, (x,))
    hessian = torch.autograd.functional.hessian(
        lambda x: (op @ x).square().sum() / 2, x
    )
    torch.testing.assert_close(hessian, dense.T @ dense, rtol=1e-13, atol=1e-13)


def test_gradient_reaches_a_vector_of_another_precision():
    op, dense = build("dense_tall", torch.float64)
    x = torch.ones(3, requires_grad=True)
    (op @ x).sum().backward()
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, dense.sum(0).float())


@pytest.mark.parametrize("kind", ["float16", "longdouble", ">f8", ">f4"])
def test_arrays_of_other_precisions_and_byte_orders(kind):
    op, dense = build("dense_tall", torch.float64)
    product = op @ np.array([1.0, 2.0, 4.0]).astype(kind)
    assert product.dtype == np.float64
    expected = dense.numpy() @ [1.0, 2.0, 4.0]
    np.testing.assert_allclose(product, expected, rtol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensors_of_other_precisions(dtype):
    op, dense = build("dense_tall", torch.float32)
    product = op @ torch.tensor([1.0, 2.0, 4.0], dtype=dtype)
    assert product.dtype == torch.float32
    torch.testing.assert_close(product, (dense @ dense.new([1.0, 2.0, 4.0])).float())


def test_repr():
    op, _ = build("low_rank_tall", torch.float32)
    assert repr(op) == f"<6x6 LowRank, torch.float32, {op.device}>"


@pytest.mark.parametrize("name", ["dense_tall", "low_rank_tall"])
def test_derivatives_through_a_product(name):
    op, dense = build(name, torch.float64)
    x, t = torch.randn(2, op.shape[1], dtype=torch.float64)

    def length(x):
        return (op @ x).square().sum()

    image, tangent = torch.func.jvp(lambda x: op @ x, (x,), (t,))
    torch.testing.assert_close((image, tangent), (dense @ x, dense @ t))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(op @ forward_ad.make_dual(x, t))
        torch.testing.assert_close(dual.tangent, dense @ t)
    slope = 2 * dense.T @ (dense @ x)
    torch.testing.assert_close(torch.func.grad(length)(x), slope)
    torch.testing.assert_close(torch.func.jacrev(lambda x: op @ x)(x), dense)
    torch.testing.assert_close(torch.func.jacfwd(lambda x: op @ x)(x), dense)
    torch.testing.assert_close(torch.func.hessian(length)(x), 2 * dense.T @ dense)
