"""BackPACK extensions that record layers instead of forming V.

BackPACK's square-root extensions backpropagate S and then form the columns of V for
each parameter. Here the layers with parameters save what the columns are made of: the
layer's input, the signal S at its output and the gradient at its output.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from backpack.extensions import SqrtGGNExact, SqrtGGNMC
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.saved_quantities import SavedQuantities
from backpack.extensions.secondorder.sqrt_ggn.batchnorm_nd import SqrtGGNBatchNormNd
from backpack.extensions.secondorder.sqrt_ggn.convnd import (
    SqrtGGNConv1d,
    SqrtGGNConv2d,
    SqrtGGNConv3d,
)
from backpack.extensions.secondorder.sqrt_ggn.convtransposend import (
    SqrtGGNConvTranspose1d,
    SqrtGGNConvTranspose2d,
    SqrtGGNConvTranspose3d,
)
from backpack.extensions.secondorder.sqrt_ggn.embedding import SqrtGGNEmbedding
from backpack.extensions.secondorder.sqrt_ggn.linear import SqrtGGNLinear
from backpack.extensions.secondorder.sqrt_ggn.losses import SqrtGGNCrossEntropyLoss
from backpack.utils.module_classification import is_loss
from torch import Tensor, nn

from vivit_linop.curvature import plan
from vivit_linop.net import layers
from vivit_linop.net.columns.base import LayerColumns
from vivit_linop.net.kinds import Kind
from vivit_linop.net.structure import columns_of_weight

SAVEFIELD = "vivit_linop_layer"
"""The attribute of a parameter that its record is saved in, until the hook takes it."""

Subsampling = Iterable[int] | None
Indices = list[int] | None


@dataclass(frozen=True)
class LayerRecord:
    """What the columns of one parameter are made of.

    Attributes:
        kind: The kind of its layer.
        role: ``"weight"`` or ``"bias"``.
        arguments: The layer's arguments by name.
        inputs: The layer's input, ``[N, …]``.
        signals: S, pulled back to the layer's output, ``[R, |S|, …]``.
        gradients: The gradient of the loss at the layer's output, ``[N, …]``.
    """

    kind: Kind
    role: str
    arguments: dict[str, Any]
    inputs: Tensor
    signals: Tensor
    gradients: Tensor

    def ggn_columns(self, subsampling: Indices) -> LayerColumns:
        """The parameter's part of V, for the samples that S is of."""
        return self._columns(subsampling, self.signals.transpose(0, 1))

    def gradient_columns(self, subsampling: Indices) -> LayerColumns:
        """The parameter's part of r U, for some samples."""
        gradients = chosen(self.gradients, subsampling)
        return self._columns(subsampling, gradients.unsqueeze(1))

    def _columns(self, subsampling: Indices, B: Tensor) -> LayerColumns:
        with torch.no_grad():
            if self.role == "bias":
                assert self.kind.bias is not None
                return self.kind.bias(self.arguments, B)
            X = chosen(self.inputs, subsampling)
            return columns_of_weight(self.kind, self.arguments, X, B.shape[1])(B)


def layer_input(module: nn.Module) -> Tensor:
    """Return what BackPACK has stored of a module's forward pass."""
    stored: Any = module
    return stored.input0


def chosen(tensor: Tensor, subsampling: Indices) -> Tensor:
    """Return some samples of ``[N, …]``."""
    return tensor if subsampling is None else tensor[subsampling]


class _Recording:
    """A module extension that saves records; BackPACK's own backpropagates S."""

    kind: Kind
    options: tuple[str, ...]

    def _record(
        self,
        role: str,
        ext: BackpropExtension,
        module: nn.Module,
        g_inp: tuple[Tensor, ...],
        g_out: tuple[Tensor, ...],
        S: Tensor,
    ) -> LayerRecord:
        if getattr(module, "padding_mode", "zeros") != "zeros":
            raise NotImplementedError(
                f"{module}: BackPACK knows no padding_mode but 'zeros'. Use vl.GGN, "
                "which takes any net."
            )
        arguments = {name: getattr(module, name) for name in self.options}
        arguments["weight_shape"] = module.get_parameter("weight").shape
        return LayerRecord(
            self.kind,
            role,
            arguments,
            layer_input(module).detach(),
            S.detach(),
            g_out[0].detach(),
        )

    weight = functools.partialmethod(_record, "weight")
    bias = functools.partialmethod(_record, "bias")


