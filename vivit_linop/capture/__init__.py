"""Capture: which layers a net has, seen from its own calls, and their factors."""

from vivit_linop.capture.capture import Capture
from vivit_linop.capture.certified import CertifiedColumns, find_structure
from vivit_linop.capture.structure import Structure

__all__ = ["Capture", "CertifiedColumns", "Structure", "find_structure"]
