"""Run benchmarks, print their tables and write them as JSON."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import products
from benchmarks.measure import (
    Suite,
    difference,
    environment,
    in_turns,
    median_ratio,
    peak_memory,
    peak_memory_in_subprocess,
    set_up,
)
from benchmarks.problems import NETS, Problem, make_problem

SUITES: dict[str, Suite] = {"products": products.SUITE}
RESULTS = Path(__file__).parent / "results"
NOTHING = "nothing"  # the case whose memory is that of the libraries, net and data
# Rounds at most, and seconds after which no further round is begun.
EFFORT, QUICK_EFFORT = (50, 60.0), (5, 5.0)


def main() -> None:
    options = parse()
    device = torch.device(options.device)
    if options.memory_of is not None:
        (suite_name,), (net,) = options.suites, options.nets
        build = SUITES[suite_name].cases.get(options.memory_of)
        problem = make_problem(net, options.device)
        print(json.dumps({"peak_bytes": peak_memory(build, problem)}))
        return

    facts = environment(device)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    report: dict[str, Any] = {"environment": facts, "suites": {}}
    for suite_name in options.suites:
        report["suites"][suite_name] = {
            net: run(suite_name, net, options) for net in options.nets
        }
    RESULTS.mkdir(exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = RESULTS / f"{'-'.join(options.suites)}-{device.type}-{stamp}.json"
    path.write_text(json.dumps(report, indent=1))
    print(f"\nWritten to {path.relative_to(RESULTS.parents[1])}.")


def run(suite_name: str, net: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one suite on one net, print it and return what was measured."""
    suite, problem = SUITES[suite_name], make_problem(net, options.device)
    print(f"\n{suite.title}: {describe(problem)}")
    runs, results, set_up_times = set_up(suite.cases, problem)
    same = {
        f"{a} | {b}": difference(results[a], results[b])
        for a, b in suite.same
        if a in results and b in results
    }
    results.clear()
    times = in_turns(runs, problem.device, *options.effort)
    memory = {}
    if not options.no_memory:
        of_problem = [suite_name, "--nets", net, "--device", options.device]
        memory = {
            name: peak_memory_in_subprocess([*of_problem, "--memory-of", name])
            for name in (NOTHING, *suite.cases)
        }
    ratios = {ratio.label: median_ratio(times, ratio) for ratio in suite.ratios}
    print_tables(suite, times, set_up_times, memory, ratios, same)
    return {
        "num_params": problem.num_params,
        "num_samples": len(problem.data[1]),
        "seconds": times,
        "set_up_seconds": set_up_times,
        "peak_bytes": memory,
        "median_ratios": ratios,
        "relative_differences": same,
    }


def describe(problem: Problem) -> str:
    X, y = problem.data
    with torch.no_grad():
        num_classes = problem.model(X[:1]).shape[1]
    return (
        f"{problem.name}, D = {problem.num_params:,}, N = {len(y)}, C = {num_classes}, "
        f"{X.dtype}, random inputs {list(X.shape[1:])}"
    )


def print_tables(
    suite: Suite,
    times: dict[str, list[float]],
    set_up_times: dict[str, float],
    memory: dict[str, int],
    ratios: dict[str, float],
    same: dict[str, float],
) -> None:
    rounds = len(next(iter(times.values())))
    width = max(map(len, [*suite.cases, *ratios, *same])) + 2
    print(f"\n{f'milliseconds, {rounds} rounds':{width}}", end="")
    print(f"{'median':>10}{'fastest':>10}{'slowest':>10}{'set-up':>10}{'peak':>12}")
    if memory:
        print(f"{NOTHING:{width}}{'':40}{memory[NOTHING] / 2**20:8.0f} MiB")
    for name, values in times.items():
        row = (statistics.median(values), min(values), max(values), set_up_times[name])
        print(f"{name:{width}}" + "".join(f"{1e3 * s:10.2f}" for s in row), end="")
        print(f"{memory[name] / 2**20:8.0f} MiB" if memory else "")
    print(f"\n{'median of ratios':{width}}{'':>10}{'aim':>20}")
    for ratio in suite.ratios:
        print(f"{ratio.label:{width}}{ratios[ratio.label]:10.2f}{ratio.target:>20}")
    print("\nrelative difference of results")
    for pair, error in same.items():
        print(f"{pair:{width}}{error:10.1e}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="suite", help=", ".join(SUITES))
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="a few rounds only")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--memory-of", metavar="CASE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.suites = options.suites or list(SUITES)
    unknown = set(options.suites) - set(SUITES)
    if unknown:
        parser.error(f"no suite {sorted(unknown)}; there are {list(SUITES)}")
    options.effort = QUICK_EFFORT if options.quick else EFFORT
    return options


if __name__ == "__main__":
    main()
