"""To and from other packages: SciPy, curvlinops and BackPACK.

All contact with curvlinops and BackPACK is in this file, through names that they make
public. They are imported when they are needed, not with this package.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import Tensor, nn
from torch.fx import GraphModule

from vivit_linop.modes import ordinary_mode
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.elementary import Dense, Diagonal
from vivit_linop.operators.kronecker import BlockDiagonal, Kronecker
from vivit_linop.operators.verbs import damped_inv, to_curvlinops
from vivit_linop.risk.copies import Copies
from vivit_linop.risk.empirical import EmpiricalRisk

# SciPy ----------------------------------------------------------------------------


def from_scipy(
    op: Any,
    *,
    self_adjoint: bool = False,
    device: torch.device | str | None = None,
) -> TorchLinearOperator:
    """Return a SciPy linear operator, sparse matrix or array as one of ours.

    Products go through numpy arrays, so on a GPU each one costs two transfers.

    Args:
        op: What ``scipy.sparse.linalg.aslinearoperator`` takes. float32 stays, all
            other real dtypes become float64.
        self_adjoint: Whether it equals its adjoint; SciPy's do not say.
        device: Where products with tensors come out.

    Raises:
        TypeError: If it is no linear operator, or complex.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from scipy.sparse import diags
        >>> A = vl.from_scipy(diags([1.0, 2.0]), self_adjoint=True)
        >>> (A + vl.Identity(2)) @ torch.ones(2)
        tensor([2., 3.], dtype=torch.float64)
    """
    if isinstance(op, TorchLinearOperator):
        return op
    return ScipyOperator(aslinearoperator(op), self_adjoint, device)


class ScipyOperator(TorchLinearOperator):
    """A SciPy linear operator; made by :func:`from_scipy`.

    Args:
        operator: The operator.
        self_adjoint: Whether it equals its adjoint.
        device: Where products come out.
    """

    def __init__(
        self,
        operator: LinearOperator,
        self_adjoint: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        if np.issubdtype(operator.dtype, np.complexfloating):
            raise TypeError(f"op: must be real, got {operator.dtype}.")
        single = operator.dtype == np.float32
        self.operator = operator
        self.self_adjoint = self_adjoint
        rows, columns = operator.shape
        super().__init__(
            (rows, columns), torch.float32 if single else torch.float64, device
        )

    def _multiply(self, X: Tensor) -> Tensor:
        return self._through_numpy(self.operator.matmat, X)

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        return self._through_numpy(self.operator.rmatmat, X)

    def _through_numpy(self, function: Callable[..., Any], X: Tensor) -> Tensor:
        product = function(np.ascontiguousarray(X.cpu().numpy()))
        # A copy: a product may be what went in.
        array = np.array(product, order="C")
        return torch.from_numpy(array).to(self.device, self.torch_dtype)


# curvlinops -------------------------------------------------------------------------


def from_curvlinops(op: Any) -> TorchLinearOperator:
    """Return an operator of curvlinops as one of ours.

    It then takes part in expressions, and in SciPy without a conversion: ``eigsh(A)``.
    curvlinops computes on the model's present parameters, so what it multiplies by
    changes with them (its KFAC and EKFAC keep the factors of their first product).

    Args:
        op: A linear operator of curvlinops.

    Raises:
        TypeError: If it is none.

    Example:
        >>> import curvlinops, torch, vivit_linop as vl
        >>> from torch import nn
        >>> net, data = nn.Linear(3, 1), (torch.rand(4, 3), torch.rand(4, 1))
        >>> loss = nn.MSELoss()
        >>> H = curvlinops.HessianLinearOperator(
        ...     net, loss, list(net.parameters()), [data]
        ... )
        >>> G = vl.GGN(net, loss, data)
        >>> x = torch.ones(4)  # for a linear model the GGN is the Hessian
        >>> torch.allclose((vl.from_curvlinops(H) - G) @ x, torch.zeros(4), atol=1e-5)
        True
    """
    if isinstance(op, CurvlinopsView):
        return op.operator
    needed = ("shape", "dtype", "device", "adjoint", "SELF_ADJOINT", "__matmul__")
    missing = [name for name in needed if not hasattr(op, name)]
    if missing:
        raise TypeError(
            f"op: a linear operator of curvlinops, got {type(op).__name__} without "
            f"{missing[0]!r}."
        )
    return CurvlinopsOperator(op)


class CurvlinopsOperator(TorchLinearOperator):
    """An operator of curvlinops; made by :func:`from_curvlinops`.

    Args:
        operator: The operator.
    """

    def __init__(self, operator: Any) -> None:
        self.operator = operator
        self.self_adjoint = bool(operator.SELF_ADJOINT)
        rows, columns = operator.shape
        super().__init__((int(rows), int(columns)), operator.dtype, operator.device)

    def _multiply(self, X: Tensor) -> Tensor:
        with torch.enable_grad():
            return (self.operator @ X).detach()

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        with torch.enable_grad():
            return (self.operator.adjoint() @ X).detach()


class CurvlinopsView:
    """One of our operators with the interface of curvlinops' estimators.

    Made by ``op.to_curvlinops()``. It multiplies tensors, and has what
    ``hutchpp_trace`` and the like ask for; :func:`from_curvlinops` gives the operator
    back.

    Args:
        operator: The operator.

    Attributes:
        shape: Rows and columns.
        dtype: The torch dtype.
        device: The torch device.
    """

    def __init__(self, operator: TorchLinearOperator) -> None:
        self.operator = operator
        self.shape = tuple(operator.shape)
        self.dtype, self.device = operator.torch_dtype, operator.device
        self.SELF_ADJOINT = operator.self_adjoint

    def __matmul__(self, X: Tensor) -> Tensor:
        """Multiply a vector or the columns of a matrix."""
        product: Tensor = self.operator @ X
        return product

    def adjoint(self) -> CurvlinopsView:
        """Return the adjoint."""
        return CurvlinopsView(self.operator.T)

    @property
    def T(self) -> CurvlinopsView:
        """The adjoint."""
        return self.adjoint()

    def to_scipy(self, dtype: Any = None) -> LinearOperator:
        """Return the operator itself, which is one of SciPy's."""
        return self.operator


