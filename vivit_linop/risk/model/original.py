"""The user's model, which goes on to change: what it is now.

A risk computes with copies. What these were made of is asked only where somebody wants
to know what has become of it: for a risk at present parameters, or whether one is
current.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn

from vivit_linop.risk.model.sharded import whole

Params = dict[str, Tensor]
Predict = Callable[[nn.Module, Any], Any]
ModelFunction = Callable[[Params, Any], Any]


class Original:
    """What the user gave.

    A module is followed as long as somebody else keeps it. Its parameters are looked up
    by name: torch exchanges none that others have weak references to
    (``torch.utils.swap_tensors``, which ``module.to`` may take).

    Args:
        model: The module, or the function.
        predict: How a module is called, if not with X itself.
        in_place: Tensors in the place of parameters, by name.
    """

    def __init__(
        self,
        model: nn.Module | ModelFunction,
        predict: Predict | None,
        in_place: Params,
    ) -> None:
        self.predict, self.in_place = predict, in_place
        self._is_module = isinstance(model, nn.Module)
        self._given: Callable[[], Any] | None = lambda: model
        if isinstance(model, nn.Module):
            self._given = weakref.ref(model)
            named = dict(model.named_parameters())
            self.in_place = {n: p for n, p in in_place.items() if p is not named[n]}

    def __getstate__(self) -> dict[str, Any]:
        """What travels: tensors in the place of parameters."""
        return self.__dict__ | {"predict": None, "_given": None}

    @property
    def model(self) -> Any:
        """The module or the function; None if it is not here."""
        return None if self._given is None else self._given()

    @property
    def module(self) -> nn.Module | None:
        """It, if it is a module."""
        return self.model if self._is_module else None

    def tensors(self) -> Params:
        """What its outputs depend on now, by name: parameters, buffers of a module."""
        module = self.module
        if module is None:
            return self.in_place
        return named_slots(module) | self.in_place

    def present(self, known: Mapping[str, Tensor]) -> Params:
        """Return what they are now, of those that are known by name.

        Raises:
            ValueError: If a module is gone, or one of them is or has another shape.
        """
        if self._is_module and self.module is None:
            raise ValueError(
                "parameters: the module that the risk was made of is gone, so that it "
                "has no present parameters. Give them."
            )
        now = self.tensors()
        for name, tensor in known.items():
            found = now.get(name)
            if found is None or found.shape != tensor.shape:
                what = "is gone" if found is None else f"is {list(found.shape)} now"
                raise ValueError(
                    f"parameters: {name!r} of the model was {list(tensor.shape)} when "
                    f"the risk was made and {what}. Make a new risk."
                )
        return {name: whole(now[name]) for name in known}

    def check_no_more(self, known: Collection[str]) -> None:
        """Raise an error if a module has other parameters to be trained."""
        module = self.module
        for name, p in module.named_parameters() if module is not None else ():
            if p.requires_grad and name not in known:
                raise ValueError(
                    f"parameters: the model has {name!r}, and had none when the risk "
                    "was made. Make a new risk."
                )


def named_slots(module: nn.Module) -> Params:
    """The parameters and buffers of a module by name, each tensor once.

    A parameter that is a buffer of another part, too, is the parameter.
    """
    parameters = dict(module.named_parameters())
    known = {*map(id, parameters.values())}
    buffers = {n: b for n, b in module.named_buffers() if id(b) not in known}
    return parameters | buffers
