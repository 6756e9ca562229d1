"""Constants of the choice of routes: defaults, measured, kept in a file."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import vivit_linop as vl
from vivit_linop.curvature import calibration, plan

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    for device in (CPU, GPU):
        vl.DeviceCosts.default(device).use(device)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Without measuring; what was asked for is listed."""
    asked: list[str] = []

    def measured(device: torch.device, name: str) -> vl.DeviceCosts:
        asked.append(name)
        return dataclasses.replace(plan.CPU_COSTS, name=name, rate=1e9)

    monkeypatch.setattr(calibration, "_measured", measured)
    return asked


def chosen(shape: tuple[int, int], device: torch.device, k: int = 10) -> plan.Choice:
    cost = plan.FactorCost.of_dense(*shape, 4, device)
    return plan.choose(shape, k, cost, 4, 10**12, shape[1] <= shape[0], device)


def test_the_defaults_of_a_cpu_are_what_they_were() -> None:
    costs = vl.DeviceCosts.on("cpu")
    assert costs == vl.DeviceCosts.default("cpu")
    assert costs.reading_flops == pytest.approx(25)
    for seconds, flops in (
        (costs.call, 1e9),
        (costs.step, 3.6e6),
        (costs.row, 6e5),
        (costs.tracing, 1e11),
        (costs.linearising, 3e9),
        (costs.short_pass, 3e7),
    ):
        assert costs.flops(seconds) == pytest.approx(flops)


def test_measured_costs_are_those_of_a_machine() -> None:
    state = torch.get_rng_state()
    costs = vl.calibrate("cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert costs is vl.DeviceCosts.on("cpu") and "CPU" in costs.name
    for name, value in dataclasses.asdict(costs).items():
        if name not in ("name", "copying"):
            assert 0 < value < math.inf
    assert costs.copying == math.inf
    # A product of large matrices is faster than reading numbers one by one, ...
    assert costs.reading_flops > 0.1
    # and tracing takes longer than a call.
    assert costs.tracing > costs.call


def test_each_device_has_its_own(quick: list[str]) -> None:
    vl.calibrate("cpu")
    assert vl.DeviceCosts.on("cpu").rate == 1e9
    assert vl.DeviceCosts.on("cuda") == vl.DeviceCosts.default("cuda")
    other = dataclasses.replace(plan.GPU_COSTS, name="the second")
    other.use("cuda:1")
    assert vl.DeviceCosts.on("cuda:1").name == "the second"
    assert vl.DeviceCosts.on("cuda:0") == plan.GPU_COSTS == vl.DeviceCosts.on("cuda")


def test_a_file_is_written_once_and_read_after(
    quick: list[str], tmp_path: Path
) -> None:
    place = tmp_path / "costs.json"
    first = vl.calibrate("cpu", file=place)
    assert len(quick) == 1 and json.loads(place.read_text())["rate"] == 1e9
    vl.DeviceCosts.default("cpu").use("cpu")
    assert vl.calibrate("cpu", file=place) == first == vl.DeviceCosts.on("cpu")
    assert len(quick) == 1 and first.copying == math.inf
    vl.calibrate("cpu")
    assert len(quick) == 2  # without a file nothing is remembered


@pytest.mark.parametrize("content", ["", "[1]", '{"rate": 1.0}', "no json"])
def test_other_files_are_refused(
    quick: list[str], tmp_path: Path, content: str
) -> None:
    place = tmp_path / "costs.json"
    place.write_text(content)
    with pytest.raises(ValueError, match=r"file: .*holds no costs of a device"):
        vl.calibrate("cpu", file=place)
    assert place.read_text() == content and not quick
    assert vl.DeviceCosts.on("cpu") == plan.CPU_COSTS


@pytest.mark.parametrize(
    "missing", [["passes", "matrix_bandwidth", "row"], ["row"], ["passes"]]
)
def test_files_of_earlier_versions_are_refused(
    quick: list[str], tmp_path: Path, missing: list[str]
) -> None:
    """What they lack would be that of a CPU, also for a GPU."""
    place = tmp_path / "costs.json"
    vl.calibrate("cpu", file=place)
    plan.CPU_COSTS.use("cpu")
    known = json.loads(place.read_text())
    place.write_text(json.dumps({k: v for k, v in known.items() if k not in missing}))
    with pytest.raises(ValueError, match=rf"earlier version, .*{', '.join(missing)}"):
        vl.calibrate("cpu", file=place)
    assert vl.DeviceCosts.on("cpu") == plan.CPU_COSTS
    place.unlink()
    assert vl.calibrate("cpu", file=place).passes == known["passes"]


def test_costs_of_another_device_are_refused(quick: list[str], tmp_path: Path) -> None:
    place = tmp_path / "costs.json"
    costs = dataclasses.replace(plan.GPU_COSTS, name="another card")
    place.write_text(json.dumps(dataclasses.asdict(costs)))
    with pytest.raises(ValueError, match="costs of 'another card', the device is"):
        vl.calibrate("cpu", file=place)


def test_a_folder_that_is_missing_is_said(quick: list[str], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        vl.calibrate("cpu", file=tmp_path / "none" / "costs.json")


def test_costs_decide() -> None:
    """A slow eigensolver makes ARPACK the cheaper way, slow products the dense one."""
    shape = 10**6, 3000
    slow_solver = dataclasses.replace(plan.CPU_COSTS, leading_pairs=1e9)
    slow_solver.use("cpu")
    assert chosen(shape, CPU).chosen.name == "ARPACK on K"
    slow_calls = dataclasses.replace(plan.CPU_COSTS, call=1e3)
    slow_calls.use("cpu")
    choice = chosen(shape, CPU)
    assert choice.chosen.name == "dense Gram"


def test_a_gpu_iterates_on_the_device_where_vectors_fit() -> None:
    shape = 10**6, 50_000
    on_gpu, on_cpu = chosen(shape, GPU), chosen(shape, CPU)
    assert [route.name for route in on_cpu.routes] == ["dense Gram", "ARPACK on K"]
    assert on_gpu.chosen.name == "Lanczos on K"
    lanczos, arpack = on_gpu.routes[1:]
    assert (lanczos.name, arpack.name) == ("Lanczos on K", "ARPACK on K")
    assert lanczos.flops < arpack.flops
    cost = plan.FactorCost.of_dense(*shape, 4, GPU)
    few = plan.choose(shape, 10, cost, 4, 10**6, True, GPU)
    assert few.chosen.name == "ARPACK on K" and "MB are free" in few.routes[1].refusal


@pytest.mark.host("the costs are a CPU's")
def test_explain_says_what_it_rests_on(quick: list[str]) -> None:
    V = vl.Dense(torch.rand(50, 4))
    op = V @ V.T
    assert "Costs of" not in str(op.explain(k=2))
    costs = vl.calibrate("cpu")
    assert f"Costs of {costs.name}: 1 GFLOP/s, 12 GB/s" in str(op.explain(k=2))


def test_results_do_not_depend_on_them(quick: list[str]) -> None:
    net = nn.Linear(4, 3).double()
    data = torch.rand(9, 4).double(), torch.randint(3, (9,))
    expected = vl.GGN(net, nn.CrossEntropyLoss(), data).eigh(k=2).eigenvalues
    vl.calibrate("cpu")
    found = vl.GGN(net, nn.CrossEntropyLoss(), data).eigh(k=2).eigenvalues
    torch.testing.assert_close(found, expected)
