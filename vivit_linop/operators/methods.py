"""What an operator is asked for: methods that look at shapes and call a verb."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from vivit_linop.arguments import (
    Index,
    as_count,
    as_index,
    as_real_numbers,
    as_scalar,
    check_generator,
    check_real,
)
from vivit_linop.modes import ordinary_mode
from vivit_linop.operators import verbs
from vivit_linop.operators.eigenpairs import Eigenpairs
from vivit_linop.operators.scipy_base import LinearOperator
from vivit_linop.ranks.alone import Ranks

Vectors = TypeVar("Vectors", Tensor, np.ndarray)
"""What is multiplied: torch in, torch out, and numpy in, numpy out."""
Op = TypeVar("Op", bound=LinearOperator)
"""The class of all operators, which extends this one."""


class VerbMethods(LinearOperator, Generic[Op]):
    """The verbs as methods: diagonals, traces, inverses, roots, spectra.

    Each checks what its verb relies on, and runs in torch's ordinary mode. The rules
    stand in :mod:`vivit_linop.linalg`.
    """

    if TYPE_CHECKING:  # what the class of all operators has
        self_adjoint: bool

        @property
        def torch_dtype(self) -> torch.dtype:
            """That of products."""

        @property
        def device(self) -> torch.device:
            """That of products."""

        @property
        def ranks(self) -> Ranks:
            """The processes that have parts of it."""

    @ordinary_mode()
    def to_dense(self) -> Tensor:
        """Return the matrix as a torch tensor, ``[m, n]``.

        Costs n products, some columns at a time; nodes that hold their matrix copy it.

        Example:
            >>> import torch, vivit_linop as vl
            >>> (2 * vl.Identity(2)).to_dense()
            tensor([[2., 0.],
                    [0., 2.]], dtype=torch.float64)
        """
        return self._in_own_dtype(verbs.to_dense(self))

    @ordinary_mode()
    def diagonal(self) -> Tensor:
        """Return the diagonal of a square operator, ``[n]``.

        Of G one forward pass, and R backward passes without weight gradients; of what
        has no closed form n products. :func:`vivit_linop.estimate_diagonal` takes less.

        Raises:
            ValueError: If the operator is not square.

        Example:
            >>> import torch, vivit_linop as vl
            >>> V = vl.Dense(torch.tensor([[1.0], [2.0]]))
            >>> (V @ V.T + 0.5 * vl.Identity(2)).diagonal()
            tensor([1.5000, 4.5000])
        """
        self._check_square("diagonal")
        return self._in_own_dtype(verbs.diagonal(self))

    @ordinary_mode()
    def trace(self) -> Tensor:
        """Return the trace of a square operator, a scalar tensor.

        Costs what the diagonal does, but of V Vᵀ with a known Gram matrix, and of its
        damped inverse: these have it from that matrix. For one from a few products see
        :func:`vivit_linop.estimate_trace`.

        Raises:
            ValueError: If the operator is not square.

        Example:
            >>> import torch, vivit_linop as vl
            >>> A = torch.tensor([[1.0, 5.0], [5.0, 2.0]])
            >>> vl.Kronecker(torch.eye(2), A).trace()
            tensor(6.)
        """
        self._check_square("trace")
        return self._in_own_dtype(verbs.trace(self))

    @ordinary_mode()
    def inv(self, route: str | None = None) -> Op:
        """Return the inverse as an operator, ``[n, n]``.

        Of c V Vᵀ + δ I by Woodbury's identity: the Gram matrix of V, once for all δ,
        and its Cholesky factor; then two products with V or Vᵀ for each vector, four
        where δ is so small that digits would be lost. Of Kronecker and block-diagonal
        operators by their parts.

        Args:
            route: Of low-rank operators, which side to factorise: ``"dense Gram"`` or
                ``"dense G"``; None for the smaller one.

        Raises:
            TypeError: If there is no closed form; :meth:`solve` iterates.
            ValueError: If the operator is not square, or numerically singular.
            MemoryError: If the factorised matrix does not fit.

        Example:
            >>> import torch, vivit_linop as vl
            >>> V = vl.Dense(torch.tensor([[1.0], [1.0]]))
            >>> S = (V @ V.T + 2 * vl.Identity(2)).inv()
            >>> S
            <2x2 Woodbury, torch.float32, cpu>
            >>> S @ torch.tensor([1.0, 1.0])
            tensor([0.2500, 0.2500])
        """
        self._check_square("inv")
        return verbs.inv(self, route=route)

    @ordinary_mode()
    def solve(
        self, b: Vectors, rtol: float | None = None, M: LinearOperator | None = None
    ) -> Vectors:
        """Return ``x`` with ``self @ x = b``, for a vector or columns ``b``.

        By ``inv`` where there is a closed form. Where there is none, or ``rtol`` or
        ``M`` is given, by Krylov iterations with products, column by column
        (:class:`vivit_linop.linalg.IterativeInverse`), for indefinite and
        unsymmetric operators too; and an error if they do not get there.

        Args:
            b: ``[n]`` or ``[n, K]``; gradients flow to it.
            rtol: The relative residual ‖b − A x‖/‖b‖ to iterate to; by default, where
                there is no closed form, the root of machine epsilon.
            M: A preconditioner: an operator that approximates the inverse, such as
                ``(vl.KFAC(risk) + delta * vl.Identity(D)).inv()``.

        Raises:
            ArithmeticError: If the iteration does not reach the residual.
            ValueError: If the operator is numerically singular.

        Example:
            >>> import torch, vivit_linop as vl
            >>> from torch import nn
            >>> data = (torch.rand(8, 3), torch.rand(8, 1))
            >>> risk = vl.EmpiricalRisk(nn.Linear(3, 1), nn.MSELoss(), data)
            >>> A = vl.Hessian(risk) + 0.1 * vl.Identity(4)
            >>> x = A.solve(risk.gradient(), rtol=1e-5)
            >>> bool((A @ x - risk.gradient()).norm() < 1e-4 * risk.gradient().norm())
            True
        """
        self._check_square("solve")
        return verbs.solver(self, rtol, M) @ b

    @ordinary_mode()
    def pinv(self, rcond: float | None = None) -> Op:
        """Return the Moore–Penrose inverse, ``[n, m]`` of an operator ``[m, n]``.

        Of low-rank operators and factors through their Gram matrix, never dense in D.

        Args:
            rcond: Eigenvalues (of what is not self-adjoint, singular values) of at most
                ``rcond`` times the largest count as zero; in block-diagonal and
                Kronecker operators, of each part. By default what rounding leaves of
                zeros: of matrices max(m, n) eps; of Gram matrices, which square
                singular values, max(10, √n) eps.

        Raises:
            TypeError: If there is no closed form.

        Example:
            >>> import torch, vivit_linop as vl
            >>> J = vl.Dense(torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
            >>> J.pinv() @ torch.tensor([1.0, 1.0])
            tensor([1.0000, 0.5000, 0.0000])
        """
        if rcond is not None:
            check_real(rcond, "rcond")
            if not 0.0 <= rcond < 1.0:
                raise ValueError(f"rcond: a number in [0, 1), got {rcond!r}.")
        return verbs.pinv(self, rcond)

    @ordinary_mode()
    def restrict(self, index: Index) -> Op:
        """Return the principal submatrix of some rows and columns, ``[k, k]``.

        For a subnetwork: of ``G`` the curvature with all other parameters fixed, of its
        damped inverse the covariance with all others integrated out. Both have inverses
        again, so that pruning can go on in rounds. What there are closed forms for
        keeps them.

        Args:
            index: Distinct numbers of rows, in the order that is wanted, or a mask. For
                a risk's parameters, ``risk.flatten(masks) > 0``.

        Raises:
            TypeError: If they are neither integers nor booleans.
            ValueError: If there is none, or one is out of range or listed twice.

        Example:
            >>> import torch, vivit_linop as vl
            >>> A = vl.Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
            >>> A.restrict([1]).to_dense(), A.inv().restrict([1]).to_dense()
            (tensor([[2.]]), tensor([[0.6667]]))
        """
        self._check_square("restrict")
        with self.ranks.together("restrict") as ballot:
            rows = as_index(index, self.shape[0]).to(self.device)
            ballot.given = (rows,)
        return verbs.restrict(self, rows)

    @ordinary_mode()
    def sqrt(self) -> Op:
        """Return R with ``self = R @ R.T``; ``R @ noise`` samples from N(0, self).

        For positive semi-definite operators with a closed form; R is unique up to an
        orthogonal mixing of its columns, and need not be square. Of c V Vᵀ it is √c V,
        which costs nothing; of damped operators and of inverses it takes the eigenpairs
        of the Gram matrix, and a product then costs one with V and one with Vᵀ.

        Raises:
            TypeError: If there is no closed form.
            ValueError: If the operator is not square or not positive semi-definite.

        Example:
            >>> import torch, vivit_linop as vl
            >>> vl.Diagonal(torch.tensor([4.0, 9.0])).sqrt().diagonal()
            tensor([2., 3.])
        """
        self._check_square("sqrt")
        return verbs.sqrt(self)

    @ordinary_mode()
    def sample(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """Return samples of N(0, self), with mean zero, as columns ``[n, num]``.

        A root times standard normal noise, ``num`` products with the root, so for
        operators with a closed-form root: KFAC and its kin. Sums add samples of their
        terms, and an inverse multiplies those of what it inverts: of a posterior
        ``(G + delta * Identity(D)).inv()`` a sample costs a product with V and one
        with the inverse, and derivatives pass to ``delta``. Of a risk's
        operator, ``risk.unflatten`` has the parameters' shapes, the samples leading.

        Args:
            num: How many samples.
            generator: For reproducible ones; by default torch's global generator.

        Raises:
            TypeError: If there is no closed-form root.
            ValueError: If the operator is not positive semi-definite, or ``num`` is
                below 1.

        Example:
            >>> import torch, vivit_linop as vl
            >>> posterior = vl.Diagonal(torch.tensor([4.0, 9.0])).inv()
            >>> samples = posterior.sample(10_000, torch.Generator().manual_seed(0))
            >>> torch.allclose(samples.var(1), torch.tensor([1 / 4, 1 / 9]), rtol=0.1)
            True
        """
        self._check_square("sample")
        with self.ranks.together(f"sample {num}"):
            check_generator(generator)
            num = as_count(num, "num")
        return verbs.sample(self, num, generator)

    @ordinary_mode()
    def logdet(self, damping: float | Tensor | Sequence[float] | None = None) -> Tensor:
        """Return the logarithm of the absolute determinant, a scalar tensor.

        For c V Vᵀ + δ I it is D log δ + Σ log(1 + λ/δ). The n eigenvalues λ are known
        up to about max(10, √n) eps λ_max each, so the error is at most that times
        Σ 1/(λ + δ), which is below n/δ. In float32 and for δ = 1e-6 λ_max, eigenvalues
        below δ can be off by 1 each; a model in float64 has them exactly.

        Costs one decomposition of the Gram matrix, kept for all δ; of what has no
        closed form one of the dense matrix, up to n = 2,000.

        Args:
            damping: δ, to return that of A + δ I; T of them to return as many, ``[T]``.
                Those of low-rank operators come from one decomposition, in one go.

        Raises:
            ValueError: If the operator is not square.
            TypeError: If it has no closed form and is not self-adjoint, or larger.

        Example:
            >>> import torch, vivit_linop as vl
            >>> V = vl.Dense(torch.tensor([[3.0], [4.0]]))
            >>> (V @ V.T).logdet(damping=[1.0, 2.0])
            tensor([3.2581, 3.9890])
        """
        self._check_square("logdet")
        if damping is None:
            return self._in_own_dtype(verbs.logdet(self))
        dampings = as_real_numbers(damping, "damping", torch.float64)
        dampings = self.ranks.agreed(dampings.to(self.device, torch.float64))
        if dampings.ndim > 1 or not dampings.isfinite().all():
            raise ValueError(
                f"damping: a finite number, or [T] of them, got {damping!r}."
            )
        if dampings.ndim == 0:
            return self._in_own_dtype(
                verbs.logdet(verbs.damp(self, as_scalar(dampings)))
            )
        return self._in_own_dtype(verbs.damped_logdets(self, dampings))

    @ordinary_mode()
    def eigvalsh(self, route: str | None = None) -> Tensor:
        """Return the eigenvalues of a self-adjoint operator, ascending, ``[n]``.

        Of low-rank operators c V Vᵀ with V ``[D, R]`` only the min(D, R) of the smaller
        side; the others are zero. Costs the Gram matrix (a forward pass, and backward
        passes for the columns of a sample) and O(min(D, R)³) for its decomposition;
        n products and O(n³) where there is no closed form, up to n = 2,000.

        Args:
            route: As for :meth:`inv`.

        Raises:
            TypeError: If the operator is not self-adjoint, or is larger without a
                closed form.
            ValueError: If it is not square.

        Example:
            >>> import torch, vivit_linop as vl
            >>> V = vl.Dense(torch.tensor([[3.0], [4.0]]))
            >>> (V @ V.T).eigvalsh(), (V @ V.T + vl.Identity(2)).eigvalsh()
            (tensor([25.]), tensor([ 1., 26.]))
        """
        self._check_self_adjoint("eigvalsh")
        return self._in_own_dtype(verbs.eigvalsh(self, route=route))

    @ordinary_mode()
    def eigh(
        self,
        k: int | None = None,
        select: Callable[[Tensor], Sequence[int] | Tensor] | None = None,
        rcond: float | None = None,
        route: str | None = None,
        start: Eigenpairs | None = None,
        tol: float | None = None,
        which: str = "LA",
        v0: Tensor | np.ndarray | None = None,
    ) -> Eigenpairs:
        """Return eigenpairs of a self-adjoint operator, eigenvalues ascending.

        All of them need a closed form, or the matrix, which n products make of up to
        2,000 rows; so do those of damped inverses and roots of low-rank operators. The
        ``k`` at an end of the spectrum are there for every operator: for Hessians, sums
        and products by ARPACK, on a GPU by Lanczos, in some 36 + 4 k products;
        ``pairs.route`` says which way was taken.

        Args:
            k: The ``k`` largest ones, or what ``which`` says.
            select: A criterion that is given all eigenvalues, ascending, and returns
                the indices to keep; the pairs come in the order of these indices.
            rcond: Without ``k`` or ``select``, pairs whose eigenvalue is at most
                ``rcond`` times the largest in magnitude are left out. Low-rank
                operators leave out their numerical zeros by default.
            route: Of low-rank operators, the way to the pairs: ``"dense Gram"`` or
                ``"dense G"``, with ``k`` also ``"ARPACK on K"``, ``"ARPACK on G"``,
                ``"Lanczos on K"`` or ``"Lanczos on G"``; None for the cheapest, which
                ``explain(k)`` names. Of every operator, with ``k``, the iteration:
                ``"ARPACK"`` on the host, ``"Lanczos"`` where the operator is.
            start: Of low-rank operators c V Vᵀ, pairs of a near one, such as that of
                the training step before: a block iteration begins there, and takes one
                product of V or Vᵀ with a block of vectors where little has changed.
                The block has as many vectors as ``start``; more than ``k`` help where
                the next eigenvalues lie close. A pair that has no part in the block
                comes in slowly, so begin anew now and then.
            tol: With ``start``, how exact: another product would raise the sum of the
                eigenvalues by no more than ``tol`` times the largest, by a bound or
                as one random vector tells, which now and then sees a fifth of it or
                less; by default 5e-3. Without ``start``, the relative accuracy of the
                iteration, by default that of the dtype.
            which: With ``k``, as in SciPy: ``"LA"`` for the largest, ``"SA"`` for the
                smallest, ``"LM"`` for those of largest magnitude.
            v0: With ``k``, the vector ``[n]`` that an iteration starts from. What gives
                ``tol`` or ``v0`` gets an iteration, also where there is a closed form.

        Returns:
            Pairs that unpack to eigenvalues ``[K]`` and orthonormal columns
            ``[n, K]``.

        Raises:
            TypeError: If the operator is not self-adjoint; if all pairs of more than
                2,000 are asked for, or ``start`` given, and there is no closed form.
            ValueError: If ``k``, ``select``, ``which`` or ``route`` ask for what there
                is not, or for two things at once.

        Example:
            >>> import torch, vivit_linop as vl
            >>> A = vl.Diagonal(torch.tensor([2.0, 5.0, 3.0]))
            >>> evals, evecs = A.eigh(k=2)
            >>> evals, torch.allclose(A @ evecs, evals * evecs)
            (tensor([3., 5.]), True)
        """
        self._check_self_adjoint("eigh")
        for name, word in (("which", which), ("route", "" if route is None else route)):
            if not isinstance(word, str):
                raise TypeError(f"{name}: a word, got {word!r}.")
        if start is not None:
            return self._eigh_near(k, start, 5e-3 if tol is None else tol)
        iterated = tol is not None or v0 is not None or route in verbs.ITERATIONS
        if which != "LA" or iterated:
            other = route not in (None, *verbs.ITERATIONS)
            if k is None or select is not None or other:
                raise ValueError(
                    "which, tol, v0: they say, as route='ARPACK' and 'Lanczos' do, how "
                    "k pairs at an end of the spectrum are found. Give k=, and leave "
                    "select= and any other route= out."
                )
            return verbs.extreme_eigenpairs(self, k, which, tol, v0, route)
        return verbs.eigh(self, k, select, rcond, route=route)

    def _eigh_near(self, k: int | None, start: Eigenpairs, tol: float) -> Eigenpairs:
        if not isinstance(start, Eigenpairs) or not len(start):
            raise TypeError(f"start: eigenpairs, as eigh returns them, got {start!r}.")
        k = len(start) if k is None else k
        if not 1 <= k <= len(start):
            raise ValueError(
                f"k: between 1 and {len(start)}, the number of pairs of start; got {k}."
            )
        check_real(tol, "tol")
        if not tol > 0:
            raise ValueError(f"tol: a positive number, got {tol!r}.")
        return verbs.eigh_near(self, k, start, tol)

    @ordinary_mode()
    def explain(self, k: int | None = None) -> Any:
        """Print which ways are taken for what the operator is asked for, and why.

        Of low-rank operators c V Vᵀ, what the ways to k eigenpairs cost, and which one
        is chosen. Of factors V, what each parameter costs in VᵀV. Of others, by verb:
        closed forms by their rules, iterations where there are none, the small side of
        sandwiches and inverses.

        Args:
            k: How many eigenpairs; by default 10, or all if there are fewer.

        Raises:
            TypeError: If ``k`` is no integer.
            ValueError: If there are no ``k`` eigenpairs.

        Returns:
            What is printed, for programs: ``routes`` and ``chosen`` of a low-rank
            operator, the rows of a factor's table, ``ways`` of others.

        Example:
            >>> import torch, vivit_linop as vl
            >>> V = vl.Dense(torch.rand(1000, 20))
            >>> choice = (V @ V.T).explain(k=2)
            eigh(k=2) takes 'dense Gram': it is estimated to be the cheaper.
              dense Gram      0.0125 GFLOP     0.0048 MB
              ARPACK on K       44.2 GFLOP    0.00192 MB
            >>> choice.chosen.name
            'dense Gram'
            >>> ways = vl.Kronecker(torch.eye(3), torch.eye(4)).explain().ways
            <12x12 Kronecker, torch.float32, cpu>
              all  factor by factor, 3 x 3, 4 x 4
        """
        if k is not None and as_count(k, "k") > self.shape[0]:
            raise ValueError(f"k: between 1 and the {self.shape[0]} rows, got {k}.")
        return verbs.explain(self, k)

    def to_curvlinops(self) -> Any:
        """Return the operator with the interface that curvlinops' estimators use.

        For ``hutchpp_trace``, ``xtrace``, ``xdiag``, ``hutchinson_squared_fro`` and
        spectral densities; :func:`vivit_linop.from_curvlinops` is the way back. A
        product with it costs what one with this operator does.

        Example:
            >>> import curvlinops, torch, vivit_linop as vl
            >>> A = vl.Diagonal(torch.arange(10.0))
            >>> curvlinops.hutchinson_trace(A.to_curvlinops(), num_matvecs=3)
            tensor(45.)
        """
        return verbs.to_curvlinops(self)

    def _in_own_dtype(self, result: Tensor) -> Tensor:
        dtype = self.torch_dtype
        return result if result.dtype == dtype else result.to(dtype)

    def _check_square(self, verb: str) -> None:
        if self.shape[0] != self.shape[1]:
            raise ValueError(
                f"{verb}: needs a square operator, this one has shape "
                f"{tuple(self.shape)}."
            )

    def _check_self_adjoint(self, verb: str) -> None:
        self._check_square(verb)
        if not self.self_adjoint:
            raise TypeError(
                f"{verb}: needs a self-adjoint operator and cannot tell that this "
                f"{type(self).__name__} is one. Use scipy.sparse.linalg.eigs; or "
                "Dense((M + M.T) / 2), if M = op.to_dense() is symmetric but for "
                "rounding."
            )
