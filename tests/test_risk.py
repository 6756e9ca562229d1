"""The risk against dense matrices and plain torch: values, vectors, subsets."""

import gc
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import vivit_linop as vl
from tests.cases import NAMES, Lambda, dense, mlp, problem
from tests.curvature_cases import fresh, risk_of
from tests.pairs import in_turn
from tests.toys import random_vector, toy, use_everything

# Values -------------------------------------------------------------------------------


# All of them in float64: test_invariance.py.
@pytest.mark.parametrize(
    ("name", "dtype"), in_turn(NAMES, [torch.float64, torch.float32]), ids=str
)
def test_value_gradient_and_sizes(name: str, dtype: torch.dtype) -> None:
    case, truth = problem(name, dtype), dense(name)
    risk = risk_of(case)
    assert (risk.num_params, risk.num_samples) == (truth.D, truth.N)
    assert risk.num_outputs == truth.C
    assert list(risk.params) == list(case.chosen())
    rtol = 1e-12 if dtype == torch.float64 else case.rtol32
    value, gradient = risk.value(), risk.gradient()
    assert value.shape == () and value.dtype == gradient.dtype == dtype
    assert abs(value.double() - truth.value) <= rtol * (1.0 + abs(truth.value))
    # Where gradients of samples cancel, their size is what rounding goes by.
    size = truth.r * truth.U.norm() * truth.N**0.5
    assert (gradient.double() - truth.gradient).norm() <= rtol * size
    assert not gradient.requires_grad and not value.requires_grad


@pytest.mark.parametrize(
    ("loss", "make_target"),
    [
        (nn.MSELoss(), lambda f: f.sin()),
        (nn.MSELoss(reduction="sum"), lambda f: f.sin()),
        (nn.CrossEntropyLoss(), lambda f: f.argmin(1)),
        (nn.CrossEntropyLoss(reduction="sum"), lambda f: f.argmin(1)),
        (nn.BCEWithLogitsLoss(), lambda f: (f > 0.1).double()),
        (nn.HuberLoss(), lambda f: f.sin()),
    ],
)
def test_per_sample_gradients_are_those_of_torch(loss: Any, make_target: Any) -> None:
    """∇ℓ_n is what torch gives for sample n alone."""
    net, _, (X, _) = toy()
    y = make_target(net(X).detach())
    risk = vl.EmpiricalRisk(net, loss, (X, y))
    U = vl.PerSampleGradients(risk).to_dense()
    for n in range(len(X)):
        single = loss(net(X[n : n + 1]), y[n : n + 1])
        gradient = torch.cat(
            [g.reshape(-1) for g in torch.autograd.grad(single, list(net.parameters()))]
        )
        torch.testing.assert_close(U[:, n], gradient, rtol=1e-12, atol=1e-14)


def test_uneven_batches_are_one_mean() -> None:
    # Not the mean of the batches' means.
    net, loss, (X, y) = toy(7)
    whole = loss(net(X), y).detach()
    for sizes in ([3, 4], [6, 1], [1] * 7):
        batches = list(zip(X.split(sizes), y.split(sizes), strict=True))
        risk = vl.EmpiricalRisk(net, loss, batches)
        torch.testing.assert_close(risk.value(), whole, rtol=1e-13, atol=0.0)
        assert risk.batch_sizes == sizes


# Parameters as vectors ----------------------------------------------------------------


@pytest.mark.parametrize("columns", [(), (1,), (3,)])
@pytest.mark.parametrize(
    "name", ["mlp_ce_mean", "callable_model", "noncontiguous_parameters", "cnn"]
)
def test_flatten_and_unflatten(name: str, columns: tuple[int, ...]) -> None:
    case = problem(name)
    risk = risk_of(case)
    vector = random_vector(risk.num_params, *columns)
    tensors = risk.unflatten(vector)
    shapes = [(*columns, *p.shape) for p in case.chosen().values()]
    assert [tuple(t.shape) for t in tensors] == shapes
    assert torch.equal(risk.flatten(tensors), vector)
    named = dict(zip(reversed(risk.params), reversed(tensors), strict=True))
    assert torch.equal(risk.flatten(named), vector)
    # The order is that of the parameters, each row-major.
    flat = torch.cat([p.detach().reshape(-1) for p in case.chosen().values()])
    assert torch.equal(risk.flatten(risk.params), flat)
    assert torch.equal(risk.flatten(iter(risk.params.values())), flat)
    if columns:
        for k in range(*columns):
            single = risk.unflatten(vector[:, k])
            assert all(
                torch.equal(t[k], s) for t, s in zip(tensors, single, strict=True)
            )


