"""Operands without dtype or device take the other's; mixed precisions promote."""

import pytest
import torch

import vivit_linop as vl
from tests.rule_cases import operands
from vivit_linop.operators import Damped, Diagonal, Scaled, Sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_undecided_identities_take_dtype_and_device(dtype, device):
    ops, _ = operands(dtype, device)
    for result in (
        ops.K + ops.I,
        ops.I + ops.K,
        ops.K - 0.5 * ops.I,
        ops.I @ ops.K,
        ops.K @ ops.I,
        vl.Kronecker(vl.Identity(2), ops.K),
        vl.BlockDiagonal([vl.Identity(2), ops.K]),
        (2 * ops.I) @ ops.D,
        ops.V @ ops.V.T + 1e-2 * ops.I,
        (ops.V @ ops.V.T + 1e-2 * ops.I).inv(),
    ):
        assert result.torch_dtype == dtype
        assert result.device == ops.K.device
        assert (result @ torch.ones(result.shape[1])).dtype == dtype


@pytest.mark.parametrize("verb", ["diagonal", "trace", "eigvalsh", "logdet"])
def test_verbs_on_undecided_parts_take_the_device(verb):
    entries = torch.ones(3, device="meta")  # cannot be mixed with what is on the CPU
    blocks = vl.BlockDiagonal([2 * vl.Identity(2), vl.Identity(1)])
    for op in (
        vl.BlockDiagonal([2 * vl.Identity(2), vl.Diagonal(entries)]),
        vl.Kronecker(vl.Identity(2), vl.Diagonal(entries)),
        vl.BlockDiagonal([blocks, vl.Diagonal(entries)]),
        vl.Kronecker(vl.Kronecker(blocks, vl.Identity(2)), vl.Diagonal(entries)),
    ):
        result = getattr(op, verb)()
        assert result.device.type == "meta"
        assert result.dtype == torch.float32


def test_undecided_blocks_take_the_device_of_what_they_meet():
    V = vl.Dense(torch.ones(3, 2, device="meta"))
    blocks = vl.BlockDiagonal([2 * vl.Identity(2), vl.Identity(1)])
    for result in (
        (V @ V.T + blocks).damping.entries,
        (blocks @ vl.Dense(V.matrix @ V.matrix.T)).logdet(),
        Scaled(torch.ones((), device="meta"), blocks).diagonal(),
        Sum(blocks, V @ V.T).diagonal(),
    ):
        assert result.device.type == "meta"


def test_identity_takes_the_precision_of_the_vector(device):
    op = 2 * vl.Identity(3)
    for dtype in (torch.float32, torch.float64):
        x = torch.ones(3, dtype=dtype, device=device)
        assert (op @ x).dtype == dtype
        assert (op @ x).device == x.device


def test_a_decided_identity_decides():
    ops, dense = operands(torch.float32)
    both = ops.D + vl.Identity(6, torch.float64)
    assert both.torch_dtype == torch.float64
    # To the precision of the operand in float32.
    vl.testing.check_operator(both, dense.D + torch.eye(6), rtol=1e-6)
    product = vl.Identity(6, torch.float64) @ ops.D
    assert product.torch_dtype == torch.float64
    vl.testing.check_operator(product, dense.D, rtol=1e-6)


def test_identities_of_the_same_dtype_are_absorbed(device):
    ops, dense = operands(torch.float64, device)
    unit = vl.Identity(6, torch.float64, ops.D.device)
    assert type(unit + unit) is Scaled
    assert type(unit @ ops.D) is Diagonal
    assert type(ops.K + unit) is Damped
    vl.testing.check_operator(ops.K + unit, dense.K + torch.eye(6).to(dense.K))


def test_devices_may_be_named_with_or_without_their_number(device):
    # torch.device("cuda") != torch.device("cuda:0"), yet both are the same one.
    ops, _ = operands(torch.float64, device)
    name = "cuda" if device.type == "cuda" else "cpu:0"
    unit = vl.Identity(6, device=name)
    assert type(ops.D + unit) is vl.Diagonal
    x = torch.ones(6, dtype=torch.float64, device=device)
    torch.testing.assert_close((ops.D + unit) @ x, ops.D.entries + 1)


MIXED = {
    "A B": lambda o, p: o.A @ p.B,
    "A D": lambda o, p: o.A @ p.D,
    "D A": lambda o, p: o.D @ p.A,
    "D E": lambda o, p: o.D @ p.E,
    "A + B": lambda o, p: o.A + p.B,
    "A + D": lambda o, p: o.A + p.D,
    "V W.T": lambda o, p: o.V @ p.W.T,
    "P.T Q": lambda o, p: o.P.T @ p.Q,
    "BD BE": lambda o, p: o.BD @ p.BE,
    "BI BJ": lambda o, p: o.BI @ p.BJ,
    "K L": lambda o, p: o.K @ p.L,
}


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("doubles", ["left", "right"])
def test_mixed_precisions_promote(name, doubles):
    single, _ = operands(torch.float32)
    double, dense = operands(torch.float64)
    pair = (double, single) if doubles == "left" else (single, double)
    result = MIXED[name](*pair)
    assert result.torch_dtype == torch.float64
    # To the precision of the operand in float32.
    vl.testing.check_operator(result, MIXED[name](dense, dense), rtol=1e-6)


MIXED_PARTS = {
    "BlockDiagonal": lambda a, b: vl.BlockDiagonal([a, b]),
    "BlockDiagonal with indices": lambda a, b: vl.BlockDiagonal(
        [a, b], [torch.tensor([3, 0]), torch.tensor([1, 2])]
    ),
    "Kronecker": lambda a, b: vl.Kronecker(a, b),
    "KhatriRao": lambda a, b: vl.KhatriRao(a, b),
}


@pytest.mark.parametrize("name", MIXED_PARTS)
@pytest.mark.parametrize("doubles", ["left", "right"])
def test_parts_of_mixed_precisions_promote(name, doubles):
    left = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    right = torch.tensor([[1.0, 4.0], [-1.0, 2.0]])
    expected = MIXED_PARTS[name](left.double(), right.double()).to_dense()
    parts = (left.double(), right) if doubles == "left" else (left, right.double())
    result = MIXED_PARTS[name](*parts)
    assert result.torch_dtype == torch.float64
    vl.testing.check_operator(result, expected, rtol=1e-6)
