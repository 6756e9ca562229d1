"""Whether a model treats samples independently: it is asked by running it on some.

Outputs of a sample must be the same whatever other samples stand in the batch, but for
rounding. Where they are nearly the same, rounding is measured. So must derivatives be,
which outputs do not show where a net has backward passes of its own, hooks on gradients
or constants that it makes of what it computes: a scale by the size of the batch, a mean
over it that is taken away again.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vivit_linop.devices import is_out_of_memory, tolerated
from vivit_linop.graphs import TOUCHES_GRAPH, gradients, has_own_code
from vivit_linop.modes import as_guest, seeded, set_random_states
from vivit_linop.noise import BY_NOISE, Noise
from vivit_linop.risk.checks import MASKED, difference_and_size, same_outputs
from vivit_linop.risk.data.containers import leaves, map_leaves
from vivit_linop.risk.data.samples import Samples
from vivit_linop.risk.model.frozen_values import DETACHES, switches_gradients
from vivit_linop.risk.model.functional import FunctionalModel, elsewhere
from vivit_linop.risk.model.original import Params

# Samples to be put together, and the places of them whose outputs are compared.
Question = tuple[Tensor, Tensor | slice]

# How far outputs may be apart, in proportion to their size: a sum in another order is
# nearer; what is further has other reasons; in between it is to be found out.
_NEAR = {torch.float64: 1e-9, torch.float32: 1e-5}
_FAR = {torch.float64: 1e-7, torch.float32: 3e-3}
# How far derivatives may be apart: iterations in backward passes end somewhere.
_SLOPES_APART = 0.05
# Times which a gradient is pulled back: what is clipped or normalised shows it.
_FACTOR = -0.5
# How often rounding is measured.
_ATTEMPTS = 8


class OutputsOfOtherOrder(Exception):
    """Outputs may be others since images came in another order in memory."""


def independent_samples(
    model: FunctionalModel, X: Any, output: Tensor, ways: Sequence[Samples]
) -> Samples:
    """Return where samples are, such that they have the same outputs beside others.

    Two groups of samples are evaluated alone, one of them in the order in memory that
    it is given in. A model that does not run on these, since it runs on batches of one
    size only, is evaluated on the whole batch with samples of the group in all places
    of others, which costs two forward passes of the batch, of two samples at least.

    Raises:
        ValueError: If samples depend on each other in all ways, or if the model can be
            asked in none.
        OutputsOfOtherOrder: Likewise, where the outputs are not of the input as given.
    """
    n, device = len(output), output.device
    failures: dict[Samples, Exception] = {}
    asked = list(ways)
    with as_guest(device):
        # Draws from a fork of the generator, which nobody sees, are found out as well.
        set_random_states(seeded(0, device), device)
        for questions in (_alone, _in_company):
            for samples in list(asked):
                watch = _Watch()
                try:
                    asking = list(questions(n))
                    same = _are_same(model, X, output, samples, asking, watch)
                # Whatever it raises: it may be since it takes other batches only.
                except Exception as error:
                    if is_out_of_memory(error):
                        raise
                    failures[samples] = error
                    continue
                if same:
                    if n > 1 and watch.doubtful:
                        _check_derivatives(model, X, output, samples)
                    if n > 1 and model.zeros:
                        _check_behind_zeros(model, X, samples, asking[-1])
                    return samples
                asked.remove(samples)
        model(model.params, X)  # an error that it always raises is to be seen
        if ways[0] not in asked:
            if model.channels_last:
                raise OutputsOfOtherOrder
            raise _dependent(model, X, output)
    failure = failures[ways[0]]
    raise ValueError(
        "model: it does not run on its batch when samples stand in the places of "
        f"others ({type(failure).__name__}: {failure}), so nobody can tell whether it "
        "treats samples independently. If samples are not where they were looked for, "
        "say where: sample_axis=, or take= and count=. If it is known to, give "
        "check=False."
    ) from failure


class _Watch(TorchFunctionMode):
    """Sees whether a net may have derivatives that its outputs do not show."""

    doubtful = False

    def run(self, model: Callable[[Params, Any], Tensor], *given: Any) -> Tensor:
        """Run the net, which may not bear anybody watching."""
        output: Tensor | None = None
        with tolerated(Exception), self:  # an error of its own comes again
            output = model(*given)
        output = model(*given) if output is None else output
        self.doubtful |= has_own_code(output)
        return output

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call the function, and note what it is."""
        self.doubtful |= func in TOUCHES_GRAPH or func in DETACHES
        self.doubtful |= switches_gradients(func)
        return func(*args, **(kwargs or {}))


