"""The Jacobian, and operators pulled back through it: Jᵀ B with B in output space."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cached_property
from operator import attrgetter
from typing import Any, Self
from weakref import ref

import torch
from torch import Tensor

from vivit_linop.curvature import plan
from vivit_linop.curvature.loss_hessian import LossHessian
from vivit_linop.curvature.output_space import OfRisk, OutputIdentity, OutputOperator
from vivit_linop.devices import check_matrix_fits
from vivit_linop.linalg.reductions import matrix_of_operator
from vivit_linop.linalg.tracking import prepared_gram
from vivit_linop.modes import as_guest
from vivit_linop.net.column_passes import accumulate_own
from vivit_linop.net.costs import layer_costs
from vivit_linop.net.inner import InnerProducts
from vivit_linop.net.linearization import kept_linearizations
from vivit_linop.net.linearized import NoTangentError, linearizations, trusted
from vivit_linop.net.pieces import StoredColumns
from vivit_linop.net.totals import AllColumns, Components
from vivit_linop.operators import verbs
from vivit_linop.operators.lowrank import Gram
from vivit_linop.operators.symmetric import KeptMatrix
from vivit_linop.risk.empirical import EmpiricalRisk, as_risk, risk_of_inputs


class Jacobian(OfRisk):
    """J: the Jacobian of all outputs in the parameters, ``[N·C, D]``.

    Rows are sample-major (n·C + c). Products run on a linearisation of the net that is
    made at the first product and kept (see ``memory`` of :class:`EmpiricalRisk`): a
    product with J or with J.T is then one pass over the data and costs about 2/3 of a
    gradient.

    Args:
        risk: An :class:`EmpiricalRisk`, or its arguments, ``model, loss, data, …``. A
            loss and targets are not needed: ``vl.Jacobian(model, X)``, or with
            ``params=`` and other options, for a batch X of inputs (a tensor, a tuple
            or a mapping) or a list or loader of such batches.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from torch import nn
        >>> J = vl.Jacobian(nn.Linear(3, 2), torch.rand(4, 3))
        >>> J.shape, (J @ J.T).shape  # the latter is the empirical NTK
        ((8, 8), (8, 8))
    """

    def __init__(
        self,
        risk: EmpiricalRisk | Any,
        loss: Any = None,
        data: Any = None,
        params: Any | None = None,
        **options: Any,
    ) -> None:
        # In the place of the loss: inputs, if there is nothing else.
        inputs = data is None and loss is not None and not callable(loss)
        if inputs and not isinstance(risk, EmpiricalRisk):
            risk = risk_of_inputs(risk, loss, params, **options)
        else:
            risk = as_risk(risk, loss, data, params, **options)
        self.risk = risk
        shape = risk.num_rows, risk.num_params
        super().__init__(shape, risk.dtype, risk.device)

    @cached_property
    def pullback(self) -> Pullback:
        """Jᵀ, made once: what it keeps serves all products."""
        return Pullback(self, OutputIdentity(self.risk))

    def _multiply(self, X: Tensor) -> Tensor:
        return self.pullback._multiply_adjoint(X)

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        return self.pullback._multiply(X)


class Pullback(OfRisk):
    """Jᵀ B for an operator B in output space (or Jᵀ itself), ``[D, N·R]``.

    Products run on the linearisation of the net, or on the stored columns where that is
    cheaper; which of them is decided at the second product, or at the first where the
    net has convolutions. Where torch cannot give J x
    (operations with first derivatives only), products with the adjoint run on columns
    in any case.

    Attributes:
        output: B; the identity for Jᵀ itself.
        is_plain: Whether it is Jᵀ itself.
        risk: The risk of J.
        width: R, the number of columns a sample; column n·R + r belongs to sample n.
            The largest, where samples have different numbers of them.
        layout: Which columns belong to which sample.
        stored: The stored columns, if there are any.
    """

    def __init__(self, jacobian: Jacobian, output: OutputOperator) -> None:
        self.risk = risk = jacobian.risk
        self.output = output
        self.width, self.layout = output.width, output.layout
        self.is_plain = isinstance(output, OutputIdentity)
        # J keeps Jᵀ, so that Jᵀ must not keep J: both would outlive their last user.
        self._jacobian: ref[Jacobian] | None = ref(jacobian)
        self.stored: StoredColumns | None = None
        self._inner: InnerProducts | None = None
        self._kept_gram = KeptMatrix(risk.kept.columns_budget)
        self._decided, self._used = self.is_plain, False
        shape = risk.num_params, output.shape[1]
        super().__init__(shape, risk.dtype, risk.device)

    def __getstate__(self) -> dict[str, Any]:
        """What travels: columns are made anew where they pay."""
        anew = {"_jacobian": None, "stored": None, "_decided": self.is_plain}
        return super().__getstate__() | anew | {"_inner": None}

    @property
    def jacobian(self) -> Jacobian:
        """J, made anew if nobody else has kept it."""
        jacobian = None if self._jacobian is None else self._jacobian()
        if jacobian is None:
            jacobian = Jacobian(self.risk)
            if self.is_plain:
                jacobian.pullback = self
            self._jacobian = ref(jacobian)
        return jacobian

    @classmethod
    def through(cls, jacobian: Jacobian, output: OutputOperator) -> Self:
        """Return Jᵀ B as a node of this class."""
        node = cls.__new__(cls)
        Pullback.__init__(node, jacobian, output)
        return node

    @property
    def gram(self) -> Gram:
        """The Gram operator of the columns; its matrix is computed once and kept."""
        return Gram(self, self, self._kept_gram)

    def columns(self) -> StoredColumns | None:
        """The stored columns, if products are to run on them."""
        if not self._decided:
            # No columns pay for one product. But convolutions are traced for it, in
            # seconds.
            dims = map(Tensor.dim, self.risk.params.values())
            if not self._used and max(dims) <= 2:
                self._used = True
                return self.stored
            with self.risk.kept.making:
                self.stored = self.stored or _shared(_cheaper_columns, self)
                self._decided = True
        return self.stored

    def offer(self, columns: StoredColumns) -> None:
        """Keep columns that a Gram matrix was made of, if they spare what follows."""
        nbytes, budget = columns.nbytes, self.risk.kept.columns_budget()
        if self.stored is not None or nbytes > budget:
            return
        if plan.few_stay(nbytes, self.device) or plan.columns_stay(
            layer_costs(self.risk, self.width), nbytes, budget, self.device
        ):
            self.stored = columns

    def keep_columns(self) -> None:
        """Store the columns if they fit into memory, for all that follows."""
        with self.risk.kept.making:
            self.stored = self.stored or _shared(_fitting_columns, self)

    def cotangents(self, batch: int) -> Tensor:
        """What each column pulls back, ``[n, C, R]``."""
        return self.output.dense_batch(batch)

    @cached_property
    def output_outer(self) -> OutputOperator:
        """B Bᵀ, which for the GGN is H: no root is needed."""
        return self.output.outer()

    def _multiply(self, X: Tensor) -> Tensor:
        return self.risk.ranks.summed(self._combination, X)

    def _combination(self, X: Tensor) -> Tensor:
        """Jᵀ B X over this rank's samples."""
        return self._transposed(self.layout.of_all(X))

    def _transposed(self, rows: Tensor) -> Tensor:
        """Jᵀ B times rows of this rank's samples."""
        if (columns := self.columns()) is not None:
            return columns.multiply(rows)
        parts = rows.split(self.layout.sizes)
        total: Tensor | None = None
        with as_guest(self.risk.device):
            ready = kept_linearizations(self.risk) or linearizations(self.risk)
            for batch, linearization in enumerate(ready):
                part = self.output.apply_batch(batch, parts[batch])
                image = linearization.vjp(part)
                total = image if total is None else total.add_(image)
        assert total is not None
        return total

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        return self.risk.ranks.listed(self._components, X)

    def _components(self, X: Tensor) -> Tensor:
        """Bᵀ J X, the rows of this rank's samples."""
        if (columns := self.columns()) is not None:
            return columns.multiply_adjoint(X)
        if self.risk.has_tangents:
            try:
                return self._linearised(X)
            except NoTangentError:
                self.risk.has_tangents = False
        return _components_without_tangents(self, X)

    def _linearised(self, X: Tensor) -> Tensor:
        """Bᵀ J X, batch by batch."""
        parts = []
        with as_guest(self.risk.device):
            ready = kept_linearizations(self.risk) or linearizations(self.risk)
            for batch, linearization in enumerate(ready):
                part = linearization.jvp(X)
                parts.append(self.output.apply_adjoint_batch(batch, part))
        return torch.cat(parts)

    def _outer(self, X: Tensor) -> Tensor:
        """Jᵀ (B Bᵀ) J X over this rank's samples; each linearisation is needed once."""
        columns = self.stored if self._decided else self.columns()
        if columns is not None:
            return columns.multiply(columns.multiply_adjoint(X))
        outer = self.output_outer
        if self.risk.has_tangents:
            total: Tensor | None = None
            try:
                with as_guest(self.risk.device):
                    ready = kept_linearizations(self.risk) or linearizations(self.risk)
                    for batch, linearization in enumerate(ready):
                        part = outer.apply_batch(batch, linearization.jvp(X))
                        image = linearization.vjp(part)
                        total = image if total is None else total.add_(image)
                assert total is not None
                return total
            except NoTangentError:
                self.risk.has_tangents = False
        # A loss Hessian that nobody has asked for a root of may have none.
        if isinstance(outer, LossHessian) and not self.output.certain:
            J = self.jacobian.pullback
            return J._transposed(outer.own_rows(J._components(X)))
        return self._transposed(self._components(X))


