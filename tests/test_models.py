"""Models in wrappers, and those of the transformers package where it is installed."""

import contextlib
from collections import UserDict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import vivit_linop as vl
from tests.cases import Lambda, call, mlp
from vivit_linop.net.linearized import linearizations

CE = nn.CrossEntropyLoss()


def data(n: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(n, 4, generator=generator).double()
    return X, torch.randint(3, (n,), generator=generator)


def net() -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return mlp(4, 5, 3)


def check_same(model: Any, params: Any = None) -> None:
    """The risk, a product and the spectrum are those of the plain net."""
    risk, plain = (
        vl.EmpiricalRisk(model, CE, data(), params),
        vl.EmpiricalRisk(net(), CE, data()),
    )
    assert list(risk.params) == list(plain.params)
    x = torch.linspace(-1.0, 1.0, plain.num_params).double()
    for of, like in (
        (vl.GGN(risk), vl.GGN(plain)),
        (vl.Hessian(risk), vl.Hessian(plain)),
    ):
        torch.testing.assert_close(of @ x, like @ x)
    torch.testing.assert_close(vl.GGN(risk).eigvalsh(), vl.GGN(plain).eigvalsh())


def saves_products(_: Any, op: Any, *args: Any, **given: Any) -> CheckpointPolicy:
    saved = op is torch.ops.aten.addmm.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("policy", [saves_products, [torch.ops.aten.sigmoid.default]])
def test_selective_checkpoints(policy: Any) -> None:
    """What they keep is there for one backward pass; other contexts are the user's."""
    entered = 0

    class Counted(contextlib.nullcontext[None]):
        def __enter__(self) -> None:
            nonlocal entered
            entered += 1

    class Checkpointed(nn.Sequential):
        contexts: Any = partial(create_selective_checkpoint_contexts, policy)

        def forward(self, x: Tensor) -> Tensor:
            run, contexts = super().forward, type(self).contexts
            return checkpoint(run, x, use_reentrant=False, context_fn=contexts)

    model = Checkpointed(*net())
    check_same(model)
    norms = vl.PerSampleGradients(model, CE, data()).squared_norms()
    expected = vl.PerSampleGradients(net(), CE, data()).squared_norms()
    torch.testing.assert_close(norms, expected)
    CE(model(data()[0]), data()[1]).backward()  # torch's own outside
    Checkpointed.contexts = staticmethod(lambda: (Counted(), Counted()))
    check_same(model)
    assert entered


@pytest.mark.parametrize("what", ["model", "layer", "in place"])
def test_compiled(what: str) -> None:
    model = net()
    if what == "in place":
        model.compile(backend="eager")
    elif what == "layer":
        model[2] = torch.compile(model[2], backend="eager")
        model[2]  # its parameters have other names
        risk = vl.EmpiricalRisk(model, CE, data())
        plain = vl.EmpiricalRisk(net(), CE, data())
        x = torch.linspace(-1.0, 1.0, plain.num_params).double()
        torch.testing.assert_close(vl.GGN(risk) @ x, vl.GGN(plain) @ x)
        torch.testing.assert_close(vl.GGN(risk).eigvalsh(), vl.GGN(plain).eigvalsh())
        return
    else:
        model = torch.compile(model, backend="eager")
        check_same(model, dict(model.named_parameters()))
    check_same(model)


def test_distributed_data_parallel(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = nn.parallel.DistributedDataParallel(net())
        check_same(model)
        check_same(model, dict(model.named_parameters()))
        check_same(model, list(model.parameters()))
    finally:
        torch.distributed.destroy_process_group()


def test_data_parallel() -> None:
    check_same(nn.DataParallel(net()))


def test_predict_gets_the_input_as_it_is() -> None:
    class Batch(UserDict[str, Tensor]):
        """Keys are attributes too, as in tokenisers' output."""

        def __getattr__(self, name: str) -> Tensor:
            if name == "data":
                raise AttributeError(name)
            return self.data[name]

    X, y = data()
    model = Lambda(lambda m, x, scale: (scale[:, None] * m.f(x), None), f=net())
    batch = Batch(x=X, scale=X[:, 0])
    risk = vl.EmpiricalRisk(
        model, CE, (batch, y), predict=lambda m, X: m(X.x, scale=X.scale)[0]
    )
    plain = vl.EmpiricalRisk(
        Lambda(lambda m, x: x[:, :1] * m.f(x), f=net()), CE, data()
    )
    assert list(risk.params) == list(plain.params)
    torch.testing.assert_close(vl.GGN(risk).eigvalsh(), vl.GGN(plain).eigvalsh())
    part = vl.GGN(risk.subset([3, 1])).eigvalsh()
    torch.testing.assert_close(part, vl.GGN(plain.subset([1, 3])).eigvalsh())


# Of the transformers package ----------------------------------------------------------


def sequences() -> Any:
    transformers = pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(0)
    # Not 0: padding has gradients of its own (none), and then nothing is traced.
    ids = torch.randint(1, 20, (3, 4), generator=generator)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    return transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask})


