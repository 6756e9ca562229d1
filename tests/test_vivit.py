"""The drop-in for ViViT: against dense references, ViViT itself, and its failures."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings

import pytest
import torch
from backpack import backpack, extend
from torch import Tensor, nn
from torch.testing import assert_close

import vivit_linop as vl
from tests.cases import Problem, dense_of
from tests.vivit_cases import (
    GROUPINGS,
    PROBLEMS,
    clusters,
    dense,
    ggn,
    keep_all,
    keep_nonzero,
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
    computations,
)

SUBSAMPLINGS = (None, [1, 0])
COMPUTATIONS = (
    EigvalshComputation,
    EighComputation,
    DirectionalDerivativesComputation,
    DirectionalDampedNewtonComputation,
)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Some of the chosen eigenvalues"),
    # BackPACK's hooks, on a first layer whose input needs no gradient.
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]


@pytest.fixture(params=["formed", "structured"])
def form(request, monkeypatch) -> str:
    """Both ways for small problems: V formed, and V in the structure of its layers."""
    if request.param == "structured":
        monkeypatch.setattr(computations, "_FORMED_ENTRIES", 0)
    return request.param


def one(evals: Tensor, *_: Tensor) -> Tensor:
    return torch.ones_like(evals)


def close(value: Tensor, reference: Tensor, tolerance: float = 1e-9) -> None:
    """Compare in the norm."""
    assert value.shape == reference.shape
    scale = reference.norm().clamp(min=1e-3)
    assert (value - reference).norm() <= tolerance * scale


def flat(vectors: list[Tensor]) -> Tensor:
    """Vectors in parameter format as rows, ``[K, d]``."""
    return torch.cat([part.flatten(1) for part in vectors], dim=1)


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


@pytest.mark.parametrize("criterion", [keep_all, keep_nonzero])
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_eigenpairs(name, subsampling, grouping, criterion, monkeypatch) -> None:
    if subsampling is None:
        monkeypatch.setattr(computations, "_FORMED_ENTRIES", 0)
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


@pytest.mark.parametrize("grouping", GROUPINGS[:2])
@pytest.mark.parametrize("sub_ggn", (None, [0, 1]), ids=str)
@pytest.mark.parametrize("sub_grad", (None, [0, 1]), ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_derivatives_and_steps(name, sub_grad, sub_ggn, grouping, monkeypatch) -> None:
    d = dense(name)
    if sub_grad is None:  # for half of the cases
        monkeypatch.setattr(computations, "_FORMED_ENTRIES", 0)
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
    torch.manual_seed(0)
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


@pytest.mark.parametrize("mc_samples", [0, 1])
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("name", [n for n in PROBLEMS if "sum" not in n])
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


def test_a_hook_used_twice_gives_the_new_result() -> None:
    """ViViT returns the result of the first pass."""
    case = setting("mlp", criterion=top(1), damping=one)
    for cls in COMPUTATIONS:
        computation = cls()
        extensions = (
            [computation.get_extension()]
            if hasattr(computation, "get_extension")
            else computation.get_extensions()
        )
        hook = computation.get_extension_hook(case.groups)
        X, y = case.data
        results = []
        for scale in (1.0, 2.0):
            case.data = scale * X, y
            case.backward(extensions, hook)
            results.append(computation.get_result(case.groups[0]))
        (anew,) = case.run(cls())
        case.data = X, y
        new, old = results[1], results[0]
        if cls is EigvalshComputation:
            close(new, anew)
            assert (new - old).norm() > 0.1 * new.norm()
        else:
            assert_close(new, anew)
            assert (new[0] - old[0]).norm() > 0.01 * new[0].norm()


def test_a_computation_used_again_scales_with_the_new_number_of_samples() -> None:
    """ViViT keeps the first N for groups that do not hold the first layer."""
    case = setting("sigmoids", "each")
    computation = EigvalshComputation(subsampling=[0, 1])
    group = case.groups[0]
    case.run(computation, [group])
    X, y = case.data
    case.data = X[:3], y[:3]
    (again,) = case.run(computation, [group])
    (anew,) = case.run(EigvalshComputation(subsampling=[0, 1]), [group])
    close(again, anew)


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


@pytest.mark.parametrize("cls", COMPUTATIONS)
@pytest.mark.parametrize("indices", [[], [1, 1]], ids=str)
def test_wrong_subsampling_is_found_at_construction(cls, indices) -> None:
    with pytest.raises(ValueError, match="subsampling"):
        cls(indices)


def test_subsampling_is_checked_for_gradients_and_ggn() -> None:
    for name in ("subsampling_grad", "subsampling_ggn"):
        with pytest.raises(ValueError, match=name):
            DirectionalDerivativesComputation(**{name: []})
    with pytest.raises(TypeError, match="subsampling"):
        EigvalshComputation([0.5])


@pytest.mark.parametrize("cls", COMPUTATIONS)
@pytest.mark.parametrize("indices", [[-1, 3], [4], [-5, 0]], ids=str)
def test_wrong_subsampling_is_found_where_the_pass_begins(cls, indices) -> None:
    case = setting("convolution", criterion=top(1), damping=one)
    with pytest.raises(ValueError, match="subsampling"):
        case.run(cls(indices))


def test_negative_indices_count_from_the_end() -> None:
    (evals,) = setting("convolution").run(EigvalshComputation([-1, 0]))
    for indices in ([3, 0], torch.tensor([3, 0]), range(0, 4, 3)):
        (same,) = setting("convolution").run(EigvalshComputation(indices))
        close(evals, same)


@pytest.mark.parametrize("mc_samples", [-1, 0.5, True])
def test_wrong_numbers_of_samples(mc_samples) -> None:
    with pytest.raises(ValueError, match="mc_samples"):
        EighComputation(mc_samples=mc_samples)
    with pytest.raises(ValueError, match="mc_samples_ggn"):
        DirectionalDampedNewtonComputation(mc_samples_ggn=mc_samples)


def test_nothing_is_left_of_parameters_outside_all_groups() -> None:
    """ViViT leaves the columns of V on them."""
    for cls in COMPUTATIONS:
        case = setting("mlp", "each", criterion=top(1), damping=one)
        case.run(cls(), case.groups[:1])
        for param in case.model.parameters():
            assert not vars(param)


def test_nothing_is_kept_of_a_complete_group() -> None:
    case = setting("convolution", criterion=top(1), damping=one)
    for cls in COMPUTATIONS:
        computation = cls()
        many = hasattr(computation, "get_extensions")
        extensions = (
            computation.get_extensions() if many else [computation.get_extension()]
        )
        hook = computation.get_extension_hook(case.groups)
        case.backward(extensions, hook)
        (block,) = hook._blocks
        assert set(block.collected.values()) == {None}
        assert not any(vars(param) for param in case.model.parameters())


@pytest.mark.parametrize("cls", COMPUTATIONS)
def test_batch_norm_in_training_mode_is_an_error(cls) -> None:
    case = setting("batch norm 1d", criterion=top(1), damping=one)
    case.model.train()
    with pytest.raises(NotImplementedError, match="BatchNorm"):
        case.run(cls())


@pytest.mark.parametrize("cls", COMPUTATIONS)
def test_wrong_groups(cls) -> None:
    case = setting("mlp", criterion=top(1), damping=one)
    (group,) = case.groups
    for key in cls._keys:
        lacking = {k: v for k, v in group.items() if k != key}
        with pytest.raises(ValueError, match=f"'{key}'"):
            cls().get_extension_hook([lacking])
    with pytest.raises(ValueError, match="as well"):
        cls().get_extension_hook([group, {**group, "params": [group["params"][0]]}])
    with pytest.raises(ValueError, match="empty"):
        cls().get_extension_hook([{**group, "params": []}])
    group["params"][2].requires_grad_(False)
    with pytest.raises(ValueError, match=r"\['params'\]\[2\]: of shape \[5, 6\].*froz"):
        cls().get_extension_hook([group])


def test_groups_without_results() -> None:
    case = setting("mlp")
    computation = EigvalshComputation()
    with pytest.raises(KeyError, match="No results"):
        computation.get_result(case.groups[0])
    case.run(computation)
    with pytest.raises(KeyError, match="No results"):
        computation.get_result(dict(case.groups[0]))
    stranger = nn.Parameter(torch.rand(3, 3))
    group = {"params": [*case.groups[0]["params"], stranger]}
    with pytest.raises(KeyError, match=r"parameters 4 \(of shape \[3, 3\]\)"):
        case.run(computation, [group])


def test_a_forgotten_extension_is_an_error() -> None:
    case = setting("mlp")
    hook = EigvalshComputation().get_extension_hook(case.groups)
    with pytest.raises(RuntimeError, match="extension"):
        case.backward([], hook)


def test_small_eigenvalues_are_warned_of() -> None:
    case = setting("mlp", criterion=keep_all)
    with pytest.warns(UserWarning, match="warn_small_eigvals"):
        case.run(EighComputation())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "Full backward hook")
        case.run(EighComputation(warn_small_eigvals=0))
        setting("mlp", criterion=top(1)).run(EighComputation())


def test_verbose_says_what_happens(capsys) -> None:
    case = setting("mlp", criterion=top(1), damping=one)
    for cls in COMPUTATIONS:
        case.run(cls())
        assert not capsys.readouterr().out
        case.run(cls(verbose=True))
        assert "Group 0: complete" in capsys.readouterr().out


# The same in the algebra --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_algebra_gives_the_same(dtype) -> None:
    torch.manual_seed(0)
    X, y = torch.rand(6, 7, dtype=dtype), torch.randint(4, (6,))
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 4)).to(dtype)
    loss = nn.CrossEntropyLoss()
    risk = vl.EmpiricalRisk(model, loss, (X, y))
    pairs = vl.GGN(risk).eigh(k=3)
    gammas, lambdas = vl.directional_derivatives(risk, pairs)
    step = vl.damped_newton_step(risk, pairs, 1.0)

    case = setting_of(
        Problem(model, loss, (X, y)),
        criterion=lambda evals: list(range(len(evals) - 3, len(evals))),
        damping=one,
    )
    ((evals, evecs),) = case.run(EighComputation())
    ((slopes, curvatures),) = case.run(DirectionalDerivativesComputation())
    (parts,) = case.run(DirectionalDampedNewtonComputation())
    tolerance = 1e-3 if dtype == torch.float32 else 1e-9
    assert evals.dtype == slopes.dtype == parts[0].dtype == dtype
    close(evals, pairs.eigenvalues, tolerance)
    close(flat(evecs).abs(), pairs.eigenvectors.T.abs(), tolerance)
    close(slopes.abs(), gammas.abs(), tolerance)
    close(curvatures, lambdas, tolerance)
    close(torch.cat([part.reshape(-1) for part in parts]), step, tolerance)


def test_other_extensions_work_beside_it() -> None:
    from backpack.extensions import DiagGGNExact

    case, name = setting("mlp"), "mlp"
    computation = EigvalshComputation()
    hook = computation.get_extension_hook(case.groups)
    case.backward([DiagGGNExact(), computation.get_extension()], hook)
    evals = computation.get_result(case.groups[0])
    diagonal = [p.diag_ggn_exact.reshape(-1) for p in case.model.parameters()]
    close(evals.sum(), torch.cat(diagonal).sum())
    close(torch.cat(diagonal), dense(name).G.diagonal())


def test_the_package_does_not_import_backpack_or_curvlinops() -> None:
    code = "import sys, vivit_linop; print({'backpack', 'curvlinops'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


def test_gradients_are_accumulated_as_ever() -> None:
    model, loss = extend(nn.Linear(3, 2)), extend(nn.MSELoss())
    X, y = torch.rand(4, 3), torch.rand(4, 2)
    loss(model(X), y).backward()
    reference = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    computation = EigvalshComputation()
    group = {"params": list(model.parameters())}
    hook = computation.get_extension_hook([group])
    with backpack(computation.get_extension(), extension_hook=hook):
        loss(model(X), y).backward()
    assert_close([p.grad for p in model.parameters()], reference)
