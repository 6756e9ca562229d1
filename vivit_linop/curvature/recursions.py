"""Recursions over layers that BackPACK computes, on a copy of a risk's model.

KFRA and the positive-curvature Hessian are defined by their recursions, the Hessian's
diagonal is the fastest by one. BackPACK is imported when it is needed, through names
that it makes public.
"""

from __future__ import annotations

import inspect
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from vivit_linop.arguments import check_choice, check_flag
from vivit_linop.curvature.blocks import ParameterBlocks, parameter_groups, places_of
from vivit_linop.curvature.positive_curvature import (
    CURVED,
    PositiveCurvature,
    PositiveCurvatureBlock,
)
from vivit_linop.devices import is_out_of_memory
from vivit_linop.extras import extra
from vivit_linop.modes import (
    as_guest,
    default_dtype,
    numbers_put_back,
    ordinary_mode,
    uncompiled,
)
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.kronecker import BlockDiagonal, Kronecker
from vivit_linop.risk.checks import same_outputs
from vivit_linop.risk.empirical import EmpiricalRisk, as_risk
from vivit_linop.risk.model.copies import (
    BACKWARD_HOOKS,
    FORWARD_HOOKS,
    Copies,
    has_hooks_on_all,
)
from vivit_linop.warned import ignoring

# What works for every model.
_INSTEAD = {
    "KFRA": "Use vl.KFAC, for every model.",
    "DiagHessian": "Use route='products', for every model.",
    "BatchDiagHessian": "Use route='products', for every model.",
    "PCHMP": "Use vl.GGN(risk).block_diagonal('parameter'), for every model.",
}
# BackPACK's extensions are those of the process.
_ALONE = threading.RLock()
# BackPACK's Kronecker factors of these number the weight's entries outputs first.
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class KFRA(BlockDiagonal):
    """KFRA: the Kronecker approximation by a recursion over layers, from BackPACK.

    Block-diagonal by parameter, B ⊗ A with A as for ``weight_sharing="backpack"`` of
    :class:`KFAC`, and B propagated from layer to layer as a mean over samples (Botev,
    Ritter & Barber 2017, arXiv:1706.03662): for a linear layer Wᵀ B W, for an
    elementwise function with derivatives d_n, B ∘ (1/N) Σ_n d_n d_nᵀ. Entries are
    numbered as the risk's parameters are, also where BackPACK exchanges axes. That
    recursion
    defines it, so it exists for nets of the modules that BackPACK has rules for only,
    and is computed by BackPACK, on a copy of the model.

    Args:
        risk: An :class:`EmpiricalRisk`, or its ``model, loss, data, params``; all
            samples are one batch.

    Attributes:
        risk: The risk.
        names: For each block the parameter that it is of.

    Raises:
        ValueError: If BackPACK cannot do the model, with the module at fault.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from torch import nn
        >>> data = (torch.rand(4, 3), torch.rand(4, 1))
        >>> vl.KFRA(nn.Sequential(nn.Linear(3, 1)), nn.MSELoss(), data).blocks[0]
        <3x3 Kronecker, torch.float32, cpu>
    """

    def __init__(
        self,
        risk: EmpiricalRisk | Any,
        loss: Any = None,
        data: Any = None,
        params: Any | None = None,
        **options: Any,
    ) -> None:
        self.risk = as_risk(risk, loss, data, params, **options)
        self.names = [[name] for name in self.risk.params]
        with extra("backpack"):
            from backpack.extensions import KFRA as Extension

        approximation = kronecker_blocks(backpack_results(self.risk, Extension()))
        super().__init__(approximation.blocks, approximation.indices)


