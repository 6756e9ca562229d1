"""The drop-in where the original fails, warns or leaves something behind."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from backpack import backpack, extend
from torch import nn
from torch.testing import assert_close

import vivit_linop as vl
from tests.cases import Problem
from tests.vivit_cases import (
    COMPUTATIONS,
    close,
    dense,
    flat,
    keep_all,
    one,
    setting,
    setting_of,
    top,
)
from vivit_linop.vivit import (
    DirectionalDampedNewtonComputation,
    DirectionalDerivativesComputation,
    EighComputation,
    EigvalshComputation,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Some of the chosen eigenvalues"),
    # BackPACK's hooks, on a first layer whose input needs no gradient.
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]


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


@pytest.mark.parametrize("cls", COMPUTATIONS)
@pytest.mark.parametrize("indices", [[], [1, 1]], ids=str)
def test_wrong_subsampling_is_found_at_construction(cls, indices) -> None:
    with pytest.raises(ValueError, match="subsampling"):
        cls(indices)


def test_subsampling_is_checked_for_gradients_and_ggn() -> None:
    for name in ("subsampling_grad", "subsampling_ggn"):
        with pytest.raises(ValueError, match=name):
            DirectionalDerivativesComputation(**{name: []})
    mask = [True, False]
    for wrong in ([0.5], mask, torch.tensor(mask), np.array(mask), 3):
        with pytest.raises(TypeError, match="subsampling: indices of samples"):
            EigvalshComputation(wrong)


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
    for groups in (group, group["params"], [group["params"]]):
        with pytest.raises(TypeError, match=r"^param_groups\[0\]: a dictionary with"):
            cls().get_extension_hook(groups)
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
    with pytest.raises(KeyError, match=r"parameters 4 \(of shape \[3, 3\]\).*extended"):
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