@to_curvlinops.register
def view_for_curvlinops(op: TorchLinearOperator) -> CurvlinopsView:
    """The operator, seen as curvlinops expects it."""
    return CurvlinopsView(op)


@damped_inv.register
def damped_inverse_of_curvlinops(
    op: CurvlinopsOperator, damping: float
) -> TorchLinearOperator:
    """The inverse of curvlinops' (E)KFAC + δ I, exactly damped; it has no others."""
    from curvlinops import KFACInverseLinearOperator, KFACLinearOperator

    if not isinstance(op.operator, KFACLinearOperator):
        return damped_inv.dispatch(object)(op, damping)
    inverse = KFACInverseLinearOperator(
        op.operator, damping=damping, use_exact_damping=True
    )
    return CurvlinopsOperator(inverse)


# BackPACK ---------------------------------------------------------------------------

# What works for every model.
_INSTEAD = {
    "KFRA": "Use vl.KFAC, for every model.",
    "DiagHessian": "Use route='products', for every model.",
    "BatchDiagHessian": "Use route='products', for every model.",
    "PCHMP": "Use vl.GGN(risk).block_diagonal('parameter'), for every model.",
}
# Functions with second derivatives, that BackPACK has rules for.
CURVED = (nn.Sigmoid, nn.Tanh, nn.ELU, nn.SELU, nn.LogSigmoid)
# BackPACK's Kronecker factors of these number the weight's entries outputs first.
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Left(NamedTuple):
    """What BackPACK has left on a parameter.

    Attributes:
        parameter: The parameter.
        value: What is there.
        layer: The module that has the parameter; None if that is not known.
    """

    parameter: Tensor
    value: Any
    layer: nn.Module | None