def check_transformer(risk: vl.EmpiricalRisk, model: nn.Module, X: Any) -> None:
    """Against JᵀHJ, with J by autograd for the eager arithmetic."""
    params = {n: p.detach() for n, p in risk.params.items()}
    names, sizes = list(params), risk.sizes

    def outputs(theta: Tensor) -> Tensor:
        tensors = {
            n: part.reshape(params[n].shape)
            for n, part in zip(names, theta.split(sizes), strict=True)
        }
        return risk_outputs(tensors)

    def risk_outputs(tensors: dict[str, Tensor]) -> Tensor:
        logits = call(model, tensors, X, lambda m, x: m(**x).logits)
        return logits if logits.ndim == 2 else logits.transpose(1, 2)

    theta = torch.cat([p.reshape(-1) for p in params.values()])
    with sdpa_kernel(SDPBackend.MATH):
        J = jacrev(outputs, chunk_size=1)(theta).reshape(-1, len(theta))
    J = J.reshape(-1, len(theta)).detach()
    dense = J.T @ (vl.LossHessian(risk) @ J)
    G = vl.GGN(risk)
    x = torch.linspace(-1.0, 1.0, len(theta)).double()
    torch.testing.assert_close(G @ x, dense @ x)
    evals = G.eigvalsh()
    expected = torch.linalg.eigvalsh(dense)[-len(evals) :]
    assert (evals - expected).abs().max() <= 1e-10 * expected[-1]
    assert {part.method for part in linearizations(risk)} == {"reverse"}


def test_bert() -> None:
    X = sequences()
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=4,
        max_position_embeddings=4,
        num_labels=3,
    )
    model = transformers.BertForSequenceClassification(config).double().eval()
    risk = vl.EmpiricalRisk(model, CE, (X, torch.tensor([0, 2, 1])))
    check_transformer(risk, model, X)


def test_gpt2() -> None:
    X = sequences()
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=20,
        n_positions=4,
        n_embd=4,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).double().eval()
    y = X["input_ids"].roll(-1, 1).masked_fill(X["attention_mask"] == 0, -100)
    y[:, -1] = -100

    def next_tokens(model: nn.Module, X: Any) -> Tensor:
        return model(**X).logits.transpose(1, 2)

    risk = vl.EmpiricalRisk(model, CE, (X, y), predict=next_tokens)
    check_transformer(risk, model, X)
    sampled = vl.GGN(risk, mc_samples=1, generator=torch.Generator().manual_seed(0))
    V = sampled.factor
    x = torch.ones(3).double()
    torch.testing.assert_close((V.T @ V).to_dense() @ x, V.T @ (V @ x))
    with pytest.raises(ValueError, match="transpose"):
        vl.EmpiricalRisk(model, CE, (X, y))
