"""How a verb finds the rule for its operands, and what it says where there is none.

The verbs themselves are in :mod:`vivit_linop.operators.verbs`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from functools import singledispatch
from typing import Any, Generic, ParamSpec, TypeAlias, TypeVar

Operator: TypeAlias = Any
"""A ``TorchLinearOperator``; a rule may say which. That class imports this file."""

P = ParamSpec("P")
Rule = TypeVar("Rule", bound=Callable[..., Any])
Result = TypeVar("Result")

BinaryRule: TypeAlias = Callable[[Any, Any], Any]
"""A rule of a binary verb."""


class BinaryVerb:
    """A function of two operators that is given by rules on their types.

    Rules are tried from the newest to the oldest, so that a more special one is
    registered after the general one. A rule that does not apply after all returns
    ``NotImplemented``.

    Args:
        name: What errors call the verb.

    Raises:
        TypeError: When it is called and no rule applies.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from vivit_linop.operators.verbs import matmul
        >>> class Flip(vl.TorchLinearOperator):
        ...     self_adjoint = True
        ...     def _multiply(self, X):
        ...         return X.flip(0)
        >>> @matmul.rule(Flip, Flip)
        ... def product_of_flips(A, B):
        ...     return vl.Identity(A.shape[0], A.torch_dtype, A.device)
        >>> A = Flip((3, 3), torch.float64)
        >>> A @ A
        <3x3 Identity, torch.float64, cpu>
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._rules: list[tuple[type, type, BinaryRule]] = []
        self._for_types: dict[tuple[type, type], list[BinaryRule]] = {}

    def rule(self, left: type, right: type) -> Callable[[BinaryRule], BinaryRule]:
        """Register the decorated function for operands of these types.

        Args:
            left: A class of operators; a rule holds for subclasses too.
            right: Likewise.

        Returns:
            A decorator. The function it decorates takes both operators, whose shapes
            fit, and returns an operator, or ``NotImplemented``.
        """
        _check_classes(left, right)

        def register(function: BinaryRule) -> BinaryRule:
            if not callable(function):
                raise TypeError(
                    f"{self._name}: a rule is a function, got {function!r}."
                )
            self._rules.append((left, right, function))
            # Another dictionary: a thread that is looking rules up fills the old one.
            self._for_types = {}
            return function

        return register

    def commuting(self, left: type, right: type) -> Callable[[BinaryRule], BinaryRule]:
        """Register the decorated function for operands of these types in either order.

        For verbs whose operands commute: ``add``.

        Args:
            left: As for :meth:`rule`.
            right: Likewise.

        Returns:
            A decorator. The function it decorates takes the operator of the type
            ``left`` first, whichever way round the operands came.

        Example:
            >>> import torch, vivit_linop as vl
            >>> from vivit_linop.operators.verbs import add
            >>> class Ones(vl.TorchLinearOperator):
            ...     self_adjoint = True
            ...     def _multiply(self, X):
            ...         return X.sum(0).expand_as(X)
            >>> @add.commuting(Ones, vl.Dense)
            ... def sum_of_ones_and_dense(A, B):
            ...     return vl.Dense(B.matrix + 1.0)
            >>> vl.Dense(torch.zeros(2, 2)) + Ones((2, 2), torch.float32)
            <2x2 Dense, torch.float32, cpu>
        """
        _check_classes(left, right)

        def register(function: BinaryRule) -> BinaryRule:
            @functools.wraps(function)
            def mirrored(left: Any, right: Any) -> Any:
                return function(right, left)

            self.rule(right, left)(mirrored)
            return self.rule(left, right)(function)

        return register

    def __call__(self, left: Operator, right: Operator) -> Operator:
        """Return the node of the newest rule that applies."""
        types = type(left), type(right)
        known = self._for_types
        rules = known.get(types)
        if rules is None:
            rules = known[types] = self._rules_for(*types)
        for function in rules:
            result = function(left, right)
            if result is not NotImplemented:
                return result
        raise no_rule(self._name, left)

    def _rules_for(self, left: type, right: type) -> list[BinaryRule]:
        """Return the rules of two types, the newest first."""
        return [
            function
            for left_type, right_type, function in reversed(self._rules)
            if issubclass(left, left_type) and issubclass(right, right_type)
        ]


def _check_classes(left: Any, right: Any) -> None:
    for name, kind in (("left", left), ("right", right)):
        if not isinstance(kind, type):
            raise TypeError(f"{name}: a class of operators, got {kind!r}.")


class RoutedVerb(Generic[P, Result]):
    """A unary verb that takes one of several ways, which ``route=`` may name.

    Rules see an operator that knows its route (:func:`routed`), not the name.
    """

    def __init__(self, verb: Callable[P, Result]) -> None:
        functools.update_wrapper(self, verb)
        self._verb: Any = singledispatch(verb)
        self._arguments = inspect.signature(verb)

    def register(self, rule: Rule) -> Rule:
        """Add the rule of a type, as ``functools.singledispatch`` does."""
        self._verb.register(rule)
        return rule

    def dispatch(self, cls: type) -> Callable[..., Any]:
        """Return the rule of a type, as ``functools.singledispatch`` does."""
        return self._verb.dispatch(cls)

    def __call__(
        self, op: Any, *arguments: Any, route: str | None = None, **options: Any
    ) -> Result:
        """Return what the rule for the operator does, on the way that is asked for."""
        if route is not None:
            if not isinstance(route, str):
                raise TypeError(f"route: the name of a way, got {route!r}.")
            given = self._arguments.bind(op, *arguments, **options).arguments
            few = given.get("k") is not None and given.get("select") is None
            op = routed(op, route, few)
        return self._verb(op, *arguments, **options)


@singledispatch
def routed(op: Any, route: str, few: bool) -> Operator:
    """Return the operator with the way that its decomposition is to take.

    Args:
        op: The operator.
        route: The name of the way.
        few: Whether some of the largest eigenpairs are wanted; iterations find no
            others.

    Raises:
        ValueError: If there is no such way.
    """
    raise ValueError(
        f"route: found {route!r}, but this {type(op).__name__} has one way only; leave "
        "it out."
    )


class NoClosedForm(TypeError):
    """What is asked for has no closed form; an iteration may find it."""


def no_inverse(op: Any, what: str = "") -> NoClosedForm:
    """Return the error of an operator whose inverse has no closed form."""
    return NoClosedForm(
        f"inv: no closed form for {what}{type(op).__name__}. op.solve(b) iterates; or "
        "invert Dense(op.to_dense()) if it is small."
    )


def no_root(op: Any, what: str = "") -> TypeError:
    """Return the error of an operator whose root has no closed form."""
    return TypeError(
        f"sqrt: no closed form for {what}{type(op).__name__}. Take "
        "Dense(op.to_dense()).sqrt() if it is small."
    )


def no_eigenpairs(op: Any) -> NoClosedForm:
    """Return the error of an operator whose eigenpairs have no closed form."""
    return NoClosedForm(
        f"eigh: no closed form for {type(op).__name__}. eigh(k) iterates for some of "
        "its pairs; Dense(op.to_dense()) has all, and logdet, if its matrix fits."
    )


def no_rule(verb: str, op: Any) -> TypeError:
    """Return the error of a verb without a rule for what it is given."""
    return TypeError(f"{verb}: no rule for an operand of type {type(op).__name__}.")
