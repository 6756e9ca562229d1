"""Further work of processes that share samples: memory, LAPACK, losses, BackPACK."""

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from backpack import extensions
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vivit_linop as vl
from tests.ranks_cases import Check
from tests.ranks_setting import DELTA, C, N, Setting, agreement, loss, net, raised
from vivit_linop.curvature import routes
from vivit_linop.linalg import decompositions, eigen, roots
from vivit_linop.operators import kronecker
from vivit_linop.operators.symmetric import symmetric_eigenpairs
from vivit_linop.ranks import group

ONE = torch.ones(1)


class Beyond(Setting):
    """What one process has no room for, and what others would find otherwise."""

    def no_room(self) -> Iterator[Check]:
        """No process has room for K: its products, in rows, are all there is."""
        G, x = vl.GGN(self.risk), self.x[:, 0]
        one, eye = vl.GGN(self.one), vl.Identity(self.D)
        places = [(module, module.free_memory) for module in (group, routes)]
        for module, _ in places:
            module.free_memory = lambda device: 1000  # type: ignore[attr-defined]
        inverse = (G + DELTA * eye).inv
        yield "inverse", lambda: inverse() @ x, (one + DELTA * eye).inv() @ x, 1e-12
        top = one.eigvalsh()[-3:]
        yield "eigh", lambda: G.eigh(k=3).eigenvalues, top, 1e-12
        for fail in (G.eigvalsh, (G + DELTA * eye).logdet):
            yield fail.__name__, lambda f=fail: raised(f, "GB are free"), ONE, 0.0
        variances = inverse().diagonal
        yield "variances", lambda: raised(variances, "no process has room"), ONE, 0.0
        for module, free_memory in places:
            module.free_memory = free_memory  # type: ignore[attr-defined]

    def other_lapack(self) -> Iterator[Check]:
        """Other ranks would have found other eigenvectors, and are not asked."""
        modules = decompositions, eigen, kronecker, roots
        for module in modules:
            if self.rank != self.risk.ranks.leader:
                module.symmetric_eigenpairs = _other_eigenpairs
        K = vl.KFAC(self.risk, variant="exact", joint_bias=True)
        E, eye = vl.EKFAC(self.risk, variant="exact"), vl.Identity(self.D)
        results: dict[str, Callable[[], Any]] = {
            "KFAC": lambda: (K.eigh(k=5).eigenvectors, K.blocks[0].eigh().eigenvectors),
            "of its other blocks": lambda: [
                (2.0 * b).eigh().eigenvectors for b in vl.KFAC(self.risk).blocks
            ],
            "KFAC, root": lambda: (
                K.sqrt() @ self.x,
                (K + DELTA * eye).sqrt() @ self.x,
            ),
            "KFAC, inverse root": lambda: (K + DELTA * eye).inv().sqrt() @ self.x,
            "damped by factors": lambda: K.pi_damped(DELTA).inv().sqrt() @ self.x,
            "KFAC, sample": lambda: K.sample(2),
            "EKFAC": lambda: (E.eigh(k=5).eigenvectors, E @ self.x),
            "K": lambda: vl.GGN(self.risk).gram.eigh(k=2).eigenvectors,
        }
        for what, compute in results.items():
            yield f"{what}, bits", lambda c=compute: agreement(c()), ONE, 0.0
        for module in modules:
            module.symmetric_eigenpairs = symmetric_eigenpairs

    def losses(self) -> Iterator[Check]:
        """A loss that is another one on one rank is refused on all, by its name."""
        last = float(self.rank == self.size - 1)
        weight = torch.tensor([1.0, 2.0, 3.0 + last, 4.0], dtype=torch.float64)
        partial = functools.partial(_plain, factor=1.0 + last)
        given = [
            ("loss.weight", nn.CrossEntropyLoss(weight=weight)),
            ("loss.label_smoothing", nn.CrossEntropyLoss(label_smoothing=0.1 * last)),
            ("loss.factor", _scaled(1.0 + last)),
            ("loss.factor", partial),
            ("loss.table.factors.1", _Table({"factors": [1.0, 1.0 + last]})),
            ("other loss ", _plain if last else _twice),
        ]
        for name, other in given:
            yield name, lambda o=other, n=name: raised(self._of_loss(o), n), ONE, 0.0
        same = [_scaled(2.0), functools.partial(_plain, factor=2.0), _twice]
        gradients = [lambda o=o: self._of_loss(o)().gradient() for o in same]
        for number, gradient in enumerate(gradients):
            yield f"the same, {number}", gradient, gradients[0], 1e-12

    def _of_loss(self, of: Any) -> Callable[[], vl.EmpiricalRisk]:
        def build() -> vl.EmpiricalRisk:
            kept = [(X[y >= 0], y[y >= 0]) for X, y in self.data]
            options = (
                {} if isinstance(of, nn.CrossEntropyLoss) else {"reduction": "sum"}
            )
            return vl.EmpiricalRisk(
                net(), of, kept, process_group=self.group, **options
            )

        return build

    def recursions(self) -> Iterator[Check]:
        """What BackPACK computes of each rank's samples, added up; else a refusal."""
        X, y = self.X, self.y.clamp(min=0)
        own = [(X, y.clamp(min=0)) for X, y in self.data]
        targets = {
            "mean": (nn.CrossEntropyLoss(), (X, y), own),
            "sum": (nn.CrossEntropyLoss(reduction="sum"), (X, y), own),
            "MSE": (nn.MSELoss(), (X, X[:, :C]), [(X, X[:, :C]) for X, _ in own]),
        }
        for name, (of, all_data, own_data) in targets.items():
            one = vl.EmpiricalRisk(smooth_net(), of, all_data)
            risk = vl.EmpiricalRisk(
                smooth_net(), of, own_data, process_group=self.group
            )
            for what, compute in _recursions(self.x[: one.num_params]).items():
                both = lambda c=compute, r=risk: c(r), lambda c=compute, r=one: c(r)
                yield f"{name}: {what}", *both, 1e-12
        for fail in (vl.KFRA, lambda r: vl.from_backpack(r, extensions.KFLR())):
            yield (
                "refused",
                lambda f=fail: raised(lambda: f(risk), "process_group"),
                ONE,
                0.0,
            )

    def ragged(self) -> Iterator[Check]:
        """Samples with different numbers of outputs, on some ranks and over ranks."""
        yield from self._of_batches("texts", Tagger(), _texts())
        yield from self._of_batches("nodes", Nodes(), _graphs())

    def _of_batches(
        self, name: str, net: nn.Module, batches: list[Any]
    ) -> Iterator[Check]:
        """Of one length on the first rank, of several on the last; others have none."""
        cuts = {0: slice(0, 1), self.size - 1: slice(1, None)}
        own = batches[cuts[self.rank]] if self.rank in cuts else []
        one = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), batches)
        risk = vl.EmpiricalRisk(
            net, nn.CrossEntropyLoss(), own, process_group=self.group
        )
        assert risk.num_outputs == one.num_outputs > one.num_samples
        generator = torch.Generator().manual_seed(0)
        x, u, z = (
            torch.randn(n, 2, generator=generator, dtype=torch.float64)
            for n in (one.num_params, one.num_outputs, vl.GGN(one).factor.shape[1])
        )
        for what, compute in _of_ragged(x, u, z).items():
            both = lambda c=compute: c(risk), lambda c=compute: c(one)
            yield f"{name}: {what}", *both, 1e-12
        path = self.folder / f"{name}.pt"
        G = vl.GGN(risk)
        spectrum = G.eigvalsh()
        vl.save(G, path, risk)
        for by in (one, risk):
            yield (
                f"{name}, loaded",
                lambda r=by: vl.load(path, r).eigvalsh(),
                spectrum,
                1e-12,
            )

    def accelerated(self) -> Iterator[Check]:
        """What Accelerate has prepared."""
        from accelerate import Accelerator

        self._as_launched()
        accelerator = Accelerator(cpu=True)
        assert accelerator.num_processes == self.size
        yield from self._wrapped(accelerator.prepare)

    def lightning(self) -> Iterator[Check]:
        """What Lightning's Fabric has set up."""
        from lightning_fabric import Fabric

        self._as_launched()
        fabric = Fabric(accelerator="cpu", strategy="ddp", devices=self.size)
        fabric.launch()

        def prepare(model: nn.Module, loader: DataLoader) -> tuple[Any, Any]:
            return fabric.setup(model), fabric.setup_dataloaders(loader)

        yield from self._wrapped(prepare)

    def _as_launched(self) -> None:
        """Say what a launcher says."""
        place = {"RANK": self.rank, "LOCAL_RANK": self.rank, "WORLD_SIZE": self.size}
        os.environ |= {name: str(number) for name, number in place.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}

    def _wrapped(self, prepare: Callable[..., Any]) -> Iterator[Check]:
        """The GGN of a prepared model and loader, before and after training steps."""
        dataset = TensorDataset(self.X, self.y)
        model, loader = prepare(net(), DataLoader(dataset, 4))
        assert self.size * len(loader) * 4 > N, "the loaders repeat samples"

        def product() -> Tensor:
            risk = self.over(model, loader)
            assert risk.num_samples == N, risk.num_samples
            first = vl.GGN(risk) @ self.x
            for X, y in loader:
                loss()(model(X), y).backward()
            assert all(p.grad is not None for p in model.parameters())
            return torch.cat([first, vl.GGN(self.over(model, loader)) @ self.x])

        wanted = vl.GGN(self.one) @ self.x
        yield "G x", product, torch.cat([wanted, wanted]), 1e-12
        _, shuffled = prepare(net(), DataLoader(dataset, 4, shuffle=True))
        # In each pass another order: which sample is the first cannot be said.
        refused = raised(lambda: self.over(model, shuffled), "shuffle=False")
        yield "shuffled", lambda: refused, ONE, 0.0