class PositiveCurvatureHessian(BlockDiagonal):
    """The block-diagonal positive-curvature Hessian, from BackPACK; ``[D, D]``.

    A recursion over layers like that of the Hessian, in which the term of
    each elementwise function, diag(φ''(z) ∂L/∂φ), is made positive before it is
    propagated further (Chen, Chou & Chang 2018, BDA-PCH, arXiv:1802.06502). It is *not*
    the Hessian projected on the positive semi-definite matrices; for piecewise linear
    functions it is the GGN's block-diagonal. The recursion defines it, so it exists for
    nets of the modules that BackPACK has rules for only: Linear, Conv2d, ReLU, Sigmoid,
    Tanh, pooling, padding, Flatten, Dropout, with MSELoss or CrossEntropyLoss.

    Args:
        risk: An :class:`EmpiricalRisk`, or its ``model, loss, data, params``; all
            samples are one batch.
        modify: ``"clip"`` sets negative terms to zero, ``"abs"`` takes their absolute
            value.
        blocks: As for :meth:`vivit_linop.GGN.block_diagonal`. ``"parameter"`` is
            BackPACK's; a product with blocks of several parameters is a forward-mode
            and a backward pass a column, with the same terms.
        as_published: Whether the terms are those above. By default they are BackPACK's:
            its version 1.7.1 multiplies by the slope ∂L/∂φ once more, before it makes
            the terms positive, so that the signs are those of φ''.

    Attributes:
        risk: The risk.

    Raises:
        ValueError: If BackPACK cannot do the model, with the module at fault; for
            another ``modify``; if a parameter is missing in ``blocks``, foreign or
            listed twice.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
        >>> data = (torch.rand(4, 3), torch.rand(4, 1))
        >>> P = vl.PositiveCurvatureHessian(net, nn.MSELoss(), data, modify="abs")
        >>> P.shape, len(P.blocks)
        ((11, 11), 4)
        >>> P = vl.PositiveCurvatureHessian(net, nn.MSELoss(), data, blocks="module")
        >>> [block.shape for block in P.blocks]
        [(8, 8), (3, 3)]
    """

    @uncompiled
    def __init__(
        self,
        risk: EmpiricalRisk | Any,
        loss: Any = None,
        data: Any = None,
        params: Any | None = None,
        *,
        modify: str = "clip",
        blocks: ParameterBlocks = "parameter",
        as_published: bool = False,
        **options: Any,
    ) -> None:
        check_choice(modify, "modify", ("clip", "abs"))
        check_flag(as_published, "as_published")
        self.risk = as_risk(risk, loss, data, params, **options)
        groups = parameter_groups(self.risk, blocks)
        with extra("backpack"):
            from backpack.extensions import PCHMP

        self._options: dict[str, Any] = {
            "modify": modify,
            "blocks": blocks if blocks == "parameter" else groups,
            "as_published": as_published,
        }
        many = self.risk.ranks.is_many
        with self.risk.ranks.together("PositiveCurvatureHessian"):
            results = []
            if self.risk.batch_sizes:
                results = own_backpack_results(self.risk, PCHMP(modify=modify))
        if blocks == "parameter" and not as_published and not many:
            super().__init__([BackpackProduct(f, p) for p, f, _ in results])
            return
        with ordinary_mode():
            whole = PositiveCurvature(self.risk, modify, squared=not as_published)
        super().__init__(
            [PositiveCurvatureBlock(whole, group) for group in groups],
            places_of(self.risk, groups),
        )

    def __reduce__(self) -> Any:
        """Travel as what it is made of: functions of BackPACK cannot be pickled."""
        return partial(type(self), **self._options), (self.risk,)


# Running BackPACK -----------------------------------------------------------------


class Left(NamedTuple):
    """What BackPACK has left on a parameter, of a layer that may be known."""

    parameter: Tensor
    value: Any
    layer: nn.Module | None


def layers_of(module: nn.Module) -> dict[int, nn.Module]:
    """By the id of each parameter, the module that has it."""
    return {id(p): part for part in module.modules() for p in part.parameters(False)}


def backpack_results(risk: EmpiricalRisk, extension: Any) -> list[Left]:
    """Run one of BackPACK's extensions on all samples, in one process.

    Raises:
        TypeError: If ``extension`` is none.
        ValueError: If BackPACK cannot do the model, or the risk is over processes: a
            recursion takes means over samples from layer to layer.
    """
    if risk.ranks.is_many:
        what = type(extension).__name__
        raise ValueError(
            f"process_group: BackPACK's {what} is a recursion over the samples of one "
            "process. Build it from a risk without process_group=, or take KFAC or "
            "EKFAC, which run over processes."
        )
    return own_backpack_results(risk, extension)


