"""Progress is shown where it was asked for; interrupts come through."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import vivit_linop as vl
from tests.data_cases import streamed
from tests.toys import Snapshot, guest_net, random_vector, toy
from vivit_linop.bars import shown
from vivit_linop.linalg.krylov import watched

# Progress and long jobs ---------------------------------------------------------------


@pytest.fixture(autouse=True)
def _terminal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if stderr were a terminal, but for tests of logs."""
    if "a_log" not in request.node.name:
        monkeypatch.setattr("vivit_linop.bars.is_log", lambda: False)


def work(risk: vl.EmpiricalRisk) -> None:
    G = vl.GGN(risk)
    risk.gradient()
    x = random_vector(risk.num_params)
    G @ x
    vl.Hessian(risk) @ x
    G.eigh(k=2, route="ARPACK on K")
    G.eigvalsh()
    risk.subset([0, 1]).gradient()


def counts(line: str) -> tuple[int, int]:
    """What a bar says is done, of how many."""
    found = re.search(r"(\d+)/(\d+) \[", line)
    assert found is not None, line
    return int(found[1]), int(found[2])


def test_no_output_by_default(capfd: pytest.CaptureFixture[str]) -> None:
    work(streamed(memory=2**12)[1])
    assert capfd.readouterr() == ("", "")


def test_progress(capfd: pytest.CaptureFixture[str]) -> None:
    work(streamed(memory=2**12, progress=True)[1])
    printed, errors = capfd.readouterr()
    assert printed == ""
    for bar in ("check_data", "risk", "gradient", "product", "columns", "subset"):
        assert f"{bar}:   0%|" in errors and "/2 [" in errors, bar
    assert "eigh(k=2):" in errors
    *_, last = [line for line in errors.split("\r") if "eigh(k=2):" in line]
    done, total = counts(last)
    assert done == total >= 20
    assert "/44 [" in errors  # as many as there are in the mean


def test_a_log_has_a_line_in_ten_seconds_at_most(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: seconds[0])
    for _ in shown(range(100), "product", 100):
        seconds[0] += 1.0
    assert 1 <= capfd.readouterr().err.count("product:") <= 10
    for _ in shown(range(5), "product", 5):
        seconds[0] += 1.0
    assert "product:" not in capfd.readouterr().err


@pytest.mark.parametrize("route", ["ARPACK on K", "ARPACK on G"])
def test_watched_eigenpairs_are_the_same(route: str) -> None:
    (_, quiet), (_, seen) = streamed(), streamed(progress=True)
    expected, got = (vl.GGN(r).eigh(k=3, route=route) for r in (quiet, seen))
    assert got.route == route
    torch.testing.assert_close(
        got.eigenvalues, expected.eigenvalues, rtol=1e-12, atol=0
    )


def test_products_are_counted(capfd: pytest.CaptureFixture[str]) -> None:
    """Those of an eigensolver, also with several columns and with the adjoint."""
    A = vl.Dense(torch.linspace(0, 10, 300, dtype=torch.float64).exp().diag())
    multiplied = []

    class Noted(vl.TorchLinearOperator):
        def _multiply(self, X: Tensor) -> Tensor:
            multiplied.append(X.shape[1])
            return A.apply(X)

        _multiply_adjoint = _multiply

    with watched(Noted(A.shape, torch.float64), k=6, total=30) as counted:
        start = np.random.default_rng(0).standard_normal(300)
        found, _ = eigsh(counted, k=6, which="LA", v0=start)
        counted @ torch.ones(300, 5).double()
        counted.T @ torch.ones(300).double()
    last = capfd.readouterr().err.split("\r")[-1]
    assert counts(last) == (sum(multiplied), sum(multiplied))
    torch.testing.assert_close(
        torch.from_numpy(found), A.eigvalsh()[-6:], rtol=1e-10, atol=0
    )


@pytest.mark.parametrize("route", ["ARPACK on K", "ARPACK on G"])
@pytest.mark.parametrize("progress", [False, True])
def test_interrupted_eigh(route: str, progress: bool) -> None:
    """Ctrl-C inside of a product: all is as before, and can be used again."""
    net = guest_net()
    left = {"calls": 10**9}

    def hook(*_: Any) -> None:
        left["calls"] -= 1
        if left["calls"] <= 0:
            raise KeyboardInterrupt

    net[2].register_forward_pre_hook(hook)
    _, loss, (X, y) = toy(30)
    loader = DataLoader(TensorDataset(X, y), 10)
    risk = vl.EmpiricalRisk(net, loss, loader, memory=0, progress=progress)
    expected = vl.GGN(risk).eigvalsh()[-2:]
    before = Snapshot(net, (X, y))
    for calls in (2, 20):
        left["calls"] = calls
        with pytest.raises(KeyboardInterrupt):
            vl.GGN(risk).eigh(k=2, route=route)
        before.check()
    left["calls"] = 10**9
    got = vl.GGN(risk).eigh(k=2, route=route).eigenvalues
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)
    before.check()


class Unknown(TensorDataset):
    """It does not say how long it is."""

    def __len__(self) -> int:
        raise NotImplementedError


def test_progress_of_so_many_batches_as_come(capfd: pytest.CaptureFixture[str]) -> None:
    net, loss, (X, y) = toy()
    batches = [[0, 1, 2], range(3, len(X))]
    loader = DataLoader(Unknown(X, y), batch_sampler=batches)
    risk = vl.EmpiricalRisk(net, loss, loader, progress=True)
    assert "risk:" in capfd.readouterr().err and risk.num_samples == len(X)
    torch.testing.assert_close(risk.value(), loss(net(X), y).detach())
