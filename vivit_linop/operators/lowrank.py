"""Low-rank nodes: V Vᵀ, the Gram matrix VᵀV, and the damped inverse.

For V of shape ``[D, R]`` all that is expensive about V Vᵀ happens in the Gram matrix
K = VᵀV of shape ``[R, R]``: its eigenpairs give those of V Vᵀ, its Cholesky factor
the damped inverse (Woodbury's identity).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from torch import Tensor

from vivit_linop.arguments import Scalar, as_scalar, without_gradient
from vivit_linop.operators import symmetric, verbs
from vivit_linop.operators.base import Op, TorchLinearOperator, in_common
from vivit_linop.operators.damped_solver import DampedSolver
from vivit_linop.operators.symmetric import KeptMatrix, Pairs, Tridiagonal
from vivit_linop.ranks.alone import RankRows, Ranks

Result = TypeVar("Result")

# Columns of a root that are made at a time: this share of all, within limits.
_SHARE, _LEAST_COLUMNS, _MOST_COLUMNS = 16, 4, 256


class Gram(TorchLinearOperator):
    """The operator AᵀB of two factors with as many rows.

    As an operator it multiplies through its factors until its matrix has been asked
    for; ``to_dense()`` is the Gram matrix (for A and B the same factor) or the
    cross-Gram matrix, and is kept.

    Args:
        left: A, ``[D, R]``.
        right: B, ``[D, Q]``.
        kept: Where its matrix is kept, for a factor that keeps its own: a factor that
            kept this node, which refers to it, would be freed by Python's collector
            only.
    """

    def __init__(self, left: Op, right: Op, kept: KeptMatrix | None = None) -> None:
        self.left, self.right = left, right
        self.kept = KeptMatrix() if kept is None else kept
        super().__init__((left.shape[1], right.shape[1]), *in_common(left, right))

    @property
    def self_adjoint(self) -> bool:  # type: ignore[override]
        """Whether both factors are the same."""
        return self.left is self.right

    @property
    def ranks(self) -> Ranks:
        """Those of the factor that has samples."""
        ranks = self.left.ranks
        return ranks if ranks.is_many else self.right.ranks

    @property
    def known(self) -> bool:
        """Whether the matrix has been computed."""
        return self.kept.known

    @property
    def matrix(self) -> Tensor:
        """The matrix, ``[R, Q]``, computed once."""
        if self.kept.matrix is None:
            if (rows := self.rows) is not None:
                return rows.whole()
            matrix = verbs.gram_matrix(self.left, self.right)
            self.kept.matrix = matrix.to(self.torch_dtype)
        return self.kept.matrix

    @property
    def rows(self) -> RankRows | None:
        """The matrix in rows over several processes, computed once; None in one."""
        if self.kept.rows is None and self.kept.matrix is None and self.ranks.is_many:
            self.kept.rows = verbs.gram_rows(self.left, self.right)
        return self.kept.rows

    def keep(self, matrix: Tensor, own: slice) -> None:
        """Take the matrix as known, of which all processes have been given all.

        Args:
            matrix: ``[R, Q]``.
            own: The rows of this process's samples.
        """
        if self.ranks.is_many:
            self.kept.rows = RankRows(self.ranks, matrix[own].clone(), own.start)
        else:
            self.kept.matrix = matrix

    def times(self, X: Tensor) -> Tensor:
        """Multiply by the matrix, which is computed if it is not known."""
        rows = self.rows
        return self.matrix @ X if rows is None else rows.multiply(X)

    def on_matrix(self, function: Callable[[Tensor], Result]) -> Result:
        """Return a function of the matrix, computed where it is as a whole.

        Its bits do not decide everything: eigenvectors are not unique.
        """
        ranks = self.ranks
        rows = self.rows if ranks.is_many else None
        matrix = self.matrix if rows is None else rows.on_leader()
        return ranks.led(function, matrix)

    @property
    def eigenvalues(self) -> Tensor:
        """Those of VᵀV, ascending, computed once: they serve every scale and damping.

        Where gradients flow to the matrix they are computed anew.
        """
        kept = self.kept
        if kept.eigenpairs is not None:
            return kept.eigenpairs[0].clone()
        if kept.eigenvalues is None:
            found = self.on_matrix(symmetric.symmetric_eigenvalues)
            if found.requires_grad:
                return found
            kept.eigenvalues = found
        return kept.eigenvalues.clone()

    def nonnegative(self, count: int) -> Tensor:
        """Return so many of the largest, with zeros where rounding left less.

        Not to be written to: kept likewise, for one damping after the other.
        """
        if self.kept.nonnegative is not None:
            return self.kept.nonnegative
        found = self.eigenvalues[-count:].clamp(min=0.0)
        if not found.requires_grad:
            self.kept.nonnegative = found
        return found

    @property
    def eigenpairs(self) -> Pairs:
        """Eigenvalues of VᵀV, ascending, and eigenvectors ``[R, R]``.

        Not to be written to: they are kept for what follows, within the budget.
        """
        kept = self.kept
        if kept.eigenpairs is not None:
            return kept.eigenpairs
        pairs = self.on_matrix(symmetric.symmetric_eigenpairs)
        if kept.has_room(pairs[1].nbytes):
            kept.eigenpairs, kept.eigenvalues, kept.tridiagonal = pairs, None, None
        return pairs

    @property
    def tridiagonal(self) -> Tridiagonal | None:
        """VᵀV in a form that has all eigenvalues, and vectors of a few.

        None where eigenpairs are known, or take no more. Kept as these are.
        """
        kept = self.kept
        if kept.tridiagonal is not None or kept.decomposed:
            return kept.tridiagonal
        found = self.on_matrix(symmetric.Tridiagonal.of)
        if found is not None and kept.has_room(found.nbytes):
            kept.tridiagonal = found
        return found

    def _made_of(self) -> tuple[Op, ...]:
        return (self.left, self.right)

    def _multiply(self, X: Tensor) -> Tensor:
        if self.known:
            return self.times(X)
        if self.left is self.right:
            return verbs.inner_product(self.left, X)
        return self.left.T.apply(self.right.apply(X))

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        if self.known:
            rows = self.rows
            return self.matrix.T @ X if rows is None else rows.multiply_adjoint(X)
        return self.right.T.apply(self.left.apply(X))


class Centered(TorchLinearOperator):
    """The columns of a factor less their mean, A (I − 1 1ᵀ/R).

    Args:
        factor: A, ``[D, R]``.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from vivit_linop.operators import Centered
        >>> Centered(vl.Dense(torch.tensor([[1.0, 5.0]]))).to_dense()
        tensor([[-2.,  2.]])
    """

    def __init__(self, factor: Op) -> None:
        self.factor = factor
        super().__init__(factor.shape, factor._own_dtype, factor._own_device)

    def _made_of(self) -> tuple[Op]:
        return (self.factor,)

    def _multiply(self, X: Tensor) -> Tensor:
        return self.factor.apply(X - X.mean(0, keepdim=True))

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        product = self.factor.T.apply(X)
        return product - product.mean(0, keepdim=True)


class LowRank(TorchLinearOperator):
    """The positive semi-definite operator c V Vᵀ.

    Args:
        factor: V, ``[D, R]``.
        scale: c, not negative.

    Attributes:
        factor: V.
        scale: c.
        gram: The Gram operator VᵀV (without c).
        route: The way that decompositions are to take, None for the cheapest.
        semidefinite: Whether there is a V; some subclass has products without one.

    Raises:
        ValueError: If c is negative or no number; ``-1.0 * (V @ V.T)`` is an operator.

    Example:
        >>> import torch, vivit_linop as vl
        >>> V = vl.Dense(torch.tensor([[3.0], [4.0]]))
        >>> evals, evecs = (V @ V.T).eigh()
        >>> evals
        tensor([25.])
    """

    self_adjoint = True
    semidefinite: bool = True
    route: str | None = None

    def __init__(self, factor: Op, scale: float = 1.0) -> None:
        self.factor, self.scale = factor, without_gradient(scale, "scale")
        if not 0.0 <= self.scale < math.inf:
            raise ValueError(
                f"scale: c V Vᵀ is positive semi-definite, got c = {self.scale}. "
                "For a negative one multiply the operator, -1.0 * (V @ V.T)."
            )
        self._grams: dict[bool, Gram] = {}  # made once, for all multiples and routes
        rows = factor.shape[0]
        super().__init__((rows, rows), factor._own_dtype, factor._own_device)

    @property
    def gram(self) -> Gram:
        """The Gram operator of the factor; its matrix is computed once and kept."""
        return self._gram_of(True)

    def _gram_of(self, columns: bool) -> Gram:
        """VᵀV of the columns of V, or V Vᵀ of its rows."""
        if columns not in self._grams:
            # The adjoint as of any operator: one of its own kind may not know V.
            adjoint = verbs.adjoint.dispatch(TorchLinearOperator)
            side = self.factor if columns else adjoint(self.factor)
            self._grams[columns] = verbs.gram(side)
        return self._grams[columns]

    @property
    def small(self) -> Gram:
        """The smaller of VᵀV and V Vᵀ, without c: what all exact verbs work on."""
        return self._gram_of(self.by_gram)

    @property
    def by_gram(self) -> bool:
        """Whether the Gram matrix is the smaller side, or the one that is wanted."""
        if self.route is not None:
            return self.route.endswith(("Gram", "K"))
        return self.factor.shape[1] <= self.shape[0]

    @property
    def small_rows(self) -> int:
        """How many rows the smaller side has."""
        return self.factor.shape[1] if self.by_gram else self.shape[0]

    @property
    def kept(self) -> KeptMatrix:
        """What is known of the smaller side."""
        return self.small.kept

    @property
    def small_side(self) -> Tensor:
        """The smaller of c VᵀV and c V Vᵀ, dense."""
        return self.scale * self.small.matrix

    @property
    def nonnegative_eigenvalues(self) -> Tensor:
        """The min(D, R) of V Vᵀ, without c, as the smaller side has them."""
        return self.small.nonnegative(min(self.factor.shape))

    def rescaled(self, scale: float) -> LowRank:
        """Return the node for another c; what is known of the factor is kept."""
        node = copy.copy(self)
        node.scale = scale
        return node

    def routed(self, route: str) -> LowRank:
        """Return the node whose decompositions take this way."""
        node = copy.copy(self)
        node.route = route
        return node

    def _mirrors(self, other: Op) -> bool:
        if not isinstance(other, LowRank):
            return False
        return verbs.same(self.factor, other.factor) and self.scale == other.scale

    def _made_of(self) -> tuple[Op]:
        return (self.factor,)

    def _multiply(self, X: Tensor) -> Tensor:
        product = verbs.outer_product(self.factor, X)
        # A pass over D entries is worth sparing.
        return product if self.scale == 1.0 else product.mul_(self.scale)


class DampedRoot(TorchLinearOperator):
    """The symmetric square root of c V Vᵀ + δ I, or the inverse of that root.

    With the eigenpairs κ, Q of K = VᵀV, for f(λ) = √λ or 1/√λ,

        f(c V Vᵀ + δ I) = f(δ) I + V Q diag((f(c κ + δ) − f(δ)) / κ) Qᵀ Vᵀ,

    where the quotients have a closed form without a division by κ. A product costs one
    with Vᵀ and one with V; nothing of D × D or of eigenvectors in D is formed. Where
    the D × D side is the smaller one, it is Q diag(f(c κ + δ)) Qᵀ. K is known up to
    rounding errors of about eps λ_max, so the inverse root needs a δ well above that.

    Args:
        operator: c V Vᵀ.
        damping: δ, positive; derivatives pass to it.
        inverse: Whether it is the root of the inverse.

    Raises:
        ValueError: If δ is not positive.
    """

    self_adjoint = True

    def __init__(
        self, operator: LowRank, damping: Scalar, inverse: bool = False
    ) -> None:
        damping = as_scalar(damping)
        if not damping > 0.0:
            raise ValueError(
                "damping: the root of a low-rank operator + damping * I needs "
                f"damping > 0, got {damping}. A root of the operator itself is "
                "G.sqrt()."
            )
        self.operator, self.inverse = _without_gradient(operator, "sqrt"), inverse
        self.damping = damping
        evals, self._vectors = operator.small.eigenpairs
        self._values = operator.scale * evals.double().clamp(min=0.0)
        super().__init__(operator.shape, operator._own_dtype, operator._own_device)

    def _made_of(self) -> tuple[Scalar | Op, ...]:
        return (self.damping, self.operator)

    @property
    def shift(self) -> Scalar:
        """f(δ)."""
        return self.damping ** (-0.5 if self.inverse else 0.5)

    @property
    def small_form(self) -> tuple[Tensor, Tensor]:
        """Q, ``[R, R]``, and the diagonal between Q and Qᵀ, ``[R]``."""
        roots = (self._values + self.damping).sqrt()
        if not self.operator.by_gram:
            factors = 1.0 / roots if self.inverse else roots
        else:
            factors = self.operator.scale / (roots + self.damping**0.5)
            if self.inverse:
                factors = -factors / (roots * self.damping**0.5)
        return self._vectors, factors.to(self.torch_dtype)

    def multiply_small(self, Y: Tensor) -> Tensor:
        """Q diag((f(c κ + δ) − f(δ)) / κ) Qᵀ times columns ``[R, K]``.

        On the D × D side, all of it.
        """
        vectors, factors = self.small_form
        return vectors @ (factors[:, None] * (vectors.T @ Y))

    def _multiply(self, X: Tensor) -> Tensor:
        if not self.operator.by_gram:
            return self.multiply_small(X)
        V = self.operator.factor
        return V.apply(self.multiply_small(V.T.apply(X))) + self.shift * X


class Woodbury(TorchLinearOperator):
    """The inverse of c V Vᵀ + δ I, through the smaller side.

    (c V Vᵀ + δ I)⁻¹ x = (x − c V (δ I + c K)⁻¹ Vᵀ x) / δ with K = VᵀV (Woodbury 1950;
    Golub & Van Loan, *Matrix Computations*, §2.1.4). When V has more columns than
    rows, the D × D side is factorised instead. The relative residual of a product is
    some multiple of machine epsilon, and its relative error that times λ_max/δ at most.

    Args:
        operator: c V Vᵀ.
        damping: δ, positive.

    Attributes:
        norm: Of the smaller side.
        refines: Whether a product takes one step of refinement, for a small δ.

    Raises:
        ValueError: If δ is not positive, or so small that the damped matrix is
            numerically singular.
    """

    self_adjoint = True
    _solver: DampedSolver  # where the small side is

    def __init__(self, operator: LowRank, damping: Scalar) -> None:
        damping = without_gradient(damping, "damping")
        if not damping > 0.0:
            raise ValueError(
                "damping: the inverse of a low-rank operator + damping * I needs "
                f"damping > 0, got {damping}."
            )
        self.operator, self.damping = _without_gradient(operator, "inv"), damping
        self.norm, self.refines = self._prepared()
        super().__init__(operator.shape, operator._own_dtype, operator._own_device)

    def _prepared(self) -> tuple[float, bool]:
        """Make what solves on the small side; its norm, and whether to refine."""
        factorised = partial(self._factorise, self.damping)
        norm, refines, error = self.operator.small.on_matrix(factorised)
        if error:
            raise ValueError(error)
        return norm, refines

    def _mirrors(self, other: Op) -> bool:
        if not isinstance(other, Woodbury) or self.damping != other.damping:
            return False
        return self.operator._mirrors(other.operator)

    def _made_of(self) -> tuple[Op]:
        return (self.operator,)

    def _factorise(self, damping: float, matrix: Tensor) -> tuple[float, bool, str]:
        """Keep the factor of the small side; returns its norm, and what is wrong.

        What is wrong must reach all processes.
        """
        inner = self.operator
        pairs = inner.small.eigenpairs if inner.kept.decomposed else None
        try:
            self._solver = DampedSolver(matrix, inner.scale, damping, pairs)
        except ValueError as error:
            return 0.0, False, str(error)
        return self._solver.norm, self._solver.refines, ""

    def solve_small(self, X: Tensor) -> Tensor:
        """(δ I + c K)⁻¹ times columns of the smaller side, ``[R, K]``."""
        return self.operator.ranks.led(lambda: self._solver.solve(X))

    @property
    def small_logdet(self) -> Tensor:
        """Log det(δ I + c K)."""
        return self.operator.ranks.led(lambda: self._solver.logdet)

    def root_columns(self) -> Iterator[Tensor]:
        """Yield columns of an R with (δ I + c K)⁻¹ = R Rᵀ, some at a time.

        Squares of rows of V R are diagonals. Beside K a few columns take little.
        """
        inner, rows = self.operator, self.operator.small_rows
        count = min(max(rows // _SHARE, _LEAST_COLUMNS), _MOST_COLUMNS)
        for start in range(0, rows, count):
            place = start, min(start + count, rows)
            yield inner.ranks.led(lambda at=place: self._solver.root_columns(*at))

    def _multiply(self, X: Tensor) -> Tensor:
        if not self.operator.by_gram:
            return self.solve_small(self.operator.ranks.agreed(X))
        scale, V = self.operator.scale, self.operator.factor
        inner = self.solve_small(V.T.apply(X))
        outer = V.apply(-scale * inner).add_(X)
        # Of nearly equal terms the difference has lost digits in the range of V. There
        # Vᵀ(x − c V y) = δ y must hold, and one step of refinement brings them back.
        if self.refines:
            residual = V.T.apply(outer) - self.damping * inner
            outer -= V.apply(scale * self.solve_small(residual))
        return outer.div_(self.damping)


def _without_gradient(operator: LowRank, verb: str) -> LowRank:
    """Return an operator no part of which requires grad, or say what to do."""
    if operator.requires_grad:
        raise TypeError(
            f"{verb}: the factor of a damped low-rank operator requires grad, and "
            "gradients would not reach it. Make it of .detach()ed tensors, or take "
            "Dense(op.to_dense()) if it is small."
        )
    return operator
