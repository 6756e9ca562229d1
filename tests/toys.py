"""Small risks, and what is seen of a model before and after."""

import copy
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import vivit_linop as vl
from tests.cases import mlp


def toy(N: int = 6) -> tuple[nn.Sequential, nn.Module, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(N, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (N,), generator=generator)
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        return mlp(4, 5, 3), nn.CrossEntropyLoss(), (X, y)


def random_vector(n: int, *columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(n, *columns, generator=generator, dtype=torch.float64)


def use_everything(risk: vl.EmpiricalRisk) -> list[Tensor]:
    """Results of all kinds of computations, for comparison."""
    x = random_vector(risk.num_params)
    G, U = vl.GGN(risk), vl.PerSampleGradients(risk)
    pairs = G.eigh(k=2)
    return [
        risk.value(),
        risk.gradient(),
        G @ x,
        vl.Jacobian(risk) @ x,
        vl.Hessian(risk) @ x,
        vl.EmpiricalFisher(risk) @ x,
        G.eigvalsh(),
        G.diagonal(),
        (U.T @ G.factor).to_dense(),
        (G + 0.1 * vl.Identity(len(x))).solve(x),
        vl.damped_newton_step(risk, pairs, 0.1),
        risk.subset(range(min(2, risk.num_samples))).gradient(),
        torch.cat([b.eigvalsh() for b in G.block_diagonal("parameter").blocks]),
    ]


class Noisy(Dataset):
    """Random augmentations, of torch's generator or of numpy's."""

    def __init__(self, X: Tensor, y: Tensor, source: str) -> None:
        self.X, self.y, self.source = X, y, source

    def __len__(self) -> int:
        return len(self.X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = (
            torch.randn(4, dtype=torch.float64)
            if self.source == "torch"
            else torch.from_numpy(np.random.standard_normal(4))
        )
        return self.X[index] + noise, self.y[index]


class Snapshot:
    """What must be as it was: the model, the data and the generators."""

    def __init__(self, model: nn.Module, data: Any) -> None:
        self.model, self.data = model, data
        self.before = self.state()

    def state(self) -> dict[str, Any]:
        tensors = {
            **dict(self.model.named_parameters()),
            **dict(self.model.named_buffers()),
            **{f"data{i}": t for i, t in enumerate(self.data)},
        }
        return {
            "values": {n: t.detach().clone() for n, t in tensors.items()},
            "identity": {n: (id(t), t.data_ptr()) for n, t in tensors.items()},
            "version": {n: t._version for n, t in tensors.items()},
            "requires_grad": {n: t.requires_grad for n, t in tensors.items()},
            "grad": {
                n: (id(t.grad), copy.deepcopy(t.grad)) for n, t in tensors.items()
            },
            "modes": [m.training for m in self.model.modules()],
            "hooks": [
                [len(v) for k, v in sorted(vars(m).items()) if k.endswith("_hooks")]
                for m in self.model.modules()
            ],
            "tensor hooks": [
                len(p._backward_hooks or {}) for p in self.model.parameters()
            ],
            "torch": torch.random.get_rng_state(),
            "numpy": np.random.get_state(),
            "python": random.getstate(),
            "grad mode": torch.is_grad_enabled(),
            "inference": torch.is_inference_mode_enabled(),
            "fast path": torch.backends.mha.get_fastpath_enabled(),
            "sdp": (
                torch.backends.cuda.flash_sdp_enabled(),
                torch.backends.cuda.mem_efficient_sdp_enabled(),
                torch.backends.cuda.math_sdp_enabled(),
            ),
            "default dtype": torch.get_default_dtype(),
            "threads": torch.get_num_threads(),
        }

    def check(self) -> None:
        after = self.state()
        for key, before in self.before.items():
            assert _equal(before, after[key]), key


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


def guest_net() -> nn.Sequential:
    """Modes, buffers, hooks, gradients and frozen parameters, in a mixed state."""
    net = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)
    ).double()
    net.eval()
    net[0].train()  # harmless, and to be kept
    net[0].weight.requires_grad_(False)
    net[0].weight.grad = torch.ones_like(net[0].weight)
    net[4].weight.grad = torch.full_like(net[4].weight, 2.0)
    net[2].register_forward_hook(lambda m, args, output: None)
    return net
