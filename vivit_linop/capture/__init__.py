"""Capture: which layers a net has, seen from its own calls, and their factors."""

from vivit_linop.capture.capture import (
    Capture,
    Structure,
    UnseenUseError,
    find_structure,
)

__all__ = ["Capture", "Structure", "UnseenUseError", "find_structure"]
