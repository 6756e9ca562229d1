"""Saved files are there as a whole or not at all, and a damaged one never loads."""

import multiprocessing
import os
import random
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vivit_linop as vl
from vivit_linop import files

CPU = torch.device("cpu")


def risk_of(seed: int = 0) -> vl.EmpiricalRisk:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        data = torch.rand(5, 3).double(), torch.rand(5, 2).double()
    return vl.EmpiricalRisk(net, nn.MSELoss(), data)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, vl.EmpiricalRisk, Any]:
    risk = risk_of()
    G = vl.GGN(risk)
    G.eigvalsh()
    vl.save(G, tmp_path / "G.pt", risk)
    return tmp_path / "G.pt", risk, G


# Damage -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits_never_load(seed: int, saved: Any) -> None:
    path, risk, G = saved
    whole = path.read_bytes()
    assert torch.equal(vl.load(path, risk).gram.matrix, G.gram.matrix)
    generator = random.Random(seed)
    for _ in range(60):
        place, bit = generator.randrange(len(whole)), generator.randrange(8)
        flipped = whole[place] ^ (1 << bit)
        path.write_bytes(whole[:place] + bytes([flipped]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=rf"^path: {path} "):
            vl.load(path, risk)


def test_each_bit_of_the_end_counts(saved: Any) -> None:
    path, risk, _ = saved
    whole = path.read_bytes()
    for place in range(len(whole) - 90, len(whole)):
        for bit in range(8):
            flipped = whole[place] ^ (1 << bit)
            path.write_bytes(whole[:place] + bytes([flipped]) + whole[place + 1 :])
            with pytest.raises(ValueError, match=rf"^path: {path} "):
                vl.load(path, risk)


def test_lost_added_and_swapped_bytes_never_load(saved: Any) -> None:
    path, risk, _ = saved
    whole = path.read_bytes()
    half = len(whole) // 2
    for contents in (
        b"",
        whole[:10],
        whole[:half],
        whole[:-1],
        whole[1:],
        whole[half:],  # with the right end
        whole + b"\0",
        whole + whole,
        whole[:half] + b"\0" + whole[half:],
        whole[half : half + 9] + whole[:half] + whole[half + 9 :],
        bytes(len(whole)),
    ):
        path.write_bytes(contents)
        with pytest.raises(ValueError, match=rf"^path: {path} "):
            vl.load(path, risk)


def test_other_files_are_refused(tmp_path: Path) -> None:
    risk, path = risk_of(), tmp_path / "other"

    class Dangerous:
        def __reduce__(self) -> Any:
            return pytest.fail, ("was unpickled",)

    def pickled() -> None:
        torch.save({"format": "vivit_linop 1", "result": Dangerous()}, path)

    def version(number: int) -> None:
        end = f"vivit_linop {number} sha256 {'0' * 64}"
        path.write_bytes(b"contents" + end.encode())

    for write, message in (
        (lambda: path.write_text("text\nvivit_linop 2"), "is no file that"),
        (lambda: path.write_bytes(b"\x80\x04N."), "is no file that"),
        (lambda: torch.save(torch.ones(3), path), "is no file that"),
        # The first format had no digest, so damage could not be seen.
        (lambda: torch.save({"format": "vivit_linop 1"}, path), "is no file that"),
        (pickled, "is no file that"),
        (lambda: version(4), "has version 4 .* reads version 3"),
        (lambda: version(3), "is damaged"),
    ):
        write()
        with pytest.raises(ValueError, match=rf"^path: {path} {message}"):
            vl.load(path, risk)
    with pytest.raises(FileNotFoundError, match="none"):
        vl.load(tmp_path / "none", risk)
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        vl.load(tmp_path, risk)


def test_torch_reads_it_too(saved: Any) -> None:
    path, _, G = saved
    content = torch.load(path, weights_only=True)
    assert torch.equal(content["result"]["matrix"], G.gram.matrix)


# Places -----------------------------------------------------------------------------


def test_places_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    risk = risk_of()
    G = vl.GGN(risk)
    monkeypatch.setattr(
        vl.EmpiricalRisk, "fingerprint", lambda _: pytest.fail("computed before")
    )
    (tmp_path / "file").write_text("kept")
    os.mkfifo(tmp_path / "pipe")
    for place, error, message in (
        (tmp_path / "none" / "G.pt", FileNotFoundError, "there is no folder .*none"),
        (tmp_path / "file" / "G.pt", FileNotFoundError, "there is no folder .*file"),
        (tmp_path, IsADirectoryError, "is a folder"),
        (tmp_path / "pipe", ValueError, "is no file"),
        (Path(os.devnull), ValueError, "is no file"),
    ):
        with pytest.raises(error, match=f"^path: .*{message}"):
            vl.save(G, place, risk)
    with pytest.raises(TypeError, match=r"^path: the name of a file, .* got GGN"):
        vl.save(str(tmp_path / "G.pt"), G, risk)  # type: ignore[arg-type]
    # Whatever the rights of who runs the tests are.
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match=rf"^path: {tmp_path} may not be written"):
        vl.save(G, tmp_path / "G.pt", risk)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "pipe"]
    assert (tmp_path / "file").read_text() == "kept"


