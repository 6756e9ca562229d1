"""What is rehearsed: nets, and what is done with their risks, in this order."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from scipy.sparse.linalg import cg, eigsh
from torch import Tensor, nn

import vivit_linop as vl

N, CLASSES = 16, 5


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(30, 8), nn.LayerNorm(8)
        self.last = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.norm(self.embedding(x)).mean(1))
        return logits


def _mlp() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, CLASSES))
    return net, torch.rand(N, 20)


def _convolutions() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6, CLASSES)),
    )
    return net.eval(), torch.rand(N, 1, 8, 8)


def _attention() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    net = nn.Sequential(layer, nn.Flatten(), nn.Linear(32, CLASSES))
    return net.eval(), torch.rand(N, 4, 8)


def _tokens() -> tuple[nn.Module, Tensor]:
    return Tokens(), torch.randint(30, (N, 6))


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": _mlp,
    "convolutions": _convolutions,
    "attention": _attention,
    "tokens": _tokens,
}


def setting(net: str, move: Callable[[Any], Any]) -> SimpleNamespace:
    """A net with data and vectors, moved to where they are to be."""
    torch.manual_seed(0)
    model, X = NETS[net]()
    y = torch.randint(CLASSES, (N,))
    D = sum(p.numel() for p in model.parameters())
    x, columns = torch.randn(D), torch.randn(D, 3)
    u = torch.randn(N * (CLASSES - 1))
    return SimpleNamespace(
        model=move(model),
        data=(move(X), move(y)),
        host=[(X[:8], y[:8]), (X[8:], y[8:])],
        D=D,
        x=move(x),
        columns=move(columns),
        u=move(u),
        host_x=x,
        index=move(torch.tensor([0, 3, 5])),
        loss=nn.CrossEntropyLoss(),
    )


def _set(name: str, make: Callable[[SimpleNamespace], Any]) -> Any:
    """An operation whose result later ones use."""

    def made(s: SimpleNamespace) -> Any:
        result = make(s)
        setattr(s, name, result)
        return result

    return made


def _trained(s: SimpleNamespace) -> Any:
    """A product as a node of autograd."""
    w = s.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((s.G @ w).sum(), w)
    return gradient


def damped(s: SimpleNamespace, op: str) -> Any:
    return getattr(s, op) + 0.1 * vl.Identity(s.D)


OPERATIONS: dict[str, Callable[[SimpleNamespace], Any]] = {
    "construction": _set("risk", lambda s: vl.EmpiricalRisk(s.model, s.loss, s.data)),
    "value": lambda s: s.risk.value(),
    "GGN": _set("G", lambda s: vl.GGN(s.risk)),
    "first G @ x": lambda s: s.G @ s.x,
    "second G @ x": lambda s: s.G @ s.x,
    "kept G @ x": lambda s: s.G @ s.x,
    "first G @ X": lambda s: s.G @ s.columns,
    "kept G @ X": lambda s: s.G @ s.columns,
    "G @ array": lambda s: s.G @ s.host_x.numpy(),
    "G @ x of the host": lambda s: s.G @ s.host_x,
    "derivative of G @ w": _trained,
    "V.T @ x": lambda s: s.G.factor.T @ s.x,
    "V @ u": lambda s: s.G.factor @ s.u,
    "gradient": _set("g", lambda s: s.risk.gradient()),
    "eigvalsh": lambda s: s.G.eigvalsh(),
    "eigh(k)": _set("pairs", lambda s: s.G.eigh(k=3)),
    "ARPACK": lambda s: s.G.eigh(k=3, route="ARPACK on G").eigenvalues,
    "Lanczos": lambda s: s.G.eigh(k=3, route="Lanczos on G").eigenvalues,
    "eigh(start)": lambda s: s.G.eigh(k=3, start=s.pairs).eigenvalues,
    "projector": lambda s: vl.projector(s.pairs) @ s.x,
    "all pairs": lambda s: vl.projector(s.G.eigh()) @ s.x,
    "eigh(select)": lambda s: s.G.eigh(select=lambda e: [len(e) - 1]).eigenvalues,
    "Woodbury": _set("inverse", lambda s: damped(s, "G").inv()),
    "first Woodbury solve": lambda s: s.inverse @ s.g,
    "Woodbury solve": lambda s: s.inverse @ s.g,
    "logdet": lambda s: damped(s, "G").logdet(),
    "directional derivatives": lambda s: vl.directional_derivatives(s.risk, s.pairs)[1],
    "Newton step": lambda s: vl.damped_newton_step(s.risk, s.pairs, 0.1),
    "diagonal": lambda s: s.G.diagonal(),
    "trace": lambda s: s.G.trace(),
    "to_dense": lambda s: s.G.to_dense(),
    "Gram of gradients": lambda s: vl.PerSampleGradients(s.risk).gram.matrix,
    "variance": lambda s: vl.PerSampleGradients(s.risk).variance(),
    "centered Gram": lambda s: vl.centered_gram(
        vl.PerSampleGradients(s.risk)
    ).to_dense(),
    "Fisher": _set("F", lambda s: vl.EmpiricalFisher(s.risk)),
    "Fisher's eigenvalues": lambda s: s.F.eigvalsh(),
    "NTK": lambda s: (vl.Jacobian(s.risk) @ vl.Jacobian(s.risk).T).to_dense(),
    "expression": lambda s: (2 * s.G - 0.5 * s.F + 0.1 * vl.Identity(s.D)) @ s.x,
    "Hessian": _set("H", lambda s: vl.Hessian(s.risk)),
    "first Hessian @ x": lambda s: s.H @ s.x,
    "kept Hessian @ x": lambda s: s.H @ s.x,
    "Hessian's diagonal": lambda s: s.H.diagonal(route="products"),
    "Hessian's pairs": lambda s: s.H.eigh(k=2, which="LM", tol=1e-4).eigenvalues,
    "blocks": lambda s: s.G.block_diagonal("parameter") @ s.x,
    "blocks' eigenvalues": lambda s: s.G.block_diagonal("parameter").eigvalsh(),
    "KFAC": _set("K", lambda s: vl.KFAC(s.risk)),
    "KFAC @ x": lambda s: s.K @ s.x,
    "KFAC's inverse": _set("K_inverse", lambda s: damped(s, "K").inv()),
    "KFAC's solve": lambda s: s.K_inverse @ s.x,
    "EKFAC": _set("E", lambda s: vl.EKFAC(s.risk)),
    "EKFAC @ x": lambda s: s.E @ s.x,
    "EKFAC's inverse": _set("E_inverse", lambda s: damped(s, "E").inv()),
    "EKFAC's solve": lambda s: s.E_inverse @ s.x,
    "Monte Carlo": lambda s: vl.GGN(
        s.risk, mc_samples=2, generator=torch.Generator().manual_seed(0)
    ).eigvalsh(),
    "subset": lambda s: vl.GGN(s.risk.subset([0, 3, 5])) @ s.x,
    "subset by an index of the device": lambda s: vl.GGN(s.risk.subset(s.index)) @ s.x,
    "eigsh": lambda s: eigsh(s.G, k=2, v0=s.host_x.numpy())[0],
    "cg": lambda s: cg(damped(s, "G"), s.g.cpu().numpy(), maxiter=5)[0],
    "estimates": lambda s: vl.estimate_diagonal(s.G, 5, seed=0),
    "streamed construction": _set(
        "streamed",
        lambda s: vl.EmpiricalRisk(s.model, s.loss, s.host, memory=0),
    ),
    "streamed GGN": _set("G_streamed", lambda s: vl.GGN(s.streamed)),
    "first streamed G @ x": lambda s: s.G_streamed @ s.x,
    "second streamed G @ x": lambda s: s.G_streamed @ s.x,
    "streamed G @ x": lambda s: s.G_streamed @ s.x,
    "streamed eigenvalues": lambda s: s.G_streamed.eigvalsh(),
}
