"""The tests, a package: pytest and scripts import what is shared as ``tests.…``."""
