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

    Args:
        model: A module, which is followed as long as somebody else keeps it, or a
            function of parameters.
        predict: How a module is called, if not with its input.
        owners: The chosen parameters, by name: a module's own, or tensors in the place
            of these.
    """

    def __init__(
        self,
        model: nn.Module | ModelFunction,
        predict: Predict | None,
        owners: Params,
    ) -> None:
        self.predict, self.owners = predict, owners
        self._is_module = isinstance(model, nn.Module)
        self._in_place = set(owners)
        self._given: Callable[[], Any] | None = lambda: model
        if isinstance(model, nn.Module):
            self._given = weakref.ref(model)
            named = dict(model.named_parameters())
            self._in_place = {n for n, p in owners.items() if p is not named[n]}

    def __getstate__(self) -> dict[str, Any]:
        """What travels: its parameters alone."""
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
        own = {name: self.owners[name] for name in self._in_place}
        module = self.module
        if module is None:
            return own
        return dict(module.named_parameters()) | dict(module.named_buffers()) | own

    def present(self, known: Mapping[str, Tensor]) -> Params:
        """Return what they are now.

        Args:
            known: What they were, by name.

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
