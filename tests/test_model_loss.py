"""Models that compute their loss themselves, from the labels in their batch."""

import copy
import pickle
from collections import UserDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import vivit_linop as vl

GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


class Language(nn.Module):
    """As those of a language library."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        single = kind in ("regression", "binary")
        self.kind, self.e = kind, nn.Embedding(11, 4)
        self.o = nn.Linear(4, 1 if single else 11)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        h = torch.tanh(self.e(ids))
        if self.kind not in ("tagging", "next"):
            h = h.mean(1)
        logits = self.o(h)
        loss = None if labels is None else self.loss(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.kind == "next":
            logits, labels = logits[:, :-1], labels[:, 1:]
        if self.kind == "regression":
            return F.mse_loss(logits.squeeze(), labels.squeeze())
        if self.kind == "binary":
            return F.binary_cross_entropy_with_logits(logits, labels)
        if self.kind == "labels":
            return F.binary_cross_entropy_with_logits(logits, labels)
        if self.kind == "smoothed":
            return F.cross_entropy(logits, labels, label_smoothing=0.5)
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def batch_of(kind: str, n: int = 5, length: int = 4) -> UserDict[str, Tensor]:
    ids = torch.randint(11, (n, length), generator=GENERATOR)
    labels = ids.clone()
    labels[0, -1] = -100
    by_kind = {
        "regression": randn(n),
        "binary": torch.randint(2, (n, 1), generator=GENERATOR).double(),
        "labels": torch.randint(2, (n, 11), generator=GENERATOR).double(),
        "tagging": labels,
        "next": labels,
    }
    return UserDict(ids=ids, labels=by_kind.get(kind, ids[:, 0]))


KINDS = {
    "classes": (nn.CrossEntropyLoss(), lambda f: f, lambda y: y),
    "tagging": (nn.CrossEntropyLoss(), lambda f: f.mT, lambda y: y),
    "next": (nn.CrossEntropyLoss(), lambda f: f[:, :-1].mT, lambda y: y[:, 1:]),
    "regression": (nn.MSELoss(), lambda f: f.squeeze(-1), lambda y: y),
    "binary": (nn.BCEWithLogitsLoss(), lambda f: f, lambda y: y),
    "labels": (nn.BCEWithLogitsLoss(), lambda f: f, lambda y: y),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_models_own(kind: str) -> None:
    loss, outputs, targets = KINDS[kind]
    net, batch = Language(kind).double(), batch_of(kind)
    risk = vl.EmpiricalRisk(net, "model", batch)
    own = net(**batch).loss
    torch.testing.assert_close(risk.value(), own.detach())
    gradient = torch.autograd.grad(own, list(net.parameters()))
    torch.testing.assert_close(risk.gradient(), risk.flatten(gradient))
    by_hand = vl.EmpiricalRisk(
        net,
        loss,
        (batch["ids"], targets(batch["labels"])),
        predict=lambda m, X: outputs(m(X).logits),
    )
    x = randn(risk.num_params)
    torch.testing.assert_close(vl.GGN(risk) @ x, vl.GGN(by_hand) @ x)
    torch.testing.assert_close(vl.GGN(risk).eigvalsh(), vl.GGN(by_hand).eigvalsh())
    for twin in (copy.deepcopy(risk), pickle.loads(pickle.dumps(risk)), risk.at()):
        torch.testing.assert_close(vl.GGN(twin) @ x, vl.GGN(risk) @ x)
    assert risk.subset([3, 1]).num_samples == 2


class InAMapping(Language):
    """Both values by their names, as some trainers want them."""

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        return dict(vars(super().forward(ids, labels)))


@pytest.mark.parametrize("kind", ["classes", "next", "binary"])
def test_the_loss_in_a_mapping(kind: str) -> None:
    batch = batch_of(kind)
    found = vl.EmpiricalRisk(InAMapping(kind).double(), "model", batch)
    same = vl.EmpiricalRisk(Language(kind).double(), "model", batch)
    torch.testing.assert_close(vl.GGN(found).to_dense(), vl.GGN(same).to_dense())
    torch.testing.assert_close(found.gradient(), same.gradient())


def test_batches_of_several_lengths() -> None:
    """Torch's mean over all labels, not the mean of the batches' losses."""
    net = Language("next").double()
    batches = [batch_of("next", 5, 4), batch_of("next", 2, 6)]
    risk = vl.EmpiricalRisk(net, "model", batches)
    totals, labels = 0.0, 0
    for batch in batches:
        count = int((batch["labels"][:, 1:] != -100).sum())
        totals, labels = totals + count * net(**batch).loss.item(), labels + count
    assert risk.value().item() == pytest.approx(totals / labels, rel=1e-12)


def test_labels_elsewhere_and_calls_of_ones_own() -> None:
    net, batch = Language("classes").double(), batch_of("classes")
    samples = [(ids, y) for ids, y in zip(batch["ids"], batch["labels"], strict=True)]
    risk = vl.EmpiricalRisk(
        net,
        "model",
        DataLoader(samples, batch_size=2),
        predict=lambda m, X: m(X[0], labels=X[1]),
        target=lambda batch: batch[1],
    )
    torch.testing.assert_close(risk.value(), net(**batch).loss.detach())


def test_the_model_is_left_alone() -> None:
    net, batch = Language("classes").double(), batch_of("classes")
    state = torch.random.get_rng_state()
    vl.EmpiricalRisk(net, "model", batch)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in net.parameters())
    assert set(batch) == {"ids", "labels"}


class Changing(Language):
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        factor = 1.0 if len(labels) > 2 else 2.0
        return factor * super().loss(logits, labels)


def test_losses_that_are_not_known() -> None:
    with pytest.raises(ValueError, match=r"loss: that of the model.*target="):
        vl.EmpiricalRisk(Language("smoothed").double(), "model", batch_of("smoothed"))
    batches = [batch_of("classes"), batch_of("classes", 2)]
    with pytest.raises(ValueError, match=r"loss: that of the model.* on batch 1"):
        vl.EmpiricalRisk(Changing("classes").double(), "model", batches)


class Balanced(Language):
    """With a small term beside, as mixtures of experts have."""

    share = 1e-3

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        beside = logits.logsumexp(-1).square().mean()
        return super().loss(logits, labels) + self.share * beside


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [1e-3, 1e-4])
def test_a_small_term_beside_is_another_loss(dtype: torch.dtype, share: float) -> None:
    net = Balanced("classes").to(dtype)
    net.share = share
    with pytest.raises(ValueError, match=r"loss: that of the model.*Give the loss"):
        vl.EmpiricalRisk(net, "model", batch_of("classes"))
    net.share = 0.0
    found = vl.EmpiricalRisk(net, "model", batch_of("classes", 200)).value()
    assert found.dtype == dtype


def test_what_is_no_model_with_a_loss() -> None:
    batch = batch_of("classes")
    with pytest.raises(TypeError, match=r"\.loss and \.logits"):
        vl.EmpiricalRisk(
            nn.Linear(4, 2),
            "model",
            {"input": randn(5, 4).float(), "labels": batch["labels"]},
            predict=lambda m, X: m(X["input"]),
        )
    with pytest.raises(TypeError, match="mappings with 'labels'"):
        vl.EmpiricalRisk(Language("classes"), "model", (batch["ids"], batch["labels"]))
    with pytest.raises(TypeError, match="'model', got 'mean'"):
        vl.EmpiricalRisk(Language("classes"), "mean", batch)
    with pytest.raises(TypeError, match="for a module, 'model', got 'model'"):
        vl.EmpiricalRisk(lambda p, X: X, "model", batch, {"w": torch.ones(1)})


def test_parameters_may_be_named_by_an_iterator() -> None:
    model, batch = Language("classes"), batch_of("classes")
    listed = vl.EmpiricalRisk(model, "model", batch, [*model.parameters()])
    found = vl.EmpiricalRisk(model, "model", batch, model.parameters())
    assert torch.equal(found.gradient(), listed.gradient())


class Adapted(Language):
    """With an adapter that is zero at the start, as a head may be."""

    def __init__(self, term: str) -> None:
        super().__init__("next" if term == "next" else "classes")
        self.own, self.term = nn.Parameter(torch.zeros(11, 4)), term
        if term in ("next", "smoothed"):
            nn.init.zeros_(self.o.weight)
            nn.init.zeros_(self.o.bias)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits = logits + 0.0 * self.own.sum()
        if self.term == "smoothed":  # the same where logits are
            return F.cross_entropy(logits, labels, label_smoothing=0.1)
        beside = {
            "decay": 0.1 * self.own.square().sum(),
            "gate": self.own.sum() * logits.square().mean(),
        }
        return super().loss(logits, labels) + beside.get(self.term, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("term", ["decay", "gate", "smoothed"])
def test_terms_that_vanish_at_the_start(term: str, dtype: torch.dtype) -> None:
    """Slopes and curvature were those of the cross-entropy alone."""
    net, batch = Adapted(term).to(dtype), batch_of("classes")
    with pytest.raises(ValueError, match=r"loss: that of the model.*and others"):
        vl.EmpiricalRisk(net, "model", batch)


def test_which_labels_where_all_logits_are_zero() -> None:
    """Those of the next token have the value that those of the same have."""
    net, batch = Adapted("next").double(), batch_of("next")
    risk = vl.EmpiricalRisk(net, "model", batch)
    own = net(**batch).loss
    gradient = torch.autograd.grad(own, list(net.parameters()), materialize_grads=True)
    torch.testing.assert_close(risk.gradient(), risk.flatten(gradient))
    assert risk.gradient().any()