verbs.gram.register(Pullback, attrgetter("gram"))


@verbs.few_products.register
@contextlib.contextmanager
def few_products_of_pullback(factor: Pullback) -> Iterator[Pullback]:
    """On linearisations that are made for them; nothing is checked or traced.

    Nor are columns looked for.
    """
    node = Pullback(factor.jacobian, factor.output)
    node.stored, node._decided = factor.stored, True
    with trusted(factor.risk):
        yield node


@verbs.inner_product.register
def inner_product_of_pullback(factor: Pullback, X: Tensor) -> Tensor:
    """Between the samples where it was prepared for that."""
    if factor._inner is not None:
        return factor._inner.multiply(X)
    return factor.T.apply(factor.apply(X))


@prepared_gram.register
def prepared_gram_of_pullback(factor: Pullback, vectors: int) -> bool:
    """With stored columns, if products with so many vectors are cheaper then."""
    if not factor.output.certain or factor.ranks.is_many:
        return False
    costs = layer_costs(factor.risk, factor.width)
    if not plan.followed_on_columns(costs, factor.width, vectors, factor.device):
        return False
    factor.keep_columns()
    if factor.stored is not None:
        factor._inner = InnerProducts(factor.stored, vectors)
    return factor.stored is not None


@verbs.outer_product.register
def outer_product_of_pullback(factor: Pullback, X: Tensor) -> Tensor:
    """Jᵀ (B Bᵀ) J X."""
    return factor.risk.ranks.summed(factor._outer, X)


