"""The risk's own module: whatever the user does with theirs, and it does to itself.

Each evaluation runs on a copy of its own (:mod:`vivit_linop.risk.model.copies`), with
the tensors it was given in the slots. So threads do not meet, what a forward pass keeps
on the module is gone with its copy, and what a backward pass recomputes (checkpoints)
sees the tensors of its evaluation.

Some nets reach the user's own modules in spite of that, through a global variable or an
object that is no module. The first evaluation watches for it. Then the copy stands in
for the user's modules while it runs, one thread at a time. What such an object holds is
the user's parameter itself, as a rule: functions that are given it get the tensor of
the evaluation. Derivatives are checked in either case, since a backward pass may be too
late for that.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.utils.rnn import PackedSequence

from vivit_linop.checkpoints import RECOMPUTED
from vivit_linop.devices import is_out_of_memory, tolerated
from vivit_linop.graphs import gradients
from vivit_linop.modes import without_cudnn
from vivit_linop.noise import Noise
from vivit_linop.risk.data.containers import rebuilt
from vivit_linop.risk.model.copies import FORWARD_HOOKS, Copies
from vivit_linop.risk.model.frozen_values import FrozenValues
from vivit_linop.risk.model.original import ModelFunction, Params, Predict, named_slots
from vivit_linop.risk.model.outputs import Returned
from vivit_linop.risk.model.parameters import HALVES, in_precision
from vivit_linop.risk.model.sharded import whole
from vivit_linop.risk.model.staleness import Twins
from vivit_linop.risk.model.tensors_used import Replaced, Watch

Pairs = list[tuple[nn.Module, nn.Module]]
_EMBEDDINGS = nn.Embedding, nn.EmbeddingBag

# Of random directions, when derivatives are checked against differences of outputs.
_DIRECTIONS = 4
_TOLERANCE = 0.02

RECOMPUTED.copies = lambda: Copies(())


class PrivateModule:
    """A module as a function of the tensors in its slots.

    Args:
        model: The user's.
        predict: How it is called with X, if not with X itself.
        slots: Its parameters and buffers, by name.
        own: By name, what stands for these.
        dtype: The precision of other tensors that it has, None for their own.

    Attributes:
        returned: What makes one tensor of its outputs.
        calls: How often it was called, in whatever way.
        has_hooks: Whether it has forward hooks that are not torch's own.
        constants: Its copies of tensors that are in no slot.

    Raises:
        ValueError: If it has parts that cannot be copied.
    """

    def __init__(
        self,
        model: nn.Module,
        predict: Predict | None,
        slots: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
    ) -> None:
        self._own, self._dtype, self.calls = dict(own), dtype, 0
        # What an evaluation must not use: the user's tensors, and what was computed
        # from them before.
        self._outside: dict[int, str] = {id(t): name for name, t in slots.items()}
        # Buffers may be, too; parameters are what derivatives are taken in.
        self._computed = {name for name, t in slots.items() if not t.is_leaf}
        self._stale = {id(own[name]): own[name] for name in self._computed}
        self.constants: list[Tensor] = []
        copies = Copies(
            ((tensor, own[name]) for name, tensor in slots.items()),
            other=self._constant,
        )
        self.module, self._predict = copies.of(model), copies.of_called(predict)
        self._is_recurrent = self.has_hooks = False
        for part in self.module.modules():
            for hook in chain(*map(dict.values, FORWARD_HOOKS(part))):
                self.has_hooks |= not str(hook.__module__).startswith("torch.")
            self._is_recurrent |= isinstance(part, nn.RNNBase)
            if isinstance(part, _EMBEDDINGS):  # not over how often a row is looked up
                part.scale_grad_by_freq = False
            if dtype is not None:  # some keep a half precision to compute in
                halves = [name for name, kept in vars(part).items() if kept in HALVES]
                vars(part).update(dict.fromkeys(halves, dtype))
        # Kept until the first evaluation has shown whether they are needed.
        self._originals: Pairs | None = copies.modules
        self._settled = self._has_travelled = False
        # Tensors of the user's that objects hold which are no modules, with names.
        self._held: list[tuple[Tensor, str]] = []
        # Which way of calling it is the right one for inputs of a type, once known.
        self._call: dict[str, int] = {}
        self.returned = Returned()

    @property
    def is_private(self) -> bool:
        """Whether a copy of it is no net for others.

        Objects that are no modules hold tensors of the user's module, or torch.jit has
        made a part, in which nothing can be replaced.
        """
        parts = self.module.modules()
        return bool(self._held) or any(isinstance(p, ScriptModule) for p in parts)

    def _constant(self, tensor: Tensor) -> Tensor:
        """Copy a tensor that is in no slot of the model's."""
        with tolerated(RuntimeError):
            constant = in_precision(tensor.detach().clone(), self._dtype)
            self.constants.append(constant)
            if not tensor.is_leaf:
                self._stale[id(constant)] = constant
            return constant
        # Left on the model by a transformation that has ended, and of no use.
        return tensor

    def is_copy_of(self, model: nn.Module, predict: Predict | None) -> bool:
        """Whether it is still what a copy would be, but for what is in slots."""
        slots = named_slots(model)
        if any(not t.is_leaf and n not in self._computed for n, t in slots.items()):
            return False  # derivatives would miss what it was computed from
        same = Twins(
            ((slots[name], own) for name, own in self._own.items() if name in slots),
            self._stale,
        )
        return same(model, self.module) and same(predict, self._predict)

    def __call__(self, params: Params, X: Any) -> Tensor:
        """Return the outputs for X with some of the tensors replaced."""
        if self._has_travelled:
            return self._evaluate_as_it_was(params, X)
        if self._settled:
            return self._evaluate(params, X)
        originals = self._originals or []
        states = [dict(original.__dict__) for original, _ in originals]
        escaped: dict[int, Tensor] = {}
        with Watch(self._stale) as watch:
            try:
                output = self._evaluate(params, X, escaped)
            finally:
                if escaped:  # what this evaluation has left there
                    for (original, _), state in zip(originals, states, strict=True):
                        object.__setattr__(original, "__dict__", state)
        self._refuse_stale(watch)
        self._settled = True
        if escaped:
            # What is used although the copy stands in for modules.
            held: dict[int, Tensor] = {}
            try:
                self._evaluate(params, X, held)
                self._held = [
                    (tensor, self._outside[key]) for key, tensor in held.items()
                ]
                self._certify(params, X, [self._outside[key] for key in escaped])
            except BaseException:
                self._settled, self._held = False, []
                raise  # whoever asks again gets no other answer
            output = self._evaluate(params, X)
        if len(escaped) == len(self._held):
            self._originals = None
        self._outside = {}
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> PrivateModule:
        """Copy it with the functions that lead to its modules, which deepcopy shares.

        What stands for the user's modules does so in the copy too.
        """
        new = memo[id(self)] = copy.copy(self)
        new._has_travelled = self._has_travelled
        # Complex parameters are views of pairs, of which deepcopy takes none.
        leaves = {n: t if t.is_leaf else t.detach() for n, t in self._own.items()}
        new._own = copy.deepcopy(leaves, memo)
        new.returned = copy.deepcopy(self.returned, memo)
        pairs = zip(self._own.values(), new._own.values(), strict=True)
        copies = Copies(pairs, other=torch.clone)
        new.module = copies.of(self.module)
        new._predict = copies.of_called(self._predict)
        if self._originals is not None:
            new._originals = [(o, copies(template)) for o, template in self._originals]
        return new

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrive in a process, where global variables are others."""
        self.__dict__.update(state)
        self._has_travelled = self._originals is not None or bool(self._held)

    def _evaluate_as_it_was(self, params: Params, X: Any) -> Tensor:
        """Evaluate, and raise an error if parameters of global modules are used."""
        with Watch() as watch:
            output = self._evaluate(params, X)
        own = {*map(id, params.values()), *map(id, self._own.values())}
        for tensor in watch.used.values():
            if isinstance(tensor, nn.Parameter) and id(tensor) not in own:
                raise ValueError(
                    f"model: its forward pass reaches a parameter {list(tensor.shape)} "
                    "through a global variable, which does not travel with a pickled "
                    "operator. Keep the module that it uses as an attribute of the "
                    "model (self.layer = …), and use that; or build the risk here."
                )
        self._has_travelled = False
        return output

    def _evaluate(
        self, params: Params, X: Any, escaped: dict[int, Tensor] | None = None
    ) -> Tensor:
        """Run a copy of the module with tensors of its own.

        Tensors of the user's module that are used all the same go into ``escaped``, by
        identity, while it is not known which these are.
        """
        own = map(self._own.__getitem__, params)
        copies = Copies(zip(own, params.values(), strict=True))
        module, predict = copies.of(self.module), copies.of_called(self._predict)
        with contextlib.ExitStack() as stack:
            stack.enter_context(RECOMPUTED)
            if self._is_recurrent:
                stack.enter_context(without_cudnn())
            if self._settled and self._originals is not None:
                stack.enter_context(_standing_in(self._originals, copies))
            if self._held or escaped is not None:
                stack.enter_context(self._replacing(copies, escaped))
            X = rebuilt(X)  # the model may change containers
            if predict is not None:
                self.calls += 1
                output = predict(module, X)
            else:
                output = self._called(module, X)
            return self.returned(output)

    def _replacing(self, copies: Copies, escaped: dict[int, Tensor] | None) -> Replaced:
        """What lets functions have this evaluation's tensors in the place of others."""
        names = {id(tensor): name for tensor, name in self._held}
        if escaped is not None:
            names = self._outside
        own = {key: self._own[name] for key, name in names.items()}
        mode = Replaced({k: copies.known.get(id(t), t) for k, t in own.items()})
        if escaped is not None:
            mode.used = escaped
        return mode

    def _called(self, module: nn.Module, X: Any) -> Any:
        """Call the module with an input, as with the first one of its form."""
        form = type(X).__qualname__
        if form in self._call:
            self.calls += 1
            args, kwargs = _calls(X)[self._call[form]]
            return module(*args, **kwargs)
        failure: Exception | None = None
        for number in _possible(module, X):
            args, kwargs = _calls(rebuilt(X))[number]
            self.calls += 1
            try:
                output = module(*args, **kwargs)
            # The error of the likeliest way is to be seen.
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                failure = failure or error
                continue
            self._call[form] = number
            return output
        assert failure is not None
        raise failure

    def copy(self, values: Mapping[str, Tensor]) -> nn.Module:
        """Return a module like it, with these tensors in its slots."""
        slots = ((self._own[name], value) for name, value in values.items())
        return Copies(slots).of(self.module)

    def _refuse_stale(self, watch: Watch) -> None:
        used = [self._stale[key] for key in self._stale if key in watch.used]
        if used:
            names = [name for name, own in self._own.items() if own is used[0]]
            names += [
                f"{prefix}.{name}".lstrip(".")
                for prefix, module in self.module.named_modules()
                for name, value in vars(module).items()
                if value is used[0]
            ]
            what = names[0] if names else f"a tensor {list(used[0].shape)}"
            raise ValueError(
                f"model: its forward pass uses {what!r}, which was computed from "
                "tensors that require grad before, so derivatives would miss how it "
                "depends on the parameters. Compute it in the forward pass, or detach "
                "it if it is a constant."
            )

    def _padding(self) -> Iterator[tuple[str, int]]:
        """Rows of embeddings that have no derivatives, with the names of these."""
        names = {id(tensor): name for name, tensor in self._own.items()}
        for part in self.module.modules():
            row = getattr(part, "padding_idx", None)
            if isinstance(part, _EMBEDDINGS) and row is not None:
                if (name := names.get(id(part.weight))) is not None:
                    yield name, row

    def _certify(self, params: Params, X: Any, escaped: list[str]) -> None:
        """Raise an error unless derivatives are those of the outputs.

        They are taken where the user's modules, which may still have the parameters of
        the risk, have others.
        """
        draw = Noise().like
        theta = {
            name: (p + p.norm() / p.numel() ** 0.5 * draw(p)).detach()
            for name, p in params.items()
        }
        frozen = FrozenValues()
        with torch.enable_grad():
            leaves = {name: p.clone().requires_grad_() for name, p in theta.items()}
            with frozen.recording():
                output = self._evaluate(leaves, X)
            u = draw(output)
            pulled_back = gradients(output, list(leaves.values()), u)
        slopes, differences = [], []
        step = torch.finfo(output.dtype).eps ** (1 / 3)
        for _ in range(_DIRECTIONS):
            x = {name: draw(p) for name, p in theta.items()}
            for name, row in self._padding():
                if name in x:
                    x[name][row] = 0.0
            along = zip(pulled_back, x.values(), strict=True)
            slopes.append(sum(((g * part).sum() for g, part in along), u.new_zeros(())))
            sides = []
            for h in (step, -step):
                moved = {n: p + h * x[n] for n, p in theta.items()}
                with torch.enable_grad(), frozen.replaying():
                    sides.append(self._evaluate(moved, X))
            ahead, behind = (side.detach() for side in sides)
            differences.append((u * (ahead - behind)).sum() / (2 * step))
        error = torch.stack(slopes) - torch.stack(differences)
        size = torch.stack(slopes).norm() + torch.stack(differences).norm()
        if not error.norm() <= _TOLERANCE * size:
            names = ", ".join(sorted(escaped)[:3])
            raise ValueError(
                f"model: its forward pass reaches {names} of your own "
                "module, through a global variable or an object that is no module, "
                "and its backward pass does not get there. Keep the module that it "
                "uses as an attribute of the model (self.layer = …), and use that."
            )


