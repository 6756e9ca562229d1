"""The caller's default device and dtype are for the caller's tensors only."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import vivit_linop as vl
from tests.cases import Lambda, mlp

DTYPE = torch.float32


@contextlib.contextmanager
def defaults(device: str, dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)
    ).to(DTYPE)


def embedded() -> nn.Module:
    return Lambda(
        lambda m, x: m.out(m.norm(m.table(x)).mean(1)),
        table=nn.Embedding(7, 4),
        norm=nn.LayerNorm(4),
        out=nn.Linear(4, 3),
    ).to(DTYPE)


def problems() -> dict[str, tuple[nn.Module, Any, Tensor, Tensor]]:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        y = torch.randint(3, (12,))
        images, flat = torch.rand(12, 1, 4, 4, dtype=DTYPE), torch.rand(12, 5).to(DTYPE)
        return {
            "layers": (mlp(5, 6, 3).to(DTYPE), nn.CrossEntropyLoss(), flat, y),
            "convolutions": (convolutional(), nn.CrossEntropyLoss(), images, y),
            "tokens": (embedded(), nn.CrossEntropyLoss(), torch.randint(7, (12, 3)), y),
            "squares": (mlp(5, 6, 3).to(DTYPE), nn.MSELoss(), flat, flat[:, :3]),
            "own loss": (
                mlp(5, 6, 3).to(DTYPE),
                lambda output, target: F.cross_entropy(output, target),
                flat,
                y,
            ),
        }


def seeded() -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(0)


class Stream:
    """An iterable of the user's own, read in each pass."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def everything(name: str, problem: Any, path: Path) -> dict[str, Any]:
    """Numbers of all verbs and analyses."""
    model, loss, X, y = problem
    options = {"reduction": "mean"} if name == "own loss" else {}
    batches = list(zip(X.split(5), y.split(5), strict=True))
    risk = vl.EmpiricalRisk(model, loss, batches, **options)
    stream = vl.EmpiricalRisk(model, loss, Stream(batches), memory=0, **options)
    D = risk.num_params
    x = torch.linspace(-1.0, 1.0, D, dtype=DTYPE, device="cpu")
    G, H, U, J = (
        kind(risk) for kind in (vl.GGN, vl.Hessian, vl.PerSampleGradients, vl.Jacobian)
    )
    V, eye = G.factor, vl.Identity(D)
    K = vl.KFAC(risk, variant="exact")
    damped, pairs = G + 0.1 * eye, G.eigh(k=4)
    index = torch.tensor([7, 1, 4], device="cpu")
    ones = np.ones(3, dtype=np.float32)
    vl.save(pairs, path / "pairs", risk)
    vl.save(G, path / "G", risk)
    results: dict[str, Any] = {
        "value": risk.value(),
        "gradient": risk.gradient(),
        "G @ x": G @ x,
        "G @ x, streamed": vl.GGN(stream) @ x,
        "G @ numpy": G @ x.numpy(),
        "matmat": G.matmat(np.eye(D, 2)),
        "H @ x": H @ x,
        "H, diagonal": H.diagonal(),
        "H, diagonals of samples": H.sample_diagonals(),
        "F @ x": vl.EmpiricalFisher(risk) @ x,
        "diagonal": G.diagonal(),
        "estimated": vl.estimate_diagonal(G, 5)[0],
        "trace": G.trace(),
        "gram": (V.T @ V).to_dense(),
        "eigvalsh": G.eigvalsh(),
        "eigvalsh, streamed": vl.GGN(stream).eigvalsh(),
        "largest": G.eigh(k=3).eigenvalues,
        "selected": G.eigh(select=lambda evals: [-1, -2]).eigenvalues,
        "selected by a tensor": G.eigh(select=lambda evals: index).eigenvalues,
        "projector": vl.projector(pairs) @ x,
        "solve": damped.inv() @ x,
        "logdet": damped.logdet(),
        "root": damped.sqrt() @ x,
        "blocks": G.block_diagonal("parameter") @ x,
        "blocks, eigvalsh": G.block_diagonal("parameter").eigvalsh(),
        "dense": G.to_dense(),
        "H, dense": H.to_dense(),
        "U, norms": U.squared_norms(),
        "U, variance": U.variance(),
        "U, dense": U.to_dense(),
        "centered": vl.centered_gram(U),
        "tangent kernel": (J @ J.T).to_dense(),
        "subset": vl.GGN(risk.subset([7, 1, 4])).trace(),
        "subset by a tensor": vl.GGN(risk.subset(index)).trace(),
        "KFAC": K @ x,
        "KFAC, inverse": (K + 0.1 * eye).inv() @ x,
        "EKFAC": vl.EKFAC(risk, variant="exact") @ x,
        "density": vl.LanczosSpectrum(G, 5).density()[1],
        "directional": vl.directional_derivatives(risk, pairs)[1],
        "step": vl.damped_newton_step(risk, pairs, 0.1),
        "step, damping by a function": vl.damped_newton_step(
            risk, pairs, lambda evals, *_: [1e-9 + float(e) for e in evals]
        ),
        "dense operator": vl.Dense(np.eye(3, dtype=np.float32)).to_dense(),
        "diagonal operator": vl.Diagonal(ones).inv().to_dense(),
        "loaded": vl.load(path / "pairs", risk).eigenvalues,
        "loaded operator": vl.load(path / "G", risk).eigvalsh(),
    }
    if name != "own loss":
        results["drawn"] = vl.GGN(risk, mc_samples=2, generator=seeded()) @ x
        results["KFAC, drawn"] = vl.KFAC(risk, generator=seeded()) @ x
    return results


class Watch(TorchFunctionMode):
    """Notes where the library calls a factory without a device."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: set[str] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _device_constructors() and kwargs.get("device") is None:
            caller = traceback.extract_stack()[-2]
            if caller.filename.startswith(str(Path(vl.__file__).parent)):
                self.sites.add(f"{caller.filename}:{caller.lineno} {caller.line}")
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [
        *((name, "meta", torch.float16) for name in problems() if name != "layers"),
        ("layers", "cpu", torch.float64),
    ],
)
def test_everything_is_the_same(
    name: str, device: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Nor is a factory called without a device."""
    problem, watch = problems()[name], Watch()
    torch.manual_seed(0)
    with watch:
        expected = everything(name, problem, tmp_path)
    assert not watch.sites
    torch.manual_seed(0)
    with defaults(device, dtype):
        found = everything(name, problem, tmp_path)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-7, msg=key)
