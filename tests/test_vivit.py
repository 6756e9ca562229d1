"""The four computations of the drop-in, against dense references and against ViViT."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor, nn

from tests.cases import Problem, dense_of
from tests.pairs import pairwise
from tests.vivit_cases import (
    COMPUTATIONS,
    GROUPINGS,
    PROBLEMS,
    close,
    clusters,
    dense,
    flat,
    ggn,
    keep_all,
    keep_nonzero,
    one,
    setting,
    setting_of,
    top,
    weight,
)
from vivit_linop.vivit import (
    DirectionalDampedNewtonComputation,
    DirectionalDerivativesComputation,
    EighComputation,
    EigvalshComputation,
)

SUBSAMPLINGS = (None, [1, 0])


pytestmark = [
    pytest.mark.filterwarnings("ignore:Some of the chosen eigenvalues"),
    # BackPACK's hooks, on a first layer whose input needs no gradient.
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]


@pytest.fixture(params=["formed", "structured"])
def form(request, monkeypatch) -> str:
    """Both ways for small problems: V formed, and V in the structure of its layers."""
    if request.param == "structured":
        monkeypatch.setattr("vivit_linop.curvature.plan.FORMED_ENTRIES", 0)
    return request.param


# ViViT's test matrix against dense references -----------------------------------------


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_eigenvalues(name, subsampling, grouping) -> None:
    case, d = setting(name, grouping), dense(name)
    results = case.run(EigvalshComputation(subsampling))
    samples = d.N if subsampling is None else len(subsampling)
    for evals, place in zip(results, case.places, strict=True):
        assert evals.shape == (samples * d.C,)
        reference = torch.linalg.eigvalsh(ggn(d, place, subsampling))
        both = min(len(evals), len(reference))
        close(evals[-both:], reference[-both:])
        assert (evals.diff() >= 0).all()


@pytest.mark.parametrize(
    ("name", "grouping", "subsampling", "criterion"),
    pairwise(PROBLEMS, GROUPINGS, SUBSAMPLINGS, [keep_all, keep_nonzero]),
)
def test_eigenpairs(name, grouping, subsampling, criterion, monkeypatch) -> None:
    if subsampling is None:
        monkeypatch.setattr("vivit_linop.curvature.plan.FORMED_ENTRIES", 0)
    case, d = setting(name, grouping, criterion=criterion), dense(name)
    results = case.run(EighComputation(subsampling))
    for group, (evals, evecs), place in zip(
        case.groups, results, case.places, strict=True
    ):
        G = ggn(d, place, subsampling)
        for param, vectors in zip(group["params"], evecs, strict=True):
            assert vectors.shape == (len(evals), *param.shape)
        E = flat(evecs)
        # Without the zeros that only one of the two ways has.
        reference = torch.linalg.eigvalsh(G)
        found = len(criterion(reference)) if criterion is keep_nonzero else len(evals)
        assert found == len(evals) > 0
        close(evals, reference[-found:])
        close(E @ G, evals[:, None] * E)
        close(E @ E.T, torch.eye(len(E), dtype=E.dtype))


@pytest.mark.parametrize(
    ("name", "sub_grad", "sub_ggn", "grouping"),
    pairwise(PROBLEMS, (None, [0, 1]), (None, [0, 1]), GROUPINGS[:2]),
)
def test_derivatives_and_steps(name, sub_grad, sub_ggn, grouping, monkeypatch) -> None:
    d = dense(name)
    if sub_grad is None:  # for half of the cases
        monkeypatch.setattr("vivit_linop.curvature.plan.FORMED_ENTRIES", 0)
    U = d.U if sub_grad is None else d.U[:, sub_grad]
    curvatures = d.per_sample_ggn()
    curvatures = curvatures if sub_ggn is None else curvatures[sub_ggn]
    for criterion in (top(1), top(10)):
        case = setting(name, grouping, criterion=criterion, damping=one)
        derivatives = case.run(DirectionalDerivativesComputation(sub_grad, sub_ggn))
        steps = case.run(DirectionalDampedNewtonComputation(sub_grad, sub_ggn))
        for group, place, (gammas, lambdas), step in zip(
            case.groups, case.places, derivatives, steps, strict=True
        ):
            g = U[place]
            found = clusters(ggn(d, place, sub_ggn), criterion)
            count = found[-1].members.stop
            assert gammas.shape == (g.shape[1], count)
            assert lambdas.shape == (len(curvatures), count)
            expected = torch.zeros(len(place), dtype=torch.float64)
            for c in found:
                # For a single direction these are |γ| and λ.
                slopes = gammas[:, c.members].square().sum(1)
                close(slopes.sqrt(), (c.projector @ g).norm(dim=0))
                G_n = curvatures[:, place][:, :, place]
                close(
                    lambdas[:, c.members].sum(1),
                    torch.einsum("nij,ji->n", G_n, c.projector),
                )
                gradient = weight(d) * g.mean(1)
                expected -= c.projector @ gradient / (c.value + 1.0)
            assert [p.shape for p in group["params"]] == [s.shape for s in step]
            close(torch.cat([s.reshape(-1) for s in step]), expected)


def test_the_order_of_the_criterion_is_that_of_the_results() -> None:
    name = "sigmoids"

    def descending(evals: Tensor) -> list[int]:
        return [len(evals) - 1, len(evals) - 2, len(evals) - 4]

    case = setting(name, criterion=descending, damping=one)
    G = ggn(dense(name), case.places[0], None)
    ((evals, evecs),) = case.run(EighComputation())
    close(evals, torch.linalg.eigvalsh(G)[[-1, -2, -4]])
    close(flat(evecs) @ G, evals[:, None] * flat(evecs))
    ((_, lambdas),) = case.run(DirectionalDerivativesComputation())
    close(lambdas.mean(0), evals)


def test_no_direction_gives_no_eigenvectors_and_no_step() -> None:
    case = setting("mlp", criterion=lambda evals: [], damping=one)
    ((evals, evecs),) = case.run(EighComputation())
    assert evals.shape == (0,)
    params = case.groups[0]["params"]
    assert [v.shape for v in evecs] == [(0, *p.shape) for p in params]
    (step,) = case.run(DirectionalDampedNewtonComputation())
    assert not any(part.any() for part in step)


def test_damping_is_given_what_vivit_gives() -> None:
    """Also by its rows: the Gram eigenvectors are those of ViViT's [C, N] order."""
    name, seen = "sigmoids", []

    def damping(*given: Tensor) -> Tensor:
        seen.extend(given)
        return given[0] + 0.5

    case = setting(name, criterion=top(3), damping=damping)
    (step,) = case.run(DirectionalDampedNewtonComputation([0, 2], [1, 3, 4]))
    evals, gram_evecs, gammas, lambdas = seen
    d, S = dense(name), [1, 3, 4]
    assert gram_evecs.shape == (len(S) * d.C, len(evals))
    assert gammas.shape == (2, len(evals)) and lambdas.shape == (3, len(evals))
    # BackPACK's root of the square loss is √2 I for each sample: V by its columns.
    J = d.J.reshape(d.N, d.C, d.D)[S].transpose(0, 1).flatten(0, 1)
    V = J.T * (2 / (len(S) * d.C)) ** 0.5
    close(V.T @ (V @ gram_evecs), evals * gram_evecs)
    E = V @ gram_evecs / evals.sqrt()
    gradient = d.U[:, [0, 2]].mean(1)
    expected = -E @ ((E.T @ gradient) / (2 * evals + 0.5))
    close(torch.cat([part.reshape(-1) for part in step]), expected)