def test_permissions_and_links_are_kept(tmp_path: Path) -> None:
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    before = os.umask(0o027)
    try:
        files.write({"a": 1}, tmp_path / "new")
    finally:
        os.umask(before)
    assert mode(tmp_path / "new") == 0o640
    for given in (0o600, 0o664, 0o755):
        (tmp_path / "new").chmod(given)
        files.write({"a": given}, tmp_path / "new")
        assert mode(tmp_path / "new") == given
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    link.symlink_to(Path("elsewhere") / "target")  # relative, and to nothing yet
    for value in range(2):
        files.write({"a": value}, link)
        assert link.is_symlink() and files.read(target, CPU) == {"a": value}
    assert [p.name for p in target.parent.iterdir()] == ["target"]


def test_what_was_there_stays_when_saving_fails(
    saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, risk, G = saved
    before = path.read_bytes()

    def interrupted(content: Any, file: Any) -> None:
        file.write(b"a part of it")
        raise KeyboardInterrupt

    for place, function, error in (
        (torch, "save", interrupted),
        (os, "fsync", lambda _: (_ for _ in ()).throw(OSError("no room"))),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, function, error)
            with pytest.raises((KeyboardInterrupt, OSError)):
                vl.save(G, path, risk)
        assert path.read_bytes() == before
        assert [p.name for p in path.parent.iterdir()] == ["G.pt"]


def test_on_disk_before_and_after_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def sync(descriptor: int) -> None:
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        events.append("sync folder" if folder else "sync file")
        fsync(descriptor)

    def rename(self: Path, target: Any) -> Path:
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", rename)
    files.write({"a": 1}, tmp_path / "file")
    assert events == ["sync file", "rename", "sync folder"]


# At the same time -------------------------------------------------------------------


def _write_often(path: Path, value: float) -> None:
    for _ in range(15):
        files.write({"tensor": torch.full((200, 50), value)}, path)


@pytest.mark.parametrize(
    "processes", [False, pytest.param(True, marks=pytest.mark.host("forked"))]
)
def test_two_at_once_leave_one_complete_file(processes: bool, tmp_path: Path) -> None:
    path = tmp_path / "file"
    kind: Any = threading.Thread
    if processes:  # which start fast, and do nothing that threads of torch would do
        kind = multiprocessing.get_context("fork").Process
    writers = [kind(target=_write_often, args=(path, float(v))) for v in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if path.exists():  # each reader sees one of them, complete
            tensor = files.read(path, CPU)["tensor"]
            assert tensor.unique().tolist() in ([0.0], [1.0])
    for writer in writers:
        writer.join()
    if processes:
        assert [writer.exitcode for writer in writers] == [0, 0]
    assert files.read(path, CPU)["tensor"].unique().tolist() in ([0.0], [1.0])
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_results_of_threads_are_those_of_one(tmp_path: Path) -> None:
    """Two risks, two results, one name: the file is one of the two."""
    risks = [risk_of(0), risk_of(1)]
    pairs = [vl.GGN(risk).eigh(k=2) for risk in risks]

    def save(number: int) -> None:
        for _ in range(5):
            vl.save(pairs[number], tmp_path / "pairs", risks[number])

    threads = [threading.Thread(target=save, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loads = []
    for number, risk in enumerate(risks):
        try:
            loaded = vl.load(tmp_path / "pairs", risk)
        except ValueError as error:
            assert str(error).startswith("risk: ")
        else:
            assert torch.equal(loaded.eigenvalues, pairs[number].eigenvalues)
            loads.append(number)
    assert len(loads) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["pairs"]


# What is in a file ------------------------------------------------------------------


def test_in_modes_of_the_caller(tmp_path: Path) -> None:
    risk = risk_of()
    path = tmp_path / "pairs"
    with torch.inference_mode():
        pairs = vl.GGN(risk).eigh(k=2)
        vl.save(pairs, path, risk)
        loaded = vl.load(path, risk)
    with torch.device("meta"):
        vl.save(pairs, path, risk)
        again = vl.load(path, risk)
    expected = vl.damped_newton_step(risk, pairs, damping=0.1)
    for each in (loaded, again):
        assert not each.eigenvalues.is_inference()
        assert each.eigenvectors.device == risk.device
        # A fresh tensor of autograd may come from it.
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        (scale * each.eigenvectors).sum().backward()
        step = vl.damped_newton_step(risk, each, damping=0.1)
        torch.testing.assert_close(step, expected)


def test_only_what_is_asked_for_is_in_it(tmp_path: Path) -> None:
    """Not the memory that a tensor is a part of."""
    risk = risk_of()
    D = risk.num_params
    evecs = torch.eye(D, 4000, dtype=torch.float64)
    pairs = vl.linalg.Eigenpairs(torch.ones(2).double(), evecs[:, :2])
    vl.save(pairs, tmp_path / "pairs", risk)
    assert (tmp_path / "pairs").stat().st_size < 8 * D * 2 + 10_000
    assert torch.equal(vl.load(tmp_path / "pairs", risk).eigenvectors, evecs[:, :2])
