"""The benchmarks run on a tiny net, and ours and the peers' results agree."""

from __future__ import annotations

import ast
import fnmatch
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import benchmarks.__main__ as command
from benchmarks import (
    compiled,
    gpu,
    growth,
    lines,
    peers,
    products,
    spectra,
    streaming,
    walk,
)
from benchmarks.measure import (
    SHORT,
    Ratio,
    Run,
    Suite,
    in_turns,
    median_ratio,
    peak_memory_in_subprocess,
)
from benchmarks.problems import NETS, Problem, Residual, Unavailable, make_problem

pytestmark = pytest.mark.host("tables and files")


def available(name: str, num_samples: int = 1) -> Problem:
    try:
        return make_problem(name, num_samples=num_samples)
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("name", NETS)
def test_nets_have_the_published_sizes(name: str) -> None:
    problem = available(name)
    assert problem.num_params == NETS[name].num_params
    assert problem.num_classes == NETS[name].num_classes
    assert not any(module.training for module in problem.model.modules())


def test_pretrained_net_knows_digits() -> None:
    problem = available("digits", 500)
    X, y = problem.data
    with torch.no_grad():
        accuracy = (problem.model(X).argmax(1) == y).float().mean()
    assert accuracy > 0.75  # 0.816 on all 1797


@pytest.mark.parametrize("suite", sorted({*command.SUITES} - {"compiled"}))
def test_cases_of_a_suite_agree(
    suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(command, "QUICK_EFFORT", (1, 5.0))
    command.main([suite, "--nets", "tiny", "--quick", "--no-memory"])
    (report,) = tmp_path.glob("*.json")
    found = json.loads(report.read_text())["suites"][suite]["tiny"]
    assert found["agreement"]
    for label, error in found["agreement"].items():
        assert error < 1e-4, label
    for name in command.SUITES[suite].cases:
        assert name in found["unavailable"] or len(found["seconds"][name]) == 1
    # Only what is not installed is left out.
    for reason in found["unavailable"].values():
        assert reason.endswith("is not installed")


def test_compiled_products_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    problem = available("tiny", 4)
    results = {name: build(problem)() for name, build in compiled.SUITE.cases.items()}
    assert len(results) == 8
    for error in compiled.SUITE.agreement(problem, results).values():
        assert error < 1e-5
    monkeypatch.setattr(compiled, "BACKEND", "of another machine")
    with pytest.raises(Unavailable, match=r"torch\.compile fails here"):
        compiled.product(problem, "ours", 1, compiled=True)


def test_the_load_is_kept_and_cores_are_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(command, "QUICK_EFFORT", (1, 5.0))
    options = ["--nets", "tiny", "--quick", "--no-memory", "--busy", "1"]
    command.main(["products", *options])
    (report,) = tmp_path.glob("*.json")
    found = json.loads(report.read_text())["suites"]["products"]["tiny"]
    assert len(found["load"]) == 2
    assert found["seconds_of_shared_cores"].keys() == found["seconds"].keys()
    assert (
        found["median_ratios_of_shared_cores"].keys() == found["median_ratios"].keys()
    )
    assert "beside 1 busy" in capsys.readouterr().out


def test_eigenvalues_are_those_of_vivit() -> None:
    pytest.importorskip("vivit")
    stub = torch.Tensor.symeig
    problem = make_problem("tiny")
    ours, theirs = (
        case(problem)() for case in (spectra.eigenvalues, spectra.vivit_eigenvalues)
    )
    assert torch.Tensor.symeig is stub
    assert len(theirs) == 18 and len(ours) == 12  # N·C and N·(C − 1)
    assert (ours - theirs[-12:]).abs().max() < 1e-4 * theirs.max()
    assert all(param.grad is None for param in problem.params)


def test_residual_blocks_for_backpack_compute_the_same() -> None:
    blocks = Residual(4, 8), Residual(8, 8), Residual(8, 16)
    net = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(64, 3)).eval()
    data = torch.randn(4, 4, 8, 8), torch.randint(3, (4,))
    problem = Problem("blocks", net, nn.CrossEntropyLoss(), data)
    extended, _ = peers.extended(problem)
    assert not any(isinstance(module, Residual) for module in extended.modules())
    torch.testing.assert_close(extended(data[0]), net(data[0]))
    pytest.importorskip("vivit")
    ours, theirs = (
        case(problem)() for case in (spectra.eigenvalues, spectra.vivit_eigenvalues)
    )
    assert spectra.eigenvalue_difference(ours, theirs) < 1e-4