def smooth_net() -> nn.Module:
    """Of modules that BackPACK has rules for."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, C)
    ).double()


def _recursions(x: Tensor) -> dict[str, Callable[[vl.EmpiricalRisk], Tensor]]:
    return {
        "diagonal": lambda r: vl.Hessian(r).diagonal(route="backpack"),
        "sample diagonals": lambda r: vl.Hessian(r).sample_diagonals(route="backpack"),
        "clipped": lambda r: vl.PositiveCurvatureHessian(r) @ x,
        "absolute, by module": lambda r: (
            vl.PositiveCurvatureHessian(r, modify="abs", blocks="module") @ x
        ),
        "as published": lambda r: vl.PositiveCurvatureHessian(r, as_published=True) @ x,
    }


class Tagger(nn.Module):
    """Classes of the words of a text, ``[n, C, T]``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.last = nn.Embedding(11, 3), nn.Linear(3, C)
        self.double()

    def forward(self, words: Tensor) -> Tensor:
        return self.last(self.embedding(words).tanh()).transpose(1, 2)


def _texts() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    sizes = (4, 3), (2, 5), (3, 1), (1, 3)
    return [
        (
            torch.randint(11, s, generator=generator),
            torch.randint(C, s, generator=generator),
        )
        for s in sizes
    ]