def from_backpack(source: Any, quantity: Any) -> TorchLinearOperator:
    """Return what BackPACK computes as an operator.

    - Kronecker factors (``KFAC``, ``KFLR``, ``KFRA``) become a ``BlockDiagonal`` of
      ``Kronecker`` operators, one block a parameter. Those of a transposed convolution
      are of ``weight.transpose(0, 1)``: the operator has the block at the places
      (``indices``) that its entries have in the parameter;
    - diagonals (``DiagGGNExact``, ``DiagHessian``, ``Variance``, …) a ``Diagonal``;
    - products with blocks (``HMP``, ``GGNMP``, ``PCHMP``) a ``BlockDiagonal``;
    - quantities with axes before the parameter's (``BatchGrad``, ``SqrtGGNExact``, …)
      a ``Dense`` with these as columns, sample-major, ``[D, N]`` or ``[D, N·C]``.

    Scalings are BackPACK's: quantities of single samples have its r = 1/N in them.

    Args:
        source: A module, or an iterable of parameters, that BackPACK has left its
            results on; or an :class:`EmpiricalRisk`, for which BackPACK runs on a copy
            of the model, on all samples at once.
        quantity: For parameters the name of the attribute, ``"kflr"`` or whatever
            ``savefield`` says; for a risk an extension, such as
            ``backpack.extensions.KFLR()``.

    Raises:
        TypeError: For arguments of a wrong type, or a quantity that is none of these.
        ValueError: If a parameter has no such attribute; if BackPACK cannot do the
            model, with the module that it has no rule for; if the shape of a kernel
            leaves open whether it is of a transposed convolution, and no module tells.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from backpack.extensions import KFRA
        >>> from torch import nn
        >>> data = (torch.rand(4, 3), torch.rand(4, 1))
        >>> risk = vl.EmpiricalRisk(nn.Sequential(nn.Linear(3, 1)), nn.MSELoss(), data)
        >>> K = vl.from_backpack(risk, KFRA())
        >>> (K + 0.1 * vl.Identity(4)).inv()
        <4x4 BlockDiagonal, torch.float32, cpu>
    """
    if isinstance(source, EmpiricalRisk):
        return _of_results(backpack_results(source, quantity))
    if isinstance(source, Tensor) or not isinstance(source, Iterable | nn.Module):
        raise TypeError(
            "source: an EmpiricalRisk, a module or an iterable of Parameters, got "
            f"{type(source).__name__}."
        )
    if not isinstance(quantity, str):
        raise TypeError(
            f"quantity: the name of an attribute of the parameters, got {quantity!r}."
        )
    layers = _layers(source) if isinstance(source, nn.Module) else {}
    results = []
    parameters = source.parameters() if isinstance(source, nn.Module) else source
    for position, p in enumerate(parameters):
        if not hasattr(p, quantity):
            raise ValueError(
                f"source: parameter {position} has no {quantity!r}. Run backward() "
                "inside of `with backpack(extension):` first; parameters of modules "
                "that BackPACK has no rule for get none."
            )
        results.append(Left(p, getattr(p, quantity), layers.get(id(p))))
    if not results:
        raise ValueError("source: is empty, there is not one parameter.")
    return _of_results(results)


def _layers(module: nn.Module) -> dict[int, nn.Module]:
    """By the id of each parameter, the module that has it."""
    return {id(p): part for part in module.modules() for p in part.parameters(False)}


