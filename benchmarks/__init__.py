"""Benchmarks: ``python -m benchmarks`` prints tables and writes JSON.

A suite (``products.py``) is a list of cases. A case is one function: it takes a problem
(``problems.py``), sets up, and returns the function that is timed. ``measure.py`` times
the cases of a suite in turns, and measures the peak memory of each in a process of its
own. A new case is one more function in the list; a new suite is listed in
``__main__.py``. How to call the other libraries stands in ``peers.py``.
``python -m benchmarks.growth`` measures how time and memory grow.
"""
