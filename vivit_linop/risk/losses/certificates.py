"""Losses are compared with what they must agree with, on the batches they are used for.

A loss of the library is tested, and is asked only whether it takes the data. Any other
may have errors: a function may mix the samples of a batch, torch's second derivative
may be wrong, a closed form may belong to another function.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vivit_linop.devices import is_out_of_memory, tolerated
from vivit_linop.noise import Noise
from vivit_linop.risk.data.batches import some_targets
from vivit_linop.risk.data.containers import copied, described, map_leaves
from vivit_linop.risk.losses.autograd import AutogradLoss
from vivit_linop.risk.losses.base import OutputLoss
from vivit_linop.risk.losses.differences import SHIFTS, STEPS, Comparison
from vivit_linop.risk.losses.draws import Draws
from vivit_linop.risk.losses.own import OwnLoss

# At how many drawn labels a likelihood is looked at, with how many entries at most;
# beyond how many deviations, and from which factor on, two means over them differ.
_LOOKED_AT, _LOOKED_AT_ENTRIES, _FEWEST = 2048, 2**22, 64
_DEVIATIONS, _ALIKE = 8.0, 1.5


def targets_of(loss: OutputLoss, target: Any, output: Tensor) -> Any:
    """Return targets as a loss computes with them, which may take one tensor only."""
    if not loss.takes_several and not isinstance(target, Tensor):
        raise TypeError(
            f"data: {loss.name} takes one tensor of targets for a batch, got "
            f"{described(target)}. Give a function (output, target) -> scalar of them, "
            "with reduction=, or say which it is with target=. A tuple of two is one "
            "pair (X, y), a list holds batches."
        )
    return loss.as_targets(target, output)


def check_loss(
    loss: OutputLoss, output: Tensor, target: Tensor, check_sum: bool = True
) -> None:
    """Raise a ``ValueError`` if a loss does not take a batch, or is not what it says.

    That it is a sum over samples is looked at with ``check_sum``.
    """
    loss.check_data(output, target)
    if loss.tested:
        return
    if check_sum:
        with torch.no_grad():
            _check_is_a_sum(loss, output, target)
    given, *data = loss.of_user(output, target)
    if not isinstance(given, AutogradLoss):
        with torch.no_grad():
            _check_value(given, *data)
    if loss.has_own("gradient"):
        by_autograd = OutputLoss.gradient(loss, output, target)
        found = loss.gradient(output, target)
        _compare(loss, "gradient", found, by_autograd, "by autograd of total")


def check_curvature(loss: OutputLoss, output: Tensor, target: Tensor) -> None:
    """Raise a ``ValueError`` if a loss has no Hessian."""
    if loss.tested:
        return
    x = torch.ones_like(loss.channels(output[:1])).unsqueeze(-1)
    try:
        product = loss.hessian_product(output[:1], _first(target), x)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"loss: {loss.name} has no second derivative in torch ({error}), so no "
            "Hessian. Write it as a function of differentiable operations, with "
            "reduction=. Gradients, PerSampleGradients and EmpiricalFisher need "
            "none."
        ) from error
    if product.shape != x.shape:
        raise ValueError(
            f"loss: hessian_product of {loss.name} has shape {list(product.shape)} for "
            f"X {list(x.shape)}, it must have the same."
        )


def certify_curvature(loss: OutputLoss, output: Tensor, target: Tensor) -> None:
    """Raise a ``ValueError`` if the Hessian of a sample of a batch is wrong.

    A product is compared with differences of gradients, a diagonal in closed form with
    products of the first sample.
    """
    if loss.tested:
        return
    _check_finite(loss, output, target)
    wrong = _surely_refuted(loss, output, target)
    if wrong.any():
        sample = int(wrong.nonzero()[0])
        if loss.has_own("hessian_product"):
            raise ValueError(
                f"loss: hessian_product of {loss.name} is wrong, it is not the slope "
                f"of its gradient (sample {sample} of its batch). Leave it out, and "
                "autograd takes its place."
            )
        raise ValueError(
            f"loss: torch's second derivative of {loss.name} is wrong, it is not "
            f"the slope of its gradient (sample {sample} of its "
            "batch). Look for hand-written autograd Functions and .detach(), and "
            "write it as a function of differentiable operations. Gradients, "
            "PerSampleGradients and EmpiricalFisher need no second derivatives."
        )
    _check_positions(*loss.of_user(output, target))
    if loss.has_own("hessian_diagonal"):
        first = output[:1], _first(target)
        by_products = OutputLoss.hessian_diagonal(loss, *first)
        found = loss.hessian_diagonal(*first)
        _compare(loss, "hessian_diagonal", found, by_products, "by hessian_product")


def _check_finite(loss: OutputLoss, output: Tensor, target: Tensor) -> None:
    """Raise a ``ValueError`` if a sample has derivatives that are none."""
    x = Noise().like(loss.channels(output)).unsqueeze(-1)
    slopes = loss.gradient(output, target), loss.hessian_product(output, target, x)
    bad = sum(~t.isfinite().reshape(len(output), -1).all(1) for t in slopes)
    if isinstance(bad, Tensor) and bad.any():
        raise ValueError(
            f"loss: {loss.name} has derivatives that are NaN or Inf, at sample "
            f"{int(bad.nonzero()[0])} of its batch, as roots, norms and logarithms "
            "have them at zero. Write it such that it has none: with a small number "
            "added below the root, or with torch.xlogy."
        )


def certified_sqrt(loss: OutputLoss, output: Tensor, target: Tensor) -> Tensor:
    """Return ``loss.sqrt``, compared with a product if it is in closed form."""
    S = loss.sqrt(output, target)
    if not loss.has_own("sqrt"):
        return S
    f = loss.channels(output)
    n, C, P = f.shape
    expected = [n, C, loss.sqrt_width(output), P]
    if list(S.shape) != expected:
        raise ValueError(
            f"loss: sqrt of {loss.name} has shape {list(S.shape)}, it must have "
            f"{expected}; sqrt_width is the number of its columns."
        )
    x = Noise().like(f)
    found = torch.einsum("ncrp,nrp->ncp", S, torch.einsum("ncrp,ncp->nrp", S, x))
    product = loss.hessian_product(output, target, x.unsqueeze(-1)).squeeze(-1)
    _compare(loss, "S Sᵀ x with S = sqrt", found, product, "by hessian_product")
    return S


def checked_sample(
    loss: OutputLoss, output: Tensor, target: Tensor, mc_samples: int, draws: Draws
) -> Tensor:
    """Return ``loss.sample``, which must be finite and have its shape."""
    drawn = loss.sample(output, target, mc_samples, draws)
    if loss.tested:
        return drawn
    expected = [len(output), output[0].numel(), mc_samples, 1]
    if list(drawn.shape) != expected or not drawn.isfinite().all():
        raise ValueError(
            f"loss: sample of {loss.name} must give gradients {expected} at labels "
            f"drawn from its likelihood, got {list(drawn.shape)}, "
            f"{'all' if drawn.isfinite().all() else 'not all'} of them finite."
        )
    given, *data = loss.of_user(output, target)
    if isinstance(given, OwnLoss):
        warn_unless_likelihood(given, *data)
    return drawn


def warn_unless_likelihood(loss: OwnLoss, output: Tensor, target: Any) -> None:
    """Warn if E[∇ℓ ∇ℓᵀ] is not E[∇²ℓ] over drawn labels (Bartlett's second identity).

    Along a random direction, at random outputs: on the data a label that makes the
    difference may be too rare to be drawn. It is looked at once.
    """
    if loss.looked_at:
        return
    loss.looked_at = True
    count = min(_LOOKED_AT, _LOOKED_AT_ENTRIES // output[0].numel())
    if count < _FEWEST:
        return
    rows = torch.arange(count, device=output.device) % len(output)
    f = Noise(0).like(output[rows])
    y = some_targets(target, rows)
    try:
        labels = loss.labels(f, y, Draws(0))
        x = Noise(1).like(loss.channels(f)).sign()
        squares = (loss.gradient(f, labels) * x).flatten(1).sum(1).square()
        product = loss.hessian_product(f, labels, x.unsqueeze(-1)).squeeze(-1)
        hessians = (product * x).flatten(1).sum(1)
    # Some losses are of probabilities only, and say so in any way.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return
    off = squares - hessians
    surely = off.mean().abs() > _DEVIATIONS * off.std() / len(off) ** 0.5
    low, high = sorted([squares.mean(), hessians.mean()])
    if off.isfinite().all() and surely and not high <= _ALIKE * low:
        warnings.warn(
            f"loss: at labels of sample= the squared gradients of {loss.name} are "
            f"{float(squares.mean() / hessians.mean()):.3g} times its second "
            "derivatives, in the mean; of a negative log-likelihood both are the same. "
            "Monte-Carlo matrices are no estimates of the Fisher matrix. If the value "
            "is a mean over entries, let it return all of them.",
            stacklevel=2,
        )


def _check_value(loss: OutputLoss, output: Tensor, target: Tensor) -> None:
    """Raise a ``ValueError`` if the user's own loss has another value."""
    found = loss.total(output, target)
    value = loss.source(output.clone(), copied(target))  # which may write into them
    if loss.reduction == "mean":
        found = found / loss.weight(output, target)
    what = {"sum": "total", "mean": "total / weight"}[loss.reduction]
    _compare(loss, what, found, value, "by the loss itself")


def _compare(
    loss: OutputLoss, what: str, found: Tensor, expected: Tensor, where: str
) -> None:
    if found.shape != expected.shape:
        raise ValueError(
            f"loss: {what} of {loss.name} has shape {list(found.shape)}, and "
            f"{list(expected.shape)} {where}."
        )
    off, size = (found - expected).double().norm(), expected.double().norm()
    # Where what is expected overflows, the risk's value is refused.
    if size.isfinite() and not off <= torch.finfo(expected.dtype).eps ** 0.5 * size:
        raise ValueError(
            f"loss: {what} of {loss.name} is wrong: it differs by {float(off):.3g} "
            f"from what it is {where}, {float(size):.3g} in norm."
        )


def _check_is_a_sum(loss: OutputLoss, output: Tensor, target: Tensor) -> None:
    """Raise a ``ValueError`` if the loss is no sum of losses of samples."""
    whole = loss.total(output, target)
    again = loss.total(output, target)
    if (again - whole).abs() > torch.finfo(output.dtype).eps ** 0.5 * whole.abs():
        raise ValueError(
            f"loss: {loss.name} has another value when it is called again, "
            f"{float(again):.6g} after {float(whole):.6g}, so it is not one function. "
            "Look for random numbers, for what it counts or keeps from call to call, "
            "and for outputs and targets that it writes into."
        )
    index = torch.arange(len(output), device=output.device)
    # Two ways to split: neighbours apart, then together.
    for mask in (index % 2 == 0, index < (len(output) + 1) // 2):
        if mask.all():
            continue
        parts = _parts(loss, output, target, mask)
        error = (parts[0] + parts[1] - whole).abs()
        tolerance = torch.finfo(output.dtype).eps ** 0.5
        size = max(part.abs() for part in (*parts, whole))
        if error > tolerance * size or _couples(loss, output, target, mask):
            raise ValueError(
                f"loss: {loss.name} with reduction={loss.reduction!r} is not "
                f"the {loss.reduction} of losses of single samples, so "
                "per-sample curvature is undefined. Give the reduction that it "
                "has, a torch.nn loss for weights and ignored targets, or a "
                "loss that does not mix samples."
            )


def _parts(
    loss: OutputLoss, output: Tensor, target: Tensor, mask: Tensor
) -> list[Tensor]:
    """The totals of some samples, and of the others."""
    try:
        return [loss.total(output[m], some_targets(target, m)) for m in (mask, ~mask)]
    except (RuntimeError, ValueError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"loss: {loss.name} fails on some of the samples alone: {error}. It "
            "must not hold anything that numbers samples, such as a weight with a "
            "sample axis; that belongs to the targets."
        ) from error


def _couples(loss: OutputLoss, output: Tensor, target: Tensor, mask: Tensor) -> bool:
    """Whether derivatives of some samples are others with the others there.

    Of a loss without second ones the first, where values do not show it: beside a large
    constant, or what is divided by a detached mean of itself.
    """
    some = output[mask], some_targets(target, mask)
    tolerance = torch.finfo(output.dtype).eps ** 0.5

    def differ(together: Tensor, alone: Tensor) -> bool:
        off = (together[mask] - alone).norm()
        return bool(off > tolerance * alone.norm() + 1e-30)

    # What has no derivatives is refused where they are needed.
    with tolerated(ValueError):
        check_curvature(loss, output, target)
        x = Noise().like(loss.channels(output)).unsqueeze(-1)
        product = loss.hessian_product(*some, x[mask])
        if differ(loss.hessian_product(output, target, x), product):
            return True
        if product.any():
            return False
    with tolerated(ValueError):
        return differ(loss.gradient(output, target), loss.gradient(*some))
    return False


def _check_positions(loss: OutputLoss, output: Tensor, target: Tensor) -> None:
    """Raise a ``ValueError`` if outputs at different positions are coupled."""
    f = loss.channels(output)
    positions = f.shape[2]
    if positions == 1 or loss.has_own("hessian_product"):
        return
    index = torch.arange(positions, device=f.device)
    x = Noise().like(f)
    for mask in (index % 2 == 0, index < (positions + 1) // 2):
        some = torch.where(mask, x, torch.zeros_like(x)).unsqueeze(-1)
        product = loss.hessian_product(output, target, some).squeeze(-1)
        elsewhere, size = product[..., ~mask].norm(), product.norm()
        if elsewhere > torch.finfo(f.dtype).eps ** 0.5 * size:
            raise ValueError(
                f"loss: {loss.name} couples outputs at different positions, which its "
                "channels (coupled= of vl.Loss) keep apart. Say coupled='all'."
            )


def _surely_refuted(loss: OutputLoss, output: Tensor, target: Tensor) -> Tensor:
    """Of which samples differences of gradients refute the Hessian, ``[n]``.

    Where torch's second derivative of the loss is wrong, differences agree with each
    other and not with the product. On a kink they may too: so it must also be wrong
    beside the outputs.
    """
    # Beside the outputs a loss may not be defined, and say so in any way.
    with tolerated(Exception):
        wrong = _refuted(loss, output, target)
        for shift in SHIFTS[torch.float64]:
            if wrong.any():
                size = output.abs().mean() + torch.finfo(output.dtype).tiny
                beside = output + shift * size * Noise(1).like(output)
                wrong &= _refuted(loss, beside, target)
        return wrong
    return torch.zeros(len(output), dtype=torch.bool, device=output.device)


def _refuted(loss: OutputLoss, output: Tensor, target: Tensor) -> Tensor:
    """Of which samples differences of gradients refute the Hessian, ``[n]``."""
    scale = (output.square().mean().sqrt() + torch.finfo(output.dtype).tiny).item()
    x = scale * Noise().like(output)
    precision = torch.float64
    exact = map_leaves(lambda t: t.double() if t.is_floating_point() else t, target)
    try:
        g = loss.gradient(output.double(), exact)
    # Whatever a loss says to numbers of another precision; its own takes less memory.
    except Exception:
        precision, exact = output.dtype, target
        g = loss.gradient(output, target)

    def norms(t: Tensor) -> Tensor:
        return scale * t.reshape(len(t), -1).double().norm(dim=1)

    def gradient(step: float) -> Tensor:
        return loss.gradient(output.to(precision) + step * x.to(precision), exact)

    direction = loss.channels(x).unsqueeze(-1)
    found = loss.hessian_product(output, target, direction).squeeze(-1)
    differences: list[Tensor] = []

    def comparison(usual: Tensor) -> Comparison:
        return Comparison(
            size=norms(found),
            total=norms(found) + norms(g) + usual,
            off=torch.stack([norms(d - found) for d in differences]),
            apart=torch.stack([norms(d - differences[0]) for d in differences]),
            precision=precision,
            own=output.dtype,
        )

    nothing = torch.zeros_like(norms(g))
    for h in STEPS[precision]:
        differences.append((gradient(h) - gradient(-h)) / (2 * h))
        if len(differences) == 1 and comparison(nothing).right().all():
            return nothing.bool()
    return comparison(_usual(loss, output, target, direction, norms)).refuted()


def _usual(
    loss: OutputLoss,
    output: Tensor,
    target: Tensor,
    direction: Tensor,
    norms: Callable[[Tensor], Tensor],
) -> Tensor:
    """The size of derivatives at random outputs, for each sample.

    Where the loss is saturated, rounding is to be measured by what is not.
    """
    typical = Noise().like(output)
    # Some losses are of probabilities only, and say so in any way.
    with tolerated(Exception):
        usual = norms(loss.gradient(typical, target))
        usual = usual + norms(loss.hessian_product(typical, target, direction))
        return usual.nan_to_num(0.0, 0.0, 0.0)
    return norms(torch.zeros_like(output))


def _first(target: Any) -> Any:
    """The targets of the first sample."""
    return some_targets(target, torch.zeros(1, dtype=torch.int64, device="cpu"))