@ordinary_mode()
def own_backpack_results(
    risk: EmpiricalRisk, extension: Any, memory: int | None = None
) -> list[Left]:
    """Run one of BackPACK's extensions on this process's samples.

    A mean is over these. There is at least one.

    Args:
        risk: The risk.
        extension: The extension.
        memory: The bytes that its recursion for Hessians may take, a matrix [features,
            N · features] after each elementwise function; None for any.

    Raises:
        TypeError: If ``extension`` is none.
        ValueError: If BackPACK cannot do the model.
    """
    with extra("backpack"):
        from backpack import backpack, extend

    savefield = getattr(extension, "savefield", None)
    if not isinstance(savefield, str) or isinstance(extension, type):
        raise TypeError(
            "quantity: an instance of a BackPACK extension such as "
            f"backpack.extensions.KFRA(), got {extension!r}."
        )
    what = type(extension).__name__
    module, loss = _module_and_loss(risk, what)
    if (reason := _misread(module)) is not None:
        raise _refusal(what, reason)
    batch, calls = _one_batch(risk, what), Counter[nn.Module]()
    try:
        with (
            _ALONE,
            # BackPACK makes convolutions of poolings, with weights that are drawn.
            as_guest(risk.device),
            numbers_put_back(),
            torch.enable_grad(),
            # Some of its rules make matrices without saying of which dtype.
            default_dtype(risk.dtype),
            ignoring(),  # of torch about BackPACK's hooks
        ):
            net, loss = extend(module), extend(loss)
            with backpack(extension):
                _pull_back(risk, net, loss, batch, memory, calls)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = _used_again(module, calls) or _first_line(error)
        raise _refusal(what, reason) from error
    if (reason := _used_again(module, calls)) is not None:
        raise _refusal(what, reason)
    named = dict(module.named_parameters())
    missing = [name for name in risk.params if not hasattr(named[name], savefield)]
    if missing:
        raise ValueError(
            f"model: BackPACK did not compute {what} for parameter {missing[0]!r}; it "
            "has no rule for its module."
        )
    layers = layers_of(module)
    return [
        Left(p, getattr(p, savefield), layers[id(p)])
        for p in (named[name] for name in risk.params)
    ]


def _pull_back(
    risk: EmpiricalRisk,
    net: nn.Module,
    loss: nn.Module,
    batch: tuple[Tensor, Tensor],
    memory: int | None,
    calls: Counter[nn.Module],
) -> None:
    """Run the net, counting calls, and the backward pass in which BackPACK computes.

    Raises:
        ValueError: If the recursion takes more memory, or would be that of another net.
    """
    residuals = 0

    def count(module: nn.Module, _: Any, output: Any) -> None:
        nonlocal residuals
        calls[module] += 1
        if isinstance(module, CURVED):
            residuals += output.numel() * output[0].numel() * output.element_size()

    X, y = batch
    handles = [m.register_forward_hook(count) for m in net.modules()]
    output = net(X)
    for handle in handles:
        handle.remove()
    if memory is not None and residuals > memory:
        raise ValueError(
            f"its matrices between layers take {residuals:.1e} bytes, the budget is "
            f"{memory:.1e}."
        )
    value = loss(output, y)
    if not _is_the_risk(risk, output, value):
        raise ValueError(
            "it goes by the types of modules and of the loss, and hooks on them, or "
            "forward methods of their own, change what these compute."
        )
    value.backward()


# What it leaves, as operators -----------------------------------------------------


class BackpackProduct(TorchLinearOperator):
    """A block of ``HMP``, ``GGNMP`` or ``PCHMP``; made by :func:`from_backpack`.

    By BackPACK's function of a parameter p, ``[K, *p] -> [K, *p]``.
    """

    self_adjoint = True

    def __init__(self, function: Callable[[Tensor], Tensor], parameter: Tensor) -> None:
        self._function, self._shape = function, parameter.shape
        size = parameter.numel()
        super().__init__((size, size), parameter.dtype, parameter.device)

    def _multiply(self, X: Tensor) -> Tensor:
        vectors = X.T.reshape(-1, *self._shape)
        return self._function(vectors).detach().flatten(1).T


