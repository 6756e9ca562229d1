"""What a backward pass leaves at layers, sorted into groups of parameters.

BackPACK calls a hook for each layer, in its order. What a group's result is made of is
complete when its last layer has been met.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from backpack.utils.module_classification import is_loss
from torch import Tensor, nn

from vivit_linop.vivit.extensions import SAVEFIELD, LayerRecord, layer_input

Group = dict[str, Any]


@dataclass(frozen=True)
class Pass:
    """One backward pass.

    Attributes:
        num_samples: N.
        num_outputs: The entries of a sample's output.
        r: What the loss multiplies the sum over samples with, 1/N or 1.
    """

    num_samples: int
    num_outputs: int
    r: float

    @classmethod
    def of(cls, loss: nn.Module) -> Pass:
        """The pass that begins at a loss."""
        output = layer_input(loss)
        mean = getattr(loss, "reduction", "mean") == "mean"
        r = 1.0 / len(output) if mean else 1.0
        return cls(len(output), output[:1].numel(), r)


@dataclass
class Block:
    """One group of parameters.

    Attributes:
        group: The user's dictionary.
        params: Its parameters.
        collected: What has been made of the parameters' records in this pass.
        result: That of this pass, None while it is not complete.
    """

    group: Group
    params: list[Tensor]
    collected: dict[int, Any] = field(default_factory=dict)
    result: Any = None

    @property
    def sizes(self) -> list[int]:
        """The numbers of entries of the parameters."""
        return [p.numel() for p in self.params]

    @property
    def missing(self) -> list[int]:
        """The positions of the parameters that have not been met in this pass."""
        return [at for at, p in enumerate(self.params) if id(p) not in self.collected]

    def take(self) -> list[Any]:
        """Hand over what was collected, in the order of the parameters."""
        taken = [self.collected[id(p)] for p in self.params]
        # Which parameters have been met is still to be known.
        self.collected = dict.fromkeys(self.collected)
        return taken


class GroupsHook:
    """An extension hook that sorts the records of layers into blocks.

    A pass begins at the loss: there all that an earlier pass has left is forgotten, and
    ``begin`` is called. ``collect`` makes what is kept out of the records of a module's
    parameters that are in one block, for each of them; ``finish`` gets complete blocks.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        begin: Callable[[Sequence[Block]], None],
        collect: Callable[[Block, list[LayerRecord], Pass], list[Any]],
        finish: Callable[[Block, Pass], None],
        verbose: bool,
    ) -> None:
        self._blocks, self._begin = blocks, begin
        self._collect, self._finish = collect, finish
        self._verbose = verbose
        self._by_param = {
            id(p): number for number, block in enumerate(blocks) for p in block.params
        }
        self._pass: Pass | None = None

    def __call__(self, module: nn.Module) -> None:
        """Take the records of a module's parameters."""
        if is_loss(module):
            self._pass = Pass.of(module)
            if self._verbose:
                print(f"Loss {module}: N = {self._pass.num_samples}")
            for block in self._blocks:
                block.collected.clear()
            self._begin(self._blocks)
            return
        found: dict[int, dict[int, LayerRecord]] = {}
        for name, param in module.named_parameters(recurse=False):
            # Parameters outside all groups are freed here, too.
            record = param.__dict__.pop(SAVEFIELD, None)
            number = self._by_param.get(id(param))
            if number is None:
                continue
            if record is None or self._pass is None:
                raise RuntimeError(
                    f"{module}, {name}: nothing was recorded. Pass the computation's "
                    "extension(s) to backpack(…), and extend the loss as well."
                )
            if id(param) in self._blocks[number].collected:
                raise NotImplementedError(
                    f"{module}, {name}: the parameter is used twice, which BackPACK "
                    "cannot see. Use vl.GGN, which takes any net."
                )
            found.setdefault(number, {})[id(param)] = record
        for number, records in found.items():
            self._add(number, module, records)

    def _add(
        self, number: int, module: nn.Module, records: dict[int, LayerRecord]
    ) -> None:
        assert self._pass is not None
        block = self._blocks[number]
        if self._verbose:
            print(f"{module}, group {number}: {len(records)} parameters")
        kept = self._collect(block, list(records.values()), self._pass)
        block.collected.update(zip(records, kept, strict=True))
        if len(block.collected) == len(block.params):
            if self._verbose:
                print(f"Group {number}: complete")
            self._finish(block, self._pass)


def checked_blocks(param_groups: Iterable[Group], keys: Sequence[str]) -> list[Block]:
    """Turn parameter groups into blocks.

    Raises:
        TypeError: If a group is no dictionary, or a parameter no tensor.
        ValueError: If a group lacks a key or has no parameters, or a parameter is
            listed twice or frozen.
    """
    blocks: list[Block] = []
    seen: dict[int, str] = {}
    for number, group in enumerate(param_groups):
        where = f"param_groups[{number}]"
        if not isinstance(group, dict):
            raise TypeError(
                f"{where}: a dictionary with {', '.join(map(repr, keys))}, got "
                f"{type(group).__name__}. param_groups is a list of such."
            )
        for key in keys:
            if key not in group:
                raise ValueError(f"{where}: does not have the key {key!r}.")
        given = group["params"]
        params = [given] if isinstance(given, Tensor) else list(given)
        if not params:
            raise ValueError(f"{where}: 'params' is empty.")
        for at, param in enumerate(params):
            name = f"{where}['params'][{at}]"
            if not isinstance(param, Tensor):
                raise TypeError(f"{name}: a parameter, got {type(param).__name__}.")
            shape = list(param.shape)
            if not param.requires_grad:
                raise ValueError(
                    f"{name}: of shape {shape}, is frozen (requires_grad=False), so "
                    "the backward pass does not reach it. Leave it out of the group."
                )
            if id(param) in seen:
                raise ValueError(
                    f"{name}: of shape {shape}, is {seen[id(param)]} as well. A "
                    "parameter is in one group, once."
                )
            seen[id(param)] = name
        blocks.append(Block(group, params))
    return blocks
