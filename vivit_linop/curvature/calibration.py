"""What the device at hand takes, measured: the constants that routes are chosen by."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vivit_linop.arguments import numbered
from vivit_linop.curvature.ggn import GGN
from vivit_linop.curvature.plan import DeviceCosts
from vivit_linop.linalg.decompositions import krylov_products
from vivit_linop.linalg.krylov import SOLVERS, Wanted, by_arpack, solver_on, start_of
from vivit_linop.modes import guests_to_come, ordinary_mode
from vivit_linop.noise import Noise
from vivit_linop.operators.elementary import Dense
from vivit_linop.operators.symmetric import largest_eigenpairs, symmetric_eigenpairs
from vivit_linop.risk.empirical import EmpiricalRisk

_ROUNDS = 3
# Rows of the matrices that are multiplied and decomposed, and numbers that are read:
# more than caches hold. On a CPU, and on a GPU.
_PRODUCT_ROWS, _EIGEN_ROWS, _NUMBERS = (1024, 8192), (800, 2000), (2**24, 2**28)
# Of the matrix that steps of a Krylov solver are taken with, and pairs it looks for.
_STEP_ROWS, _STEP_PAIRS = 200, 3
_LEADING = 10
# Samples, inputs a side and classes of the nets whose products are nothing but calls.
_SAMPLES, _SIDE, _CLASSES = 8, 12, 3


def calibrate(
    device: torch.device | str | None = None, file: str | os.PathLike[str] | None = None
) -> DeviceCosts:
    """Measure what a device takes, and choose routes by that in this process.

    Without it choices rest on the defaults of a CPU or a GPU; these decide differently
    where two ways take nearly the same. It takes some seconds on an idle device, and
    never happens of its own accord. Risks that are there already keep what they have
    decided.

    Args:
        device: The device; by default that of new tensors.
        file: Where to keep the costs, as JSON. If the file is there, it is read and
            nothing is measured; else it is written.

    Returns:
        The costs. ``explain(k)`` names them from now on.

    Raises:
        ValueError: If the file holds something else, costs of another device, or not
            all of them, since an earlier version wrote it.
        OSError: If it cannot be read or written.

    Example:
        >>> import vivit_linop as vl
        >>> costs = vl.calibrate("cpu")
        >>> costs.rate > 1e8 and costs.call > 0.0
        True
        >>> vl.DeviceCosts.default("cpu").use("cpu")  # as before
    """
    where = torch.empty(0).device if device is None else numbered(device)
    if where.type == "meta":
        raise ValueError("device: 'meta' computes nothing. Give 'cpu' or a GPU.")
    name = _name(where)
    if file is not None and Path(file).exists():
        costs = _read(Path(file), name)
    else:
        with ordinary_mode():
            costs = _measured(where, name)
        if file is not None:
            Path(file).write_text(json.dumps(asdict(costs), indent=1) + "\n")
    costs.use(where)
    return costs


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _read(file: Path, name: str) -> DeviceCosts:
    try:
        known = json.loads(file.read_text())
        costs = DeviceCosts(**known)
        # What an earlier version did not measure has defaults of a CPU.
        missing = [field.name for field in fields(costs) if field.name not in known]
        if missing:
            raise ValueError(f"of an earlier version, without {', '.join(missing)}")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"file: {file} holds no costs of a device ({error}). Remove it, and the "
            "device is measured again; or give the name of another file."
        ) from error
    if costs.name != name:
        raise ValueError(
            f"file: {file} holds the costs of {costs.name!r}, the device is {name!r}. "
            "Give another file for each device."
        )
    return costs


def _measured(device: torch.device, name: str) -> DeviceCosts:
    def seconds(run: Callable[[], Any]) -> float:
        """The least of some runs, after one that does not count."""
        return min(_seconds(device, run) for _ in range(1 + _ROUNDS))

    is_gpu = device.type != "cpu"
    rows, fewer, numbers = (
        sizes[is_gpu] for sizes in (_PRODUCT_ROWS, _EIGEN_ROWS, _NUMBERS)
    )
    A, read = torch.ones(rows, rows, device=device), torch.ones(numbers, device=device)
    rate = 2.0 * rows**3 / seconds(lambda: A @ A)
    nbytes, copied = read.element_size() * numbers, read[: numbers // 8]
    S = Noise(0)(fewer, fewer, like=A)
    S = S @ S.T
    small, cubes = S[:_STEP_ROWS, :_STEP_ROWS], fewer**3 / rate
    leading = seconds(lambda: largest_eigenpairs(S, _LEADING)) / cubes
    of_small = seconds(lambda: largest_eigenpairs(small, _LEADING))
    beside = of_small - leading * _STEP_ROWS**3 / rate
    net, convolutional, data = _problem(device)
    first, kept = _products(device, net, data)
    tracing, _ = _products(device, convolutional, data)
    return DeviceCosts(
        name=name,
        rate=rate,
        bandwidth=nbytes / seconds(read.sum),
        copying=nbytes / 8 / seconds(copied.cpu) if is_gpu else float("inf"),
        call=kept,
        step=seconds(lambda: _steps(small)) / krylov_products(_STEP_PAIRS),
        tracing=tracing,
        linearising=first,
        short_pass=2 * seconds(lambda: net(data[0])),
        all_pairs=seconds(lambda: symmetric_eigenpairs(S)) / cubes,
        leading_pairs=leading,
        passes=DeviceCosts.default(device).passes,
        matrix_bandwidth=A.nbytes / seconds(lambda: A @ A[0]),
        row=max(beside, of_small / 10) / _STEP_ROWS,
    )


def _seconds(device: torch.device, run: Callable[[], Any]) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begun = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - begun


def _steps(matrix: Tensor) -> None:
    op = Dense(matrix)
    wanted = Wanted(_STEP_PAIRS, start_of(op))
    if (solver := solver_on(op.device)) == "ARPACK":
        by_arpack(matrix.numpy(), wanted)
    else:
        SOLVERS[solver](op, wanted)


def _problem(
    device: torch.device,
) -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    """A small net, one with as many layers as LeNet, and data that both take."""
    X = torch.linspace(-1, 1, _SAMPLES * _SIDE**2, device=device)
    y = torch.arange(_SAMPLES, device=device) % _CLASSES
    # The user's random numbers are not drawn.
    with guests_to_come(torch.device("cpu")):
        net = nn.Sequential(
            *(nn.Flatten(), nn.Linear(_SIDE**2, 10), nn.ReLU()),
            nn.Linear(10, _CLASSES),
        )
        convolutional = nn.Sequential(
            *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(36, 10), nn.ReLU(), nn.Linear(10, _CLASSES)),
        )
    for module in (net, convolutional):
        module.to(device, torch.float32)
    return net, convolutional, (X.view(_SAMPLES, 1, _SIDE, _SIDE), y)


def _products(
    device: torch.device, net: nn.Module, data: tuple[Tensor, Tensor]
) -> tuple[float, float]:
    """Seconds of a first product with the net's GGN, and of one that is kept."""
    firsts, others = [], []
    for _ in range(2):
        G = GGN(EmpiricalRisk(net, nn.CrossEntropyLoss(), data))
        x = torch.ones(G.shape[0], device=device)
        product = partial(G.__matmul__, x)
        firsts.append(_seconds(device, product))
        others += [_seconds(device, product) for _ in range(1 + _ROUNDS)]
    return min(firsts), min(others)
