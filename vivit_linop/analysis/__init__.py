"""Analyses: what is read off the spectrum of the GGN."""

from vivit_linop.analysis.directional import directional_derivatives
from vivit_linop.analysis.evidence import (
    log_marginal_likelihood,
    posterior_precision,
)
from vivit_linop.analysis.gram import centered_gram
from vivit_linop.analysis.influence import influence, self_influence
from vivit_linop.analysis.newton import damped_newton_step
from vivit_linop.analysis.predictive import predictive_covariance
from vivit_linop.analysis.projectors import projector
from vivit_linop.analysis.spectrum import LanczosSpectrum

__all__ = [
    "LanczosSpectrum",
    "centered_gram",
    "damped_newton_step",
    "directional_derivatives",
    "influence",
    "log_marginal_likelihood",
    "posterior_precision",
    "predictive_covariance",
    "projector",
    "self_influence",
]
