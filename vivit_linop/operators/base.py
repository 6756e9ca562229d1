"""The base class of all operators: SciPy's contract on torch kernels.

A node of the algebra says how to multiply a matrix of columns by itself and by its
adjoint, in torch. Everything else stands here, once: what ``@``, ``*``, ``+`` do with
tensors, arrays, scalars and other operators. The bridge between numpy and torch is in
:mod:`vivit_linop.operators.scipy_base`, and :mod:`vivit_linop.operators.methods` hands
over to the verbs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from operator import index
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np
import torch
from torch import Tensor

from vivit_linop.arguments import (
    Scalar,
    as_array,
    as_float,
    as_scalar,
    check_has_values,
    check_is_no_number,
    is_scalar,
    numbered,
    without_axes,
)
from vivit_linop.modes import (
    has_tangent,
    is_followed,
    needs_a_node,
    ordinary_mode,
    uncompiled,
)
from vivit_linop.operators import verbs
from vivit_linop.operators.linear_map import LinearMap
from vivit_linop.operators.methods import Vectors, VerbMethods
from vivit_linop.operators.outline import as_html
from vivit_linop.operators.scipy_base import LinearOperator, NumpyProducts
from vivit_linop.ranks.alone import ALONE, Ranks

NUMPY_DTYPES = {torch.float32: np.dtype("float32"), torch.float64: np.dtype("float64")}
"""The numpy names of the dtypes that an operator can have."""


_CPU = torch.device("cpu")
_Described = tuple[tuple[int, int], np.dtype[Any], dict[str, Any]]


@lru_cache(maxsize=256)
def _described(dtype: torch.dtype | None, shape: tuple[int, int]) -> _Described:
    """Return the shape, the numpy dtype and what else SciPy's class keeps of a node.

    The nodes of an expression are alike, and to check each of them would take as long
    as the rest of a small one.
    """
    if dtype is not None and dtype not in NUMPY_DTYPES:
        raise _other_dtype(dtype)
    node = object.__new__(LinearOperator)
    LinearOperator.__init__(node, NUMPY_DTYPES[dtype or torch.float64], shape)
    kept = vars(node)
    return kept.pop("shape"), kept.pop("dtype"), kept


def _other_dtype(found: Any) -> TypeError:
    if isinstance(found, torch.dtype):
        way = "Convert the model or the tensor first, for example with .float()"
    else:
        way = "op.torch_dtype is that of an operator, and op.dtype NumPy's of the same"
    return TypeError(
        f"dtype: operators are torch.float32 or torch.float64, got {found!r}. {way}."
    )


class TorchLinearOperator(VerbMethods["TorchLinearOperator"], NumpyProducts):
    """A SciPy ``LinearOperator`` that multiplies with torch kernels.

    Whatever SciPy does with a linear operator it does with this one: numpy arrays go
    in and come out. A torch tensor on either side of ``@`` gives a torch tensor on
    the operator's device. Products have the operator's dtype. Inputs are never
    written to, and gradients flow through a product to the tensor it was taken with.

    To write an operator, give the shape, dtype and device to ``__init__`` and define
    ``_multiply`` and ``_multiply_adjoint`` (or ``self_adjoint``); then run
    :func:`vivit_linop.testing.check_operator` on it.

    Args:
        shape: Rows and columns.
        dtype: ``torch.float32`` or ``torch.float64``; ``None`` for an operator that
            takes the dtype of what it is combined with.
        device: Where the products are computed; ``None`` likewise.

    Attributes:
        shape: Rows and columns.
        dtype: The numpy dtype, for SciPy.
        torch_dtype: The torch dtype.
        device: The torch device.

    Example:
        >>> import torch, vivit_linop as vl
        >>> class Doubling(vl.TorchLinearOperator):
        ...     self_adjoint = True
        ...     def _multiply(self, X):
        ...         return 2 * X
        >>> Doubling((2, 2), torch.float64) @ torch.tensor([1.0, 3.0])
        tensor([2., 6.], dtype=torch.float64)
    """

    # numpy scalars and arrays leave ``array @ op`` and ``np.float32(2) * op`` to us.
    __array_ufunc__ = None

    self_adjoint: bool = False
    """Whether the operator equals its adjoint."""

    if TYPE_CHECKING:  # what SciPy's class has, which comes without types
        T: TorchLinearOperator
        H: TorchLinearOperator
        adjoint: Callable[[], TorchLinearOperator]
        transpose: Callable[[], TorchLinearOperator]

    @property
    def requires_grad(self) -> bool:
        """Whether a tensor that it is made of, as a scale or a damping, requires grad.

        Derivatives in it then flow through products, traces, diagonals, determinants,
        eigenvalues and solutions, or there is an error.
        """
        for tensor in self._tensors:
            if tensor.requires_grad:
                return True
        return False

    @property
    def _is_followed(self) -> bool:
        """Whether such a tensor has a tangent, or is of a transformation."""
        return any(map(is_followed, self._tensors))

    @property
    def _carries_derivatives(self) -> bool:
        """Whether derivatives in such a tensor are wanted here."""
        return (torch.is_grad_enabled() and self.requires_grad) or self._is_followed

    @cached_property
    def _tensors(self) -> tuple[Tensor, ...]:
        """The tensors that it is made of, and those of its parts."""
        found: list[Tensor] = []
        for part in self._made_of():
            if isinstance(part, Tensor):
                found.append(part)
            elif isinstance(part, TorchLinearOperator):
                found += part._tensors
        return tuple(found)

    def _made_of(self) -> Sequence[Scalar | TorchLinearOperator]:
        """Return what gradients may flow to: operators, and tensors of its own."""
        return ()

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype | None,
        device: torch.device | str | None = None,
    ) -> None:
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise _other_dtype(dtype)
        self._own_dtype = dtype
        self._own_device: torch.device | None
        if device is None or (type(device) is torch.device and device == _CPU):
            self._own_device = device  # as nearly always
        else:
            self._own_device = numbered(device)
        self.shape, self.dtype, more = _described(dtype, tuple(shape))
        if more:
            vars(self).update(more)

    @property
    def ranks(self) -> Ranks:
        """The processes that have parts of it: one, unless samples are spread."""
        for part in self._made_of():
            if isinstance(part, TorchLinearOperator) and part.ranks.is_many:
                return part.ranks
        return ALONE

    # What a node defines -------------------------------------------------------

    def _multiply(self, X: Tensor) -> Tensor:
        """Multiply the columns of a matrix, ``[n, K] -> [m, K]``, K at least 1."""
        raise NotImplementedError(f"{type(self).__name__} does not define _multiply.")

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        """Multiply by the adjoint, ``[m, K] -> [n, K]``, K at least 1."""
        if self.self_adjoint:
            return self._multiply(X)
        raise NotImplementedError(
            f"{type(self).__name__} does not define _multiply_adjoint."
        )

    def _settled(
        self, dtype: torch.dtype | None, device: torch.device | None
    ) -> TorchLinearOperator:
        """Return an undecided operator as part of one with this dtype and device."""
        return self

    def _mirrors(self, other: TorchLinearOperator) -> bool:
        """Whether it is the adjoint of another operator, part by part."""
        return False

    # What it is ---------------------------------------------------------------

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype of products (float64 while nothing has decided it)."""
        return self._own_dtype or torch.float64

    @property
    def device(self) -> torch.device:
        """The device of products (the CPU while nothing has decided it)."""
        return self._own_device or torch.device("cpu")

    def __repr__(self) -> str:
        """Say what the operator is, its shape, dtype and device."""
        rows, columns = self.shape
        return (
            f"<{rows}x{columns} {type(self).__name__}, {self.torch_dtype}, "
            f"{self.device}>"
        )

    def _repr_html_(self) -> str:
        """Show notebooks the expression as a tree, with shapes and costs."""
        return as_html(self)

    # Products with tensors and arrays -------------------------------------------

    def apply(self, X: Tensor) -> Tensor:
        """Multiply the columns of a matrix, ``[n, K] -> [m, K]``.

        What composite nodes call on their parts: casts to the operator's dtype and
        device, and leaves the checks of shape to the outermost product.
        """
        if self._carries_derivatives or needs_a_node(X):
            X = X.to(self._own_device or X.device, self._own_dtype or X.dtype)
            return self._differentiable(X)
        return self._multiplied(X)

    def _multiplied(self, X: Tensor) -> Tensor:
        """Multiply columns that carry no derivatives."""
        # Also where the caller is in inference mode: what is kept between products
        # must be ordinary tensors.
        with ordinary_mode(), torch.no_grad():
            X = X.to(self._own_device or X.device, self._own_dtype or X.dtype)
            if X.is_inference():
                X = X.clone()
            if X.shape[1] == 0:
                return X.new_zeros(self.shape[0], 0)
            product = self._multiply(X)
            if product.shape != (self.shape[0], X.shape[1]):
                raise ValueError(
                    f"_multiply: of {list(X.shape)} {self!r} returned "
                    f"{list(product.shape)}; an adjoint has it from _multiply_adjoint."
                )
            # Parts of another precision do not decide that of the whole.
            return product.to(X.dtype)

    def _differentiable(self, X: Tensor) -> Tensor:
        """Multiply so that gradients flow to the columns and to the parts."""
        if self._carries_derivatives:
            # The parts are multiplied as nodes of autograd, in reverse mode.
            if has_tangent(X) and not self._is_followed:
                raise NotImplementedError(
                    "x: derivatives in forward mode of an operator whose tensors "
                    "require grad; pass the operator .detach()ed tensors."
                )
            return self._multiply(X).to(X.dtype)
        return LinearMap.apply(X, self)

    def _other_rows(self, x: Tensor | np.ndarray) -> ValueError:
        """What to say of no vector or matrix of as many rows as there are columns."""
        return ValueError(
            f"x: an operator of shape {tuple(self.shape)} multiplies a vector "
            f"[{self.shape[1]}] or a matrix [{self.shape[1]}, K], got "
            f"{list(x.shape)}."
        )

    def _as_fitting_array(self, x: Any) -> np.ndarray:
        """Return an array; scalars and batches of matrices are for SciPy to judge."""
        array = as_array(x)
        if array.ndim in (1, 2) and array.shape[0] != self.shape[1]:
            with self.ranks.together("x"):
                raise self._other_rows(array)
        return array

    def _product(self, x: Tensor) -> Tensor:
        """Multiply a torch vector or matrix, with the checks that a user needs."""
        if x.ndim not in (1, 2) or x.shape[0] != self.shape[1]:
            with self.ranks.together("x"):
                raise self._other_rows(x)
        if x.is_meta and self.device.type != "meta":
            check_has_values(x, "x: a tensor")
        if x.layout != torch.strided:
            x = x.to_dense()
        if x.is_complex():  # all operators are real
            parts = torch.view_as_real(x.resolve_conj()).flatten(1)
            product = self._product(parts).unflatten(1, (*x.shape[1:], 2))
            return torch.view_as_complex(product.contiguous())
        if not x.is_floating_point():
            x = x.to(self.torch_dtype)
        X = x.reshape(x.shape[0], -1) if x.ndim == 2 else x.unsqueeze(1)
        # Without derivatives to carry, the node would only take time.
        if needs_a_node(X) or (self._tensors and self._carries_derivatives):
            X = X.to(self._own_device or X.device) if self.requires_grad else X
            result = self._differentiable(X.to(self._own_dtype or X.dtype))
        else:
            result = self._multiplied(X.detach())
        return result if x.ndim == 2 else result.squeeze(1)

    @uncompiled
    def matvec(self, x: Vectors) -> Vectors:
        """Multiply a vector; see ``scipy.sparse.linalg.LinearOperator.matvec``."""
        if isinstance(x, Tensor):
            return self._product(x)
        return super().matvec(self._as_fitting_array(x))

    @uncompiled
    def matmat(self, X: Vectors) -> Vectors:
        """Multiply a matrix; see ``scipy.sparse.linalg.LinearOperator.matmat``."""
        if isinstance(X, Tensor):
            return self._product(X)
        return super().matmat(self._as_fitting_array(X))

    @uncompiled
    def rmatvec(self, x: Vectors) -> Vectors:
        """Multiply a vector by the adjoint."""
        if isinstance(x, Tensor):
            return self.T._product(x)
        return super().rmatvec(as_array(x))

    @uncompiled
    def rmatmat(self, X: Vectors) -> Vectors:
        """Multiply a matrix by the adjoint."""
        if isinstance(X, Tensor):
            return self.T._product(X)
        return super().rmatmat(as_array(X))

    # The algebra --------------------------------------------------------------

    @uncompiled
    def _adjoint(self) -> TorchLinearOperator:
        return verbs.adjoint(self)

    _transpose = _adjoint

    @overload
    def dot(self, x: TorchLinearOperator | float) -> TorchLinearOperator: ...
    @overload
    def dot(self, x: Vectors) -> Vectors: ...
    @overload
    def dot(self, x: Any) -> Any: ...

    @uncompiled
    def dot(self, x: Any) -> Any:
        """Multiply by an operator, a scalar, a tensor or an array from the right."""
        if isinstance(x, TorchLinearOperator):
            if self.shape[1] != x.shape[0]:
                raise ValueError(f"Shapes do not match: {self!r} @ {x!r}.")
            return verbs.matmul(self, x)
        x = without_axes(x, self.shape[1])
        if is_scalar(x):
            return verbs.scale(self, as_scalar(x))
        if isinstance(x, Tensor):
            return self._product(x)
        if not isinstance(x, LinearOperator):
            x = self._as_fitting_array(x)
        return super().dot(x)

    __mul__ = dot

    @overload
    def __matmul__(self, x: TorchLinearOperator) -> TorchLinearOperator: ...
    @overload
    def __matmul__(self, x: Vectors) -> Vectors: ...
    @overload
    def __matmul__(self, x: Any) -> Any: ...

    @uncompiled
    def __matmul__(self, x: Any) -> Any:
        """Return ``self @ x`` for an operator, a tensor or an array ``x``."""
        if isinstance(x, Tensor) and x.ndim > 0:
            return self._product(x)
        if is_scalar(x):
            raise ValueError("A scalar is no operand of '@'; use '*' instead.")
        return self.dot(x)

    @overload
    def __rmul__(self, x: float) -> TorchLinearOperator: ...
    @overload
    def __rmul__(self, x: Any) -> Any: ...

    @uncompiled
    def __rmul__(self, x: Any) -> Any:
        """Return ``x * self``: a scaling, or what ``x @ self`` is."""
        x = without_axes(x, self.shape[0])
        if is_scalar(x):
            return verbs.scale(self, as_scalar(x))
        return self.__rmatmul__(x)

    @overload
    def __rmatmul__(self, x: Vectors) -> Vectors: ...
    @overload
    def __rmatmul__(self, x: Any) -> Any: ...

    @uncompiled
    def __rmatmul__(self, x: Any) -> Any:
        """Return ``x @ self`` for a tensor or an array ``x``."""
        if is_scalar(x):
            raise ValueError("A scalar is no operand of '@'; use '*' instead.")
        if not isinstance(x, Tensor):
            x = as_array(x)
        if x.ndim not in (1, 2) or x.shape[-1] != self.shape[0]:
            raise ValueError(
                f"x: [{self.shape[0]}] or [K, {self.shape[0]}] can stand left of an "
                f"operator of shape {tuple(self.shape)}, got {list(x.shape)}."
            )
        return self.T.dot(x) if x.ndim == 1 else self.T.dot(x.T).T

    @uncompiled
    def __truediv__(self, x: Any) -> TorchLinearOperator:
        """Return ``self / x`` for a scalar ``x``."""
        x = without_axes(x, 0)
        if isinstance(x, Tensor) and x.ndim:  # which would divide by itself first
            raise TypeError(f"An operator is divided by a number, got {list(x.shape)}.")
        if not is_scalar(x):
            return NotImplemented
        return verbs.scale(self, as_scalar(1.0 / as_scalar(x)))

    @uncompiled
    def __neg__(self) -> TorchLinearOperator:
        """Return ``-self``."""
        return verbs.scale(self, -1.0)

    @overload
    def __add__(self, x: TorchLinearOperator | float) -> TorchLinearOperator: ...
    @overload
    def __add__(self, x: Any) -> Any: ...

    @uncompiled
    def __add__(self, x: Any) -> Any:
        """Return ``self + x`` for an operator ``x``."""
        if isinstance(x, TorchLinearOperator):
            if self.shape != x.shape:
                raise ValueError(f"Shapes do not match: {self!r} + {x!r}.")
            return verbs.add(self, x)
        if isinstance(x, LinearOperator):
            return super().__add__(x)
        if is_scalar(x) and as_float(x) == 0.0:  # where sum([...]) starts
            return self
        check_is_no_number(x)
        return NotImplemented

    __radd__ = __add__

    @overload
    def __sub__(self, x: TorchLinearOperator) -> TorchLinearOperator: ...
    @overload
    def __sub__(self, x: Any) -> Any: ...

    def __sub__(self, x: Any) -> Any:
        """Return ``self - x`` for an operator ``x``."""
        return self + (-x) if isinstance(x, LinearOperator) else self.__add__(x)

    def __rsub__(self, x: Any) -> Any:
        """Return ``x - self``."""
        return (-self).__add__(x)

    @uncompiled
    def __pow__(self, power: Any) -> TorchLinearOperator:
        """Return the operator multiplied by itself ``power`` times, at least 0."""
        self._check_square("power")
        try:
            times = index(power)
        except TypeError:
            times = -1
        if times < 0:
            raise ValueError(
                f"power: an integer of at least 0, got {power!r}. Use .inv() for an "
                "inverse."
            )
        return verbs.power(self, times)


