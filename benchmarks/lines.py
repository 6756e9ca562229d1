"""What the lines of the package are for: ``python -m benchmarks lines``.

Each file belongs to one capability. Lines of code are counted apart from docstrings
(contracts, shapes, costs, examples that run) and from comments and empty lines.
``--files`` prints each file.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import vivit_linop as vl

PACKAGE = Path(vl.__file__).parent
FIRST = "what the first version did"

# What came after the first version. All other files are of that, also where they grew.
CAPABILITIES = {
    "certificates of outputs, J x, columns, losses, second derivatives": """
        noise.py net/certified.py net/certificate.py risk/checks.py
        risk/independence.py risk/losses/differences.py risk/losses/draws.py
        risk/losses/certificates.py curvature/culprit.py
        curvature/second_derivatives.py
    """,
    "a private copy of the net, its precision, other parameters": """
        checkpoints.py risk/model/copies.py risk/model/private_module.py
        risk/model/foreign_memory.py risk/model/memory_format.py risk/model/original.py
        risk/model/staleness.py risk/model/tensors_used.py risk/model/widened.py
    """,
    "data of any form, samples along any axis": """
        risk/data/containers.py risk/data/samples.py risk/data/sample_search.py
        risk/data/segments.py risk/model/outputs.py risk/row_layout.py
    """,
    "losses: with derivatives of their own, of the model, weighted, item by item": """
        risk/losses/derived.py risk/losses/numbers_read.py risk/losses/own.py
        risk/model_loss.py
    """,
    "algebra: sandwiches, stacks, restrictions, diagonal dampings, gradients": """
        curvature/block_sandwich.py linalg/diagonal_damping.py
        linalg/restrictions.py linalg/sandwiches.py
        net/columns/weighted.py operators/damped.py operators/grams.py
        operators/linear_map.py operators/random_projection.py operators/sandwich.py
        operators/symmetric.py operators/damped_solver.py operators/parts.py
    """,
    "iterations: tracking, ends of spectra, solvers, Lanczos, costs of devices": """
        curvature/calibration.py linalg/iterative.py linalg/krylov.py linalg/leading.py
        linalg/tracking.py net/inner.py
    """,
    "many processes": """
        ranks/*.py risk/data/distributed.py risk/model/same_function.py
        risk/model/sharded.py
    """,
    "analyses: Laplace, evidence, influence, covariance, predictive, trust region": """
        analysis/class_means.py analysis/covariance.py analysis/evidence.py
        analysis/inner_products.py analysis/laplace.py interop/laplace.py
    """,
    "many columns at a time, the run of construction": """
        net/columns/products.py risk/kept.py
    """,
    "recurrent layers": "net/recurrent.py",
    "KFRA, and BackPACK's recursions": "curvature/recursions.py",
    "notebooks, plots, bars, explain of every operator": """
        bars.py drawing.py extras.py linalg/explanations.py operators/outline.py
        operators/outlines.py
    """,
}


class Lines(NamedTuple):
    """Numbers of lines.

    Attributes:
        code: Those with code.
        docstrings: Those of docstrings.
        others: Comments and empty lines.
    """

    code: int
    docstrings: int
    others: int

    @classmethod
    def of(cls, source: str) -> Lines:
        documented: set[int] = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                if isinstance(node.value.value, str):
                    documented.update(range(node.lineno, (node.end_lineno or 0) + 1))
        layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT}
        layout |= {tokenize.DEDENT, tokenize.ENDMARKER}
        written: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type not in layout:
                written.update(range(token.start[0], token.end[0] + 1))
        code = len(written - documented)
        return cls(code, len(documented), source.count("\n") - code - len(documented))

    @property
    def all(self) -> int:
        return sum(self)


def capability(name: str) -> str:
    """What a file is for."""
    for what, patterns in CAPABILITIES.items():
        if any(fnmatch(name, pattern) for pattern in patterns.split()):
            return what
    return FIRST


def counted(package: Path = PACKAGE) -> dict[str, dict[str, Lines]]:
    """By capability, the lines of each file."""
    found: dict[str, dict[str, Lines]] = {FIRST: {}} | {w: {} for w in CAPABILITIES}
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        found[capability(name)][name] = Lines.of(path.read_text())
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks lines")
    parser.add_argument("--files", action="store_true", help="print each file")
    each = parser.parse_args(arguments).files
    columns = "files", "lines", "code", "docstrings"
    print(f"{'':80}" + "".join(f"{column:>12}" for column in columns))
    whole: list[Lines] = []
    for what, files in counted().items():
        print_row(what, list(files.values()))
        whole += files.values()
        for name, lines in files.items() if each else ():
            print_row(f"    {name}", [lines])
    print_row("together", whole)


def print_row(what: str, lines: Sequence[Lines]) -> None:
    total = Lines(*map(sum, zip(*lines, strict=True)))
    numbers = len(lines), total.all, total.code, total.docstrings
    print(f"{what:80}" + "".join(f"{number:12,}" for number in numbers))


if __name__ == "__main__":
    main()
