"""Axes for the pictures that results draw of themselves; matplotlib is met here."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vivit_linop.extras import extra


def axes_for(ax: Any | None, x: str, y: str) -> Any:
    """Return matplotlib axes, those given or new ones, with labels where none are."""
    if ax is None:
        with extra("plot"):
            from matplotlib import pyplot

        ax = pyplot.figure(layout="constrained").add_subplot()
    ax.set_xlabel(ax.get_xlabel() or x)
    ax.set_ylabel(ax.get_ylabel() or y)
    return ax


def numbers(tensor: Tensor) -> Any:
    """Return what matplotlib takes, on the host."""
    return tensor.detach().cpu().numpy()