# Further layers and losses ------------------------------------------------------------


def _further() -> dict[str, Problem]:
    torch.manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64)

    return {
        "conv 1d, stride, groups": Problem(
            nn.Sequential(
                nn.Conv1d(4, 4, 3, stride=2, padding=1, groups=2),
                nn.ELU(),
                nn.Flatten(),
                nn.Linear(16, 3),
            ).double(),
            nn.MSELoss(),
            (rand(3, 4, 7), rand(3, 3)),
        ),
        "conv 3d, dilation": Problem(
            nn.Sequential(
                nn.Conv3d(1, 2, 2, dilation=2, bias=False), nn.Flatten()
            ).double(),
            nn.MSELoss(reduction="sum"),
            (rand(3, 1, 3, 3, 4), rand(3, 4)),
        ),
        "transposed convolution": Problem(
            nn.Sequential(
                nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1, output_padding=1),
                nn.Tanh(),
                nn.Flatten(),
                nn.Linear(32, 2),
            ).double(),
            nn.CrossEntropyLoss(),
            (rand(4, 2, 2, 2), torch.tensor([0, 1, 1, 0])),
        ),
        "embedding, logits": Problem(
            nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 1)).double(),
            nn.BCEWithLogitsLoss(),
            (torch.randint(5, (6, 3)), torch.randint(2, (6, 1)).double()),
        ),
    }


