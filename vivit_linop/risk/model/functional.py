"""The user's model as a function of its parameters, and as a guest.

What the library does with a model leaves it as it was. Parameters are copied, so that
neither their gradients nor their ``requires_grad`` are touched and an operator stays
the same matrix while training goes on; a module is copied too
(:mod:`vivit_linop.risk.model.private_module`), and what runs it is put back
(:func:`vivit_linop.modes.as_guest`).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vivit_linop.devices import tolerated
from vivit_linop.modes import default_dtype, numbers_put_back
from vivit_linop.noise import Noise
from vivit_linop.risk.data.containers import copied, leaves, map_leaves
from vivit_linop.risk.model import memory_format
from vivit_linop.risk.model.copies import has_hooks_on_all
from vivit_linop.risk.model.foreign_memory import ForeignMemory
from vivit_linop.risk.model.given import (
    check_fixed,
    check_given,
    check_modes,
    unwrapped,
)
from vivit_linop.risk.model.original import (
    ModelFunction,
    Original,
    Params,
    Predict,
    named_slots,
)
from vivit_linop.risk.model.outputs import OutputTree
from vivit_linop.risk.model.parameters import (
    as_pairs,
    check_chosen,
    check_finite,
    check_memory,
    check_precision,
    chosen_of_function,
    chosen_of_module,
    explained_casts,
    have_equal_entries,
    in_precision,
    of_pairs,
    other_entries,
)
from vivit_linop.risk.model.private_module import (
    PrivateFunction,
    PrivateModule,
    take_modes,
)
from vivit_linop.risk.model.sharded import whole
from vivit_linop.risk.model.tensors_used import WithoutKeptGradients
from vivit_linop.risk.model.widened import Widened


class FunctionalModel:
    """A model as a function of chosen parameters and an input.

    Args are those of :class:`vivit_linop.EmpiricalRisk`, and so are its errors.

    Attributes:
        original: What the user gave.
        params: Copies of the chosen parameters, by name; they require grad. Of complex
            ones the real and imaginary parts, ``[*p, 2]``.
        complex_names: The complex ones.
        precision: As ``dtype`` is given.
        constants: What else a module's outputs depend on, by name: its buffers, and
            parameters that are not chosen.
        foreign: The memory that it reads and the risk has no copy of.
        count: Counts the samples of an input, where the outputs of all come item by
            item; None where they have a sample axis.
        writes: Whether it writes into its input, so that it gets copies.
        draws: Whether it draws from NumPy's generator or Python's, which are put back.
        keeps_gradients: Whether it asks for gradients of what it computes, or puts
            hooks on parameters, which no evaluation does from then on; or has others.
        channels_last: Whether it gets images in another order in memory
            (:mod:`vivit_linop.risk.model.memory_format`); not once it has refused.
        is_finite: Whether the parameters are known to hold no NaN or Inf.
        zeros: Those that were found to be zero, and may be factors: not biases.
    """

    def __init__(
        self,
        model: nn.Module | ModelFunction,
        params: Any | None = None,
        predict: Predict | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_given(model, predict)
        if isinstance(model, nn.Module):
            model, params = unwrapped(model, params)
        check_precision(dtype)
        self.precision, self._default_dtype = dtype, torch.get_default_dtype()
        self.writes = self.keeps_gradients = self.channels_last = self.draws = False
        self.is_finite = False
        self.zeros: list[str] = []
        self.foreign = ForeignMemory()
        self._empty: list[str] = []
        self.constants: Params = {}
        self._moved: Params = {}
        self.count: Callable[[Any], int] | None = None
        self._buffers: list[str] = []
        self._written = frozenset[str]()
        is_module = isinstance(model, nn.Module)
        if isinstance(model, nn.Module):
            chosen = chosen_of_module(model, params)
            check_memory(model, chosen)
            check_modes(model)
        else:
            chosen = chosen_of_function(params)
        self.original = Original(model, predict, dict(chosen))
        chosen = {name: whole(p) for name, p in chosen.items()}
        check_chosen(chosen, dtype)
        self.complex_names = frozenset(n for n, p in chosen.items() if p.is_complex())
        # In inference mode copies would be tensors that autograd refuses.
        with torch.inference_mode(False):
            # A function of parameters has the kind of tensors that the user gives.
            self.params: Params = {
                name: nn.Parameter(as_pairs(self._copied(p)))
                if is_module or isinstance(p, nn.Parameter)
                else as_pairs(self._copied(p)).requires_grad_()
                for name, p in chosen.items()
            }
            self._empty = [name for name, p in self.params.items() if not p.numel()]
            self._private = self._copy_of(model)

    def _copied(self, tensor: Tensor) -> Tensor:
        return in_precision(whole(tensor).detach().clone(), self.precision)

    def _copy_of(self, model: Any) -> PrivateModule | PrivateFunction:
        """Copy all that outputs depend on: it stays as it is when training goes on."""
        if not isinstance(model, nn.Module):
            return PrivateFunction(model, self.precision)
        slots, parameters = named_slots(model), dict(model.named_parameters())
        self.constants = {
            name: of_kind(tensor, self._copied(tensor))
            for name, tensor in self.original.tensors().items()
            if name not in self.params
        }
        check_fixed(self.constants)
        self._buffers = [name for name in slots if name not in parameters]
        self._moved = {}
        own = {**self.constants, **self._as_given(self.params)}
        predict = self.original.predict
        private = PrivateModule(model, predict, slots, own, self.precision)
        self.channels_last = memory_format.runs_faster(private.module)
        return private

    @property
    def device(self) -> torch.device:
        """That of the parameters."""
        return next(iter(self.params.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """That of the parameters."""
        return next(iter(self.params.values())).dtype

    @property
    def module(self) -> nn.Module | None:
        """A copy of the module that is the risk's; None for a function."""
        private = self._private
        return private.module if isinstance(private, PrivateModule) else None

    def present(self) -> tuple[Params, Params]:
        """Return the user's parameters as they are now, and what else is a slot.

        Raises:
            ValueError: If the user's module is gone, or has lost a parameter or buffer.
        """
        now = self.original.present({**self._as_given(self.params), **self.constants})
        return {n: now[n] for n in self.params}, {n: now[n] for n in self.constants}

    def is_at_present(self) -> bool:
        """Whether the user's parameters and buffers, as now, are what they are here."""
        now, fixed = self.present()
        now = {name: as_pairs(p.detach()) for name, p in now.items()} | fixed
        known = {**self.params, **self.constants}
        return all(have_equal_entries(now[n].to(p), p) for n, p in known.items())

    def has_changed(self) -> bool:
        """Whether the user's model is not the same function any more.

        Other values of parameters and buffers, and modes, are no change; other entries
        of memory that it reads and the risk has no copy of are one. Of what has
        travelled there is no user's model.
        """
        if self.foreign.has_changed():
            return True
        model, predict = self.original.model, self.original.predict
        return model is not None and not self._private.is_copy_of(model, predict)

    def anew(self) -> FunctionalModel:
        """Return what the user's model is now, in the modes of before.

        Raises:
            ValueError: If it has other parameters; as :meth:`present` and :meth:`at`.
        """
        model = self.at(*self.present())
        model.writes, model.count = False, None
        model.foreign = ForeignMemory()
        self.original.check_no_more({**self.params, **self.constants})
        with torch.inference_mode(False):
            model._private = model._copy_of(self.original.model)
        if model.module is not None and self.module is not None:
            take_modes(model.module, self.module)
            check_modes(model.module)
        return model

    def at(self, params: Params, fixed: Params) -> FunctionalModel:
        """Return the same function at other parameters.

        Args:
            params: Its parameters, in the shapes of these; they are copied.
            fixed: What stands for other parameters and buffers of a module; what is
                missing stays.
        """
        model = copy.copy(self)
        with torch.inference_mode(False):
            model.params = {
                name: of_kind(
                    p, as_pairs(params[name].detach()).to(p, copy=True)
                ).requires_grad_()
                for name, p in self.params.items()
            }
            known = self.constants
            changed = {
                n: of_kind(known[n], tensor.detach().to(known[n], copy=True))
                for n, tensor in fixed.items()
                if not have_equal_entries(tensor.to(known[n]), known[n])
            }
        check_finite(model.params, "parameters")
        model.constants = {**known, **changed}
        model._moved = {**self._moved, **changed}
        return model

    def originals(self, model: nn.Module | ModelFunction) -> list[Tensor]:
        """Return the user's parameters, whose values were copied."""
        own = list(model.parameters()) if isinstance(model, nn.Module) else []
        return [*own, *self.original.in_place.values()]

    def over(self, names: Sequence[str]) -> FunctionalModel:
        """Return it as a function of some of its parameters; the others stay."""
        model = copy.copy(self)
        others = {name: p for name, p in self.params.items() if name not in names}
        constant = self._as_given(
            {name: of_kind(p, p.detach()) for name, p in others.items()}
        )
        model.params = {name: p for name, p in self.params.items() if name in names}
        model._empty = [name for name in self._empty if name in names]
        model.constants = {**self.constants, **constant}
        model._moved = {**self._moved, **constant}
        return model

    def __call__(self, params: Params, X: Any) -> Tensor:
        """Return the outputs, ``[n, …]``; X is not written into."""
        if self.channels_last:
            # In whatever way it fails; an error of its own comes again.
            with tolerated(Exception):
                return self.as_given(params, memory_format.channels_last(X))
            self.channels_last = False
        return self.as_given(params, X)

    def as_given(self, params: Params, X: Any) -> Tensor:
        """Return the outputs of an input in the order in memory that it has."""
        if self.foreign.parts:
            self.foreign.check()
        return self._evaluate(params, self.private_input(X, params))

    def first(
        self, params: Params, X: Any, samples: int
    ) -> tuple[Any, Tensor, list[tuple[Tensor, Tensor]]]:
        """Return a copy of the input, its outputs, and the tensors of it, as given too.

        Which of these were written into says :func:`is_written`.

        Once the model is known to write, every evaluation has a copy of the input.
        """
        X = self._precise(X, params)
        own = copied(memory_format.channels_last(X) if self.channels_last else X)
        tensors = list(leaves(own))
        known = [*tensors, *params.values(), *self._known()]
        with (
            explained_casts(self.precision),
            self._private.returned.of_batch(samples),
            self.foreign.read_by(known),
        ):
            output = self._evaluate(params, own)
        # The model may have taken something out of a container, or put something in.
        return own, output, list(zip(tensors, leaves(X), strict=False))

    def _known(self) -> Iterator[Tensor]:
        """What it may read: its own constants, and what copies stand in for."""
        yield from self.constants.values()
        yield from self._private.constants
        module = self.original.module
        if module is not None:
            yield from named_slots(module).values()

    def private_input(self, X: Any, params: Params | None = None) -> Any:
        """Return an input in the precision of parameters, which the model may have."""
        X = self._precise(X, self.params if params is None else params)
        return copied(X) if self.writes else X

    def _precise(self, X: Any, params: Params) -> Any:
        """Return an input in the precision of parameters, if the user asked for one."""
        if self.precision is None:
            return X
        dtype = self._precision(params)
        return map_leaves(lambda leaf: in_precision(leaf, dtype), X)

    def _precision(self, params: Params) -> torch.dtype:
        name, own = next(iter(self.params.items()))
        return params.get(name, own).dtype

    def _as_given(self, params: Params) -> Params:
        """Return parameters with complex numbers where the model has them."""
        if not self.complex_names:
            return params
        return {
            name: of_pairs(p) if name in self.complex_names else p
            for name, p in params.items()
        }

    def _evaluate(self, params: Params, X: Any) -> Tensor:
        if self.count is None:
            return self.item_by_item(params, X)
        n = self.count(X)
        return self.item_by_item(params, X).unflatten(0, (n, -1))

    def item_by_item(self, params: Params, X: Any) -> Tensor:
        """Return the outputs as the model does."""
        # Torch has no backward pass to some of what has no entries; none is needed.
        for name in self._empty:
            params = {**params, name: params[name].detach()}
        params = self._as_given(params)
        if self._moved:
            params = {**self._moved, **params}
        for name in self._written:
            params = {**params, name: params.get(name, self.constants[name]).clone()}
        dtype = self._precision(params)
        own = self.precision is None and dtype is self.dtype
        casts = contextlib.nullcontext() if own else Widened(dtype)
        keeps_none: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.keeps_gradients:
            keeps_none = WithoutKeptGradients(params.values())
        numbers = numbers_put_back() if self.draws else contextlib.nullcontext()
        with keeps_none, default_dtype(self._default_dtype), casts, numbers:
            return self._private(params, X)

    @property
    def calls(self) -> int:
        """How often a module was called, in whatever way; 0 for a function."""
        return getattr(self._private, "calls", 0)

    @property
    def has_hooks(self) -> bool:
        """Whether hooks of others than torch see what its modules compute."""
        return has_hooks_on_all() or getattr(self._private, "has_hooks", False)

    @property
    def tree(self) -> OutputTree | None:
        """The form of its outputs where these are several; known when it has run."""
        return self._private.returned.tree

    def copied_module(self, params: Params) -> nn.Module | None:
        """Return a module at these parameters, None for a function model.

        For packages that work on modules, and write on them. It is in the modes of
        construction, and its parameters are leaves: real ones, so that there is none
        for complex ones either, nor one with several outputs, nor of what is private
        to a run (:attr:`PrivateModule.is_private`).
        """
        if isinstance(self._private, PrivateFunction) or self._private.is_private:
            return None
        if self.complex_names or self.tree is not None:
            return None
        self.foreign.check()
        with torch.inference_mode(False):
            values = {**self.constants, **params}
            buffers = {name: values[name].detach().clone() for name in self._buffers}
            parameters = {
                name: nn.Parameter(values[name].detach().clone(), name in params)
                for name, _ in self._private.module.named_parameters()
            }
            return self._private.copy({**buffers, **parameters})

    def cast(self, params: Params, X: Any, dtype: torch.dtype) -> tuple[Params, Any]:
        """Return parameters with constants, and the input, in another precision."""
        params = {
            name: in_precision(tensor, dtype)
            for name, tensor in {**self.constants, **params}.items()
        }
        return params, map_leaves(lambda leaf: in_precision(leaf, dtype), X)

    @property
    def buffers(self) -> Params:
        """The buffers among them that stay what they are in evaluations."""
        names = (name for name in self._buffers if name not in self._written)
        return {name: self.constants[name] for name in names}

    def restore(self, buffers: Params) -> None:
        """Let every evaluation have copies of these buffers, which it writes into."""
        self.constants = {**self.constants, **buffers}
        self._written |= buffers.keys()


