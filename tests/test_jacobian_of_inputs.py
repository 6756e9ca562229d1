"""``vl.Jacobian(model, X)``: without a loss and without targets."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vivit_linop as vl
from tests.curvature_cases import close
from tests.toys import toy

float64 = torch.float64


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 3, dtype=float64), nn.Linear(4, 3, dtype=float64)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.a(left) * self.b(right).tanh()


@pytest.mark.parametrize("dtype, rtol", [(float64, 1e-12), (torch.float32, 1e-5)])
def test_of_a_tensor_a_list_and_a_loader(dtype: torch.dtype, rtol: float) -> None:
    net, loss, (X, y) = toy()
    expected = vl.Jacobian(net, loss, (X, y)).to_dense()
    net, X = net.to(dtype), X.to(dtype)
    loader = DataLoader(TensorDataset(X), batch_size=4)
    for inputs in (X, [X[:2], X[2:]], loader, {"input": X}, (X,)):
        J = vl.Jacobian(net, inputs)
        assert J.torch_dtype == dtype
        assert close(J.to_dense(), expected, rtol)
        assert close((J @ J.T).to_dense(), expected @ expected.T, rtol)


def test_of_several_inputs_and_some_parameters() -> None:
    net = TwoInputs()
    left, right = torch.rand(5, 2, dtype=float64), torch.rand(5, 4, dtype=float64)
    data = ((left, right), torch.zeros(5, 3, dtype=float64))
    expected = vl.Jacobian(net, nn.MSELoss(), data).to_dense()
    for inputs in ((left, right), {"left": left, "right": right}):
        assert close(vl.Jacobian(net, inputs).to_dense(), expected)
    some = vl.Jacobian(net, (left, right), params=net.a.parameters())
    assert close(some.to_dense(), expected[:, :9])


def test_the_model_stays_as_it_is() -> None:
    net, _, (X, _) = toy()
    before = [p.clone() for p in net.parameters()]
    J = vl.Jacobian(net, X)
    assert (J.T @ torch.ones(J.shape[0], dtype=float64)).shape == (J.shape[1],)
    assert all(map(torch.equal, before, net.parameters()))
    assert all(p.grad is None for p in net.parameters())


def test_there_is_no_loss_to_ask_for() -> None:
    net, _, (X, _) = toy()
    risk = vl.Jacobian(net, X).risk
    for make in (vl.GGN, vl.LossHessian, vl.GGNFactor):
        with pytest.raises(ValueError, match="loss: there is none"):
            make(risk)
    for ask in (
        risk.gradient,
        lambda: vl.PerSampleGradients(risk) @ torch.ones(6, dtype=float64),
        lambda: vl.Hessian(risk) @ torch.ones(risk.num_params, dtype=float64),
        lambda: vl.EmpiricalFisher(risk).eigvalsh(),
    ):
        with pytest.raises(ValueError, match="loss: there is none"):
            ask()


def test_what_is_refused() -> None:
    net, loss, (X, y) = toy()
    with pytest.raises(TypeError, match="risk: with an EmpiricalRisk"):
        vl.Jacobian(vl.EmpiricalRisk(net, loss, (X, y)), X)
    with pytest.raises(TypeError, match="risk: an EmpiricalRisk, or a model with a"):
        vl.Jacobian(net, loss)
    with pytest.raises(TypeError, match="inputs: a tensor, a tuple"):
        vl.Jacobian(net, 3)
    with pytest.raises(ValueError, match="only once"):
        vl.Jacobian(net, iter([X]))
    with pytest.raises(TypeError, match="inputs: a batch must hold tensors"):
        vl.Jacobian(net, ["text"])


class SeveralOutputs(nn.Module):
    def __init__(self, container: type) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 3, dtype=float64), nn.Linear(2, 1, dtype=float64)
        self.container = container

    def forward(self, X: Tensor) -> object:
        outputs = self.a(X).tanh(), self.b(X).exp()
        if self.container is dict:
            return {"mean": outputs[0], "variance": outputs[1]}
        return outputs


@pytest.mark.parametrize("container", [tuple, dict])
def test_of_a_model_with_several_outputs(container: type) -> None:
    net, X = SeveralOutputs(container), torch.rand(5, 2, dtype=float64)
    params = {name: p.detach() for name, p in net.named_parameters()}

    def outputs(params: dict[str, Tensor]) -> Tensor:
        found = torch.func.functional_call(net, params, (X,))
        parts = found.values() if isinstance(found, dict) else found
        return torch.cat(list(parts), dim=1).flatten()

    blocks = torch.func.jacrev(outputs)(params)
    expected = torch.cat([block.flatten(1) for block in blocks.values()], dim=1)
    J = vl.Jacobian(net, X)
    assert close(J.to_dense(), expected, 1e-12)
    assert close((J @ J.T).to_dense(), expected @ expected.T, 1e-12)
    with pytest.raises(ValueError, match="loss: there is none"):
        vl.GGN(J.risk).to_dense()