@pytest.mark.parametrize("name", list(_further()))
def test_further_layers(name, form) -> None:
    problem = _further()[name]
    d = dense_of(problem)
    for subsampling in (None, [2, 0]):
        case = setting_of(problem, criterion=top(4), damping=one)
        (place,) = case.places
        G = ggn(d, place, subsampling)
        (evals,) = case.run(EigvalshComputation(subsampling))
        reference = torch.linalg.eigvalsh(G)
        both = min(len(evals), len(reference))
        close(evals[-both:], reference[-both:])
        (step,) = case.run(DirectionalDampedNewtonComputation(None, subsampling))
        gradient = weight(d) * d.U.mean(1)
        expected = sum(
            -c.projector @ gradient / (c.value + 1.0) for c in clusters(G, top(4))
        )
        close(torch.cat([part.reshape(-1) for part in step]), expected)


# Monte Carlo --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "sigmoids"])
def test_many_monte_carlo_samples_come_near_the_exact_ggn(name) -> None:
    case, d = setting(name, criterion=keep_all), dense(name)
    ((evals, evecs),) = case.run(EighComputation(mc_samples=3000))
    E = flat(evecs)
    close(E.T @ (evals[:, None] * E), d.G, 0.05)


@pytest.mark.parametrize("mc_samples", [1, 3])
def test_monte_carlo_samples_in_all_four(mc_samples) -> None:
    """Of one draw, the four agree; any number of samples will do."""
    name, S = "sigmoids", [0, 3, 4]

    def run(make):
        torch.manual_seed(1)
        return setting(name, criterion=top(2), damping=one).run(make)[0]

    evals = run(EigvalshComputation(S, mc_samples))
    assert evals.shape == (mc_samples * len(S),)
    top_evals, evecs = run(EighComputation(S, mc_samples))
    close(evals[-2:], top_evals)
    gammas, lambdas = run(DirectionalDerivativesComputation(None, S, mc_samples))
    close(lambdas.mean(0), top_evals)
    d, E = dense(name), flat(evecs)
    close(gammas.abs(), (d.U.T @ E.T).abs())
    step = run(DirectionalDampedNewtonComputation(None, S, mc_samples))
    expected = -E.T @ ((E @ d.U.mean(1)) / (top_evals + 1))
    close(torch.cat([part.reshape(-1) for part in step]), expected)


# Against ViViT ------------------------------------------------------------------------


@pytest.fixture
def original(monkeypatch):
    """The classes of ViViT 1.0.0, with the function that torch has dropped."""
    pytest.importorskip("vivit", reason="vivit-for-pytorch is not installed")

    def symeig(A: Tensor, eigenvectors: bool = False, upper: bool = True):
        uplo = "U" if upper else "L"
        if eigenvectors:
            return torch.linalg.eigh(A, UPLO=uplo)
        return torch.linalg.eigvalsh(A, UPLO=uplo), None

    monkeypatch.setattr(Tensor, "symeig", symeig)
    return {
        cls.__name__: getattr(importlib.import_module("vivit"), cls.__name__)
        for cls in COMPUTATIONS
    }


@pytest.mark.parametrize(
    ("name", "grouping", "mc_samples"),
    pairwise([n for n in PROBLEMS if "sum" not in n], GROUPINGS, [0, 1]),
)
def test_equal_to_vivit(original, name, grouping, mc_samples) -> None:
    # Of equal eigenvalues (and of eigenvectors' signs) nothing can be compared.
    case = setting(name, grouping, criterion=top(10), damping=one)
    N = len(case.data[1])
    for cls in COMPUTATIONS:
        directional = issubclass(cls, COMPUTATIONS[2:])
        S = [N - 1, 0]
        arguments = ([0, 1], S, mc_samples) if directional else (S, mc_samples)
        torch.manual_seed(0)
        ours = case.run(cls(*arguments))
        torch.manual_seed(0)
        theirs = case.run(original[cls.__name__](*arguments))
        for a, b in zip(ours, theirs, strict=True):
            if cls is EigvalshComputation:
                close(a, b)
            elif cls is EighComputation:
                (evals, evecs), (reference, others) = a, b
                close(evals, reference)
                E, F = flat(evecs), flat(others)
                close(E.T @ E, F.T @ F)
            elif cls is DirectionalDerivativesComputation:
                close(a[1].mean(0), b[1].mean(0))
                close(a[0].square().sum(1), b[0].square().sum(1))
            else:
                for part, other in zip(a, b, strict=True):
                    close(part, other)


# Better than the original -------------------------------------------------------------


