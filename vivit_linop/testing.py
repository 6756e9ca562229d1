"""Checks for operators and layer kinds, for yours as for ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import aslinearoperator
from torch import Tensor

from vivit_linop.modes import as_guest
from vivit_linop.net.capture import Capture
from vivit_linop.net.certified import CertifiedColumns
from vivit_linop.net.structure import Layout, Structure
from vivit_linop.noise import Noise
from vivit_linop.operators.base import NUMPY_DTYPES, TorchLinearOperator
from vivit_linop.risk.empirical import EmpiricalRisk, check_risk


def check_operator(
    op: TorchLinearOperator, dense: Tensor | np.ndarray, rtol: float | None = None
) -> None:
    """Check that an operator is the given matrix, in every way that it can be used.

    Checked are products from both sides with vectors and matrices, of torch and numpy,
    also non-contiguous, read-only and reversed ones and those of another precision;
    that inputs stay as they are and results do not share their memory; adjoints, the
    scalings and sums of the algebra, mixed expressions with SciPy's operators,
    integers, booleans and complex numbers, gradients through products, ``to_dense``,
    the diagonal and the trace, and the errors for wrong shapes. What other verbs
    return (``op.inv()``, ``op.sqrt()``) is an operator with a matrix of its own.

    Args:
        op: The operator.
        dense: Its matrix, ``[m, n]``, computed in another way.
        rtol: The error allowed in a product, relative to the norms of the matrix and
            the vector. By default 1e-12 for float64 and 1e-5 for float32.

    Raises:
        AssertionError: With what was checked, and by how much it failed.

    Example:
        >>> import torch, vivit_linop as vl
        >>> entries = torch.arange(3.0)
        >>> vl.testing.check_operator(vl.Diagonal(entries), torch.diag(entries))
    """
    battery = _Battery(op, torch.as_tensor(dense), rtol)
    for check in (
        battery.attributes,
        battery.products,
        battery.unusual_arrays,
        battery.adjoint,
        battery.algebra,
        battery.mixed_with_scipy,
        battery.gradients,
        battery.dense,
        battery.errors,
    ):
        check()


def check_kind(name: str, risk: EmpiricalRisk) -> None:
    """Check that a layer kind gives the parameters of a net the right columns.

    A risk takes columns from autograd where a rule of a kind fails or is wrong, without
    a word. This says why. Costs a run of the net on the first batch, and some backward
    passes, two for the columns.

    Args:
        name: The name of a registered :class:`~vivit_linop.net.kinds.Kind`.
        risk: One whose net makes calls of that kind.

    Raises:
        AssertionError: If the net makes no such call, or columns of a parameter are not
            those that a backward pass gives; with the parameter.
        Exception: Whatever a rule raises.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from torch import nn
        >>> data = torch.rand(8, 3), torch.randint(2, (8,))
        >>> risk = vl.EmpiricalRisk(nn.Linear(3, 2), nn.CrossEntropyLoss(), data)
        >>> vl.testing.check_kind("linear", risk)
    """
    check_risk(risk)
    X, _ = next(risk.passes.batches())
    with as_guest(risk.device):
        capture = Capture(risk, X, risk.batch_sizes[0])
        uses = [use for use in capture.uses if use.kind.name == name]
        names = {parameter for use in uses for parameter in use.names}
        if not names:
            raise AssertionError(
                f"name: the net makes no call of kind {name!r} with parameters of the "
                "risk. Is the kind registered, and does its function, if it is not "
                "torch's, call handle_torch_function?"
            )
        variant = capture.find()
        for use, layout in zip(capture.uses, variant.layouts, strict=True):
            # Where columns are made of all uses, errors of rules pass.
            if use in uses and layout is not None:
                place = Layout(layout, capture.num_samples)
                signal = place(capture.output.new_zeros(use.output_shape))
                use.columns(place, 1)(signal.unsqueeze(1))
        cotangents = Noise(1)(*capture.output.shape, 2, like=capture.output)
        made = capture.columns(cotangents, variant, names)
        certified = CertifiedColumns(risk, X, capture, Structure())
        for parameter in sorted(certified.failing(made, cotangents, names)):
            found = "are others than" if parameter in made else "are missing, unlike"
            raise AssertionError(
                f"kind {name!r}: columns of {parameter!r} {found} those of a backward "
                "pass. Of all its uses in the net one has another kind or none, or a "
                "rule is wrong, or samples= is."
            )


class _Battery:
    def __init__(
        self, op: TorchLinearOperator, dense: Tensor, rtol: float | None
    ) -> None:
        self.op = op
        self.A = dense.detach().to(op.device, torch.float64)
        self.dtype = op.torch_dtype
        self.np_dtype: Any = NUMPY_DTYPES[self.dtype]
        self.rtol = rtol or (1e-12 if self.dtype == torch.float64 else 1e-5)
        self.generator = torch.Generator().manual_seed(0)

    def draw(self, *shape: int) -> Tensor:
        noise = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return noise.to(self.op.device, self.dtype)

    def compare(self, what: str, got: Any, A: Tensor, x: Tensor) -> None:
        """Compare with A x, relative to ‖A‖ ‖x‖."""
        expected = A @ x.to(torch.float64)
        value = torch.as_tensor(got).to(expected)
        _require(
            value.shape == expected.shape,
            f"{what}: shape {list(value.shape)}, expected {list(expected.shape)}",
        )
        # Without rows, columns or norm, only zero is right.
        scale = A.norm() * x.to(torch.float64).norm()
        self.is_small(what, (value - expected).norm(), scale)

    def is_small(self, what: str, error: Tensor, scale: Tensor) -> None:
        _require(
            bool(error <= self.rtol * scale),
            f"{what}: relative error {error / scale:.2e} > {self.rtol:.0e}",
        )

    def attributes(self) -> None:
        op = self.op
        _require(
            tuple(op.shape) == tuple(self.A.shape),
            f"op.shape is {tuple(op.shape)}, that of dense {tuple(self.A.shape)}",
        )
        _require(isinstance(op.dtype, np.dtype), "dtype is not a numpy dtype")
        _require(op.dtype == self.np_dtype, "dtype and torch_dtype do not match")
        _require(isinstance(op.device, torch.device), "device is no torch.device")

    def products(self) -> None:
        """With tensors and arrays, from both sides."""
        for name, A, multiply in (
            ("op @ {}", self.A, lambda x: self.op @ x),
            ("{} @ op", self.A.T, lambda x: _turned(_turned(x) @ self.op)),
        ):
            for what, columns in (("vector", ()), ("column", (1,)), ("matrix", (3,))):
                x = self.draw(A.shape[1], *columns)
                self._product(name.format(f"torch {what}"), multiply, A, x, x)
                self._product(name.format(f"numpy {what}"), multiply, A, x, _array(x))
        m, n = self.A.shape
        other = torch.float32 if self.dtype == torch.float64 else torch.float64
        for op, A, size in ((self.op, self.A, n), (self.op.T, self.A.T, m)):
            got = op @ torch.ones(size, dtype=other, device=self.op.device)
            decided = op._own_dtype is not None
            expected = self.dtype if decided else other
            _require(got.dtype == expected, f"op @ {other} has dtype {got.dtype}")
            self.compare("op @ other precision", got, A, torch.ones(size).to(A))
        x, y, X, Y = self.draw(n), self.draw(m), self.draw(n, 2), self.draw(m, 2)
        self.compare("matvec", self.op.matvec(_array(x)), self.A, x)
        self.compare("rmatvec", self.op.rmatvec(_array(y)), self.A.T, y)
        self.compare("matmat", self.op.matmat(_array(X)), self.A, X)
        self.compare("rmatmat", self.op.rmatmat(_array(Y)), self.A.T, Y)

    def _product(
        self,
        what: str,
        multiply: Callable[[Any], Any],
        A: Tensor,
        x: Tensor,
        given: Any,
    ) -> None:
        """Compare with A x, where x is given as a tensor or an array."""
        before, got = copy.deepcopy(given), multiply(given)
        kind: Any = Tensor if isinstance(given, Tensor) else np.ndarray
        _require(isinstance(got, kind), f"{what} is {type(got).__name__}")
        dtype = self.dtype if kind is Tensor else self.np_dtype
        _require(got.dtype == dtype, f"{what} has dtype {got.dtype}")
        moved = kind is Tensor and got.device.type != self.op.device.type
        _require(not moved, f"{what} moved")
        self.compare(what, got, A, x)
        got += 1.0  # must not reach x
        same = bool((given == before).all())
        _require(same, f"{what} changed or aliased its input")

    def unusual_arrays(self) -> None:
        n = self.A.shape[1]
        x = self.draw(n)
        array = _array(x)
        spread = np.zeros(2 * n, dtype=self.np_dtype)
        spread[::2] = array
        frozen, X = array.copy(), self.draw(n, 3)
        frozen.flags.writeable = False
        for what, given, same in (
            ("non-contiguous array", spread[::2], x),
            ("negative strides", array[::-1].copy()[::-1], x),
            ("read-only array", frozen, x),
            ("column-major array", np.asfortranarray(_array(X)), X),
            ("field of a structured array", _field(array), x),
            ("transposed tensor", X.T.contiguous().T, X),
            ("list", array.tolist(), x),
        ):
            self.compare(f"op @ {what}", self.op @ given, self.A, same)
        for numbers in (torch.arange(n) - 1, torch.arange(n) % 2 == 0):
            expected, kind = numbers.to(self.op.device).double(), numbers.dtype
            self.compare(f"op @ {kind}", self.op @ numbers, self.A, expected)
            self.compare(
                f"op @ array of {kind}", self.op @ numbers.numpy(), self.A, expected
            )
        z = torch.complex(x, self.draw(n))
        for got in (self.op @ z, torch.as_tensor(self.op @ _array(z))):
            _require(
                got.dtype == z.dtype, f"op @ complex numbers has dtype {got.dtype}"
            )
            self.compare("op @ complex numbers, real part", got.real, self.A, z.real)
            self.compare("op @ complex numbers, imaginary", got.imag, self.A, z.imag)
        empty = self.op @ torch.zeros(n, 0, dtype=self.dtype, device=self.op.device)
        _require(
            tuple(empty.shape) == (self.A.shape[0], 0), "op @ zero columns has no shape"
        )

    def adjoint(self) -> None:
        m, n = self.A.shape
        x, y = self.draw(n), self.draw(m)
        for name, adjoint in (("T", self.op.T), ("H", self.op.H)):
            _require(tuple(adjoint.shape) == (n, m), f"op.{name} has the wrong shape")
            self.compare(f"op.{name} @ y", adjoint @ y, self.A.T, y)
            self.compare(f"op.{name} @ numpy y", adjoint @ _array(y), self.A.T, y)
            self.compare(f"op.{name}.{name} @ x", getattr(adjoint, name) @ x, self.A, x)
        left = (y @ (self.op @ x)).double()
        right = ((self.op.T @ y) @ x).double()
        scale = self.A.norm() * x.norm() * y.norm()
        self.is_small("⟨y, A x⟩ - ⟨Aᵀ y, x⟩", (left - right).abs(), scale)

    def algebra(self) -> None:
        x = self.draw(self.A.shape[1])
        op, two = self.op, 2.0 * self.A
        expressions: list[tuple[str, Any, Tensor]] = [
            ("2 * op", 2 * op, two),
            ("op * 2", op * 2, two),
            ("np.float32(2) * op", np.float32(2) * op, two),
            ("np.array(2.) * op", np.array(2.0) * op, two),
            ("torch.tensor(2.) * op", torch.tensor(2.0) * op, two),
            ("op * torch.tensor(2.)", op * torch.tensor(2.0), two),
            ("op / 0.5", op / 0.5, two),
            ("op + op", op + op, two),
            ("sum([op, op])", sum([op, op]), two),
            ("3 * op - op", 3 * op - op, two),
            ("-(-2 * op)", -(-2 * op), two),
            ("(2 * op.T).T", (2 * op.T).T, two),
            ("op.T @ op", op.T @ op, self.A.T @ self.A),
        ]
        for name, result, A in expressions:
            _require(
                isinstance(result, TorchLinearOperator), f"{name} is {type(result)}"
            )
            self.compare(f"({name}) @ x", result @ x, A, x)
            self.compare(f"({name}) @ numpy x", result @ _array(x), A, x)

    def mixed_with_scipy(self) -> None:
        m, n = self.A.shape
        x = self.draw(n)
        B = self.draw(m, n).double()
        other = aslinearoperator(_array(B.to(self.dtype)))
        y, both = self.draw(m), self.A + B
        for what, mixed, A, z in (
            ("op + scipy", self.op + other, both, x),
            ("scipy + op", other + self.op, both, x),
            ("scipy.T @ op", other.T @ self.op, B.T @ self.A, x),
            ("op @ scipy.T", self.op @ other.T, self.A @ B.T, y),
        ):
            self.compare(f"({what}) @ numpy", mixed @ _array(z), A, z)

    def gradients(self) -> None:
        m, n = self.A.shape
        x, y = self.draw(n).requires_grad_(), self.draw(m)
        product = self.op @ x
        _require(product.requires_grad, "op @ x cuts the graph of x")
        (gradient,) = torch.autograd.grad(product, x, y)
        self.compare("the gradient through op @ x", gradient, self.A.T, y)

    def dense(self) -> None:
        got = self.op.to_dense()
        _require(isinstance(got, Tensor), "to_dense returns no tensor")
        unit = torch.eye(self.A.shape[1]).to(self.A)
        self.compare("to_dense", got, self.A, unit)
        if self.A.shape[0] == self.A.shape[1]:
            diagonal = self.A.diagonal()
            error = (self.op.diagonal().double() - diagonal).norm()
            self.is_small("diagonal", error, self.A.norm())
            error = (self.op.trace().double() - diagonal.sum()).abs()
            # A sum of n entries that may cancel.
            self.is_small("trace", error, diagonal.abs().sum() + self.A.norm())

    def errors(self) -> None:
        n = self.A.shape[1]
        op, device = self.op, self.op.device
        for what, x in (
            ("a vector too long", torch.ones(n + 1, dtype=self.dtype, device=device)),
            ("an array too long", np.ones(n + 1, dtype=self.np_dtype)),
            ("three axes", torch.ones(n, 1, 1, dtype=self.dtype, device=device)),
        ):
            try:
                op @ x
            except ValueError:
                continue
            raise AssertionError(f"op @ {what} raises no ValueError")


def _turned(x: Any) -> Any:
    return x if x.ndim == 1 else x.T


def _array(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy().copy()


def _field(array: np.ndarray) -> np.ndarray:
    """The same entries, at strides that are no multiples of one."""
    table = np.zeros(len(array), dtype=[("tag", "i1"), ("x", array.dtype)])
    table["x"] = array
    return table["x"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