def test_what_does_not_fit_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vivit", reason="the case asks for the package first")
    monkeypatch.setattr(peers, "free_memory", lambda device: 100)
    with pytest.raises(Unavailable, match="GiB"):
        spectra.vivit_eigenvalues(make_problem("tiny"))


def test_peak_memory_is_that_of_another_process() -> None:
    arguments = ["spectra", "--nets", "tiny", "--memory-of", "all eigenvalues"]
    assert peak_memory_in_subprocess("benchmarks", arguments) > 2**24


def test_ratios_are_medians_over_rounds() -> None:
    times = {"slow": [2.0, 9.0, 8.0], "fast": [1.0, 3.0, 1.0]}
    ratio = Ratio("slow / fast", "slow", "fast", {"net": 2.5})
    assert median_ratio(times, ratio) == 3.0
    assert ratio.verdict("net", 3.0) == "≥ 2.5 yes"
    assert ratio.verdict("net", 2.0) == "≥ 2.5 no"
    assert ratio.verdict("other", 2.0) == ""


def test_cases_take_turns() -> None:
    order: list[str] = []

    def run(name: str) -> None:
        order.append(name)
        time.sleep(SHORT)

    runs = {name: functools.partial(run, name) for name in "ab"}
    in_turns(runs, torch.device("cpu"), rounds=3, budget=60.0)
    assert "".join(order) == "abbaab"


def test_what_is_over_at_once_runs_often() -> None:
    runs: list[int] = []
    times = in_turns({"a": lambda: runs.append(1)}, torch.device("cpu"), 1, 60.0)
    (mean,) = times["a"]
    assert SHORT <= len(runs) * mean < SHORT + 1.0 and len(runs) > 9


def fails(_: Problem) -> Run:
    raise RuntimeError("no such kernel")


def fails_later(_: Problem) -> Run:
    runs: list[int] = []

    def run() -> torch.Tensor:
        runs.append(1)
        if len(runs) == 2:
            raise RuntimeError("out of memory")
        return torch.ones(1)

    return run


def stays(_: Problem) -> Run:
    def run() -> None:
        while True:
            pass

    return run


def test_what_fails_is_a_row_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(command, "QUICK_SECONDS", 20.0)
    cases = {"gradient": products.gradient, "none": fails, "one": fails_later}
    broken = Suite(
        "broken",
        {**cases, "stays": stays},
        {"tiny": None},
        agreement=lambda *_: {"x": 1 / 0},
        from_scratch=True,
    )
    monkeypatch.setitem(command.SUITES, "broken", broken)
    monkeypatch.setitem(command.SUITES, "products", products.SUITE)
    command.main(["broken", "products", "--nets", "tiny", "--quick"])
    (report,) = tmp_path.glob("*.json")
    found = json.loads(report.read_text())["suites"]
    assert found["broken"]["tiny"]["unavailable"]["none"] == (
        "RuntimeError: no such kernel"
    )
    assert "TimeoutError" in found["broken"]["tiny"]["unavailable"]["stays"]
    assert list(found["broken"]["tiny"]["seconds"]) == ["gradient"]
    assert found["broken"]["tiny"]["agreement"] == {}
    assert found["products"]["tiny"]["seconds"]
    assert "out of memory" in capsys.readouterr().out


