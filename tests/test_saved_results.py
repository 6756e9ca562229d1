"""What is saved is what is loaded, for the same risk only."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import vivit_linop as vl
from tests.data_cases import Drawn, streamed
from tests.toys import guest_net, random_vector, toy
from vivit_linop.linalg.decompositions import GramEigenpairs


def in_memory(net: nn.Module) -> vl.EmpiricalRisk:
    """The same risk of one batch."""
    samples = [Drawn(40, 6)[index] for index in range(40)]
    X, y = (torch.stack(parts) for parts in zip(*samples, strict=True))
    return vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, y))


# Saving -------------------------------------------------------------------------------

RESULTS: dict[str, Callable[[vl.EmpiricalRisk], Any]] = {
    "pairs": lambda r: vl.GGN(r).eigh(k=3),
    "all pairs": lambda r: vl.GGN(r).eigh(),
    "small pairs": lambda r: vl.GGN(r).eigh(select=lambda evals: [40, 41]),
    "scaled": lambda r: (2 * vl.GGN(r)).eigh(k=3),
    "fisher": lambda r: vl.EmpiricalFisher(r).eigh(k=3),
    "drawn": lambda r: vl.GGN(r, mc_samples=1).eigh(k=3),
    "damped": lambda r: (vl.GGN(r) + 0.1 * vl.Identity(r.num_params)).eigh(k=3),
}


@pytest.mark.parametrize("formed", [False, True])
@pytest.mark.parametrize("name", RESULTS)
def test_loaded_pairs_work_as_before(name: str, formed: bool, tmp_path: Any) -> None:
    net, risk = streamed()
    pairs = RESULTS[name](risk)
    if formed:
        pairs.eigenvectors  # noqa: B018
    vl.save(pairs, tmp_path / "pairs.pt", risk)
    torch.load(tmp_path / "pairs.pt", weights_only=True)
    assert [file.name for file in tmp_path.iterdir()] == ["pairs.pt"]
    for again in (streamed()[1], in_memory(net)):  # cut into batches in two ways
        loaded = vl.load(tmp_path / "pairs.pt", again)
        assert type(loaded) is type(pairs) and loaded.route == pairs.route
        assert torch.equal(loaded.eigenvalues, pairs.eigenvalues)
        torch.testing.assert_close(
            vl.damped_newton_step(again, loaded, 0.1),
            vl.damped_newton_step(risk, pairs, 0.1),
            rtol=1e-9,
            atol=1e-12,
        )
        for got, expected in zip(
            (*vl.directional_derivatives(again, loaded), loaded.eigenvectors),
            (*vl.directional_derivatives(risk, pairs), pairs.eigenvectors),
            strict=True,
        ):
            torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


def test_pairs_of_arpack_are_loaded(tmp_path: Any) -> None:
    for side in "KG":
        _, risk = streamed()
        pairs = vl.GGN(risk).eigh(k=3, route=f"ARPACK on {side}")
        vl.save(pairs, tmp_path / side, risk)
        loaded = vl.load(tmp_path / side, risk)
        assert loaded.route == f"ARPACK on {side}"
        assert isinstance(loaded, GramEigenpairs) == (side == "K")
        torch.testing.assert_close(loaded.eigenvectors, pairs.eigenvectors)


@pytest.mark.parametrize(
    "build",
    [
        vl.GGN,
        vl.EmpiricalFisher,
        lambda r: 3 * vl.GGN(r),
        lambda r: 3 * vl.EmpiricalFisher(r),
        lambda r: vl.GGN(r, mc_samples=2),
        lambda r: (lambda V: V.T @ V)(vl.GGNFactor(r)),
        lambda r: (lambda J: J @ J.T)(vl.Jacobian(r)),
        lambda r: (lambda J: J.T @ J)(vl.Jacobian(r)),
        lambda r: 0.5 * (lambda J: J.T @ J)(vl.Jacobian(r)),
    ],
)
@pytest.mark.parametrize("captured", [False, True])
def test_loaded_operators_know_their_gram_matrix(
    build: Any, captured: bool, tmp_path: Any
) -> None:
    net, risk = streamed()
    op = build(risk)
    evals = op.eigvalsh() if captured else None
    vl.save(op, tmp_path / "op.pt", risk)
    again = streamed()[1]
    loaded = vl.load(tmp_path / "op.pt", again)
    x = random_vector(op.shape[0])
    assert type(loaded) is type(op)
    torch.testing.assert_close(loaded @ x, op @ x, rtol=1e-10, atol=1e-12)
    if evals is not None:
        net[0].register_forward_hook(lambda *_: pytest.fail("computed again"))
        for module in again.model.module.modules():  # type: ignore[union-attr]
            module.register_forward_pre_hook(lambda *_: pytest.fail("again"))
        assert torch.equal(loaded.eigvalsh(), evals)


def others() -> dict[str, Callable[[], vl.EmpiricalRisk]]:
    """Risks that are not that of ``guest_net`` and ``toy``."""
    _, loss, (X, y) = toy()

    def changed(change: Callable[[nn.Module], Any]) -> vl.EmpiricalRisk:
        torch.manual_seed(0)
        net = guest_net()
        with torch.no_grad():
            change(net)
        return vl.EmpiricalRisk(net, loss, (X, y))

    def given(*arguments: Any) -> vl.EmpiricalRisk:
        torch.manual_seed(0)
        return vl.EmpiricalRisk(guest_net(), *arguments)

    def last_bit(net: nn.Module) -> None:
        net[4].weight[0, 0] = torch.nextafter(
            net[4].weight[0, 0], torch.ones((), dtype=torch.float64)
        )

    weight = torch.tensor([1.0, 2.0, 3.0]).double()
    return {
        "parameters": lambda: changed(last_bit),
        "buffers": lambda: changed(lambda net: net[1].running_mean.add_(1e-3)),
        "frozen": lambda: changed(lambda net: net[0].weight.mul_(1.001)),
        "outputs": lambda: changed(lambda net: net.__setitem__(2, nn.ReLU())),
        "samples": lambda: given(loss, (X, (y + 1) % 3)),
        "samples, order": lambda: given(loss, (X.flip(0), y.flip(0))),
        "samples, fewer": lambda: given(loss, (X[:-1], y[:-1])),
        "value": lambda: given(nn.CrossEntropyLoss(weight=weight), (X, y)),
        "loss": lambda: given(nn.CrossEntropyLoss(reduction="sum"), (X, y)),
    }


@pytest.mark.parametrize("kind", list(others()))
def test_another_risk_is_refused(kind: str, tmp_path: Any) -> None:
    _, loss, data = toy()
    torch.manual_seed(0)
    risk = vl.EmpiricalRisk(guest_net(), loss, data)
    vl.save(vl.GGN(risk), tmp_path / "G", risk)
    vl.load(tmp_path / "G", risk)
    what = kind.split(",")[0]
    with pytest.raises(
        ValueError, match=f"^risk: .* saved for one with .*other .*{what}"
    ):
        vl.load(tmp_path / "G", others()[kind]())


def test_what_cannot_be_saved_or_loaded(tmp_path: Any) -> None:
    _, risk = streamed()
    other = streamed()[1]
    path = tmp_path / "file"
    V, U = vl.GGNFactor(risk), vl.PerSampleGradients(risk)
    pairs = vl.Dense(torch.eye(3)).eigh()
    for result, error in (
        (torch.ones(3), TypeError),
        (V, TypeError),
        (U.T @ V, TypeError),
        (vl.GGN(risk).block_diagonal("parameter").blocks[0], TypeError),
        (vl.GGN(other), ValueError),
        (pairs, ValueError),
    ):
        with pytest.raises(error, match=r"^(result|risk): "):
            vl.save(result, path, risk)
    assert not list(tmp_path.iterdir())
    for function in (lambda r: vl.save(vl.GGN(risk), path, r), vl.load.__get__(path)):
        with pytest.raises(TypeError, match=r"^risk: an EmpiricalRisk, got Linear"):
            function(nn.Linear(2, 2))
    path.write_text("nothing of the kind")
    with pytest.raises(ValueError, match=r"^path: .*no file that vl.save wrote"):
        vl.load(path, risk)
    torch.save({"format": "another"}, path)
    with pytest.raises(ValueError, match=r"^path: "):
        vl.load(path, risk)
    with pytest.raises(FileNotFoundError):
        vl.load(tmp_path / "none", risk)
