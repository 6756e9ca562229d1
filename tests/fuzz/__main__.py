"""Look for cases on which the library is wrong: ``python -m tests.fuzz --help``."""

from __future__ import annotations

import argparse
import sys
import time
import types
from collections import Counter

import torch

from . import checks
from .checks import Finding
from .nets import Plan
from .truth import Undecided


def program(code: str) -> types.ModuleType:
    """The module of a program, which pickle finds by its name."""
    module = types.ModuleType("fuzzed")
    sys.modules["fuzzed"] = module
    exec(compile(code, "<fuzzed>", "exec"), module.__dict__)
    return module


def run(plan: Plan, only: str | None = None) -> list[Finding]:
    """The findings of a plan; Undecided if its program does not run in plain torch."""
    try:
        built = program(plan.code())
        built.build()
    except Exception as error:
        raise Undecided(f"{type(error).__name__}: {error}") from error
    return checks.findings(built.build, plan.seed, only)


def shrunk(plan: Plan, finding: Finding) -> Plan:
    """A smaller plan on which the same check fails in the same way."""

    def same(smaller: Plan) -> bool:
        try:
            found = run(smaller, None if finding.check == "guest" else finding.check)
        except Exception:  # not a case at all
            return False
        return any(
            (f.check, f.refused) == (finding.check, finding.refused)
            and (f.what.split()[:2] == finding.what.split()[:2])
            for f in found
        )

    while True:
        better = next((p for p in plan.smaller() if same(p)), None)
        if better is None:
            return plan
        plan = better


def script(plan: Plan, findings: list[Finding]) -> str:
    said = "".join(f"# {finding}\n" for finding in findings)
    return (
        f"# nets, seed {plan.seed}; run from the root of the project\n{said}"
        f"{plan.code()}\n\nif __name__ == '__main__':\n"
        f"    from tests.fuzz.checks import report\n\n    report(build, {plan.seed})\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6 * 1000)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--case", type=int)
    given = parser.parse_args()
    torch.set_num_threads(1)
    seed, end = given.seed, time.monotonic() + 60 * given.minutes
    counts: Counter[str] = Counter()
    while time.monotonic() < end:
        plan = Plan.draw(given.case if given.case is not None else seed)
        try:
            found = run(plan)
            counts["cases"] += 1
        except Undecided as reason:
            found = []
            counts[f"undecided: {reason}"[:90]] += 1
        for finding in found:
            small = shrunk(plan, finding)
            print(script(small, [finding]), flush=True)
            counts[str(finding)[:90]] += 1
        if given.case is not None:
            break
        seed += 1
    for name, count in counts.most_common():
        print(count, name)
    sys.exit(any(counts))


if __name__ == "__main__":
    main()