def _check_behind_zeros(
    model: FunctionalModel, X: Any, samples: Samples, question: Question
) -> None:
    """Raise an error if samples have other outputs beside others elsewhere.

    Behind a head, an adapter or a gate that is zero, outputs are the same whatever is
    there. Nothing is said of nets that do not run there, and where outputs differ in
    float32, those in float64 decide, if the net has these.
    """

    def how_far(params: Params, X: Any, output: Tensor) -> float:
        found = _apart_among(model, params, X, output, samples, *question)
        return _in_proportion([found])[0]

    apart = False
    with tolerated(Exception):
        here, inputs = model.cast(elsewhere(model.params), X, model.dtype)
        output = model(here, inputs).detach()
        near = max(_NEAR[output.dtype], _FAR[torch.float64])
        if not (far := how_far(here, inputs, output)) > near:
            return
        exact = _in_double(model, here, inputs, output)
        if exact is None:
            alone = _are_alone(model, here, inputs, output, samples)
            apart = alone is False or not far <= _FAR[output.dtype]
        elif how_far(*exact) > _FAR[torch.float64]:
            # An iteration that ends when all samples have converged leaves differences.
            apart = not _are_alone(model, *exact, samples)
    if apart:
        raise dependent(f" where {model.zeros[0]!r} is not zero")


def _check_derivatives(
    model: FunctionalModel, X: Any, output: Tensor, samples: Samples
) -> None:
    """Raise an error if a sample has other derivatives beside another than alone.

    Or if these are not in proportion to what is pulled back. Nothing is said of nets
    that do not run on one sample or two, or have no gradients there; where derivatives
    differ in float32, those in float64 decide.
    """
    both = [0, len(output) - 1]

    def differ(params: Params, X: Any) -> list[bool]:
        wanted = [*params.values()]
        found = []
        for numbers, factor in (([0], 1.0), ([0], _FACTOR), (both, 1.0)):
            index = torch.tensor(numbers, device="cpu")
            some = model(params, samples.take(X, index))
            u = torch.zeros_like(some)
            u[0] = factor * Noise()(*some.shape[1:], like=some)
            found.append([g / factor for g in gradients(some, wanted, u)])
        sizes = torch.stack([one.norm() for one in found[0]])
        least = torch.finfo(sizes.dtype).eps ** 0.5 * sizes.norm()

        def is_off(other: list[Tensor]) -> bool:
            pairs = zip(found[0], other, strict=True)
            off = torch.stack([(one - two).norm() for one, two in pairs])
            return bool((off > _SLOPES_APART * sizes + least).any())

        return [*map(is_off, found[1:])]

    bends = mixes = False
    # Whatever it says to other batches, or to another precision.
    with tolerated(Exception):
        if any(differ(model.params, X)):
            exact = _in_double(model, model.params, X, output)
            if exact is not None:
                doubles = [p.detach().requires_grad_() for p in exact[0].values()]
                named = dict(zip(exact[0], doubles, strict=True))
                bends, mixes = differ(named, exact[1])
    if bends:
        raise ValueError(
            "model: its backward pass is not linear, a multiple of a gradient at its "
            "outputs does not give that multiple at its parameters, so it has no "
            "Jacobian. Look for hooks on gradients and backward passes that normalise, "
            "clip or round, and leave that to the optimiser. (check=False turns this "
            "check off.)"
        )
    if mixes:
        raise ValueError(
            "model: its outputs for a sample are the same whatever others stand beside "
            "it, but its derivatives are not, so per-sample curvature is undefined. "
            "Look for backward passes, hooks on gradients and detached values that use "
            "the whole batch or its size. (check=False turns this check off.)"
        )


