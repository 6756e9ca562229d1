"""Which parameters an operator is over, in which precision, and their vectors."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from vivit_linop.arguments import as_list, check_has_values
from vivit_linop.risk.data.containers import strided_parts

# What curvature is computed in.
PRECISIONS = (torch.float32, torch.float64)
HALVES = (torch.float16, torch.bfloat16)
# By bytes of an entry.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# Precision ---------------------------------------------------------------------------


def check_precision(dtype: Any) -> None:
    """Raise a ``ValueError`` unless a model can be evaluated in it; None is no wish."""
    if dtype is not None and not any(dtype is known for known in PRECISIONS):
        raise ValueError(
            f"dtype: torch.float32 or torch.float64, in which copies of the model are "
            f"evaluated, or None for the model's own; got {dtype!r}."
        )


@contextlib.contextmanager
def explained_casts(dtype: torch.dtype | None) -> Iterator[None]:
    """Say what to do where a model in another precision casts by itself."""
    try:
        yield
    except RuntimeError as error:
        if dtype is None or "dtype" not in str(error):
            raise
        raise ValueError(
            f"model: does not run in dtype={dtype} ({error}). Its forward pass casts "
            "to a precision of its own. Let it take that of its parameters, as "
            "x.to(self.weight.dtype) does."
        ) from error


def in_precision(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a real or complex tensor in a real precision; integers stay."""
    if dtype is None:
        return tensor
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def other_entries(left: Tensor, right: Tensor) -> Tensor:
    """Whether tensors of one layout differ, NaN from NaN not; not read by the host."""
    pairs = list(zip(strided_parts(left), strided_parts(right), strict=True))
    if any(a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
        return torch.ones((), dtype=torch.bool, device=right.device)
    other = [(bits(a) != bits(b)).any() for a, b in pairs]
    return functools.reduce(torch.logical_or, other)


def bits(tensor: Tensor) -> Tensor:
    """Return entries as integers where they may be NaN, which equals nothing."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not tensor.is_floating_point():
        return tensor
    return tensor.resolve_neg().view(_INTEGERS[tensor.element_size()])


def have_equal_entries(left: Tensor, right: Tensor) -> bool:
    """Whether tensors are the same, sparse ones in the same order, NaN included."""
    if left.layout != right.layout or left.shape != right.shape:
        return False
    parts = zip(strided_parts(left), strided_parts(right), strict=True)
    # As nearly always, and sooner.
    equal = all(torch.equal(a, b) for a, b in parts)
    return equal or not other_entries(left, right)


def as_pairs(tensor: Tensor) -> Tensor:
    """Return complex numbers ``[…]`` as real and imaginary parts ``[…, 2]``."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def of_pairs(pairs: Tensor) -> Tensor:
    """Return the complex numbers of pairs ``[…, 2]``."""
    return torch.complex(pairs[..., 0], pairs[..., 1])


# Which parameters --------------------------------------------------------------------


def chosen_of_module(model: nn.Module, params: Any | None) -> dict[str, Tensor]:
    """Return the parameters of a module that a user has chosen, by name.

    Raises:
        TypeError: If they are not None, an iterable of these, or a dict of tensors.
        ValueError: If one is foreign, frozen, listed twice or of another shape.
    """
    named = dict(model.named_parameters())
    if params is None:
        chosen = {name: p for name, p in named.items() if p.requires_grad}
        if not chosen:
            raise ValueError(
                "params: no parameter of the model requires grad. Call "
                "requires_grad_(True) on those of interest, or pass them as params."
            )
        return dict(chosen)
    if isinstance(params, Mapping):
        return _chosen_by_name(named, params)
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise TypeError(
            "params: None, an iterable of Parameters or a dict of tensors, got "
            f"{type(params).__name__}."
        )
    return _chosen_one_by_one(named, params)


def _chosen_by_name(
    named: Mapping[str, Tensor], params: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return tensors that stand for the parameters of these names."""
    foreign = [name for name in params if name not in named]
    if foreign:
        raise ValueError(
            f"params: {foreign[0]!r} is not the name of a parameter of the model. "
            "Use names of model.named_parameters()."
        )
    for name, value in params.items():
        if not isinstance(value, Tensor) or value.shape != named[name].shape:
            raise ValueError(
                f"params: {name!r} must be a tensor {list(named[name].shape)}, got "
                f"{list(value.shape) if isinstance(value, Tensor) else value!r}."
            )
    return dict(params)


def _chosen_one_by_one(
    named: Mapping[str, Tensor], params: Iterable[Any]
) -> dict[str, Tensor]:
    """Return the module's own parameters that are listed."""
    names = {id(p): name for name, p in named.items()}
    result: dict[str, Tensor] = {}
    for position, p in enumerate(params):
        if not isinstance(p, Tensor):
            raise TypeError(
                "params: parameters of the model, after the data: (model, loss, data, "
                f"params). Number {position} is of type {type(p).__name__}. Names are "
                "for risk.over(names)."
            )
        if id(p) not in names:
            raise ValueError(
                f"params: number {position} is not a parameter of the model. Take it "
                "from model.parameters()."
            )
        name = names[id(p)]
        if name in result:
            raise ValueError(f"params: {name!r} is listed twice.")
        if not p.requires_grad:
            raise ValueError(
                f"params: {name!r} has requires_grad=False. Leave it out, or call "
                "requires_grad_(True) on it."
            )
        result[name] = p
    return result


def check_memory(model: nn.Module, chosen: Container[str]) -> None:
    """Refuse parameters that are two for autograd, and one in memory."""
    places: dict[tuple[torch.device, int], str] = {}
    for name, p in model.named_parameters():
        plain = type(p) is nn.Parameter and p.layout == torch.strided
        if not plain or p.is_meta or not p.numel():
            continue
        other = places.setdefault((p.device, p.data_ptr()), name)
        if other != name and (name in chosen or other in chosen):
            raise ValueError(
                f"params: {other!r} and {name!r} share their memory, but derivatives "
                "in one of them do not see the other. Let them be one parameter, "
                "b.weight = a.weight, or copy one of them."
            )


def chosen_of_function(params: Any | None) -> dict[str, Tensor]:
    """Return the parameters of a function model, which must be a dict of tensors."""
    if not isinstance(params, Mapping):
        raise TypeError(
            "params: a function model needs a dict from names to tensors, got "
            f"{type(params).__name__}."
        )
    for name, value in params.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"params: {name!r} must be a tensor, got {type(value).__name__}."
            )
    return dict(params)


def check_chosen(params: dict[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Refuse parameters without values, or not of one device and dtype.

    They may have several dtypes if they are copied in another.
    """
    for name, p in params.items():
        if is_lazy(p) or p.is_meta:
            raise ValueError(
                f"params: {name!r} has no values yet. Call a lazy model once, "
                "model(X), or load the values of one on device 'meta', before the risk "
                "is built."
            )
    if not params or not sum(p.numel() for p in params.values()):
        raise ValueError("params: is empty; at least one parameter is needed.")
    devices = {str(p.device) for p in params.values()}
    if len(devices) > 1:
        raise ValueError(
            f"params: have several devices, {sorted(devices)}. Convert the model with "
            "model.to(…), or choose parameters of one of them."
        )
    for name, p in params.items():
        if not (p.is_floating_point() or p.is_complex()):
            raise TypeError(f"params: {name!r} is {p.dtype}, which has no derivatives.")
    # Complex numbers are pairs of real ones.
    dtypes = {p.dtype.to_real() for p in params.values()} if dtype is None else {dtype}
    if len(dtypes) > 1:
        raise ValueError(
            f"params: have several dtypes, {sorted(map(str, dtypes))}. Give dtype= "
            "torch.float32 or torch.float64, in which copies are evaluated then."
        )
    name, first = next(iter(params.items()))
    if dtypes.isdisjoint(PRECISIONS):
        raise TypeError(
            f"params: {name!r} is {first.dtype}; curvature is computed in float32 or "
            "float64. Give dtype=torch.float32: the model is evaluated in copies of "
            "that precision then."
        )


def check_finite(params: dict[str, Tensor], argument: str) -> None:
    """Refuse NaN and Inf."""
    if largest_entries(params).isfinite().all():
        return
    for name, p in params.items():
        if not p.detach().isfinite().all():
            raise ValueError(f"{argument}: {name!r} holds NaN or Inf.")


def check_derivatives(params: Mapping[str, Tensor], vec: Tensor) -> None:
    """Refuse NaN and Inf in derivatives ``[D]`` of what is finite itself."""
    if vec.isfinite().all():
        return
    parts = vec.split([p.numel() for p in params.values()])
    bad = [n for n, d in zip(params, parts, strict=True) if not d.isfinite().all()]
    raise ValueError(
        f"model: its derivatives in {bad[0]!r} are NaN or Inf where its outputs are "
        "finite, or those of the loss are. Roots, norms and logarithms have such at "
        "zero, also below torch.where; so has what has Inf among its inputs. Add a "
        "small number below the root, or leave these samples out."
    )


def largest_entries(params: Mapping[str, Tensor]) -> Tensor:
    """The largest entry of each parameter by size, NaN where it has one.

    It is not read by the host, and one pass over the entries.
    """
    sizes = [
        torch.linalg.vector_norm(p.detach(), torch.inf if p.numel() else 0)
        for p in params.values()
    ]
    return torch.stack(sizes)


# Vectors -----------------------------------------------------------------------------


class ParameterVectors:
    """Vectors over all parameters, ``[D]``, and tensors in their shapes.

    A complex parameter has two entries for each number, the real part first.

    Attributes:
        params: The parameters, by name; of complex ones pairs ``[*p, 2]``.
        complex_names: The complex ones.
    """

    params: dict[str, Tensor]
    complex_names: frozenset[str] = frozenset()

    def flatten(
        self, tensors: Iterable[Tensor | None] | Mapping[str, Tensor | None]
    ) -> Tensor:
        """Turn tensors in the shapes of the parameters into a vector or columns.

        Args:
            tensors: One for each parameter, in the order of ``params`` or by name:
                ``[*p]`` each, or ``[K, *p]`` each. None stands for zeros ``[*p]``.

        Returns:
            ``[D]``, or ``[D, K]``; gradients flow to the tensors.

        Example:
            >>> import torch, vivit_linop as vl
            >>> from torch import nn
            >>> data = (torch.rand(8, 3), torch.rand(8, 1))
            >>> risk = vl.EmpiricalRisk(nn.Linear(3, 1), nn.MSELoss(), data)
            >>> risk.flatten([torch.zeros(5, 1, 3), torch.ones(5, 1)]).shape
            torch.Size([4, 5])
        """
        return self.flattened(tensors, "tensors")

    def flattened(self, tensors: Any, argument: str) -> Tensor:
        """Do what :meth:`flatten` does; errors name the argument."""
        if isinstance(tensors, np.ndarray):
            _check_tensor(tensors, argument)
        if isinstance(tensors, Mapping):
            if set(tensors) != set(self.params):
                raise ValueError(
                    f"{argument}: names are {list(tensors)}, the parameters are "
                    f"{list(self.params)}."
                )
            tensors = [tensors[name] for name in self.params]
        given = as_list(tensors, argument, "tensors, one for each parameter")
        if len(given) != len(self.params):
            raise ValueError(
                f"{argument}: needs one for each of {len(self.params)} parameters, got "
                f"{len(given)}."
            )
        parts: list[Tensor] = []
        columns: set[int | None] = set()
        for tensor, (name, p) in zip(given, self.params.items(), strict=True):
            if tensor is None:
                tensor = torch.zeros_like(p)
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"{argument}: for {name!r} a tensor, got {type(tensor).__name__}."
                )
            check_has_values(tensor, f"{argument}: that of {name!r}")
            if tensor.layout != torch.strided:  # gradients of embeddings may be sparse
                tensor = tensor.to_dense()
            if name in self.complex_names:
                tensor = as_pairs(tensor)
            if tensor.shape == p.shape:
                parts.append(tensor.reshape(1, -1))
                columns.add(None)
            elif tensor.shape[1:] == p.shape and tensor.ndim > 0:
                parts.append(tensor.reshape(len(tensor), -1))
                columns.add(len(tensor))
            else:
                raise ValueError(
                    f"{argument}: for {name!r} needs {list(p.shape)} or "
                    f"[K, …] of that, got {list(tensor.shape)}."
                )
        if len(columns) > 1:
            raise ValueError(f"{argument}: all need the same leading axis, or none.")
        flat = torch.cat(parts, dim=1)
        return flat.squeeze(0) if columns == {None} else flat.T

    def unflatten(self, vec: Tensor) -> list[Tensor]:
        """Turn a vector or columns into tensors in the shapes of the parameters.

        Args:
            vec: ``[D]``, or ``[D, K]``.

        Returns:
            One for each parameter, in order: ``[*p]``, or ``[K, *p]``.
        """
        return self._unflattened(vec, "vec")

    def _unflattened(self, vec: Tensor, argument: str) -> list[Tensor]:
        return [
            of_pairs(part) if name in self.complex_names else part
            for name, part in self.unflatten_real(vec, argument).items()
        ]

    def unflatten_real(self, vec: Tensor, argument: str = "vec") -> dict[str, Tensor]:
        """Return by name what :meth:`unflatten` does, pairs for complex numbers."""
        _check_tensor(vec, argument)
        sizes = [p.numel() for p in self.params.values()]
        if vec.ndim not in (1, 2) or len(vec) != sum(sizes):
            raise ValueError(
                f"{argument}: needs [{sum(sizes)}] or [{sum(sizes)}, K], got "
                f"{list(vec.shape)}."
            )
        if vec.is_complex() and (argument != "vec" or self.complex_names):
            raise TypeError(
                f"{argument}: must be real, got {vec.dtype}; a complex parameter has "
                "two entries for each number."
            )
        leading = () if vec.ndim == 1 else (vec.shape[1],)
        return {
            name: (part if vec.ndim == 1 else part.T).reshape((*leading, *p.shape))
            for part, (name, p) in zip(
                vec.split(sizes), self.params.items(), strict=True
            )
        }

    def add_to_(self, model: nn.Module | Mapping[str, Tensor], step: Tensor) -> None:
        """Add a step to the parameters of a model, in place: θ ← θ + step.

        A risk holds copies of the parameters, so it stays as it is; ``risk.at()`` is
        the one after the step.

        Args:
            model: A module that has the parameters of the risk by their names, or a
                dict of tensors.
            step: ``[D]``.

        Raises:
            ValueError: If a parameter is missing or has another shape, or the step is
                no vector over all of them. Nothing is changed then.

        Example:
            >>> import torch, vivit_linop as vl
            >>> from torch import nn
            >>> _ = torch.manual_seed(0)
            >>> net, data = nn.Linear(3, 1), (torch.rand(8, 3), torch.rand(8, 1))
            >>> risk = vl.EmpiricalRisk(net, nn.MSELoss(), data)
            >>> risk.add_to_(net, -0.1 * risk.gradient())
            >>> bool(risk.at().value() < risk.value())
            True
        """
        _check_tensor(step, "step")
        if step.ndim != 1:
            raise ValueError(f"step: one vector [D] is added, got {list(step.shape)}.")
        check_has_values(step, "step: a vector")
        parts = self._unflattened(step, "step")
        if not step.isfinite().all():
            raise ValueError("step: holds NaN or Inf; the model stays as it is.")
        if not isinstance(model, (nn.Module, Mapping)):
            raise TypeError(
                f"model: a module, or a dict of tensors, got {type(model).__name__}."
            )
        named = dict(
            model.named_parameters() if isinstance(model, nn.Module) else model
        )
        for name, part in zip(self.params, parts, strict=True):
            found = named.get(name)
            if found is not None:
                _check_numbers(found, name)
            if found is None or found.shape != part.shape:
                has = "has none" if found is None else f"it has {list(found.shape)}"
                raise ValueError(
                    f"model: needs {name!r} of shape {list(part.shape)}, {has}."
                )
        with torch.no_grad():
            for name, part in zip(self.params, parts, strict=True):
                named[name].add_(part.to(named[name]))


def _check_numbers(found: Any, name: str) -> None:
    """Refuse what no step can be added to; integers would lose it."""
    is_tensor = isinstance(found, Tensor)
    if not is_tensor or not (found.is_floating_point() or found.is_complex()):
        what = found.dtype if is_tensor else type(found).__name__
        raise TypeError(
            f"model: {name!r} must be a tensor of real or complex numbers, got {what}."
        )
    check_has_values(found, f"model: {name!r}")


def _check_tensor(given: Any, name: str) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(
            f"{name}: a tensor, got {type(given).__name__}. Of an array take "
            f"torch.from_numpy({name})."
        )