@verbs.to_dense.register
def dense_of_pullback(op: Pullback) -> Tensor:
    """The columns, formed."""
    name = "Jacobian" if op.is_plain else type(op).__name__
    check_matrix_fits(name, op.shape, op.torch_dtype, op.device)
    return matrix_of_operator(op)


def _shared(
    make: Callable[[Pullback], StoredColumns | None], pullback: Pullback
) -> StoredColumns | None:
    """Return columns, which the risk keeps for all operators that have the same."""
    if not pullback.output.determined:
        return make(pullback)
    kept, key = pullback.risk.kept, ("columns", type(pullback.output))
    if kept.values.get(key) is None:
        kept.put(key, make(pullback))
    found: StoredColumns | None = kept.values[key]
    return found


def _components_without_tangents(pullback: Pullback, X: Tensor) -> Tensor:
    """Return Vᵀ X where J x is impossible.

    On the stored columns if they fit into the memory budget; else on columns that are
    made anew for each product, by R backward passes.
    """
    pullback.keep_columns()
    if pullback.stored is not None:
        return pullback.stored.multiply_adjoint(X)
    total = Components(pullback, X)
    accumulate_own(pullback, [total])
    return torch.cat(total.parts, dim=1).T


def _cheaper_columns(pullback: Pullback) -> StoredColumns | None:
    """Return the columns if products with them are the cheaper ones, and they fit."""
    # A root of a loss Hessian that nobody has asked for may not exist.
    if not pullback.output.certain:
        return None
    costs = layer_costs(pullback.risk, pullback.width)
    pay = plan.columns_pay(costs, pullback.width, pullback.device)
    return _fitting_columns(pullback) if pay else None


def _fitting_columns(pullback: Pullback) -> StoredColumns | None:
    """Return the columns if they fit into the memory budget."""
    costs = layer_costs(pullback.risk, pullback.width)
    budget = pullback.risk.kept.columns_budget()
    if sum(cost.nbytes for cost in costs) > budget:
        return None
    # Few parameters may have small columns that are pulled back from large blocks.
    if not pullback.output.blocks_fit():
        return None
    total = AllColumns(pullback)
    accumulate_own(pullback, [total])
    return StoredColumns.kept_on(pullback.device, total.pieces)
