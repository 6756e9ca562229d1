"""Columns of parameters without a known structure, by vector–Jacobian products.

There are three ways, each slower than the one before and possible for more nets: all
samples vectorised, sample by sample, and on the graph of a whole batch, for nets that
run on batches of one size only. Each runs as a guest, which its caller has entered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from vivit_linop.graphs import gradients
from vivit_linop.net.capture import Capture
from vivit_linop.net.columns.base import DenseColumns, LayerColumns
from vivit_linop.risk.data.containers import leaves, map_leaves
from vivit_linop.risk.empirical import EmpiricalRisk
from vivit_linop.risk.model.original import Params
from vivit_linop.warned import ignoring


def vectorised(
    risk: EmpiricalRisk, X: Any, cotangents: Tensor, names: Sequence[str]
) -> dict[str, LayerColumns]:
    """Pull back cotangents ``[n, C, R]`` by ``vmap``, which is not always right.

    Returns:
        The columns, but for those that have another shape than they should.

    Raises:
        Exception: Of any kind, where the net cannot be vectorised.
    """
    fixed, chosen = _split(risk, names)
    axes = risk.samples.axes(X)
    if axes is None:
        raise NotImplementedError("samples are not along axes of tensors")
    if risk.model.has_hooks:  # which may keep what they see longer than it lives
        raise NotImplementedError("hooks see one sample at a time")
    numbered = [axis for axis in axes if axis is not None]

    def outputs(params: Params, sample: Any) -> Tensor:
        return risk.model({**fixed, **params}, sample).reshape(-1)

    def columns(sample_leaves: list[Tensor], weight: Tensor) -> dict[str, Tensor]:
        given, of_leaf = iter(sample_leaves), iter(axes)

        def alone(leaf: Tensor) -> Tensor:
            axis = next(of_leaf)
            return leaf if axis is None else next(given).unsqueeze(axis)

        sample = map_leaves(alone, X)
        pull_back = vjp(lambda params: outputs(params, sample), chosen)[1]
        (gradients,) = vmap(pull_back)(weight)
        return gradients

    pairs = zip(leaves(X), axes, strict=True)
    batched = [leaf for leaf, axis in pairs if axis is not None]
    n, _, R = cotangents.shape
    # Signals of all columns are there together, as many as those of R graphs.
    runs = zip(risk.graph_bytes, risk.batch_sizes, strict=False)
    each = max((nbytes // size for nbytes, size in runs), default=0) * (R + 1)
    few = max(1, risk.kept.columns_budget() // max(1, each))
    together = vmap(columns, in_dims=(numbered, 0), chunk_size=few)
    with torch.no_grad(), ignoring("There is a performance drop"):
        made = together(batched, cotangents.mT.contiguous())
    return {
        name: DenseColumns(part.detach().reshape(n, R, -1))
        for name, part in made.items()
        if part.shape == (n, R, *chosen[name].shape)
    }


def one_by_one(
    risk: EmpiricalRisk, X: Any, cotangents: Tensor, names: Sequence[str]
) -> dict[str, LayerColumns]:
    """Pull back cotangents ``[n, C, R]``, each sample on a graph of its own.

    Raises:
        Exception: Of any kind, where the net does not run on one sample.
    """
    fixed, chosen = _split(risk, names)
    params = {name: p.clone().requires_grad_() for name, p in chosen.items()}

    def outputs(index: int) -> Tensor:
        sample = risk.samples.take(X, torch.tensor([index], device="cpu"))
        return risk.model({**fixed, **params}, sample).reshape(-1)

    return _pulled_back(outputs, params, cotangents)


def on_the_batch(
    capture: Capture, risk: EmpiricalRisk, cotangents: Tensor, names: Sequence[str]
) -> dict[str, LayerColumns]:
    """Pull back cotangents ``[n, C, R]`` on the graph of all samples, one by one."""
    params = {name: risk.model.params[name] for name in names}
    return _pulled_back(capture.output.__getitem__, params, cotangents)


def _pulled_back(
    outputs: Callable[[int], Tensor], params: Params, cotangents: Tensor
) -> dict[str, LayerColumns]:
    """Pull back cotangents ``[n, C, R]`` from the outputs ``[C]`` of each sample."""
    n, _, R = cotangents.shape
    made = {name: cotangents.new_empty(n, R, p.numel()) for name, p in params.items()}
    for index, weights in enumerate(cotangents.mT.contiguous()):
        output = outputs(index)
        for r, w in enumerate(weights):
            found = gradients(output, [*params.values()], w, retain_graph=True)
            for part, gradient in zip(made.values(), found, strict=True):
                part[index, r] = gradient.reshape(-1)
    return {name: DenseColumns(part) for name, part in made.items()}


def _split(risk: EmpiricalRisk, names: Sequence[str]) -> tuple[Params, Params]:
    """All other parameters, and those of interest."""
    fixed = {name: p.detach() for name, p in risk.params.items()}
    return fixed, {name: fixed.pop(name) for name in names}