def _classifier(C: int, scale: float = 1.0) -> Problem:
    """Six samples, and more parameters than outputs."""
    torch.manual_seed(0)
    last = nn.Linear(9, C)
    nn.init.uniform_(last.weight, -scale, scale)
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), last).double()
    X = torch.rand(6, 7, dtype=torch.float64)
    return Problem(model, nn.CrossEntropyLoss(), (X, torch.randint(C, (6,))))


def _segmenter() -> Problem:
    """A class for each of two pixels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 2), nn.Tanh(), nn.Conv1d(4, 3, 2)).double()
    X = torch.rand(6, 2, 4, dtype=torch.float64)
    return Problem(model, nn.CrossEntropyLoss(), (X, torch.randint(3, (6, 2))))


@pytest.mark.parametrize("subsampling", (None, [4, 1]), ids=str)
@pytest.mark.parametrize("C, scale", [(4, 1.0), (4, 12.0), (2, 1.0), (1, 1.0)], ids=str)
def test_the_zeros_of_a_cross_entropy_are_not_computed(
    C, scale, subsampling, monkeypatch
) -> None:
    """Its Hessian has rank C − 1, also where a probability is nearly 1."""
    monkeypatch.setattr("vivit_linop.curvature.plan.TURNED_COLUMNS", 1)
    problem = _classifier(C, scale)
    case, d = setting_of(problem), dense_of(problem)
    (evals,) = case.run(EigvalshComputation(subsampling))
    samples = d.N if subsampling is None else len(subsampling)
    assert evals.shape == (samples * d.C,)
    everything = torch.arange(d.D)
    reference = torch.linalg.eigvalsh(ggn(d, everything, subsampling))
    close(evals, reference[-len(evals) :].clamp(min=0.0))
    assert (evals == 0).sum() >= samples


def test_pixels_have_a_cross_entropy_each(form) -> None:
    problem = _segmenter()
    d = dense_of(problem)
    (evals,) = setting_of(problem).run(EigvalshComputation())
    close(evals, torch.linalg.eigvalsh(d.G)[-d.N * 6 :])


@pytest.mark.parametrize("computation", COMPUTATIONS)
def test_targets_that_do_not_count_are_refused(computation) -> None:
    """BackPACK counts them as any others: eigenvalues were too large or too small."""
    problem = _classifier(3)
    X, y = problem.data
    ignored, heavy = y.clone(), 2.0 * nn.functional.one_hot(y, 3).double()
    ignored[2] = -100
    for target, match in ((ignored, "ignored"), (heavy, "sum to 1")):
        case = setting_of(
            Problem(problem.model, problem.loss, (X, target)),
            criterion=keep_all,
            damping=one,
        )
        with pytest.raises(NotImplementedError, match=match):
            case.run(computation())


def _overdetermined() -> Problem:
    """N·C = 24 columns for D = 8 parameters."""
    torch.manual_seed(0)
    X = torch.rand(12, 3, dtype=torch.float64)
    return Problem(
        nn.Linear(3, 2).double(), nn.MSELoss(), (X, torch.rand_like(X[:, :2]))
    )


def _repeated() -> Problem:
    """Each sample twice: the GGN has half the rank that it could have."""
    torch.manual_seed(0)
    X = torch.rand(3, 7, dtype=torch.float64).repeat(2, 1)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return Problem(model, nn.CrossEntropyLoss(), (X, torch.randint(3, (6,))))


@pytest.mark.parametrize("make", [_overdetermined, _repeated])
def test_all_directions_of_a_singular_gram_matrix(make, form) -> None:
    """ViViT: not orthogonal, NaN."""
    problem = make()
    d = dense_of(problem)
    case = setting_of(problem, criterion=keep_all, damping=one)
    ((evals, evecs),) = case.run(EighComputation())
    assert len(evals) == min(d.D, d.N * d.C)
    E = flat(evecs)
    close(E @ E.T, torch.eye(len(E), dtype=E.dtype))
    close(E @ d.G, evals[:, None] * E)
    ((gammas, lambdas),) = case.run(DirectionalDerivativesComputation())
    close(gammas.norm(dim=1), d.U.norm(dim=0))  # all slopes are in the span
    close(lambdas.mean(0), evals)
    (step,) = case.run(DirectionalDampedNewtonComputation())
    damped = d.G + torch.eye(d.D, dtype=d.G.dtype)
    gradient = d.gradient
    close(
        torch.cat([part.reshape(-1) for part in step]),
        -torch.linalg.solve(damped, gradient),
    )
