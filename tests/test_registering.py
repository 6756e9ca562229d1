"""Rules and layer kinds that are registered while other threads use them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from vivit_linop.net import kinds
from vivit_linop.operators.dispatch import BinaryVerb


class Slow(type):
    """Classes of which it takes time to say what belongs to them."""

    asked: threading.Event
    go_on: threading.Event

    def __subclasscheck__(cls, other: Any) -> bool:
        cls.asked.set()
        assert cls.go_on.wait(10)
        return super().__subclasscheck__(other)


class Node:
    """An operand."""


@pytest.mark.parametrize("commuting", [False, True])
def test_a_rule_that_comes_while_rules_are_looked_up(commuting: bool) -> None:
    """What was found without it is not what is found from then on."""
    Slow.asked, Slow.go_on = threading.Event(), threading.Event()
    verb, found = BinaryVerb("join"), list[Any]()
    late = Slow("Late", (Node,), {})
    verb.rule(Node, Node)(lambda left, right: "first")
    verb.rule(late, Node)(lambda left, right: NotImplemented)
    node: Any = Node()
    thread = threading.Thread(target=lambda: found.append(verb(node, node)))
    thread.start()
    assert Slow.asked.wait(10)
    # Looked up are now the rules of before, from the newest on.
    register = verb.commuting if commuting else verb.rule
    register(Node, Node)(lambda left, right: "second")
    Slow.go_on.set()
    thread.join()
    assert found == ["first"]
    assert verb(node, node) == "second"


@pytest.fixture
def linear() -> Iterator[kinds.Kind]:
    """The kind of linear layers, registered again in the end."""
    [(_, kind)] = kinds.readings(F.linear)
    before = {function: list(known) for function, known in kinds._READINGS.items()}
    yield kind
    kinds._READINGS.clear()
    kinds._READINGS.update(before)


def test_kinds_that_are_registered_by_many_threads(linear: kinds.Kind) -> None:
    """There always is one of each name, also while it is replaced."""
    ended, missing = threading.Event(), list[str]()

    def read() -> None:
        while not ended.is_set():
            names = [kind.name for _, kind in kinds.readings(F.linear)]
            if linear.name not in names or len(set(names)) < len(names):
                missing.append(str(names))

    def register(number: int) -> None:
        for _ in range(300):
            kinds.register(linear)
            kinds.register(replace(linear, name=f"linear {number}"))

    readers = [threading.Thread(target=read) for _ in range(2)]
    writers = [threading.Thread(target=register, args=(n,)) for n in range(4)]
    for thread in (*readers, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    ended.set()
    for thread in readers:
        thread.join()
    assert not missing
    names = [kind.name for _, kind in kinds.readings(F.linear)]
    assert sorted(names) == sorted([linear.name, *(f"linear {n}" for n in range(4))])
    assert torch.addmm in kinds._READINGS
