"""Two threads that overlap: what is one for the process is what it was before."""

from __future__ import annotations

import queue
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from backpack import extensions
from torch import Tensor, nn

import vivit_linop as vl
from tests.toys import random_vector, toy
from vivit_linop.modes import as_guest

# What a thread waits for another one that may be locked out, in seconds.
WHILE = 0.3


# What a thread does when it is next asked.
TO_DO = threading.local()


def step(*_: Any) -> None:
    vars(TO_DO).pop("next", lambda: None)()


class Halting(torch.autograd.Function):
    """The identity; its backward pass does what the thread has to do."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        step()
        return gradients[0] * 1.0


@pytest.mark.host("passes run in threads of autograd's elsewhere")
def test_filters_of_warnings_are_those_of_before() -> None:
    """The first of two passes ends while the second goes on."""
    net, loss, data = toy()
    model = nn.Sequential(*net)
    model.register_forward_hook(lambda m, args, out: Halting.apply(out))
    risk = vl.EmpiricalRisk(model, loss, data)
    J, U = vl.Jacobian(risk), random_vector(risk.num_rows, 2)
    expected = J.T @ U
    inside, ended = threading.Event(), threading.Event()

    def second() -> Tensor:
        TO_DO.next = lambda: (inside.set(), ended.wait(10))
        return J.T @ U

    with ThreadPoolExecutor(1) as pool, warnings.catch_warnings():
        warnings.simplefilter("error", ImportWarning)
        before, later = list(warnings.filters), []

        def start() -> None:
            later.append(pool.submit(second))
            assert inside.wait(10)

        TO_DO.next = start
        found = [J.T @ U]
        ended.set()
        found.append(later[0].result())
        assert list(warnings.filters) == before
    for each in found:
        torch.testing.assert_close(each, expected)


class Scaled(vl.TorchLinearOperator):
    """A diagonal; products do something before."""

    self_adjoint = True

    def __init__(self, first: Callable[[], object]) -> None:
        super().__init__((9, 9), torch.float64)
        self._first = first

    def _multiply(self, X: Tensor) -> Tensor:
        self._first()
        return torch.linspace(1, 2, 9, dtype=torch.float64)[:, None] * X


@pytest.mark.parametrize("seed", [0, 3])
def test_random_numbers_of_a_density_are_its_own(seed: int) -> None:
    """A guest that comes meanwhile and stays longer puts back the user's."""
    guest = as_guest(torch.device("cpu"))
    with ThreadPoolExecutor(1) as pool:
        comes = [guest.__enter__]
        op = Scaled(lambda: comes and pool.submit(comes.pop()).result())
        before = torch.get_rng_state()
        found = vl.LanczosSpectrum(op, 4, seed=seed).density(5, 2)
        pool.submit(guest.__exit__, None, None, None).result()
    assert torch.equal(torch.get_rng_state(), before)
    expected = vl.LanczosSpectrum(Scaled(lambda: None), 4, seed=seed).density(5, 2)
    torch.testing.assert_close(found[1], expected[1])


def test_labels_are_drawn_by_one_thread_at_a_time() -> None:
    """Of torch's own generator, in the state that the first draw is to have."""
    net, _, data = toy()
    # Which a risk does not take a copy of, as of lists.
    meanwhile = queue.SimpleQueue[threading.Thread]()

    def sample(output: Tensor, target: Tensor, draws: Any) -> Tensor:
        if not meanwhile.empty():
            other = meanwhile.get()
            other.start()
            other.join(WHILE)
        return output + torch.randn_like(output)

    def value(output: Tensor, target: Tensor) -> Tensor:
        return 0.5 * (output - target).square().sum(1)

    loss, y = vl.Loss(value, sample=sample), random_vector(len(data[1]), 3)
    risk = vl.EmpiricalRisk(net, loss, (data[0], y))

    def drawn(seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return vl.GGN(risk, mc_samples=1, generator=generator).to_dense()

    expected = drawn()
    other = threading.Thread(target=drawn, args=(1,))
    meanwhile.put(other)
    found = drawn()
    other.join()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def _stepping(kind: type) -> Any:
    """Return an extension that takes a step where it computes something."""

    class Stepping(kind):
        def __call__(self, *args: Any) -> Any:
            step()
            return super().__call__(*args)

    return Stepping()


def test_extensions_of_backpack_run_in_one_thread_at_a_time() -> None:
    net, loss, data = toy()
    risk = vl.EmpiricalRisk(net, loss, data)
    kinds = [_stepping(extensions.DiagHessian), _stepping(extensions.DiagGGNExact)]
    x = random_vector(risk.num_params)
    expected = [vl.from_backpack(risk, kind) @ x for kind in kinds]
    started, ended = threading.Event(), threading.Event()

    def second() -> Tensor:
        TO_DO.next = lambda: (started.set(), ended.wait(WHILE))
        return vl.from_backpack(risk, kinds[1]) @ x

    with ThreadPoolExecutor(1) as pool:
        later: list[Any] = []
        TO_DO.next = lambda: (
            later.append(pool.submit(second)),
            started.wait(WHILE),
        )
        found = [vl.from_backpack(risk, kinds[0]) @ x]
        ended.set()
        found.append(later[0].result())
    torch.testing.assert_close(found, expected)
