"""What a net does with its parameters: linearisations, layers, columns."""
