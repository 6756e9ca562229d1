"""Run benchmarks, print their tables and write them as JSON."""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    certificates,
    compiled,
    compositions,
    directions,
    inverses,
    lines,
    monitor,
    preconditioners,
    products,
    quantities,
    quoted,
    routes,
    spectra,
    vivit_dropin,
    walk,
)
from benchmarks.measure import (
    Prepared,
    Ratio,
    Results,
    Suite,
    at_most,
    environment,
    in_full_precision,
    in_turns,
    load,
    median_ratio,
    peak_memory,
    peak_memory_in_subprocess,
    prepare,
    shared_cores,
)
from benchmarks.problems import NETS, Problem, Unavailable, make_problem

SUITES: dict[str, Suite] = {
    "products": products.SUITE,
    "compiled": compiled.SUITE,
    "spectra": spectra.SUITE,
    "directions": directions.SUITE,
    "inverses": inverses.SUITE,
    "preconditioners": preconditioners.SUITE,
    "quantities": quantities.SUITE,
    "vivit": vivit_dropin.SUITE,
    "certificates": certificates.SUITE,
    "compositions": compositions.SUITE,
    "monitor": monitor.SUITE,
    "routes": routes.SUITE,
}
RESULTS = Path(__file__).parent / "results"
NOTHING = "nothing"  # the case whose memory is that of the libraries, net and data
# Rounds at most, and seconds after which no further round is begun.
EFFORT, QUICK_EFFORT = (50, 60.0), (2, 5.0)
# Of a quick run, in all.
QUICK_SECONDS = 100.0


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["walk"]:  # counts, and neither a time nor a peer
        walk.main(arguments[1:])
        return
    if arguments[:1] == ["lines"]:  # what the package is for, in lines
        lines.main(arguments[1:])
        return
    if arguments[:1] == ["quote"]:  # for the documentation
        quoted.main(SUITES, arguments[1:])
        return
    options = parse(arguments)
    if options.memory_of is not None:
        print(json.dumps({"peak_bytes": memory_of_case(options)}))
        return

    device = torch.device(options.device)
    if device.type == "cuda":
        in_full_precision()
    facts = environment(device)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    report: dict[str, Any] = {"environment": facts, "suites": {}}
    RESULTS.mkdir(exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = RESULTS / f"{'-'.join(options.suites)}-{device.type}-{stamp}.json"
    end = time.perf_counter() + (QUICK_SECONDS if options.quick else math.inf)
    chosen = [(name, net) for name in options.suites for net in nets_of(name, options)]
    for number, (suite_name, net) in enumerate(chosen):
        suite = SUITES[suite_name]
        measured = report["suites"].setdefault(suite_name, {})
        left = (end - time.perf_counter()) / (len(chosen) - number)
        try:
            samples = options.samples or suite.nets.get(net)
            problem = make_problem(net, options.device, samples)
            measured[net] = run(suite_name, problem, options, left)
        except Unavailable as reason:
            print(f"\n{suite.title}: no {net}, {reason}")
        except Exception as error:
            measured[net] = {"error": f"{type(error).__name__}: {error}"}
            print(f"\n{suite.title}, {net}: {measured[net]['error']}")
        path.write_text(json.dumps(report, indent=1))  # as far as it got
    print(f"\nWritten to {os.path.relpath(path)}.")


def nets_of(suite: str, options: argparse.Namespace) -> list[str]:
    """Those asked for, or the suite's; of a quick run, its first."""
    if options.nets:
        return list(options.nets)
    return list(SUITES[suite].nets)[: 1 if options.quick else None]


def memory_of_case(options: argparse.Namespace) -> int:
    (suite_name,), (net,) = options.suites, options.nets
    suite = SUITES[suite_name]
    build = suite.cases.get(options.memory_of)
    problem = make_problem(net, options.device, options.samples)
    return peak_memory(build, problem, runs=1 if suite.from_scratch else 2)


def run(
    suite_name: str, problem: Problem, options: argparse.Namespace, left: float
) -> dict[str, Any]:
    """Run one suite on one problem, print it and return what was measured.

    What is not done in the seconds that are left is a row that says so.
    """
    now = time.perf_counter
    start = now()
    suite = SUITES[suite_name]
    print(f"\n{suite.title}: {describe(problem)}", flush=True)
    # Rounds get a part of the time too, and no case takes it all.
    most = 3 * left / (len(suite.cases) + 3)
    prepared = prepare(
        suite, problem, lambda: at_most(min(most, 0.7 * left + start - now()))
    )
    with at_most(start + left - now()):
        agreement = agreement_of(suite, problem, prepared.results)
    iterations = suite.iterations(prepared.results)
    prepared.results.clear()
    print_agreement(prepared, agreement)
    loads = [load()]
    rounds, seconds = options.effort
    seconds = min(seconds, max(start + left - now(), 0.1))
    times = in_turns(prepared.runs, problem.device, rounds, seconds)
    loads.append(load())
    shared: dict[str, list[float]] = {}
    if options.busy:
        with shared_cores(options.busy):
            shared = in_turns(prepared.runs, problem.device, *options.effort)
    memory = {}
    if not options.no_memory:
        of_problem = [suite_name, "--nets", problem.name, "--device", options.device]
        of_problem += ["--samples", str(problem.num_samples)]
        memory = memory_of_cases((NOTHING, *prepared.runs), of_problem)
    ratios, shared_ratios = (
        {r.label: median_ratio(found, r) for r in suite.ratios if r.of(found)}
        for found in (times, shared)
    )
    memory_ratios, beyond = {}, {}
    for ratio in suite.memory_ratios:
        if ratio.of(memory) and NOTHING in memory:
            ours, theirs = memory[ratio.numerator], memory[ratio.denominator]
            nothing = memory[NOTHING]
            memory_ratios[ratio.label] = ours / theirs
            beyond[ratio.label] = (ours - nothing) / max(theirs - nothing, 1)
    print(f"\nload {loads[0]} before, {loads[1]} after")
    print_times(suite, prepared, times, memory, iterations)
    # What is aimed at is said of the default sizes.
    usual = suite.nets.get(problem.name) or NETS[problem.name].num_samples
    net = problem.name if problem.num_samples == usual else ""
    print_ratios("median of ratios", suite.ratios, ratios, net)
    print_ratios(f"… beside {options.busy} busy", suite.ratios, shared_ratios, "")
    print_ratios("ratios of peak memory", suite.memory_ratios, memory_ratios, net)
    print_ratios(f"… beyond {NOTHING}", suite.memory_ratios, beyond, "")
    return {
        "num_params": problem.num_params,
        "num_samples": problem.num_samples,
        "num_classes": problem.num_classes,
        "load": loads,
        "seconds": times,
        "seconds_of_shared_cores": shared,
        "first_seconds": prepared.first,
        "peak_bytes": memory,
        "median_ratios": ratios,
        "median_ratios_of_shared_cores": shared_ratios,
        "memory_ratios": memory_ratios,
        "memory_ratios_beyond_nothing": beyond,
        "agreement": agreement,
        "iterations": iterations,
        "unavailable": prepared.unavailable,
    }


def memory_of_cases(names: Sequence[str], of_problem: list[str]) -> dict[str, int]:
    """The peaks of those that can be measured, each in a process of its own."""
    memory = {}
    for name in names:
        arguments = [*of_problem, "--memory-of", name]
        try:
            memory[name] = peak_memory_in_subprocess("benchmarks", arguments)
        except RuntimeError as error:
            print(f"no memory of {name}: {str(error).strip().splitlines()[-1]}")
    return memory


def agreement_of(suite: Suite, problem: Problem, results: Results) -> dict[str, float]:
    """How far results are apart; nothing, and the reason, where one is missing."""
    try:
        return suite.agreement(problem, results)
    except Exception as error:
        print(f"results not compared: {type(error).__name__}: {error}")
        return {}


def describe(problem: Problem) -> str:
    X, _ = problem.data
    return (
        f"{problem.name}, D = {problem.num_params:,}, N = {problem.num_samples}, "
        f"C = {problem.num_classes}, {X.dtype}, {problem.inputs} {list(X.shape[1:])}"
    )


def print_agreement(prepared: Prepared, agreement: dict[str, float]) -> None:
    for name, reason in prepared.unavailable.items():
        print(f"not run: {name}, {reason}")
    if agreement:
        print("\nrelative differences of results")
    for label, error in agreement.items():
        print(f"{label:54}{error:10.1e}", flush=True)


def print_times(
    suite: Suite,
    prepared: Prepared,
    times: dict[str, list[float]],
    memory: dict[str, int],
    iterations: dict[str, int],
) -> None:
    rounds = max(map(len, times.values()), default=0)
    first = "first run" if suite.from_scratch else "set-up"
    print(f"\n{f'milliseconds, rounds: {rounds}':44}", end="")
    print(
        f"{'median':>10}{'fastest':>10}{'slowest':>10}{first:>10}{'peak':>12}", end=""
    )
    print(f"{'iterations':>12}" if iterations else "")
    if NOTHING in memory:
        print(f"{NOTHING:44}{'':40}{memory[NOTHING] / 2**20:8.0f} MiB")
    for name, values in times.items():
        row = statistics.median(values), min(values), max(values), prepared.first[name]
        print(f"{name:44}" + "".join(f"{1e3 * s:10.2f}" for s in row), end="")
        print(
            f"{memory[name] / 2**20:8.0f} MiB" if name in memory else " " * 12, end=""
        )
        print(f"{iterations[name]:12d}" if name in iterations else "")


def print_ratios(
    title: str, ratios: list[Ratio], values: dict[str, float], net: str
) -> None:
    if not values:
        return
    print(f"\n{title:44}{'':>10}{'aim':>14}")
    for ratio in ratios:
        if ratio.label in values:
            value = values[ratio.label]
            verdict = ratio.verdict(net, value)
            print(f"{ratio.label:44}{value:10.2f}{verdict:>14}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    suites = f"{', '.join(SUITES)}; or walk, quote"
    parser.add_argument("suites", nargs="*", metavar="suite", help=suites)
    parser.add_argument(
        "--nets", nargs="+", choices=NETS, help="by default those of the suite"
    )
    parser.add_argument("--samples", type=int, help="N, by default the suite's")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="within two minutes: a net of each suite, two rounds, no memory",
    )
    parser.add_argument(
        "--busy",
        type=int,
        default=0,
        metavar="N",
        help="time all again beside N processes that keep the cores busy",
    )
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--memory-of", metavar="CASE", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.suites = options.suites or list(SUITES)
    unknown = set(options.suites) - set(SUITES)
    if unknown:
        parser.error(f"no suite {sorted(unknown)}; there are {list(SUITES)}")
    options.effort = QUICK_EFFORT if options.quick else EFFORT
    options.no_memory |= options.quick
    return options


if __name__ == "__main__":
    main()