def _recording(of_backpack: type, kind: Kind, *options: str) -> _Recording:
    """Return BackPACK's extension of a module, which records layers of this kind."""
    attributes = {"kind": kind, "options": options}
    return type(of_backpack.__name__, (_Recording, of_backpack), attributes)()


_CONV = "stride", "padding", "dilation", "groups"
_NORM = _recording(
    SqrtGGNBatchNormNd, layers.BATCH_NORM, "running_mean", "running_var", "eps"
)
# They have no state, so that all extensions share them.
_MODULES: dict[type[nn.Module], _Recording] = {
    nn.Linear: _recording(SqrtGGNLinear, layers.LINEAR),
    nn.Conv1d: _recording(SqrtGGNConv1d, layers.CONV, *_CONV),
    nn.Conv2d: _recording(SqrtGGNConv2d, layers.CONV, *_CONV),
    nn.Conv3d: _recording(SqrtGGNConv3d, layers.CONV, *_CONV),
    nn.ConvTranspose1d: _recording(
        SqrtGGNConvTranspose1d, layers.CONV_TRANSPOSE, *_CONV
    ),
    nn.ConvTranspose2d: _recording(
        SqrtGGNConvTranspose2d, layers.CONV_TRANSPOSE, *_CONV
    ),
    nn.ConvTranspose3d: _recording(
        SqrtGGNConvTranspose3d, layers.CONV_TRANSPOSE, *_CONV
    ),
    nn.BatchNorm1d: _NORM,
    nn.BatchNorm2d: _NORM,
    nn.BatchNorm3d: _NORM,
    nn.Embedding: _recording(SqrtGGNEmbedding, layers.EMBEDDING, "padding_idx"),
}


class _AtRank(SqrtGGNCrossEntropyLoss):
    """BackPACK's S of the cross-entropy without its null space: C − 1 columns."""

    def backpropagate(
        self,
        ext: SqrtGGNExact,
        module: nn.Module,
        grad_inp: tuple[Tensor, ...],
        grad_out: tuple[Tensor, ...],
        backproped: None,
    ) -> Tensor:
        """Turn S of logits ``[N, C]`` until its last column is zero.

        The columns ``[C, |S|, C]`` are dependent, Σ_c √p_c s_c = 0, and the reflection
        that takes √p to the last axis leaves S Sᵀ as it is.
        """
        S: Tensor = super().backpropagate(ext, module, grad_inp, grad_out, backproped)
        logits = layer_input(module)
        small = len(S) < 2 or S.shape[0] * S.shape[1] < plan.TURNED_COLUMNS
        if small or logits.ndim != 2:
            return S
        axis = chosen(logits, ext.get_subsampling()).softmax(1).sqrt().T
        axis[-1] += 1.0
        # |√p + e|² is twice its last entry, since both have norm 1.
        along = torch.einsum("cn,cnd->nd", axis, S) / axis[-1:].T
        return S[:-1] - axis[:-1].unsqueeze(-1) * along


