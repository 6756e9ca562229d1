"""Losses as functions of outputs, with their derivatives in output space."""