class Nodes(nn.Module):
    """Classes of the nodes of graphs, which come one graph after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(2, 3), nn.Linear(3, C)
        self.double()

    def forward(self, x: Tensor, edges: Tensor, owner: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h.index_add(0, edges[1], h[edges[0]]).tanh())


def _graphs() -> list[tuple[tuple[Tensor, Tensor, Tensor], Tensor]]:
    """Chains of nodes: a node is told of the one before it."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for sizes in ((2, 2), (3, 1), (1, 2, 3)):
        owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        numbers = torch.arange(1, len(owner))
        edges = torch.stack([numbers - 1, numbers])[:, owner.diff() == 0]
        x = torch.randn(len(owner), 2, generator=generator, dtype=torch.float64)
        y = torch.randint(C, (len(owner),), generator=generator)
        batches.append(((x, edges, owner), y))
    return batches


def _of_ragged(
    x: Tensor, u: Tensor, z: Tensor
) -> dict[str, Callable[[vl.EmpiricalRisk], Tensor]]:
    eye = vl.Identity(len(x))
    return {
        "value": lambda r: r.value()[None],
        "J x": lambda r: vl.Jacobian(r) @ x,
        "Jt u": lambda r: vl.Jacobian(r).T @ u,
        "J": lambda r: vl.Jacobian(r).to_dense(),
        "H": lambda r: vl.LossHessian(r).to_dense(),
        "H's diagonal": lambda r: vl.LossHessian(r).diagonal(),
        "V z": lambda r: vl.GGN(r).factor @ z,
        "Vt x": lambda r: vl.GGN(r).factor.T @ x,
        "G x": lambda r: vl.GGN(r) @ x,
        "K": lambda r: vl.GGN(r).gram.to_dense(),
        "K z": lambda r: vl.GGN(r).gram.times(z),
        "J Jt": lambda r: (vl.Jacobian(r) @ vl.Jacobian(r).T).to_dense(),
        "spectrum": lambda r: vl.GGN(r).eigvalsh(),
        "inverse": lambda r: (vl.GGN(r) + DELTA * eye).inv() @ x,
        "λ": lambda r: vl.directional_derivatives(r, vl.GGN(r).eigh(k=3))[1],
        "U, V": lambda r: (vl.PerSampleGradients(r).T @ vl.GGN(r).factor).to_dense(),
        "sample diagonals": lambda r: vl.GGN(r).sample_diagonals(),
        "diagonal": lambda r: vl.GGN(r).diagonal(),
        "draws": lambda r: (
            vl.GGN(r, mc_samples=2, generator=torch.Generator().manual_seed(1)) @ x
        ),
        "KFAC": lambda r: vl.KFAC(r, variant="exact") @ x,
        "F": lambda r: vl.EmpiricalFisher(r).eigvalsh(),
        "Hessian": lambda r: vl.Hessian(r) @ x,
        "Hessian's diagonals": lambda r: vl.Hessian(r).sample_diagonals(),
        "subset": lambda r: vl.GGN(r.subset([0, 3, 6])) @ x,
        "later": lambda r: vl.GGN(r.at(1.5 * r.flatten(r.params))) @ x,
        "norms": lambda r: vl.PerSampleGradients(r).squared_norms(),
    }


def _plain(output: Tensor, y: Tensor, factor: float = 1.0) -> Tensor:
    return factor * nn.functional.cross_entropy(output, y, reduction="sum")


def _twice(output: Tensor, y: Tensor) -> Tensor:
    return 2.0 * _plain(output, y)


def _scaled(factor: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda output, y: _plain(output, y, factor)


class _Table:
    """A loss with what it needs in a container."""

    def __init__(self, table: dict[str, list[float]]) -> None:
        self.table = table

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        return _plain(output, y, sum(self.table["factors"]))


def _other_eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    evals, evecs = symmetric_eigenpairs(matrix)
    return evals, -evecs


_other_eigenpairs.__qualname__ = symmetric_eigenpairs.__qualname__
