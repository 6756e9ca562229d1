"""A fuzzer: random nets and expressions, each against dense truth in float64.

``layers`` and ``nets`` write a random net, its loss, data and parameters as a program;
``truth`` evaluates the program by plain autograd, ``checks`` by the library.
``expressions`` do the same for the algebra. A case is a seed, and is printed as a
script: ``python -m tests.fuzz --help``.
"""
