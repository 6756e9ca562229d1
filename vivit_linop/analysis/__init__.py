"""Analyses: what is read off the spectrum of the GGN."""

from vivit_linop.analysis.directional import directional_derivatives
from vivit_linop.analysis.newton import damped_newton_step

__all__ = ["damped_newton_step", "directional_derivatives"]