class _LayerRecords:
    """Record the layers in a backward pass of S.

    Args:
        of_backpack: What BackPACK's extension takes.
    """

    savefield: str
    saved_quantities: SavedQuantities

    def __init__(self, *of_backpack: Any) -> None:
        super().__init__(*of_backpack)
        self.savefield, self._checked = SAVEFIELD, dict[str, Indices]()
        for module, extension in _MODULES.items():
            self.set_module_extension(  # type: ignore[attr-defined]
                module, extension, overwrite=True
            )

    def again(self, checked: dict[str, Indices]) -> Self:
        """Return another one for a pass of its own, with lists of samples to check."""
        new = copy.copy(self)
        for name, value in vars(self).items():
            if type(value) is dict:  # of modules and their extensions
                setattr(new, name, dict(value))
        new.saved_quantities, new._checked = SavedQuantities(), checked
        return new

    def __call__(
        self, module: nn.Module, g_inp: tuple[Tensor, ...], g_out: tuple[Tensor, ...]
    ) -> None:
        """Check the indices of samples where the pass begins, then do as BackPACK."""
        if is_loss(module):
            for name, subsampling in self._checked.items():
                check_subsampling(name, subsampling, len(layer_input(module)))
            _check_targets(module)
        super().__call__(module, g_inp, g_out)  # type: ignore[misc]


def layer_records(
    mc_samples: int, subsampling: Indices, checked: dict[str, Indices], at_rank: bool
) -> BackpropExtension:
    """Return an extension that records the layers of a backward pass.

    All lists of samples are checked, by the names of their arguments. ``at_rank`` is
    whether the exact S of a cross-entropy may have a column less.
    """
    samples = None if subsampling is None else tuple(subsampling)
    return _records(mc_samples, samples, at_rank).again(checked)


class ExactLayerRecords(_LayerRecords, SqrtGGNExact):
    """Those of the exact S."""


class MCLayerRecords(_LayerRecords, SqrtGGNMC):
    """Those of a Monte-Carlo S."""


@functools.lru_cache(maxsize=8)
def _records(
    mc_samples: int, samples: tuple[int, ...] | None, at_rank: bool
) -> ExactLayerRecords | MCLayerRecords:
    """Making one takes an eighth of a small net's pass with BackPACK."""
    subsampling = None if samples is None else [*samples]
    if mc_samples:
        return MCLayerRecords(mc_samples, subsampling)
    records = ExactLayerRecords(subsampling)
    if at_rank:
        records.set_module_extension(nn.CrossEntropyLoss, _AtRank(), overwrite=True)
    return records


def _check_targets(loss: nn.Module) -> None:
    """Refuse targets of a cross-entropy that BackPACK's S does not know of."""
    if not isinstance(loss, nn.CrossEntropyLoss):
        return
    stored: Any = loss
    target: Tensor = stored.input1
    if target.is_floating_point():
        mass = target.sum(1)
        counted = torch.allclose(mass, torch.ones_like(mass), rtol=0.0, atol=1e-3)
        found = "soft targets do not sum to 1"
    else:
        counted = not (target == loss.ignore_index).any()
        found = f"some targets are {loss.ignore_index}, and are ignored"
    if not counted:
        raise NotImplementedError(
            f"{loss}: {found}, but for BackPACK all samples count the same. Leave such "
            "samples out, or use vl.GGN, which takes any."
        )


def check_subsampling(
    name: str, subsampling: Subsampling, num_samples: int | None = None
) -> list[int] | None:
    """Return indices of different samples as a list, or raise an error.

    Raises:
        TypeError: If there is anything but integers.
        ValueError: If there are none, some twice, or some out of range.
    """
    if subsampling is None:
        return None
    try:
        given = list(subsampling)
        if any("bool" in str(getattr(i, "dtype", type(i))) for i in given):
            raise TypeError  # a mask, whose entries would count as 0 and 1
        indices = [operator.index(i) for i in given]
    except TypeError:
        raise TypeError(
            f"{name}: indices of samples or None, got {subsampling!r}."
        ) from None
    if not indices:
        raise ValueError(f"{name}: is empty. Use None for all samples.")
    places = indices
    if num_samples is not None:
        outside = [i for i in indices if not -num_samples <= i < num_samples]
        if outside:
            raise ValueError(
                f"{name}: there are {num_samples} samples, got the index {outside[0]}."
            )
        places = [i % num_samples for i in indices]
    if len(set(places)) < len(places):
        raise ValueError(f"{name}: names a sample more than once: {indices}.")
    return indices
