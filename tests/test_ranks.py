"""Risks over several processes: all that they compute is that of all samples."""

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vivit_linop as vl
from tests import ranks_cases
from vivit_linop.ranks.alone import ALONE, Ranks
from vivit_linop.ranks.messages import (
    Note,
    RankError,
    VectorsDifferError,
    as_error,
    checksum,
    decisive,
    layout_of,
    name_of,
    packed,
    unpacked,
)
from vivit_linop.risk.data.distributed import by_items

pytestmark = pytest.mark.host("processes over gloo")

# Of the market: layers and losses of every sort, one batch only, more columns than
# parameters, parameters that some samples do not reach.
OF_TWO = ("convolutions", "attention", "ce_everything", "tuple_input_in_batches")
OF_THREE = ("uneven_batches", "embedding", "more_columns_than_parameters", "huber")
# Models and loaders that other packages have prepared, where these are installed.
PREPARED = [
    work
    for package, work in (
        ("accelerate", "accelerated"),
        ("lightning_fabric", "lightning"),
    )
    if find_spec(package)
]


@pytest.mark.parametrize(
    ("size", "work"),
    [
        (
            2,
            (
                "analyses",
                "files",
                "no_room",
                "losses",
                *OF_TWO,
                "sharded",
                "other_arguments",
                "arguments_of_analyses",
                "caught_errors",
                "other_rounding",
                "two_threads",
                *PREPARED,
                "ended",
            ),
        ),
        (
            3,
            (
                "other_lapack",
                "current",
                "other_vectors",
                "ragged",
                "recursions",
                "same_bits",
                "little_memory",
                "loaders",
                "failures",
                *OF_THREE,
                "subgroup",
                "late",
            ),
        ),
    ],
)
def test_every_process_finds_what_one_would(
    tmp_path: Path, size: int, work: tuple[str, ...]
) -> None:
    found = ranks_cases.launched(tmp_path, size, *work)
    assert found == [{}] * size


def test_one_process_is_alone() -> None:
    data = torch.rand(4, 3), torch.rand(4, 1)
    risk = vl.EmpiricalRisk(nn.Linear(3, 1), nn.MSELoss(), data)
    assert risk.ranks is ALONE
    assert vl.GGN(risk).ranks is ALONE
    assert "rank" not in repr(risk)


@pytest.mark.parametrize(
    ("tensors", "others"),
    [
        ((torch.ones(5),), (torch.ones(5).nextafter(torch.zeros(5)),)),
        ((torch.zeros(3),), (torch.zeros(4),)),
        ((torch.tensor([1.0, 2.0]),), (torch.tensor([2.0, 1.0]),)),
        ((torch.ones(2), torch.zeros(2)), (torch.zeros(2), torch.ones(2))),
    ],
    ids=["a bit", "a zero", "order", "order of tensors"],
)
def test_checksums_tell_vectors_apart(
    tensors: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]
) -> None:
    assert checksum(tensors) == checksum(tuple(t.clone() for t in tensors))
    assert checksum(tensors) != checksum(others)


@pytest.mark.parametrize(
    ("error", "kind"), [(MemoryError("full"), MemoryError), (KeyError("k"), RankError)]
)
def test_errors_of_other_ranks_are_of_the_same_kind(
    error: Exception, kind: type[Exception]
) -> None:
    notes = [Note.of("sum", 1, 5, None), Note.of("sum", 1, 5, error)]
    found = as_error(notes, 0)
    assert isinstance(found, RankError)
    assert isinstance(found, kind)
    assert f"rank 1 raised {type(error).__name__}" in str(found)


@pytest.mark.parametrize(
    ("errors", "first"),
    [
        ([None, ValueError("v"), MemoryError("m")], 1),
        ([ValueError("v"), KeyboardInterrupt(), None], 1),
        ([None, None, OSError("o")], 2),
    ],
    ids=["the first", "what stops", "the only one"],
)
def test_all_ranks_raise_the_same_kind_of_error(
    errors: list[BaseException | None], first: int
) -> None:
    notes = [Note.of("sum", 1, 5, error) for error in errors]
    assert decisive(notes) == first
    kinds = {type(as_error(notes, rank)).__bases__ for rank in range(len(notes))}
    assert len(kinds) == 1
    assert str(as_error(notes, 0)).startswith(f"rank {first} raised")


def test_errors_of_other_ranks_are_of_no_other_kind() -> None:
    """What catches RuntimeError on this rank does not catch it on that one."""
    of_key = as_error([Note.of("sum", 1, 5, KeyError("k"))], 0)
    of_torch = as_error([Note.of("sum", 1, 5, torch.OutOfMemoryError("full"))], 0)
    assert not isinstance(of_key, RuntimeError)
    assert isinstance(of_torch, RuntimeError)


def test_calls_are_named_by_their_numbers() -> None:
    def solve(k: int, tol: float, v0: Any) -> None:
        """Not called."""

    names = [name_of(partial(solve, k), (1e-3, None)) for k in (2, 3)]
    assert names[0] != names[1]
    assert names[0].endswith("solve 2 0.001")
    assert name_of(solve, (0.1,)) == name_of(solve, (0.1 * (1 + 1e-15),))


def test_errors_tell_other_deeds_from_other_vectors() -> None:
    deeds = as_error([Note("sum", 1, 5), Note("list", 1, 5)], 0)
    vectors = as_error([Note("sum", 1, 5), Note("sum", 1, 6)], 0)
    assert "rank 1: list" in str(deeds)
    assert isinstance(vectors, VectorsDifferError)


def test_packed_objects_share_what_they_shared() -> None:
    shared = torch.rand(4, 3)
    head, tensors = packed({"a": shared, "b": [shared, shared.T], "c": (1, "x")})
    content, layout = layout_of(head)
    assert [shape for _, shape, _ in layout] == [t.shape for t in tensors]
    assert len(tensors) == 2
    found = unpacked(content, tensors)
    assert found["a"] is found["b"][0]
    assert found["b"][1].equal(shared.T)
    assert found["c"] == (1, "x")


class Said(Ranks):
    """Ranks that have said something."""

    def __init__(self, said: list[bool | None]) -> None:
        self.said = said

    def gathered(self, item: Any) -> list[Any]:
        return self.said


@pytest.mark.parametrize(
    ("said", "found"),
    [([True, None, True], True), ([None, False], False), ([None, True], True)],
)
def test_outputs_come_item_by_item_on_all_ranks(
    said: list[bool | None], found: bool
) -> None:
    assert by_items(Said(said), None) is found


def test_outputs_come_item_by_item_on_some_ranks() -> None:
    with pytest.raises(ValueError, match="on rank 2, and not on rank 0"):
        by_items(Said([False, None, True]), None)


@pytest.mark.parametrize("group", [3, "WORLD", object()])
def test_what_is_no_group_is_refused(group: object) -> None:
    data = torch.rand(4, 3), torch.rand(4, 1)
    with pytest.raises(TypeError, match="process_group: a group"):
        vl.EmpiricalRisk(nn.Linear(3, 1), nn.MSELoss(), data, process_group=group)
