"""What a kind of layer is: one entry of the table by which nets are read.

The built-in kinds stand in :mod:`vivit_linop.net.layers`. Others are registered in the
same way, from outside.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vivit_linop.arguments import as_list, check_function
from vivit_linop.net.columns.base import LayerColumns

Arguments = dict[str, Any]
OfTensor = Callable[[Arguments, Tensor], Tensor]

_SAMPLES = ("first", "leading", "anywhere", "broadcast")


def functions(names: str) -> list[Callable[..., Any]]:
    """Return the functions of these names, of ``torch`` and of tensors."""
    found = (
        getattr(place, name, None)
        for name in names.split()
        for place in (torch, Tensor)
    )
    return [function for function in found if function is not None]


@dataclass(frozen=True)
class View:
    """Consecutive entries of a flattened parameter as an argument.

    Attributes:
        name: The parameter.
        place: Which of its entries these are, from the first to before the second.
        shape: The shape of the argument.
        transposed: Whether the entries are, in order, those of its transpose.
    """

    name: str
    place: tuple[int, int]
    shape: torch.Size
    transposed: bool = False

    @property
    def mT(self) -> View:
        """The transpose of a matrix; a vector as a matrix with one row."""
        if len(self.shape) == 1:
            return replace(self, shape=torch.Size((1, *self.shape)))
        return replace(self, shape=self.shape[::-1], transposed=not self.transposed)


@dataclass(frozen=True)
class Signature:
    """Functions that are called in the same way, and how such a call is read.

    Args:
        functions: A list of torch functions: of ``torch``, methods of tensors, or your
            own that call ``torch.overrides.handle_torch_function``.
        arguments: The names of their arguments in order, in one string.
        read: Takes a call's arguments by name, in the order of their names and without
            those that are None, and returns the layer's; or None where the call is not
            of this kind. Parameters are given as :class:`View`.
            A layer's are ``"input"``, the data, with ``"weight"`` and ``"bias"``, the
            parameters, and whatever its columns depend on. By default a call has these
            names already.
    """

    functions: Sequence[Callable[..., Any]]
    arguments: str
    read: Callable[[Arguments], Arguments | None] | None = None

    def __post_init__(self) -> None:
        for function in as_list(self.functions, "functions", "functions"):
            check_function(function, "functions")
        if not isinstance(self.arguments, str):
            raise TypeError(f"arguments: one string, got {self.arguments!r}.")

    @cached_property
    def names(self) -> list[str]:
        """The names of the arguments."""
        return self.arguments.split()


@dataclass(frozen=True, kw_only=True, eq=False)
class Kind:
    """A kind of layer: its calls, and the columns that it gives its parameters.

    The layer is linear in its parameters: the rules do not see their values. A column
    of a parameter is what a cotangent at the layer's output pulls back to it. The rules
    take R cotangents for each of n samples at once. ``arguments`` is the call's
    arguments by name, with ``"weight_shape"`` and ``"bias_shape"``. The weight's rule
    is either ``weight``, or ``inputs`` and ``cotangents`` for a weight whose columns
    are Σ_p b_nrp ⊗ a_np over positions p: no column is formed then, and Gram matrices
    cost what the two factors cost.

    Columns are certified on all data that they are used for, those of torch's own calls
    by their place in the graph (``nodes``). A rule that is wrong takes time, and
    ``explain()`` says "no structure" of the parameter; it gives no wrong number.

    Args:
        name: Its name, as in ``explain()``.
        signatures: The calls that are of this kind.
        samples: Where the axis of samples may be in the layer's output, and so in its
            input: ``"first"``; ``"leading"`` for any axis but the last; ``"anywhere"``;
            or ``"broadcast"`` where entries of the output belong to those of the input
            and parameters are repeated along axes, the samples' among them. The rules
            get samples first; with ``"broadcast"`` one axis follows for each of the
            output, and that of the samples is left with length one.
        weight: From arguments, the input ``[n, …]`` and cotangents at the output
            ``[n, R, …]`` to the columns of the weight.
        inputs: From arguments and the input ``[n, …]`` to a, ``[n, G, a, P]``, for G
            groups of channels and P positions.
        cotangents: From arguments and cotangents ``[n, R, …]`` to b,
            ``[n, R, G, b, P]``. The weight, ``[out, …]``, is laid out as ``[G, b, a]``.
        bias: From arguments and cotangents ``[n, R, …]`` to the columns of the bias.
        inputs_first: Whether the weight is laid out as ``[G, a, b]``.
        unfolds: Whether a is larger than the input, of which it copies each channel by
            itself: it is made of some samples at a time then, where that does.
        entries: From arguments, the number of entries of one sample's input and R to
            that of what the columns of a sample take beside the cotangents. By default
            it is estimated.
        nodes: By the names of the nodes that calls of torch's own functions make in the
            graph, which of their inputs are weight and bias, −1 for none. Where a graph
            has a parameter in nothing but such, columns are believed on all data once
            the rules have been certified on some: give it only where the rules are
            right for any values.

    Raises:
        ValueError: If ``samples`` is none of these words, or there is no rule.

    Example:
        A function of one's own, ``scale(x, w) = x * w`` for ``[N, d]`` and ``[d]``:

        >>> import torch, vivit_linop as vl
        >>> from torch import nn
        >>> from torch.overrides import handle_torch_function, has_torch_function
        >>> from vivit_linop.net.columns.base import DenseColumns
        >>> from vivit_linop.net.kinds import Kind, Signature, register
        >>> def scale(x, w):
        ...     if has_torch_function((x, w)):  # a function that can be seen
        ...         return handle_torch_function(scale, (x, w), x, w)
        ...     return torch.stack([row * w for row in x])
        >>> register(
        ...     Kind(
        ...         name="scale",
        ...         signatures=[Signature([scale], "input weight")],
        ...         weight=lambda arguments, X, B: DenseColumns(B * X.unsqueeze(1)),
        ...     )
        ... )
        >>> class Scale(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.w = nn.Parameter(torch.rand(3))
        ...
        ...     def forward(self, x):
        ...         return scale(x, self.w)
        >>> net = nn.Sequential(Scale(), nn.Linear(3, 2))
        >>> data = torch.rand(8, 3), torch.randint(2, (8,))
        >>> factor = vl.GGNFactor(net, nn.CrossEntropyLoss(), data)
        >>> factor.explain()[0].use
        parameter  use     contraction     GFLOP        MB
        0.w        scale   dense        1.92e-07   9.6e-05
        1.weight   linear  blocks        4.8e-07   0.00016
        1.bias     linear  blocks        1.6e-07   3.2e-05
        total                           8.32e-07  0.000288
        'scale'
    """

    name: str
    signatures: Sequence[Signature]
    samples: str = "first"
    weight: Callable[[Arguments, Tensor, Tensor], LayerColumns] | None = None
    inputs: OfTensor | None = None
    cotangents: OfTensor | None = None
    bias: Callable[[Arguments, Tensor], LayerColumns] | None = None
    inputs_first: bool = False
    unfolds: bool = False
    entries: Callable[[Arguments, int, int], int] | None = None
    nodes: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for signature in as_list(self.signatures, "signatures", "Signatures"):
            if not isinstance(signature, Signature):
                raise TypeError(f"signatures: of Signatures, got {signature!r}.")
        if self.samples not in _SAMPLES:
            raise ValueError(
                f"samples: found {self.samples!r}; take one of {', '.join(_SAMPLES)}."
            )
        if (self.inputs is None) != (self.cotangents is None):
            raise ValueError(
                "inputs, cotangents: found one of them; give both, or weight=."
            )
        if not self.has_weight and self.bias is None:
            raise ValueError(
                f"Kind {self.name!r} has no rule; give weight=, inputs= and "
                "cotangents=, or bias=."
            )

    @property
    def has_weight(self) -> bool:
        """Whether there is a rule for the weight."""
        return self.weight is not None or self.inputs is not None


_READINGS: dict[Callable[..., Any], list[tuple[Signature, Kind]]] = {}
_REGISTERING = threading.Lock()


def register(kind: Kind) -> None:
    """Let nets be read with a kind of layer, from the next risk on.

    Of several kinds with the same function the one registered last comes first; the
    next is asked where its ``read`` gives None. A kind takes the place of one with the
    same name.

    Args:
        kind: The kind.
    """
    if not isinstance(kind, Kind):
        raise TypeError(f"kind: a Kind, got {kind!r}.")
    new: dict[Callable[..., Any], list[tuple[Signature, Kind]]] = {}
    for signature in kind.signatures:
        for function in signature.functions:
            new.setdefault(function, []).insert(0, (signature, kind))
    with _REGISTERING:
        for function, before in {**dict.fromkeys(new, ()), **_READINGS}.items():
            others = [pair for pair in before if pair[1].name != kind.name]
            # At once: other threads read nets meanwhile.
            _READINGS[function] = new.get(function, []) + others


def readings(function: Callable[..., Any]) -> Sequence[tuple[Signature, Kind]]:
    """Return the ways in which calls of a function may be read."""
    return _READINGS.get(function, ())