def kronecker_blocks(results: Sequence[Left]) -> BlockDiagonal:
    """The blocks of all parameters, at the places of their entries."""
    blocks, indices, start = [], [], 0
    turned = [_of_transpose(result, number) for number, result in enumerate(results)]
    for (p, factors, _), is_turned in zip(results, turned, strict=True):
        places = torch.arange(start, start + p.numel(), device=p.device)
        if is_turned:
            places = places.view(p.shape).transpose(0, 1).flatten()
        blocks.append(Kronecker(*(factor.detach() for factor in factors)))
        indices.append(places)
        start += p.numel()
    return BlockDiagonal(blocks, indices if any(turned) else None)


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


# What it can do -------------------------------------------------------------------


def _module_and_loss(risk: EmpiricalRisk, what: str) -> tuple[nn.Module, nn.Module]:
    """A copy of the model with the risk's parameters, and of the loss, without hooks.

    BackPACK computes with the types of modules.
    """
    source = risk.loss.source
    if not isinstance(source, nn.Module):
        raise ValueError(
            f"loss: {what} needs a module of torch.nn, got "
            f"{getattr(source, '__name__', type(source).__name__)}."
        )
    module = risk.model.copied_module(risk.model.params)
    if module is None:
        raise ValueError(f"model: {what} needs an nn.Module, got a function.")
    if has_hooks_on_all():
        raise _refusal(what, "there are hooks on all modules, and it goes by types.")
    loss = Copies(()).of(source)
    for part in (*module.modules(), *loss.modules()):
        if any(BACKWARD_HOOKS(part)):
            raise _refusal(what, "it knows nothing of hooks on gradients.")
        for hooks in FORWARD_HOOKS(part):
            hooks.clear()
        vars(part).pop("forward", None)
    return module, loss


def _is_the_risk(risk: EmpiricalRisk, output: Tensor, value: Tensor) -> bool:
    """Whether modules by their types have the outputs and the loss of the risk."""
    pairs = list(zip(risk.outputs, risk.all_targets, strict=True))
    with torch.no_grad():
        total = torch.stack([risk.loss.total(*pair) for pair in pairs]).sum()
        if risk.reduction == "mean":
            total /= torch.stack([risk.loss.weight(*pair) for pair in pairs]).sum()
    expected = torch.cat(risk.outputs)
    return same_outputs(output, expected) and same_outputs(value, total)


def _misread(module: nn.Module) -> str | None:
    """Say what BackPACK would take for something else, if there is anything.

    It takes any container for one of modules, a shared parameter for two.
    """
    for name, part in module.named_modules():
        forward, where = inspect.unwrap(type(part).forward), name or "it"
        if isinstance(part, nn.Sequential) and forward is not nn.Sequential.forward:
            return f"{where} is a Sequential with a forward pass of its own."
        nodes = part.graph.nodes if isinstance(part, GraphModule) else ()
        if {node.op for node in nodes} & {"call_function", "call_method", "get_attr"}:
            return f"{where} is a graph with calls of functions between its modules."
    try:
        shared = len(list(module.named_parameters(remove_duplicate=False)))
    except RecursionError:
        return "a part leads back to it, as a weak proxy."
    several = shared != len(list(module.named_parameters()))
    return "modules share a parameter." if several else None


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
    inputs, targets = list[Tensor](), list[Tensor]()
    for (X, _), y in zip(risk.passes.batches(), risk.all_targets, strict=True):
        needed = ""
        if not isinstance(X, Tensor):
            kind = "a mapping" if isinstance(X, Mapping) else "several tensors"
            needed = f"one tensor as input, got {kind}"
        elif risk.samples.axes(X) != [0]:
            needed = "samples along the first axis"
        elif not isinstance(y, Tensor):
            needed = f"one tensor of targets, got several, as {risk.loss.name} has them"
        elif not risk.layout.is_uniform:
            needed = "samples with as many outputs each"
        elif inputs and inputs[0].shape[1:] != X.shape[1:]:
            needed = "inputs of one shape"
        if needed:
            raise ValueError(f"data: BackPACK computes {what} for {needed}.")
        # What the user computed them from gets no gradients.
        inputs.append(risk.model.private_input(X).detach())
        targets.append(y.detach())
    return torch.cat(inputs), torch.cat(targets)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    first = text[0].rstrip(".") if text else "it failed"
    return f"{first} ({type(error).__name__})."