Op: TypeAlias = TorchLinearOperator
"""What rules call an operator of any kind."""


def in_common(
    *operators: TorchLinearOperator,
) -> tuple[torch.dtype | None, torch.device | None]:
    """The dtype and device of an expression over operators, None while none decides."""
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    for operator in operators:
        own, place = operator._own_dtype, operator._own_device
        if own is not None:
            dtype = own if dtype is None else torch.promote_types(dtype, own)
        if place is not None and device is not None and place != device:
            raise ValueError(
                "Operators on different devices cannot be combined: "
                f"{sorted(map(str, (place, device)))}. Move the tensors they are made "
                "of first."
            )
        device = place or device
    return dtype, device


def settled(parts: Sequence[TorchLinearOperator]) -> list[TorchLinearOperator]:
    """Let identities take the dtype and device of the other parts."""
    dtype, device = in_common(*parts)
    return [settle(part, dtype, device) for part in parts]


def settle(
    op: TorchLinearOperator, dtype: torch.dtype | None, device: torch.device | None
) -> TorchLinearOperator:
    """Return an operator as part of one with this dtype and device."""
    # What decides nothing new leaves it as it is: parts of parts are looked at once.
    takes_dtype = op._own_dtype is None and dtype is not None
    takes_device = op._own_device is None and device is not None
    return op._settled(dtype, device) if takes_dtype or takes_device else op