def test_flatten_takes_none_for_zeros() -> None:
    risk = vl.EmpiricalRisk(*toy())
    gradients: list[Tensor | None] = [p.detach() for p in risk.params.values()]
    gradients[1] = None
    flat = risk.flatten(gradients)
    assert torch.equal(risk.unflatten(flat)[1], torch.zeros(5, dtype=torch.float64))
    assert torch.equal(risk.unflatten(flat)[2], gradients[2])


def test_gradient_is_that_of_torch() -> None:
    net, loss, data = toy()
    risk = vl.EmpiricalRisk(net, loss, data)
    loss(net(data[0]), data[1]).backward()
    expected = risk.flatten([p.grad for p in net.parameters()])
    torch.testing.assert_close(risk.gradient(), expected, rtol=1e-13, atol=1e-15)


# Subsets ------------------------------------------------------------------------------


@pytest.mark.parametrize("indices", [[4, 0], [2], [5, 4, 3, 2, 1, 0]])
@pytest.mark.parametrize(
    "name", ["mlp_ce_mean", "mlp_mse_sum", "uneven_batches", "ce_everything", "poisson"]
)
def test_subset(name: str, indices: list[int]) -> None:
    case = problem(name)
    if name == "ce_everything":
        indices = [i for i in indices if i != 4] or [0]  # never all ignored
    if name == "poisson":
        indices = [i for i in indices if i < 5]
    whole = risk_of(case)
    part = whole.subset(indices)
    batches = case.batches()
    X = torch.cat([X for X, _ in batches])[indices]
    y = torch.cat([y for _, y in batches])[indices]
    expected = risk_of(replace(case, data=(X, y)))
    assert part.num_samples == len(indices)
    for got, want in zip(
        use_everything(part)[:11], use_everything(expected)[:11], strict=True
    ):
        # Bases of an eigenspace may differ, so the step is compared with k=2 distinct.
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    J, order = vl.Jacobian(whole).to_dense(), torch.tensor(indices)
    rows = J.reshape(whole.num_samples, -1, whole.num_params)[order].flatten(0, 1)
    torch.testing.assert_close(
        vl.Jacobian(part).to_dense(), rows, rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
def test_subset_of_a_mask(make: Any) -> None:
    whole = fresh("uneven_batches")
    chosen = [n % 3 == 1 for n in range(whole.num_samples)]
    J = vl.Jacobian(whole).to_dense().unflatten(0, (whole.num_samples, -1))
    found = vl.Jacobian(whole.subset(make(chosen))).to_dense()
    torch.testing.assert_close(found, J[torch.tensor(chosen)].flatten(0, 1))


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array, range])
def test_subset_indices_of_all_kinds(kind: Any) -> None:
    risk = vl.EmpiricalRisk(*toy())
    indices = range(1, 3) if kind is range else kind([1, 2])
    expected = risk.subset([1, 2])
    assert torch.equal(risk.subset(indices).gradient(), expected.gradient())


def test_subset_of_subset_and_of_inputs_with_several_leaves() -> None:
    for name in ("mapping_input", "tuple_input"):
        whole, truth = fresh(name), dense(name)
        part = whole.subset([3, 1, 4]).subset([2, 0])  # samples 4 and 3
        U = vl.PerSampleGradients(part).to_dense()
        if truth.r == 1.0 or name == "mapping_input":
            torch.testing.assert_close(U, truth.U[:, [4, 3]], rtol=1e-12, atol=1e-14)
        J = truth.J.reshape(truth.N, truth.C, truth.D)[[4, 3]].flatten(0, 1)
        torch.testing.assert_close(
            vl.Jacobian(part).to_dense(), J, rtol=1e-12, atol=1e-14
        )