def test_a_device_in_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ROUNDS", 1)
    options = ["--device", "cpu", "--small", "--suites-only", "--minutes", "0.3"]
    gpu.main([*options, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "gpu.json").read_text())
    suites = ["products", "routes", "products"]
    assert [row["suite"] for row in found["suites"]] == suites
    # What this device cannot do, or has no time left for, is said.
    assert all("seconds" in row or row["error"] for row in found["suites"])
    assert {"waits", "calibration", "streaming"} <= found.keys()
    assert "routes, tiny" in (tmp_path / "gpu.txt").read_text()
    gpu.main([*options, "--only", "products, tiny", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["net"] for row in found["suites"]] == ["tiny"]
    assert not found.keys() & {"waits", "calibration", "streaming"}


def test_growth_fits_exponents_and_draws(tmp_path: Path) -> None:
    points = {n: 5e-3 + 3e-6 * n**2 for n in (2, 4, 8, 16)}
    points |= {n: 3e-6 * n**2 for n in (64, 128, 256, 512)}
    time = growth.Curve("Gram", "N·R", "s", 2.0, points)
    assert time.exponent == pytest.approx(2.0)  # small ones do not count
    memory = growth.Curve("Gram", "N·R", "B", 2.0, {8: 256.0, 16: 1024.0})
    growth.draw([time, memory], tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_growth_measures_the_gram_matrix() -> None:
    problem = make_problem("tiny")
    evals = torch.linalg.eigvalsh(growth.gram(problem)())
    assert len(evals) == growth.side(problem)
    torch.testing.assert_close(evals, spectra.eigenvalues(problem)())


def test_streaming_measures_and_prints(capsys: pytest.CaptureFixture[str]) -> None:
    first, same = streaming.Synthetic(3, "tiny")[1], streaming.Synthetic(9, "tiny")[1]
    assert all(map(torch.equal, first, same))
    found = {N: streaming.stream(N, "cpu", "tiny") for N in (100, 300)}
    for measured in found.values():
        assert measured["peak_bytes"] >= measured["nothing_bytes"] > 2**24
        assert all(time > 0 for time in measured["seconds"].values())
    streaming.print_table(found)
    assert "N grows by 3, memory by 1." in capsys.readouterr().out


def test_walks_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """Exact numbers: construction runs the net, and products do not run it again."""
    command.main(["walk"])
    table = capsys.readouterr().out
    assert all(name in table for name in walk.WALKS)
    ways = walk.construction, walk.first_product, walk.product
    risk, first, again = (walk.follow(make()) for make in ways)
    assert again.files <= again.functions <= again.calls < first.calls
    assert again.moves < again.calls and again.runs == first.runs == 0 < risk.runs
    command.main(["walk", "--follow", "G @ x"])
    assert "operators/base.py" in capsys.readouterr().out


def test_shares_of_walks_are_of_functions_that_there_are() -> None:
    found = {
        name
        for path in walk.PACKAGE.rglob("*.py")
        for name in defined(ast.parse(path.read_text()))
    }
    asked = {name.replace(".<locals>.", ".") for name in walk.BEGINS}
    assert asked - found == set()


def defined(node: ast.AST, prefix: str = "") -> Iterator[str]:
    """The qualified names of the functions and classes inside a node."""
    for child in ast.iter_child_nodes(node):
        name = prefix
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            name = f"{prefix}{child.name}"
            yield name
            name += "."
        yield from defined(child, name)


def test_lines_are_counted_once_each(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = list(lines.PACKAGE.rglob("*.py"))
    names = [path.relative_to(lines.PACKAGE).as_posix() for path in files]
    for patterns in lines.CAPABILITIES.values():
        for pattern in patterns.split():
            assert fnmatch.filter(names, pattern), pattern
    counted = lines.counted()
    every = [n for each in counted.values() for n in each.values()]
    assert sum(n.all for n in every) == sum(
        path.read_text().count("\n") for path in files
    )
    monkeypatch.setattr(lines, "counted", lambda: counted)  # takes long
    command.main(["lines"])
    assert f"{sum(n.code for n in every):,}" in capsys.readouterr().out


def test_kinds_of_lines() -> None:
    source = (
        '"""What.\n\nMore.\n"""\n\n# Why.\nx = (\n    1,\n)  # beside\ny = """\n\n"""\n'
    )
    assert lines.Lines.of(source) == (6, 4, 2)
