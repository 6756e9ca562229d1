"""Processes that share samples: how they are started, and what they check.

Workers write what they find before they end, and end with ``os._exit``: what torch does
with a process group on the way out is none of our business.
"""

import argparse
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import vivit_linop as vl
from tests import cases

ROOT = Path(__file__).parents[1]
Found = dict[str, str]
Check = tuple[str, Callable[[], Any], Any, float]
# What results in float64 may be apart from the truth and from one process.
EXACT = 1e-12


# Starting processes -----------------------------------------------------------------


def launched(folder: Path, size: int, *work: str, limit: float = 300.0) -> list[Found]:
    """Let ``size`` processes do some work; return what each has found."""
    command = [sys.executable, "-m", "tests.ranks_work", str(folder), str(size), *work]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen(
        command, cwd=ROOT, env=environment, start_new_session=True
    )
    try:
        parent.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()
    return [read(folder, rank) for rank in range(size)]


def read(folder: Path, rank: int) -> Found:
    path = folder / f"{rank}.json"
    if not path.exists():
        return {"result": "a process ended without one"}
    found: Found = json.loads(path.read_text())
    return found


def join(folder: str, size: int, rank: int, seconds: float = 60.0) -> Any:
    """Join the group of all processes."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=seconds),
    )
    return dist.group.WORLD


def gathered(item: Any) -> list[Any]:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, item)
    return every


# Parts of problems ------------------------------------------------------------------


def part_of(problem: cases.Problem) -> list[tuple[Any, Tensor]]:
    """This rank's samples, in batches of two.

    Uneven parts: the first has the most, and of three or more the second has none.
    """
    ((X, y),) = problem.joined().batches()
    size, rank = dist.get_world_size(), dist.get_rank()
    live = [r for r in range(size) if not (size > 2 and r == 1)]
    counts, left = [0] * size, len(y)
    for place, r in enumerate(live):
        more = -(-left * 2 // (len(live) - place + 1))
        counts[r] = left if r == live[-1] else min(left, more)
        left -= counts[r]
    first = sum(counts[:rank])
    index = torch.arange(first, first + counts[rank])
    return [
        (cases.map_tensors(lambda t, i=i: t[i] if len(t) == len(y) else t, X), y[i])
        if isinstance(X, Tensor)
        else (_samples(X, i, len(y)), y[i])
        for i in (index.split(2) if len(index) else ())
    ]


def _samples(X: Any, index: Tensor, total: int) -> Any:
    return cases.map_tensors(lambda t: t[index] if t.ndim and len(t) == total else t, X)


def relative(found: Tensor, wanted: Tensor) -> float:
    scale = wanted.norm().item() or 1.0
    return (found - wanted).norm().item() / scale


def carried_out(checks: Iterator[Check], prefix: str) -> Found:
    """Do what is to be checked; return what is wrong."""
    found = {}
    for what, compute, wanted, tolerance in checks:
        try:
            wanted = wanted() if callable(wanted) else wanted
            error = relative(compute(), wanted)
            if not error <= tolerance:
                found[f"{prefix}: {what}"] = f"error {error:.1e}"
        except Exception as failure:  # reported below
            places = traceback.extract_tb(failure.__traceback__)[-3:]
            where = [f"{Path(p.filename).name}:{p.lineno}" for p in places]
            text = str(failure)[:200]
            found[f"{prefix}: {what}"] = f"{type(failure).__name__}: {text} {where}"
    return found


def of_case(name: str, group: Any) -> Found:
    """Check a problem of the market against its dense matrices."""
    torch.manual_seed(0)
    problem, dense = cases.problem(name), cases.dense(name)
    mine = part_of(problem)
    (model, loss, _, params), keywords = problem.arguments()
    try:
        risk = vl.EmpiricalRisk(
            model, loss, mine, params, process_group=group, **keywords
        )
    except Exception as failure:  # reported by the test
        return {f"{name}: construction": f"{type(failure).__name__}: {failure}"[:300]}
    checks = products(problem, dense, risk)
    found = carried_out(checks, name)
    if problem.convex and dense.G.norm() > 1e-12:
        (model, loss, data, params), keywords = problem.joined().arguments()
        one = vl.EmpiricalRisk(model, loss, data, params, **keywords)
        found |= carried_out(of_factor(dense, risk, one), name)
    return found


def products(
    problem: cases.Problem, dense: cases.Dense, risk: vl.EmpiricalRisk
) -> Iterator[Check]:
    """Values, products and norms, against the dense matrices."""
    generator = torch.Generator().manual_seed(1)
    D, rows, exact = dense.D, dense.N * dense.C, EXACT
    x = torch.randn(D, 2, generator=generator, dtype=torch.float64)
    u = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    z = torch.randn(dense.N, 2, generator=generator, dtype=torch.float64)
    J, H = vl.Jacobian(risk), vl.LossHessian(risk)
    yield "value", risk.value, dense.value, exact
    if dense.gradient.norm() > 1e-14:
        yield "gradient", risk.gradient, dense.gradient, exact
    yield "J x", lambda: J @ x, dense.J @ x, exact
    yield "Jt u", lambda: J.T @ u, dense.J.T @ u, exact
    yield "J dense", J.to_dense, dense.J, exact
    yield "J Jt", (J @ J.T).to_dense, dense.J @ dense.J.T, exact
    if dense.H.norm() > 1e-12:
        yield "H u", lambda: H @ u, dense.H @ u, exact
        yield "H dense", H.to_dense, dense.H, exact
        yield "H diagonal", H.diagonal, dense.H.diagonal(), exact
    if dense.G.norm() > 1e-12:
        G = vl.GGN(risk)
        yield "G x", lambda: G @ x, dense.G @ x, exact
    if dense.U.norm() > 1e-12:
        U, F = vl.PerSampleGradients(risk), vl.EmpiricalFisher(risk)
        yield "U z", lambda: U @ z, dense.U @ z, exact
        yield "U dense", U.to_dense, dense.U, exact
        yield "U norms", U.squared_norms, dense.U.square().sum(0), exact
        moment = dense.U.square().mean(1)
        yield "U moments", U.second_moment, moment, exact
        yield "F x", lambda: F @ x, dense.F @ x, exact
        evals = torch.linalg.eigvalsh(dense.F)[-min(D, dense.N) :]
        yield spectrum("F spectrum", F.eigvalsh, evals, evals[-1])
    if problem.has_hessian and dense.hessian.norm() > 1e-12:
        yield "Hessian x", lambda: vl.Hessian(risk) @ x, dense.hessian @ x, exact


def of_factor(
    dense: cases.Dense, risk: vl.EmpiricalRisk, one: vl.EmpiricalRisk
) -> Iterator[Check]:
    """What needs V, Gram matrices or a decomposition; ``one`` is of one process."""
    generator = torch.Generator().manual_seed(2)
    D, G, V = dense.D, vl.GGN(risk), vl.GGN(risk).factor
    x = torch.randn(D, 2, generator=generator, dtype=torch.float64)
    evals = torch.linalg.eigvalsh(dense.G)
    small, largest = min(D, V.shape[1]), evals[-1]
    eye, delta = torch.eye(D, dtype=torch.float64), 1e-2 * largest.item()
    damped = dense.G + delta * eye
    alone = vl.GGN(one)
    K = V.gram.to_dense
    yield "V Vt x", lambda: V @ (V.T @ x), dense.G @ x, EXACT
    yield spectrum("K", K, alone.factor.gram.to_dense(), largest)
    yield spectrum("K's", lambda: _spectrum(K(), small), evals[-small:], largest)
    yield spectrum("spectrum", G.eigvalsh, evals[-small:], largest)
    yield spectrum("spectrum of one", G.eigvalsh, alone.eigvalsh(), largest)
    yield "diagonal", G.diagonal, dense.G.diagonal(), EXACT
    yield "trace", G.trace, dense.G.trace(), EXACT
    solution = torch.linalg.solve(damped, x)
    inverse = (G + delta * vl.Identity(D)).inv
    yield "inverse", lambda: inverse() @ x, solution, EXACT
    logdet = torch.logdet(damped)
    yield "logdet", (G + delta * vl.Identity(D)).logdet, logdet, EXACT
    diagonals = dense.per_sample_ggn().diagonal(dim1=1, dim2=2)
    yield "sample diagonals", G.sample_diagonals, diagonals, EXACT
    yield "E Λ Et", lambda: _projected(G), dense.G, EXACT
    yield "λ", lambda: _mean_curvatures(risk), evals[-1:], EXACT
    if dense.U.norm() > 1e-12:
        slopes = dense.U.T @ dense.gradient
        yield "U, V", lambda: _slopes(risk, V), dense.U.T @ dense.G, EXACT
        U = vl.PerSampleGradients(risk)
        yield "U gradient", lambda: U.T @ risk.gradient(), slopes, EXACT
    if small > 4:
        for route in ("ARPACK on K", "ARPACK on G"):
            found = functools.partial(_largest, G, route)
            yield spectrum(route, found, evals[-2:], largest)


def spectrum(
    what: str, compute: Callable[[], Tensor], wanted: Tensor, largest: Tensor
) -> Check:
    """A check of entries, in units of the largest eigenvalue."""

    def apart() -> Tensor:
        return ((compute() - wanted).abs().max() / largest)[None]

    return what, apart, torch.zeros(1), EXACT


def _largest(G: vl.GGN, route: str) -> Tensor:
    return G.eigh(k=2, route=route).eigenvalues


def _spectrum(matrix: Tensor, count: int) -> Tensor:
    return torch.linalg.eigvalsh(matrix)[-count:]


def _projected(G: vl.GGN) -> Tensor:
    pairs = G.eigh()
    E = pairs.eigenvectors
    return (E * pairs.eigenvalues) @ E.T


def _mean_curvatures(risk: vl.EmpiricalRisk) -> Tensor:
    pairs = vl.GGN(risk).eigh(k=1)
    _, lambdas = vl.directional_derivatives(risk, pairs)
    return lambdas.sum(0) * risk.reduction_factor


def _slopes(risk: vl.EmpiricalRisk, V: vl.GGNFactor) -> Tensor:
    cross = (vl.PerSampleGradients(risk).T @ V).to_dense()
    return (V @ cross.T).T


def main() -> None:
    """Check every problem of the market, over several numbers of processes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("names", nargs="*", help="problems; all by default")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 3, 4])
    options = parser.parse_args()
    wrong = 0
    for size in options.processes:
        with tempfile.TemporaryDirectory() as folder:
            names = options.names or cases.NAMES
            found = launched(Path(folder), size, *names, limit=3600.0)
        for rank, each in enumerate(found):
            for what, said in each.items():
                print(f"rank {rank} of {size}: {what}: {said}")
        wrong += sum(map(len, found))
        print(f"{size} processes, {len(names)} problems: {sum(map(len, found))} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
