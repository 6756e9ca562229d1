"""Analyses: what is read off the spectrum of the GGN."""

from vivit_linop.analysis.class_means import ClassMeans, class_means
from vivit_linop.analysis.covariance import ParameterCovariance, covariance
from vivit_linop.analysis.directional import directional_derivatives
from vivit_linop.analysis.evidence import log_marginal_likelihood, posterior_precision
from vivit_linop.analysis.gram import centered_gram
from vivit_linop.analysis.influence import influence, self_influence
from vivit_linop.analysis.laplace import Laplace
from vivit_linop.analysis.newton import damped_newton_step
from vivit_linop.analysis.predictive import predictive_covariance
from vivit_linop.analysis.projectors import projector
from vivit_linop.analysis.spectrum import LanczosSpectrum
from vivit_linop.analysis.trust_region import TrustRegionStep, trust_region_step

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