def of_kind(like: Tensor, values: Tensor) -> Tensor:
    """Return values as a frozen parameter where they stand for one: nets may ask."""
    if isinstance(like, nn.Parameter) and type(values) is Tensor:
        return nn.Parameter(values, requires_grad=False)
    return values


def elsewhere(params: Params) -> Params:
    """Parameters that are none of these, as large.

    Zeros become as large as the largest of the others, or 1 where all are zero.
    """
    sizes = torch.stack(
        [p.detach().norm() / max(p.numel(), 1) ** 0.5 for p in params.values()]
    )
    largest = sizes.max()
    sizes = sizes.where(sizes > 0, largest.where(largest > 0, 1.0))
    draw = Noise().like
    return {
        name: of_kind(p, p.detach() + size * draw(p))
        for (name, p), size in zip(params.items(), sizes, strict=True)
    }


def is_written(own: Tensor, given: Tensor) -> Tensor:
    """Whether a copy was written into; also where autograd was not to see it.

    A copy that requires grad now counts, since what is given would do so too.
    """
    if own.requires_grad and not given.requires_grad:
        return torch.tensor(True, device="cpu")
    if own.layout == torch.strided and own.shape == given.shape:
        return other_entries(own, given) | bool(own._version)
    return torch.tensor(own.layout == torch.strided or own._version > 0, device="cpu")