class PrivateFunction:
    """A function of parameters and an input, with copies of what it leads to.

    Modules that it calls and tensors that it uses are copied as they are now.

    Attributes:
        returned: What makes one tensor of its outputs.
        constants: Its copies of tensors, in the precision that is wanted.
    """

    def __init__(self, function: ModelFunction, dtype: torch.dtype | None) -> None:
        self.constants: list[Tensor] = []
        self.returned, self._dtype = Returned(), dtype
        copies = Copies((), other=self._constant, frozen=dtype is not None)
        self._function = copies.of_called(function)

    def _constant(self, tensor: Tensor) -> Tensor:
        constant = in_precision(whole(tensor).detach().clone(), self._dtype)
        self.constants.append(constant)
        return constant

    def is_copy_of(self, function: Any, _: Predict | None) -> bool:
        """Whether it is still what a copy would be."""
        return Twins(())(function, self._function)

    def __call__(self, params: Params, X: Any) -> Tensor:
        """Return the outputs for X."""
        with RECOMPUTED:
            output = Copies(()).of_called(self._function)(params, rebuilt(X))
            return self.returned(output)


_ALONE = threading.RLock()


@contextlib.contextmanager
def _standing_in(originals: Pairs, copies: Copies) -> Iterator[None]:
    """Let copies stand in for the user's modules; nothing is written to these."""
    with _ALONE:
        states = [(original, original.__dict__) for original, _ in originals]
        try:
            for original, template in originals:
                copied = copies.known[id(template)]
                object.__setattr__(original, "__dict__", copied.__dict__)
            yield
        finally:
            for original, state in states:
                object.__setattr__(original, "__dict__", state)