def test_subset_across_batches_with_a_leaf_without_samples() -> None:
    # Two samples come from a batch, and the shared leaf has two entries.
    generator = torch.Generator().manual_seed(0)
    shift = torch.randn(2, generator=generator).double()
    net = Lambda(lambda m, x, s: m.layer(x + s), layer=nn.Linear(2, 2)).double()
    batches = []
    for _ in range(2):
        X = torch.randn(4, 2, generator=generator).double()
        batches.append(((X, shift), torch.randint(2, (4,), generator=generator)))
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), batches)
    part = risk.subset([0, 1, 6])
    rows = vl.Jacobian(risk).to_dense().reshape(8, 2, -1)[[0, 1, 6]].flatten(0, 1)
    torch.testing.assert_close(
        vl.Jacobian(part).to_dense(), rows, rtol=1e-12, atol=1e-14
    )
    gram = (vl.Jacobian(part) @ vl.Jacobian(part).T).to_dense()
    torch.testing.assert_close(gram, rows @ rows.T, rtol=1e-12, atol=1e-14)


# Inputs whose leaves look as if they counted samples ----------------------------------


def _shared_leaf(N: int) -> tuple[nn.Module, Any, Tensor]:
    """A leaf without sample axis that is as long as there are samples."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(N, N, generator=generator).double()
    shift = torch.randn(N, generator=generator).double()
    net = Lambda(lambda m, x, s: m.layer(x + s), layer=nn.Linear(N, 2)).double()
    return net, (X, shift), torch.randint(2, (N,), generator=generator)


@pytest.mark.parametrize("memory", [None, 2 * 8 * 2 * 8 * 3])
def test_shared_leaf_as_long_as_a_batch_is_not_cut(memory: int | None) -> None:
    """It must be right, or refused: a shift [d] broadcasts also when it is cut."""
    net, (X, shift), y = _shared_leaf(4)

    def model(m: Any, x: Tensor) -> Tensor:
        return m.inner(x, shift)

    try:
        risk = vl.EmpiricalRisk(
            net, nn.CrossEntropyLoss(), ((X, shift), y), memory=memory
        )
        gram = (vl.Jacobian(risk) @ vl.Jacobian(risk).T).to_dense()
    except ValueError:
        return
    closed = vl.EmpiricalRisk(
        Lambda(model, inner=net).double(), nn.CrossEntropyLoss(), (X, y)
    )
    expected = vl.Jacobian(closed).to_dense()
    torch.testing.assert_close(gram, expected @ expected.T, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("memory", [0, 500, 1000, None])
def test_shared_leaf_as_long_as_a_piece_of_a_batch(memory: int | None) -> None:
    # Gram matrices may be made of some samples at a time; shared leaves stay whole.
    generator = torch.Generator().manual_seed(0)
    for length in (1, 2, 3):
        X = torch.randn(5, length, generator=generator).double()
        shift = torch.randn(length, generator=generator).double()
        net = Lambda(lambda m, x, s: m.layer(x * s), layer=mlp(length, 3, 2)).double()
        data = ((X, shift), torch.randint(2, (5,), generator=generator))
        risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), data, memory=memory)
        J = vl.Jacobian(risk)
        unit = torch.eye(risk.num_params, dtype=torch.float64)
        rows = J @ unit  # by products, which see whole batches
        gram = (J @ J.T).to_dense()
        torch.testing.assert_close(gram, rows @ rows.T, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(J.to_dense(), rows, rtol=1e-12, atol=1e-14)


# Forms of data ------------------------------------------------------------------------


class Counting(Dataset):
    """A dataset that counts how often it is read."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors, self.reads = tensors, 0

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        self.reads += 1
        return tuple(t[index] for t in self.tensors)


# Memory -------------------------------------------------------------------------------


def test_a_risk_can_be_freed() -> None:
    net, loss, data = toy()
    risk = vl.EmpiricalRisk(net, loss, data)
    use_everything(risk)
    alive = weakref.ref(risk)
    del risk
    gc.collect()
    assert alive() is None


def test_data_are_read_no_more_often_than_needed() -> None:
    # Kept linearisations and columns spare passes over the data.
    net, loss, (X, y) = toy()
    dataset = Counting(X, y)
    loader = DataLoader(dataset, batch_size=4)
    vl.EmpiricalRisk(net, loss, loader)
    assert dataset.reads == 12
    risk = vl.EmpiricalRisk(net, loss, loader, check_data=False)
    assert dataset.reads == 18
    x = random_vector(risk.num_params)
    vl.GGN(risk) @ x
    vl.Jacobian(risk) @ x
    first = dataset.reads
    vl.GGN(risk) @ x
    vl.Jacobian(risk) @ x
    assert dataset.reads == first
