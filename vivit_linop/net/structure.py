"""What is known of how a net uses its parameters, and which columns are trusted.

A net is recorded on a few samples first. What is found there is a guess for all others:
columns are checked on every batch that they are made for, and what fails is remembered.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vivit_linop.net.columns.base import LayerColumns
from vivit_linop.net.uses import Use, UseKey

# A net that takes other ways on other samples may have this many; beyond, parameters
# whose layouts do not fit are opaque.
_MOST_VARIANTS = 8


@dataclass
class Variant:
    """One way that a net takes: its uses, and where the samples are in each.

    Attributes:
        uses: The kind of each, with the names of weight and bias.
        layouts: For each, where its samples are; None where unknown.
        single: Whether it was found on one sample, where every axis is of that sample.
    """

    uses: list[UseKey]
    layouts: list[str | None]
    single: bool

    def fits(self, uses: list[Use], num_samples: int) -> bool:
        """Whether it may be that of a run, as far as can be seen from outside."""
        if self.single != (num_samples == 1):
            return False
        return self.uses == [use.key for use in uses] and all(
            layout is None or layout in use.layouts(num_samples)
            for use, layout in zip(uses, self.layouts, strict=True)
        )

    @property
    def unknown(self) -> set[str]:
        """The parameters with a use whose samples were not found."""
        pairs = zip(self.uses, self.layouts, strict=True)
        names = {name for (_, *names), at in pairs if at is None for name in names}
        return {name for name in names if name is not None}


@dataclass
class Structure:
    """What has been learnt of a net, on all batches so far.

    Attributes:
        variants: The ways that it takes, the one seen last first.
        opaque: Parameters whose columns need a vector–Jacobian product by sample.
        singly: Those of them for which samples cannot be vectorised.
        uses: What was used where it was looked for.
        layers: There the columns of each parameter, one a sample, without data.
    """

    variants: list[Variant] = field(default_factory=list)
    opaque: set[str] = field(default_factory=set)
    singly: set[str] = field(default_factory=set)
    uses: list[UseKey] = field(default_factory=list)
    layers: dict[str, LayerColumns] = field(default_factory=dict)

    def fitting(self, uses: list[Use], num_samples: int) -> Variant | None:
        """Return a known variant that a run may be of."""
        fit = (each for each in self.variants if each.fits(uses, num_samples))
        return next(fit, None)

    def learn(self, variant: Variant) -> None:
        """Take up a variant; what is unknown there is opaque everywhere."""
        others = [each for each in self.variants if each != variant]
        self.variants = [variant, *others[: _MOST_VARIANTS - 1]]
        self.opaque |= variant.unknown

    @property
    def is_full(self) -> bool:
        """Whether so many variants are known that no more are looked for."""
        return len(self.variants) >= _MOST_VARIANTS
