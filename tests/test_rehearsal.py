"""A GPU is rehearsed on the CPU: what is on the device stays there."""

import json
import math
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.rehearsal.limits import LAUNCHED_BY, LAUNCHES, LIMITS

NETS = ["mlp", "convolutions", "attention", "tokens"]
# Of float32, on other orders of summation.
CLOSE = 1e-5

pytestmark = [
    pytest.mark.host("pretends the GPU"),
    pytest.mark.skipif(
        torch.backends.cuda.is_built()
        or not (shutil.which("g++") or shutil.which("c++")),
        reason="needs a compiler of C++, and a torch whose CUDA it can pretend",
    ),
]


def rehearsed() -> dict[str, dict[str, dict[str, Any]]]:
    command = [sys.executable, "-m", "tests.rehearsal", *NETS, "--json"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()[-len(NETS) :]
    return dict(zip(NETS, map(json.loads, lines), strict=True))


def test_all_stays_on_the_device_is_right_and_takes_no_more_than_it_did() -> None:
    found = {net: what_is_wrong(report) for net, report in rehearsed().items()}
    assert found == {net: {} for net in NETS}


def what_is_wrong(report: dict[str, dict[str, Any]]) -> dict[str, Any]:
    assert report.keys() == LIMITS.keys()
    wrong, more = {}, {}
    for name, line in report.items():
        near = line.get("distance", 0.0) <= CLOSE
        if "error" in line or not near or not line.get("on_device", True):
            wrong[name] = line
        waits, copies = LIMITS[name]
        if line["waits"] > waits or line["copies"] > copies:
            more[name] = line["events"]
        counted = torch.__version__.startswith(LAUNCHED_BY)
        if counted and line["launches"] > LAUNCHES.get(name, math.inf):
            more[name] = {"launches": line["launches"]}
    return wrong | more


def test_the_limits_are_those_that_were_aimed_at() -> None:
    waits = {name: count for name, (count, _) in LIMITS.items()}
    for name in (
        *("kept G @ x", "kept G @ X", "kept Hessian @ x", "Woodbury solve"),
        *("KFAC @ x", "KFAC's solve", "EKFAC @ x", "EKFAC's solve"),
    ):
        assert LIMITS[name] == (0, 0)
    assert waits["construction"] <= 4
    for name in ("first G @ x", "first Hessian @ x", "first streamed G @ x"):
        assert waits[name] <= 6
    assert waits["streamed G @ x"] <= 1
    # One a restart, and two that look for copies: vectors stay on the device.
    assert waits["Lanczos"] <= 3 < waits["ARPACK"]


def test_a_mixed_device_is_seen() -> None:
    code = (
        "from tests.rehearsal.pretended import PretendedGPU, on_the_gpu\n"
        "import os, torch\n"
        "with PretendedGPU():\n"
        "    x = on_the_gpu(torch.ones(3))\n"
        "    assert x.device == torch.device('cuda:0')\n"
        "    assert (x + x).sum().item() == 6.0\n"
        "    try:\n"
        "        x + torch.ones(3)\n"
        "    except RuntimeError as error:\n"
        "        print(error, flush=True)\n"
        "os._exit(0)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "two devices" in run.stdout, run.stderr
