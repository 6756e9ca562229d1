"""Rehearse a GPU: python -m tests.rehearsal mlp tokens [--events "kept G @ x"].

Prints, for each operation, how often the host waits for the device, how often it copies
to it, how many operations it launches, and how far the result is from that of the CPU;
as JSON or for reading.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import traceback
import warnings
from typing import Any

import numpy as np

from .pretended import (  # first: it is there before torch looks for a GPU
    Events,
    Pretended,
    PretendedGPU,
    on_the_gpu,
)

import torch  # isort: skip

from .operations import NETS, OPERATIONS, setting  # isort: skip


def numbers(result: Any) -> Any:
    """The numbers of a result on the host, None for what has none."""
    if isinstance(result, Pretended):
        result = result.inner
    if isinstance(result, torch.Tensor):
        return result.detach().numpy()
    return result if isinstance(result, np.ndarray) else None


def rehearsed(net: str) -> dict[str, dict[str, Any]]:
    """Every operation, on the CPU first, then on the pretended GPU."""
    here = setting(net, lambda x: x)
    expected = {name: numbers(run(here)) for name, run in OPERATIONS.items()}
    report: dict[str, dict[str, Any]] = {}
    with PretendedGPU():
        there = setting(net, on_the_gpu)
        for name, run in OPERATIONS.items():
            line: dict[str, Any] = {}
            with Events.recorded() as events:
                try:
                    result = run(there)
                except Exception as error:
                    line["error"] = f"{type(error).__name__}: {error}"
                    line["trace"] = traceback.format_exc()
                    result = None
            line["events"], line["launches"] = dict(events), events.launches
            for kind in ("waits", "copies"):
                line[kind] = sum(n for what, n in events.items() if kind in what)
            known, found = expected[name], numbers(result)
            if isinstance(result, torch.Tensor):
                line["on_device"] = isinstance(result, Pretended)
            if found is not None:
                distance = np.linalg.norm(found - known)
                line["distance"] = float(distance / max(np.linalg.norm(known), 1e-30))
            report[name] = line
    return report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.rehearsal")
    parser.add_argument("nets", nargs="+", choices=list(NETS))
    parser.add_argument("--events", help="an operation, whose events are printed")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    importlib.import_module("torch._dynamo")  # else each net does, at its first vmap
    for net in given.nets:
        sys.stdout.flush()
        if os.fork() == 0:  # what one net leaves behind counts for no other
            show(rehearsed(net), given)
            sys.stdout.flush()
            os._exit(0)  # torch would look for a device to clean up
        if os.wait()[1]:
            os._exit(1)
    os._exit(0)


def show(report: dict[str, dict[str, Any]], given: argparse.Namespace) -> None:
    if given.json:
        print(json.dumps(report))
    elif given.events:
        line = report[given.events]
        print(line.get("trace", ""), end="")
        for what, often in line["events"].items():
            print(f"{often:4} {what}")
    else:
        for name, line in report.items():
            counts = "{waits:4} {copies:4} {launches:5}".format(**line)
            far = f"{line['distance']:.0e}" if "distance" in line else ""
            error = line.get("error", "").splitlines()[:1]
            print(f"{name:35} {counts} {far:8}", *error)


if __name__ == "__main__":
    main()