Call = tuple[tuple[Any, ...], dict[str, Any]]


def _calls(X: Any) -> list[Call]:
    """How a module may be called with an input, the likeliest first.

    A mapping holds keyword arguments of a module, a tuple positional ones; so may what
    data loaders make of tuples, which is lists.
    """
    whole: Call = (X,), {}
    if isinstance(X, PackedSequence):
        return [whole]
    if isinstance(X, Mapping):
        named = all(isinstance(name, str) for name in X)
        return [((), dict(X)), whole] if named else [whole]
    if type(X) is tuple:
        return [(X, {}), whole]
    return [whole, (tuple(X), {})] if isinstance(X, (list, tuple)) else [whole]


def _possible(module: nn.Module, X: Any) -> list[int]:
    """Which of these calls the module's signature allows; the first if none."""
    calls = _calls(X)
    if len(calls) == 1:
        return [0]
    try:
        signature = inspect.signature(module.forward)
    except (TypeError, ValueError):  # there may be none
        return [0]
    possible = []
    for number, (args, kwargs) in enumerate(calls):
        with contextlib.suppress(TypeError):
            signature.bind(*args, **kwargs)
            possible.append(number)
    return possible or [0]


def take_modes(module: nn.Module, other: nn.Module) -> None:
    """Set training modes as those of another; parts that it has not get its root's."""
    modes = {name: part.training for name, part in other.named_modules()}
    for name, part in module.named_modules():
        part.training = modes.get(name, other.training)
