"""The columns of one parameter, in the structure of its layer."""
