"""Look for cases on which the library is wrong."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator

import torch

from .checks import Finding
from .expressions import Expression
from .nets import Plan
from .truth import Undecided

KINDS = {"nets": Plan, "expressions": Expression}
Case = Plan | Expression


def shrunk(case: Case, finding: Finding) -> Case:
    """A smaller case on which the same check fails in the same way."""
    only = None if finding.check == "guest" else finding.check

    def same(smaller: Case) -> bool:
        try:
            return any(f.alike(finding) for f in smaller.findings(only))
        # What was cut away may have held the net together: it fails in any way.
        except Exception:
            return False

    while (better := next(filter(same, case.smaller()), None)) is not None:
        case = better
    return case


def cases(kinds: list[str], seed: int) -> Iterator[Case]:
    """One of each kind by turns, without end; a seed is a case."""
    while True:
        for kind in kinds:
            yield KINDS[kind].draw(seed)
        seed += 1


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=time.time_ns() // 10**6 % 10**9)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--only", choices=list(KINDS))
    parser.add_argument("--case", action="store_true", help="the one of the seed")
    given = parser.parse_args()
    torch.set_num_threads(1)
    kinds = [given.only] if given.only else list(KINDS)
    end = time.monotonic() + 60 * given.minutes
    count: Counter[str] = Counter()
    found: list[Finding] = []
    for case in cases(kinds, given.seed):
        kind = "nets" if isinstance(case, Plan) else "expressions"
        try:
            findings = case.findings()
            count[kind] += 1
        except Undecided as reason:
            findings = []
            count[f"{kind} without a truth: {str(reason)[:70]}"] += 1
        count.update(str(finding)[:120] for finding in findings)
        new = [f for f in findings if not any(f.alike(known) for known in found)]
        found += new
        if new:  # one script a case: most often, one fault has many faces
            print(f"# {kind}, seed {case.seed}:", *new, sep="\n# ")
            print(shrunk(case, new[0]).code(), flush=True)
        if time.monotonic() > end or (given.case and kind == kinds[-1]):
            break
    print(f"# from seed {given.seed}:")
    for what, often in count.most_common():
        print(f"# {often:5} {what}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
