"""Parameters as vectors: derivatives pass, and what a risk shows carries no graph."""

import pytest
import torch
from torch import nn

import vivit_linop as vl
from tests.toys import random_vector, toy, use_everything

float64 = torch.float64


def make() -> tuple[nn.Module, vl.EmpiricalRisk]:
    net, loss, data = toy()
    return net, vl.EmpiricalRisk(net, loss, data)


def test_derivatives_pass_through_flatten_and_unflatten() -> None:
    net, risk = make()
    weights = random_vector(risk.num_params)
    vector = risk.flatten(net.parameters())
    (weights @ vector).backward()
    for p, expected in zip(net.parameters(), risk.unflatten(weights), strict=True):
        assert torch.equal(p.grad, expected)
    columns = [torch.stack([p, 2 * p]).detach() for p in net.parameters()]
    for column in columns:
        column.requires_grad_()
    product = vl.GGN(risk) @ risk.flatten(columns)
    product[0].sum().backward()
    assert all(column.grad is not None for column in columns)
    leaf = weights.clone().requires_grad_()
    risk.unflatten(leaf)[0].sum().backward()
    assert leaf.grad.sum() == risk.sizes[0]


def test_a_vector_of_parameters_times_an_operator() -> None:
    """‖θ‖²_G of the model's own parameters, and its gradient 2 G θ."""
    net, risk = make()
    G = vl.GGN(risk)
    vector = risk.flatten(net.parameters())
    (vector @ (G @ vector)).backward()
    found = risk.flatten([p.grad for p in net.parameters()])
    assert torch.allclose(found, 2 * (G @ vector.detach()))


def test_what_a_risk_shows_carries_no_graph() -> None:
    _, risk = make()
    assert not any(p.requires_grad for p in risk.params.values())
    moved = risk.at(random_vector(risk.num_params))
    assert not any(p.requires_grad for p in moved.params.values())
    assert torch.equal(moved.flatten(moved.params), random_vector(risk.num_params))
    assert not any(output.requires_grad for output in risk.outputs)
    for result in use_everything(risk):
        assert not result.requires_grad
    assert not risk.flatten(risk.params).requires_grad


def test_lists_of_tensors_say_what_to_do() -> None:
    net, risk = make()
    G, J = vl.GGN(risk), vl.Jacobian(risk)
    tensors = list(net.parameters())
    for wrong in (tensors, tuple(tensors), net.parameters(), dict(risk.params)):
        for multiply in (G.__matmul__, J.__matmul__, G.matvec, G.dot):
            with pytest.raises(TypeError, match=r"x: .*risk\.flatten\(tensors\)"):
                multiply(wrong)
        if not isinstance(wrong, (list, tuple)):
            wrong = net.parameters()
        with pytest.raises(TypeError, match=r"x: .*risk\.flatten\(tensors\)"):
            _ = wrong @ G
    # A list of numbers is a vector.
    numbers = [1.0] * risk.num_params
    assert (G @ numbers).shape == (risk.num_params,)
    zeros = [torch.zeros(()) for _ in numbers]
    assert (G @ zeros == 0).all()
