"""The user's model as a guest: a function of its parameters, run on private copies."""