@ordinary_mode()
def backpack_results(
    risk: EmpiricalRisk, extension: Any, memory: int | None = None
) -> list[Left]:
    """Run one of BackPACK's extensions on a copy of a risk's model.

    Args:
        risk: The risk.
        extension: The extension.
        memory: The bytes that its recursion for Hessians may take, a matrix [features,
            N · features] after each elementwise function; None for any.

    Returns:
        What BackPACK left on the parameters of the copy.

    Raises:
        TypeError: If ``extension`` is none.
        ValueError: If BackPACK cannot do the model.
    """
    from backpack import backpack, extend

    savefield = getattr(extension, "savefield", None)
    if not isinstance(savefield, str) or isinstance(extension, type):
        raise TypeError(
            "quantity: an instance of a BackPACK extension such as "
            f"backpack.extensions.KFRA(), got {extension!r}."
        )
    what = type(extension).__name__
    module, loss = _module_and_loss(risk, what)
    _check_layers(module, what)
    X, y = _one_batch(risk, what)
    calls: dict[nn.Module, int] = {}
    residuals = 0

    def count(module: nn.Module, _: Any, output: Any) -> None:
        nonlocal residuals
        calls[module] = calls.get(module, 0) + 1
        if isinstance(module, CURVED):
            residuals += output.numel() * output[0].numel() * output.element_size()

    try:
        with (
            torch.enable_grad(),
            _default_dtype(risk.dtype),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # of torch about BackPACK's hooks
            handles = [m.register_forward_hook(count) for m in module.modules()]
            net, loss = extend(module), extend(loss)
            with backpack(extension):
                output = net(X)
                for handle in handles:
                    handle.remove()
                if memory is not None and residuals > memory:
                    raise ValueError(
                        f"its matrices between layers take {residuals:.1e} bytes, the "
                        f"budget is {memory:.1e}."
                    )
                loss(output, y).backward()
    except Exception as error:
        reason = _used_again(module, calls) or _first_line(error)
        raise _refusal(what, reason) from error
    again = _used_again(module, calls)
    if again is not None:
        raise _refusal(what, again)
    named = dict(module.named_parameters())
    missing = [name for name in risk.params if not hasattr(named[name], savefield)]
    if missing:
        raise ValueError(
            f"model: BackPACK did not compute {what} for parameter {missing[0]!r}; it "
            "has no rule for its module."
        )
    layers = _layers(module)
    return [
        Left(p, getattr(p, savefield), layers[id(p)])
        for p in (named[name] for name in risk.params)
    ]


def backpack_kfra(risk: EmpiricalRisk) -> BlockDiagonal:
    """Return BackPACK's KFRA, a block a parameter."""
    from backpack.extensions import KFRA

    approximation = from_backpack(risk, KFRA())
    assert isinstance(approximation, BlockDiagonal)
    return approximation


def backpack_diagonal_hessian(
    risk: EmpiricalRisk, by_sample: bool, memory: int
) -> Tensor:
    """Return the Hessian's diagonal by BackPACK, ``[D]``, or by sample ``[N, D]``.

    By sample with its r.

    Raises:
        ValueError: If BackPACK cannot do the model, or not in that memory.
    """
    from backpack.extensions import BatchDiagHessian, DiagHessian

    extension = BatchDiagHessian() if by_sample else DiagHessian()
    results = backpack_results(risk, extension, memory)
    leading = 1 if by_sample else 0
    parts = [result.value.detach().flatten(leading) for result in results]
    return torch.cat(parts, dim=leading)


def backpack_positive_curvature(risk: EmpiricalRisk, modify: str) -> BlockDiagonal:
    """Return BackPACK's positive-curvature Hessian, a block a parameter."""
    from backpack.extensions import PCHMP

    operator = from_backpack(risk, PCHMP(modify=modify))
    assert isinstance(operator, BlockDiagonal)
    return operator


class BackpackProduct(TorchLinearOperator):
    """A block of ``HMP``, ``GGNMP`` or ``PCHMP``; made by :func:`from_backpack`.

    Args:
        function: BackPACK's, ``[K, *p] -> [K, *p]``.
        parameter: The parameter p.
    """

    self_adjoint = True

    def __init__(self, function: Callable[[Tensor], Tensor], parameter: Tensor) -> None:
        self._function, self._shape = function, parameter.shape
        size = parameter.numel()
        super().__init__((size, size), parameter.dtype, parameter.device)

    def _multiply(self, X: Tensor) -> Tensor:
        vectors = X.T.reshape(-1, *self._shape)
        return self._function(vectors).detach().flatten(1).T


def _of_results(results: Sequence[Left]) -> TorchLinearOperator:
    """Decide by what BackPACK left on the parameters."""
    parameters, values, _ = zip(*results, strict=True)
    if all(callable(value) and not isinstance(value, Tensor) for value in values):
        return BlockDiagonal([BackpackProduct(f, p) for p, f, _ in results])
    if all(isinstance(value, (list, tuple)) for value in values):
        return _kronecker_blocks(results)
    if all(isinstance(value, Tensor) for value in values):
        leading = {value.ndim - p.ndim for p, value, _ in results}
        shapes_match = all(
            value.shape[value.ndim - p.ndim :] == p.shape for p, value, _ in results
        )
        if shapes_match and leading == {0}:
            return Diagonal(torch.cat([value.detach().flatten() for value in values]))
        if shapes_match and leading == {1}:
            return Dense(
                torch.cat([value.detach().flatten(1) for value in values], dim=1).T
            )
        if shapes_match and leading == {2}:
            by_sample = [value.detach().transpose(0, 1) for value in values]
            rows = [value.flatten(0, 1).flatten(1) for value in by_sample]
            return Dense(torch.cat(rows, dim=1).T)
    raise TypeError(
        "quantity: is neither a diagonal, columns, Kronecker factors nor a product "
        f"with a block; parameter {list(parameters[0].shape)} holds "
        f"{_describe(values[0])}."
    )


def _kronecker_blocks(results: Sequence[Left]) -> BlockDiagonal:
    """The blocks of all parameters, at the places of their entries."""
    blocks, indices, start = [], [], 0
    for number, result in enumerate(results):
        p = result.parameter
        places = torch.arange(start, start + p.numel(), device="cpu")
        if _of_transpose(result, number):
            places = places.view(p.shape).transpose(0, 1).flatten()
        blocks.append(Kronecker(*(factor.detach() for factor in result.value)))
        indices.append(places.to(p.device))
        start += p.numel()
    in_order = torch.equal(torch.cat(indices).cpu(), torch.arange(start, device="cpu"))
    return BlockDiagonal(blocks, None if in_order else indices)


def _of_transpose(result: Left, number: int) -> bool:
    """Whether factors are those of a parameter with its first two axes exchanged."""
    p, factors, layer = result
    if len(factors) != 2 or p.ndim < 3:
        return False
    if isinstance(layer, _TRANSPOSED):
        ends = zip(layer.output_padding, layer.padding, strict=True)
        if any(added and removed for added, removed in ends):
            raise ValueError(
                f"model: BackPACK's factors leave out the output_padding of {layer}. "
                f"{_INSTEAD['KFRA']}"
            )
        return True
    if layer is not None:
        return False
    outputs = len(factors[0])
    if p.shape[0] == p.shape[1] == outputs > 1:
        raise ValueError(
            f"source: parameter {number}, {list(p.shape)}, may be of a convolution or "
            "of a transposed one, and BackPACK numbers their entries in different "
            "orders. Give the module in place of its parameters."
        )
    return outputs != p.shape[0]


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    return f"a {type(value).__name__}"


def _module_and_loss(risk: EmpiricalRisk, what: str) -> tuple[nn.Module, nn.Module]:
    """A copy of the model with the risk's parameters, and of the loss."""
    source = risk.loss.source
    if not isinstance(source, nn.Module):
        raise ValueError(
            f"loss: {what} needs a module of torch.nn, got "
            f"{getattr(source, '__name__', type(source).__name__)}."
        )
    module = risk.model.copied_module(risk.params)
    if module is None:
        raise ValueError(f"model: {what} needs an nn.Module, got a function.")
    return module, Copies(()).of(source)


def _check_layers(module: nn.Module, what: str) -> None:
    """BackPACK takes any container for one of modules, a shared parameter for two."""
    for name, part in module.named_modules():
        forward = inspect.unwrap(type(part).forward)
        if isinstance(part, nn.Sequential) and forward is not nn.Sequential.forward:
            raise _refusal(
                what, f"{name or 'it'} is a Sequential with a forward pass of its own."
            )
        if isinstance(part, GraphModule) and any(
            node.op in ("call_function", "call_method", "get_attr")
            for node in part.graph.nodes
        ):
            raise _refusal(
                what,
                f"{name or 'it'} is a graph with calls of functions between its "
                "modules.",
            )
    shared = len(list(module.named_parameters(remove_duplicate=False)))
    if shared != len(list(module.named_parameters())):
        raise _refusal(what, "modules share a parameter.")


def _refusal(what: str, reason: str) -> ValueError:
    """An error that says what works instead."""
    instead = _INSTEAD.get(what, "The operators of this package work for every model.")
    return ValueError(
        f"model: BackPACK cannot compute {what} for it: {reason} {instead}"
    )


def _used_again(module: nn.Module, calls: Mapping[nn.Module, int]) -> str | None:
    """Say which module with parameters was called more than once, if any was."""
    for name, part in module.named_modules():
        if calls.get(part, 0) > 1 and any(True for _ in part.parameters(False)):
            return f"module {name!r} is used {calls[part]} times."
    return None


def _one_batch(risk: EmpiricalRisk, what: str) -> tuple[Tensor, Tensor]:
    inputs, targets = [], []
    for (X, _), y in zip(risk.batches(), risk.targets(), strict=True):
        if not isinstance(X, Tensor):
            kind = "a mapping" if isinstance(X, Mapping) else "several tensors"
            raise ValueError(
                f"data: BackPACK computes {what} for one tensor as input, got {kind}."
            )
        inputs.append(X)
        targets.append(y)
    return torch.cat(inputs), torch.cat(targets)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Some of BackPACK's rules make matrices without saying of which dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    first = text[0].rstrip(".") if text else "it failed"
    return f"{first} ({type(error).__name__})."