def _dependent(model: FunctionalModel, X: Any, output: Tensor) -> ValueError:
    """What to say of a model whose samples have other outputs beside others."""
    if not same_outputs(model(model.params, X), output):
        return ValueError(
            "model: it has other outputs when it is evaluated a second time, "
            "so it is not one function. Look for a generator of its own, and "
            "for what it counts or keeps from call to call."
        )
    return dependent()


def dependent(where: str = "") -> ValueError:
    """What to say of samples that have other outputs beside others."""
    return ValueError(
        "model: its outputs for a sample depend on the other samples of the "
        f"batch{where}, so per-sample curvature is undefined. Look for normalisations "
        "or means over the batch, and for inputs without a sample axis, such "
        "as a mask, that are as long as the batch: sample_axis= says where samples "
        "are. (check=False turns this check off.)"
    )


def _are_same(
    model: FunctionalModel,
    X: Any,
    output: Tensor,
    samples: Samples,
    questions: Sequence[Question],
    watch: _Watch,
) -> bool:
    """Whether samples put together have their outputs, in some places of that batch."""

    def furthest(params: Params, X: Any, output: Tensor) -> tuple[float, float]:
        given, other = questions
        as_given = partial(watch.run, model.as_given)
        found = [
            _apart_among(as_given, params, X, output, samples, *given),
            _apart_among(model, params, X, output, samples, *other),
        ]
        return _in_proportion(found)

    dtype = output.dtype
    far, visible = furthest(model.params, X, output)
    if not far <= _FAR[dtype]:
        return False
    if visible <= _NEAR[dtype]:
        return True
    exact = _in_double(model, model.params, X, output)
    if exact is None:
        # Kernels of low precision may be that far apart.
        return _are_alone(model, model.params, X, output, samples) is not False
    _, far = furthest(*exact)
    if far <= _NEAR[torch.float64] or far <= BY_NOISE * _rounding(model, *exact):
        return True
    # An iteration that ends when all samples have converged leaves such differences.
    return _are_alone(model, *exact, samples) is True


