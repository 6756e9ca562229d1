"""Spectra draw themselves, on axes that are given or new."""

from __future__ import annotations

import sys

import matplotlib
import numpy as np
import pytest
import torch

import vivit_linop as vl
from vivit_linop.linalg import Eigenpairs

matplotlib.use("Agg")
import matplotlib.pyplot as plt

A = vl.Dense(torch.diag(torch.tensor([3.0, 0.5, 2.0], dtype=torch.float64)))


def fail() -> torch.Tensor:
    raise AssertionError("a picture needs no vectors")


def test_pairs_by_rank() -> None:
    pairs = Eigenpairs(torch.tensor([0.5, 3.0, 2.0]), fail)
    _, ax = plt.subplots()
    ax.set_xlabel("k")
    assert pairs.plot(ax, color="red", label="G") is ax
    (line,) = ax.lines
    assert np.array_equal(line.get_xdata(), [1, 2, 3])
    assert np.array_equal(line.get_ydata(), np.float32([3.0, 2.0, 0.5]))
    assert (line.get_color(), line.get_label()) == ("red", "G")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("k", "eigenvalue")
    assert ax.get_yscale() == "log"
    new = A.eigh().plot()
    assert new is not ax and len(ax.lines) == 1
    assert np.allclose(new.lines[0].get_ydata(), [3.0, 2.0, 0.5])


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([-1.0, 2.0], "symlog"),
        ([0.0, 2.0], "symlog"),
        ([0.0], "linear"),
        ([], "linear"),
    ],
)
def test_values_that_are_not_positive(values: list[float], scale: str) -> None:
    ax = Eigenpairs(torch.tensor(values), fail).plot()
    assert ax.get_yscale() == scale
    assert sorted(ax.lines[0].get_ydata()) == values


@pytest.mark.parametrize("log", [True, False])
def test_densities(log: bool) -> None:
    spectrum = vl.LanczosSpectrum(vl.Diagonal(torch.linspace(1.0, 2.0, 50)), ncv=10)
    ax = spectrum.plot(log=log, num_repeats=2)
    density = spectrum.log_density if log else spectrum.density
    grid, values = density(num_repeats=2)
    (line,) = ax.lines
    assert np.array_equal(line.get_xdata(), grid)
    far = values < 1e-8 * values.max()
    drawn = torch.from_numpy(line.get_ydata())
    torch.testing.assert_close(drawn[~far], values[~far])
    assert ax.get_xscale() == ("log" if log else "linear")
    assert spectrum.plot(ax, log=log) is ax and len(ax.lines) == 2


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"vivit-linop\[plot\]"):
        A.eigh().plot()
