"""What a net does with its parameters: linearisations, layers, columns."""

from vivit_linop.net import layers as layers  # the built-in kinds are registered
