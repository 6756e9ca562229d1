"""Analyses: what is read off the spectrum of the GGN."""

from vivit_linop.analysis.class_means import ClassMeans, class_means
from vivit_linop.analysis.covariance import ParameterCovariance, covariance
from vivit_linop.analysis.directions import directional_derivatives, projector
from vivit_linop.analysis.evidence import log_marginal_likelihood, posterior_precision
from vivit_linop.analysis.inner_products import (
    centered_gram,
    influence,
    predictive_covariance,
    self_influence,
)
from vivit_linop.analysis.laplace import Laplace
from vivit_linop.analysis.newton import (
    TrustRegionStep,
    damped_newton_step,
    trust_region_step,
)
from vivit_linop.analysis.spectrum import LanczosSpectrum

__all__ = [
    "ClassMeans",
    "LanczosSpectrum",
    "Laplace",
    "ParameterCovariance",
    "TrustRegionStep",
    "centered_gram",
    "class_means",
    "covariance",
    "damped_newton_step",
    "directional_derivatives",
    "influence",
    "log_marginal_likelihood",
    "posterior_precision",
    "predictive_covariance",
    "projector",
    "self_influence",
    "trust_region_step",
]
