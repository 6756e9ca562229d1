"""Solvers that run on one rank, while the others help it to multiply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.ranks.alone import Ranks
from vivit_linop.ranks.messages import Note, known, like, name_of

Result = TypeVar("Result")


class Asking(TorchLinearOperator):
    """An operator whose products are taken by all ranks when the leader asks."""

    def __init__(self, operator: TorchLinearOperator, ranks: Ranks) -> None:
        super().__init__(operator.shape, operator.torch_dtype, operator.device)
        self.self_adjoint = operator.self_adjoint
        self._operator, self._asked = operator, ranks

    def _multiply(self, X: Tensor) -> Tensor:
        self._asked.sent(("product", X))
        return self._operator.apply(X)

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        self._asked.sent(("adjoint", X))
        return self._operator.T.apply(X)


def led(function: Callable[[Any], Result], operator: TorchLinearOperator) -> Result:
    """Return ``function(operator)`` on all processes, computed by one of them.

    For solvers that draw random vectors or whose decisions depend on rounding: over
    several processes all must multiply the same vectors. One of them runs the solver,
    the others take part in its products. In one process it is ``function(operator)``.

    Args:
        function: What is computed: products with the operator it is given, and nothing
            else that other processes would have to take part in.
        operator: The operator, of a risk over the processes of a group.

    Returns:
        The result, which may hold arrays and tensors.

    Raises:
        RankError: If the function raises on the process that runs it, which raises the
            error itself.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from scipy.sparse.linalg import eigsh
        >>> A = vl.Diagonal(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        >>> evals, evecs = vl.led(lambda A: eigsh(A, k=1), A)
        >>> round(float(evals[0]), 3)
        4.0
    """
    if not isinstance(operator, TorchLinearOperator):
        raise TypeError(f"operator: an operator, got {type(operator).__name__}.")
    ranks = operator.ranks
    with ranks.together(f"led {name_of(function)}"):
        if not callable(function):
            raise TypeError(f"function: a function, got {type(function).__name__}.")
    if not ranks.is_many:
        return function(operator)
    if not ranks.leads:
        return _taken_part(operator, ranks)
    try:
        result = function(Asking(operator, ranks))
        ranks.sent(("result", result))
    except BaseException as error:
        ranks.sent(("error", Note.of("led", 0, 0, error)))
        known(error)
        raise
    return result


def _taken_part(operator: TorchLinearOperator, ranks: Ranks) -> Any:
    """Multiply what the leader sends, until it has a result."""
    failure: BaseException | None = None
    while True:
        what, content = ranks.sent(None)
        if what == "result":
            return content
        if what == "error":
            kind = like(content.kind)
            raise failure or kind(f"the leading rank raised {content.said}")
        try:
            (operator if what == "product" else operator.T).apply(content)
        # Of any kind; the leader has it too, and says what comes next.
        except BaseException as error:
            failure = error
