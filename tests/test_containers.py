"""Inputs and targets reach the model and the loss as the type that they are."""

import collections
import copy
import dataclasses
import pickle
from collections import UserDict, namedtuple
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import rnn
from torch.utils.data import DataLoader, TensorDataset

import vivit_linop as vl
from tests.cases import Lambda
from tests.sample_truth import check, check_products, truth_of
from vivit_linop.risk.data.containers import copied, leaves

CE = nn.CrossEntropyLoss()
N = 6
GENERATOR = torch.Generator().manual_seed(0)
x = torch.randn(N, 3, generator=GENERATOR, dtype=torch.float64)
scale = torch.rand(N, 1, generator=GENERATOR, dtype=torch.float64) + 0.5
y = torch.randint(3, (N,), generator=GENERATOR)

Named = namedtuple("Named", "x scale")


class Typed(NamedTuple):
    x: Tensor
    scale: Tensor
    note: str = "a note"


@dataclasses.dataclass
class Data:
    x: Tensor
    scale: Tensor
    name: str = "data"


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: Tensor
    scale: Tensor
    made: int = dataclasses.field(init=False, default=3)

    def __post_init__(self) -> None:
        assert isinstance(self.x, Tensor)  # not built from anything else


class Plain:
    """An object with attributes, whose constructor takes something else."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.x, self.scale = (torch.stack(part) for part in zip(*pairs, strict=True))
        self.me = self  # a circle


class Slotted:
    __slots__ = ("scale", "x")

    def __init__(self, x: Tensor, scale: Tensor) -> None:
        self.x, self.scale = x, scale


class Encoding(UserDict):
    """As that of a tokenizer: items are attributes, too."""

    def __init__(self, data: Any = None, encodings: Any = None) -> None:
        super().__init__(data)
        self.encodings = encodings

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


class Attributed(list):
    pass


def attributed() -> Attributed:
    result = Attributed([x, scale])
    result.tag = "kept"
    return result


def of_attributes(m: Any, X: Any) -> Tensor:
    return m.f(X.x) * X.scale


def of_items(m: Any, X: Any) -> Tensor:
    return m.f(X["x"]) * X["scale"]


def of_list(m: Any, X: Any) -> Tensor:
    return m.f(X[0]) * X[1]


def of_nested(m: Any, X: Any) -> Tensor:
    return m.f(X["a"][0].x) * X["b"]["c"][1]


CONTAINERS: dict[str, tuple[Any, Callable[[Any, Any], Tensor]]] = {
    "list": ([x, scale], of_list),
    "list with attributes": (attributed(), of_list),
    "deque": (collections.deque([x, scale]), of_list),
    "named tuple": (Named(x, scale), of_attributes),
    "typed named tuple": (Typed(x, scale), of_attributes),
    "dataclass": (Data(x, scale), of_attributes),
    "frozen dataclass": (Frozen(x, scale), of_attributes),
    "object": (Plain(list(zip(x, scale, strict=True))), of_attributes),
    "object with slots": (Slotted(x, scale), of_attributes),
    "namespace": (SimpleNamespace(x=x, scale=scale), of_attributes),
    "dict": ({"x": x, "scale": scale}, of_items),
    "ordered dict": (collections.OrderedDict(x=x, scale=scale), of_items),
    "default dict": (collections.defaultdict(list, x=x, scale=scale), of_items),
    "read-only mapping": (MappingProxyType({"x": x, "scale": scale}), of_items),
    "encoding": (Encoding({"x": x, "scale": scale}, "tokens"), of_attributes),
    "nested": (
        {"a": [Data(x, scale), "text"], "b": {"c": (None, scale), 3: 4}},
        of_nested,
    ),
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 3).double()


def strict(kind: Any, forward: Any) -> Callable[[Any, Any], Tensor]:
    """A forward pass that takes one type only, and spoils what it is given."""

    def checked(m: Any, X: Any) -> Tensor:
        assert type(X) is kind
        out = forward(m, X)
        if isinstance(X, dict):
            X.clear()
        elif isinstance(X, list):
            X.append(None)
        elif isinstance(X, Data):
            X.x = None
        return out

    return checked


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_are_what_they_were(name: str) -> None:
    X, forward = CONTAINERS[name]
    model = Lambda(strict(type(X), forward), f=net())
    own = net()
    samples = [
        (
            lambda m, i=i: m(x[i]) * scale[i],
            lambda f, i=i: F.cross_entropy(f, y[i]),
        )
        for i in range(N)
    ]
    risk = vl.EmpiricalRisk(model, CE, (X, y))
    (check if name == "dataclass" else check_products)(
        risk, truth_of(own, samples, 1 / N)
    )


def test_what_else_a_container_has_is_kept() -> None:
    seen: list[Any] = []

    def look(m: Any, X: Any) -> Tensor:
        seen.append(X)
        return m.f(X[0] if isinstance(X, list) else X.x)

    for X, what in (
        (attributed(), lambda X: X.tag),
        (Data(x, scale, "mine"), lambda X: X.name),
        (Encoding({"x": x, "scale": scale}, "tokens"), lambda X: X.encodings),
    ):
        seen.clear()
        vl.EmpiricalRisk(Lambda(look, f=net()), CE, (X, y)).gradient()
        assert {what(each) for each in seen} == {what(X)}
        assert all(each is not X for each in seen)


def test_lists_of_a_loader_are_spread_where_the_model_takes_several() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = net()

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            out: Tensor = self.f(x) * scale
            return out

    class Optional(Two):
        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            return super().forward(x, scale)

    expected = vl.EmpiricalRisk(Two(), CE, ((x, scale), y)).gradient()
    data = [((x[i], scale[i]), y[i]) for i in range(N)]
    for model in (Two(), Optional()):
        risk = vl.EmpiricalRisk(model, CE, DataLoader(data, batch_size=4))
        torch.testing.assert_close(risk.gradient(), expected)
        named = vl.EmpiricalRisk(model, CE, (Named(x, scale), y))
        torch.testing.assert_close(named.gradient(), expected)


def test_the_error_is_that_of_the_likeliest_call() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = net()

        def forward(self, pair: Any) -> Tensor:
            raise KeyError("of the model's own")

    with pytest.raises(KeyError, match="of the model's own"):
        vl.EmpiricalRisk(One(), CE, ([x, scale], y))


# Packed sequences ---------------------------------------------------------------------


class OfPacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.r, self.o = nn.GRU(3, 4), nn.Linear(4, 3)

    def forward(self, packed: rnn.PackedSequence) -> Tensor:
        out: Tensor = self.o(self.r(packed)[1][0])
        return out


@pytest.mark.parametrize("lengths", [(5, 2, 4, 1, 3, 3), (5, 4, 4, 3, 2, 1)])
@pytest.mark.parametrize("nested", [False, True])
def test_packed_sequences(lengths: tuple[int, ...], nested: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    sequences = [
        torch.randn(k, 3, generator=generator, dtype=torch.float64) for k in lengths
    ]
    ordered = sorted(lengths, reverse=True) == list(lengths)
    packed = rnn.pack_sequence(sequences, enforce_sorted=ordered)
    torch.manual_seed(0)
    model = OfPacked().double()
    X: Any = {"packed": packed} if nested else packed
    risk = vl.EmpiricalRisk(model, CE, (X, y))
    samples = [
        (
            lambda m, i=i: m(rnn.pack_sequence([sequences[i]]))[0],
            lambda f, i=i: F.cross_entropy(f, y[i]),
        )
        for i in range(N)
    ]
    (check if nested else check_products)(risk, truth_of(model, samples, 1 / N))
    chosen = [4, 1, 0]
    some = truth_of(model, [samples[i] for i in chosen], 1 / 3)
    check_products(risk.subset(chosen), some)
    halves = [
        (rnn.pack_sequence(sequences[a:b], enforce_sorted=ordered), y[a:b])
        for a, b in ((0, 2), (2, 6))
    ]
    cut = vl.EmpiricalRisk(model, CE, halves)
    assert (
        cut.fingerprint()["samples"]
        == (vl.EmpiricalRisk(model, CE, (packed, y)).fingerprint()["samples"])
    )
    torch.testing.assert_close(cut.gradient(), risk.gradient())


# Targets ------------------------------------------------------------------------------


def of_two(f: Tensor, t: Any) -> Tensor:
    return F.cross_entropy(f[:, :2], t[0]) + F.mse_loss(f[:, 2:], t[1])


def of_named(f: Tensor, t: Any) -> Tensor:
    return of_two(f, (t["class"], t["value"]))


@pytest.mark.parametrize("form", ["tuple", "list", "dict", "batches", "loader"])
def test_targets_may_be_several(form: str) -> None:
    values = torch.randn(N, 1, generator=GENERATOR, dtype=torch.float64)
    classes = y % 2
    loss: Any = of_named if form == "dict" else of_two
    data: Any = {
        "tuple": lambda: (x, (classes, values)),
        "list": lambda: (x, [classes, values]),
        "dict": lambda: (x, {"class": classes, "value": values}),
        "batches": lambda: [
            (x[:2], (classes[:2], values[:2])),
            (x[2:], (classes[2:], values[2:])),
        ],
        "loader": lambda: DataLoader(
            [(x[i], (classes[i], values[i])) for i in range(N)], batch_size=4
        ),
    }[form]()
    model = net()
    samples = [
        (
            lambda m, i=i: m(x[i]),
            lambda f, i=i: of_two(f[None], (classes[i : i + 1], values[i : i + 1])),
        )
        for i in range(N)
    ]
    risk = vl.EmpiricalRisk(model, loss, data, reduction="mean")
    (check if form == "tuple" else check_products)(
        risk, truth_of(model, samples, 1 / N)
    )
    some = truth_of(model, [samples[i] for i in (5, 0)], 1 / 2)
    check_products(risk.subset([5, 0]), some)
    for there in (copy.deepcopy(risk), pickle.loads(pickle.dumps(risk))):
        assert torch.equal(there.gradient(), risk.gradient())


def test_two_inputs_and_two_targets() -> None:
    def forward(m: Any, x: Tensor, scale: Tensor) -> Tensor:
        return m.f(x) * scale

    model, values = Lambda(forward, f=net()), x[:, :1]
    X, targets = (x, scale), (y % 2, values)
    expected = of_two(model(*X), targets)
    risk = vl.EmpiricalRisk(model, of_two, (X, targets), reduction="mean")
    torch.testing.assert_close(risk.value(), expected.detach())


def test_two_batches_in_a_tuple() -> None:
    batches = (x[:2], y[:2]), (x[2:], y[2:])
    assert vl.EmpiricalRisk(net(), CE, batches).batch_sizes == [2, 4]


def test_a_loss_that_takes_one_target_says_so() -> None:
    with pytest.raises(TypeError, match="CrossEntropyLoss takes one tensor"):
        vl.EmpiricalRisk(net(), CE, (x, (y, y)))


@dataclasses.dataclass
class WithTargets:
    x: Tensor
    y: Tensor


@pytest.mark.parametrize("form", ["labels", "y", "target", "target of a loader"])
def test_targets_inside_of_batches(form: str) -> None:
    model = net()
    expected = vl.EmpiricalRisk(model, CE, (x, y)).gradient()
    keywords: dict[str, Any] = {}
    batch: Any
    if form == "labels":
        batch = Encoding({"input": x, "labels": y})
    elif form == "y":
        batch = WithTargets(x, y)
        keywords = {"predict": lambda m, X: m(X.x)}
    else:
        batch = (x, scale, y)
        keywords = {"target": lambda b: b[2], "predict": lambda m, X: m(X[0])}
        if form == "target of a loader":
            batch = DataLoader(TensorDataset(x, scale, y), batch_size=4)
    data = batch if form.startswith("target") else [batch]
    for each in (data, batch):
        risk = vl.EmpiricalRisk(model, CE, each, **keywords)
        assert risk.num_samples == N
        torch.testing.assert_close(risk.gradient(), expected)
        torch.testing.assert_close(risk.at().value(), risk.value())


def test_no_targets_are_an_error() -> None:
    with pytest.raises(TypeError, match="target="):
        vl.EmpiricalRisk(net(), CE, [{"x": x}])
    with pytest.raises(TypeError, match="target: returned NoneType for batch 0"):
        vl.EmpiricalRisk(net(), CE, [(x, y)], target=lambda batch: None)


def test_items_that_are_attributes_may_raise_errors_of_items() -> None:
    class Items(UserDict):
        def __getattr__(self, name: str) -> Any:
            if name == "data":
                raise AttributeError(name)
            return self.data[name]

    for X in (Items(x=x, scale=scale), [Items(x=x), {"scale": scale}]):
        model = Lambda(
            lambda m, X: (
                m.f(X.x) * X.scale
                if isinstance(X, Items)
                else m.f(X[0].x) * X[1]["scale"]
            ),
            f=net(),
        )
        risk = vl.EmpiricalRisk(model, CE, (X, y), predict=lambda m, X: m(X))
        plain = vl.EmpiricalRisk(
            Lambda(lambda m, x, s: m.f(x) * s, f=net()), CE, ((x, scale), y)
        )
        torch.testing.assert_close(risk.gradient(), plain.gradient())


class Kept(MutableMapping[str, Any]):
    """A mapping that keeps its items in a dictionary, as they do that are no dict."""

    def __init__(self, **items: Any) -> None:
        self.items_kept = items

    def __getitem__(self, name: str) -> Any:
        return self.items_kept[name]

    def __setitem__(self, name: str, item: Any) -> None:
        self.items_kept[name] = item

    def __delitem__(self, name: str) -> None:
        del self.items_kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_kept)

    def __len__(self) -> int:
        return len(self.items_kept)


class Keyed:
    """No mapping, but it has keys."""

    __slots__ = ("_items",)

    def __init__(self, **items: Any) -> None:
        self._items = items

    def keys(self) -> Any:
        return self._items.keys()

    def __getitem__(self, name: str) -> Any:
        return self._items[name]

    def __setitem__(self, name: str, item: Any) -> None:
        self._items[name] = item


class Deep(Kept):
    """It keeps its items where no copy of it finds them."""

    def __init__(self, **items: Any) -> None:
        self.below = SimpleNamespace(items=items)

    @property
    def items_kept(self) -> dict[str, Any]:
        return self.below.items


@pytest.mark.parametrize("kind", [Kept, Keyed])
def test_items_of_the_user_stay(kind: Callable[..., Any]) -> None:
    X = kind(x=x, scale=scale)
    model = Lambda(of_items, f=net())
    risk = vl.EmpiricalRisk(model, CE, [(X, y)], predict=lambda m, X: m(X))
    own = net()
    risk.subset([4, 1])
    assert X["x"] is x and X["scale"] is scale
    expected = F.cross_entropy(own(x) * scale, y)
    gradient = torch.autograd.grad(expected, list(own.parameters()))
    torch.testing.assert_close(risk.at().value(), expected)
    torch.testing.assert_close(risk.gradient(), risk.flatten(gradient))
    assert X["x"] is x and X["scale"] is scale


@pytest.mark.parametrize("kind", [Kept, lambda **items: MappingProxyType(items)])
def test_labels_of_the_user_stay(kind: Callable[..., Any]) -> None:
    X = kind(x=x, labels=y)
    model = net()
    risk = vl.EmpiricalRisk(model, CE, [X], predict=lambda m, X: m(X["x"]))
    assert list(X) == ["x", "labels"]
    torch.testing.assert_close(risk.at().value(), F.cross_entropy(model(x), y))


def test_copies_that_share_items_are_refused() -> None:
    for X, data in [
        (inputs := Deep(x=x, scale=scale), [(inputs, y)]),
        (batch := Deep(x=x, labels=y), [batch]),
    ]:
        before = dict(X)
        with pytest.raises(TypeError, match="data: a copy of Deep has its items"):
            vl.EmpiricalRisk(Lambda(of_items, f=net()), CE, data)
        assert all(X[name] is item for name, item in before.items())


class Views(Mapping[str, Any]):
    """A mapping whose items are made as they are asked for."""

    def __init__(self, items: dict[str, Tensor]) -> None:
        self.made_of = items

    def __getitem__(self, name: str) -> Tensor:
        return self.made_of[name][:]

    def __iter__(self) -> Iterator[str]:
        return iter(self.made_of)

    def __len__(self) -> int:
        return len(self.made_of)


@pytest.mark.parametrize("kind", ["nested", "views", "objects"])
def test_tensors_that_are_made_when_asked_for_are_told_apart(kind: str) -> None:
    """One that is gone may leave its number to the next."""
    parts = [[torch.full((2,), 10.0 * i + j) for j in range(3)] for i in range(4)]
    X: Any
    if kind == "nested":
        X = tuple(map(torch.nested.nested_tensor, parts))
    elif kind == "views":
        X = tuple(Views({str(j): part for j, part in enumerate(p)}) for p in parts)
    else:
        X = [Views({"x": torch.stack(part)}) for part in parts]
    for own, given in zip(copied(X), X, strict=True):
        for left, right in zip(leaves(own), leaves(given), strict=True):
            assert left is not right and torch.equal(left, right)