def _in_proportion(found: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """How far outputs are apart at most, in proportion to their size.

    And if none of them were larger than what logits are that nothing masks.
    """
    off, size = torch.stack([*map(torch.stack, found)]).cpu().unbind(1)  # it waits once
    floor = torch.finfo(off.dtype).eps ** 0.5
    visible = off / (size.clamp(max=MASKED) + floor)
    return float((off / (size + floor)).max()), float(visible.max())


def _apart_among(
    model: Callable[[Params, Any], Tensor],
    params: Params,
    X: Any,
    output: Tensor,
    samples: Samples,
    index: Tensor,
    places: Tensor | slice,
) -> tuple[Tensor, Tensor]:
    """How far samples put together are from their outputs, and the size of these."""
    found = model(params, samples.take(X, index)).detach()
    if len(found) != len(index):
        raise ValueError(
            f"it returned outputs {list(found.shape)} for {len(index)} samples"
        )
    if found.shape[1:] != output.shape[1:]:
        raise ValueError(
            f"it returned outputs of shape {list(found.shape[1:])} for some samples, "
            f"and of {list(output.shape[1:])} among others. Where it pads them to the "
            "longest of its batch, let it return a list with those of each sample, or "
            "pad to one length"
        )
    own = index[places].to(output.device)
    if isinstance(places, Tensor):
        places = places.to(output.device)
    return difference_and_size(found[places], output[own])


def _in_double(
    model: FunctionalModel, params: Params, X: Any, output: Tensor
) -> tuple[Params, Any, Tensor] | None:
    """Parameters, inputs and outputs in float64; None for a model without these."""
    if output.dtype is torch.float64:
        return params, X, output
    params, X = model.cast(params, X, torch.float64)
    # Whatever a model says to numbers of another precision, or for want of memory for
    # them.
    with contextlib.suppress(Exception):
        exact = model(params, X).detach()
        if exact.dtype is torch.float64 and same_outputs(exact.to(output), output):
            return params, X, exact
    return None


def _rounding(model: FunctionalModel, params: Params, X: Any, output: Tensor) -> float:
    """How far outputs are apart if numbers have other last digits."""
    digits, found = Noise(), []
    for _ in range(_ATTEMPTS):
        nearby = {name: digits.off(p.detach()) for name, p in params.items()}
        again = model(nearby, map_leaves(digits.off, X))
        found.append(difference_and_size(again, output))
    return _in_proportion(found)[1]


def _are_alone(
    model: FunctionalModel, params: Params, X: Any, output: Tensor, samples: Samples
) -> bool | None:
    """Whether outputs have derivatives in inputs of their own samples only.

    None for inputs of which this cannot be told: tokens, lists, and those that the
    model writes into.
    """
    X = map_leaves(lambda leaf: leaf.detach().clone(), X)
    axes = samples.axes(X) or []
    wanted = [
        (leaf.requires_grad_(), axis)
        for leaf, axis in zip(leaves(X), axes, strict=False)
        if axis is not None and leaf.is_floating_point()
    ]
    if not wanted:
        return None
    mine = torch.arange(len(output), device=output.device) % 2 == 0
    # Whatever it says to inputs that require grad; slopes in sparse ones are sparse.
    with tolerated(Exception):
        found = model(params, X)
        vector = Noise(1).like(found)
        vector[~mine] = 0.0
        slopes = gradients(found, [leaf for leaf, _ in wanted], vector)
        of_samples = [
            slope.movedim(axis, 0).reshape(len(mine), -1).any(1).to(output.device)
            for slope, (_, axis) in zip(slopes, wanted, strict=True)
        ]
        reached = torch.stack(of_samples).any(0)
        return not bool(reached[~mine].any()) if reached.any() else None
    return None


def _alone(n: int) -> Iterator[Question]:
    """Two groups without a sample in common, an eighth of the batch each.

    At most one of them holds the largest entry of anything. No sample of theirs stands
    beside its neighbour, its mirror image, or the one half of the batch further.
    """
    for group in _groups(n):
        yield torch.tensor(group, device="cpu"), slice(None)


@lru_cache(maxsize=16)
def _groups(n: int) -> tuple[list[int], list[int]]:
    more = max(1, n // 8 - 1)
    inner = range(2, max(n - 2, 2))
    chosen = random.Random(0).sample(inner, min(2 * more + 1, len(inner)))
    chosen = [i for i in chosen if i != n // 2]
    # Some models take sorted batches only.
    first, second = [0, *chosen[:more]], [*chosen[more : 2 * more], n - 1]
    return sorted(first), sorted(second)


def _in_company(n: int) -> Iterator[Question]:
    """The two halves of the batch, each in its places, with repetitions in the others.

    Places stay, and batches sorted by anything stay sorted.
    """
    mine = torch.zeros(n, dtype=torch.bool, device="cpu")
    mine[random.Random(0).sample(range(n), n // 2)] = True
    mine[0], mine[1], mine[n // 2], mine[n - 1] = True, False, False, False
    places = torch.arange(n, device="cpu")
    first, second = places[mine], places[~mine]
    yield first[torch.searchsorted(first, places, right=True) - 1], first
    yield second[torch.searchsorted(second, places)], second
