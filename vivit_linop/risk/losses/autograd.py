"""Any other loss of a user: a function, differentiated by autograd in output space."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from vivit_linop.devices import tolerated
from vivit_linop.graphs import leaves_of
from vivit_linop.risk.data.containers import described, leaves, map_leaves
from vivit_linop.risk.losses.base import OutputLoss
from vivit_linop.risk.losses.numbers_read import NumbersRead
from vivit_linop.risk.model.foreign_memory import ForeignMemory
from vivit_linop.risk.model.outputs import OutputTree

LossCallable = Callable[[Tensor, Tensor], Tensor]


class AutogradLoss(OutputLoss):
    """A function, with derivatives by autograd.

    Args:
        function: ``(output, target) -> scalar``, a mean or a sum.
        count: Of how many a mean over outputs is; by default one over samples.
    """

    def __init__(
        self, function: LossCallable, count: Callable[[Tensor], int] = len
    ) -> None:
        self.function, self._count = function, count
        self._parameters: Sequence[Tensor] | None = None
        self._own: Sequence[Tensor] = ()
        self._memory = ForeignMemory()
        self._tree: OutputTree | None = None
        self._numbers: list[NumbersRead] = []

    def of_several(self, tree: OutputTree) -> OutputLoss:
        """The function has them as the model returns them."""
        self._tree = tree
        return self

    def as_returned(self, output: Tensor) -> Any:
        """Return outputs as the model has returned them."""
        return output if self._tree is None else self._tree.split(output)

    def arguments(self, output: Tensor, target: Any) -> tuple[Any, Any]:
        """What the function takes, in memory of its own: it may write into both."""
        return self.as_returned(output.clone()), map_leaves(Tensor.clone, target)

    def called(self) -> list[Any]:
        """What of the user's is called."""
        return [self.function]

    def __getstate__(self) -> dict[str, Any]:
        """Global variables do not travel: those elsewhere are others."""
        return self.__dict__ | {"_numbers": []}

    def watch(self, parameters: Sequence[Tensor], own: Sequence[Tensor]) -> None:
        """Let the next check look; tensors that others have must stay what they are."""
        self._parameters, self._own = list(parameters), list(own)
        self._memory = ForeignMemory(f"loss: {self.name}")
        self._numbers = [*map(NumbersRead, self.called())]

    def check_data(self, output: Tensor, target: Tensor) -> None:
        """The loss is a scalar, and uses no parameters of the model."""
        try:
            with torch.no_grad():
                value: Any = self.function(*self.arguments(output, target))
        except TypeError as error:
            raise TypeError(
                f"loss: {self.name} cannot be called as loss(output, target): {error}. "
                "Of a loss of several inputs make a function of one output and one "
                "target, with reduction=: for example lambda output, target: "
                "loss(*output, target), where the model returns (a, b)."
            ) from error
        except Exception as error:
            given = [y.dtype for y in leaves(target) if not y.is_floating_point()]
            if given and self._takes_real(output, target):
                raise TypeError(
                    f"data: targets are {given[0]}, which {self.name} does not take "
                    f"({error}). Convert them with y.to({output.dtype})."
                ) from error
            error.add_note(
                f"loss: {self.name} was called as loss(output, target), with "
                f"{described(self.as_returned(output))} and {described(target)}."
            )
            raise
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = list(value.shape) if isinstance(value, Tensor) else value
            raise ValueError(
                f"loss: {self.name} must return a scalar tensor, got {shape}. Use "
                "reduction='mean' or 'sum'."
            )
        eps = [
            torch.finfo(t.dtype).eps for t in (value, output) if t.is_floating_point()
        ]
        if eps[0] > eps[-1]:
            raise ValueError(
                f"loss: {self.name} computes in {value.dtype}, a lower precision than "
                f"{output.dtype} of the outputs, in which nothing can be checked. "
                "Leave out its casts, such as .float()."
            )
        self._look_outside(output, target)

    def _takes_real(self, output: Tensor, target: Any) -> bool:
        """Whether it takes targets as real numbers."""
        real = map_leaves(lambda leaf: leaf.to(output.dtype), target)
        with tolerated(Exception), torch.no_grad():
            self.function(*self.arguments(output, real))
            return True
        return False

    def total(self, output: Tensor, target: Tensor) -> Tensor:
        self.check_memory()
        factor = self._count(output) if self.reduction == "mean" else 1
        return factor * self.function(*self.arguments(output, target)).reshape(())

    def weight(self, output: Tensor, target: Tensor) -> Tensor:
        """Of how many its mean is."""
        return output.new_tensor(self._count(output))

    def _look_outside(self, output: Tensor, target: Tensor) -> None:
        """Find what the loss uses beside outputs and targets, once."""
        if self._parameters is None:
            return
        given = self.arguments(output.detach(), target)
        with (
            torch.enable_grad(),
            self._memory.read_by([*leaves(given), *self._own]) as read,
        ):
            value = self.function(*given)
        if parts_of([*read.values(), *leaves_of(value)], self._parameters):
            raise uses_parameters(self.name)
        self._memory.settle()
        for numbers in self._numbers:
            numbers.settle()
        self._parameters, self._own = None, []

    def check_memory(self) -> None:
        """Without a call where it reads nothing, since it is asked in each product."""
        if self._memory.parts:
            self._memory.check()
        for numbers in self._numbers:
            if (change := numbers.change()) is not None:
                raise ValueError(
                    f"loss: {self.name} reads {change}. An operator is one matrix: "
                    "make a new risk, or give a lambda, which keeps numbers and "
                    "mappings around it as they are."
                )


def parts_of(tensors: Iterable[Any], whole: Sequence[Tensor]) -> list[Tensor]:
    """Return those of some tensors that are among others, by identity."""
    known = {id(tensor) for tensor in whole}
    return [tensor for tensor in tensors if id(tensor) in known]


def uses_parameters(name: str) -> ValueError:
    """Of a loss that is not a function of the outputs alone."""
    return ValueError(
        f"loss: {name} uses parameters of the model, so it is no function of its "
        "outputs alone, and derivatives would miss that part. Give the loss without "
        "it; weights of tasks that are trained are outputs of the model, [N, …], like "
        "others. A regulariser τ/2 ‖θ‖² is added to operators as vl.GGN(risk) + "
        "τ * vl.Identity(D), another one by its curvature as + vl.Diagonal(…), and "
        "to risk.value() and risk.gradient() by hand."
    )
