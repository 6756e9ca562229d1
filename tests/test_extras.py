"""What needs a package of an extra says so; all else works without."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import vivit_linop as vl
from vivit_linop.extras import extra

pytestmark = pytest.mark.host("processes of their own")

WITHOUT = """
import sys
import torch
from torch import nn

for package in ("backpack", "curvlinops", "torchvision", "vivit"):
    assert package not in sys.modules
import vivit_linop as vl
for package in ("backpack", "curvlinops", "torchvision", "vivit"):
    assert package not in sys.modules, package
    sys.modules[package] = None  # as if it were not installed

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
data = torch.randn(6, 3).double(), torch.randn(6, 2).double()
risk = vl.EmpiricalRisk(net, nn.MSELoss(), data)
dense = vl.Hessian(risk).to_dense()
torch.testing.assert_close(vl.Hessian(risk).diagonal(), dense.diagonal())
assert len(vl.GGN(risk).eigh(k=3).eigenvalues) == 3
vl.KFAC(risk), vl.EKFAC(risk), vl.GGN(risk).to_curvlinops()

def lanczos():
    vl.LanczosSpectrum(vl.GGN(risk), 5).density(10)

def vivit():
    import vivit_linop.vivit

for extra, use in {
    "backpack": lambda: vl.KFRA(risk),
    "backpack ": lambda: vl.PositiveCurvatureHessian(risk),
    "backpack  ": lambda: vl.Hessian(risk).diagonal(route="backpack"),
    "backpack   ": vivit,
    "curvlinops": lanczos,
}.items():
    try:
        use()
    except ModuleNotFoundError as error:
        assert f"pip install 'vivit-linop[{extra.strip()}]'" in str(error), error
    else:
        raise AssertionError(extra)
print("all said")
"""


def test_the_library_works_without_its_extras() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "all said"


def test_errors_of_other_kinds_pass() -> None:
    with pytest.raises(RuntimeError, match="broken build"), extra("backpack"):
        raise RuntimeError("broken build")


@pytest.mark.parametrize("name", ["backpack", "curvlinops"])
def test_an_error_names_the_extra_and_what_was_not_found(name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=rf"\[{name}\]") as caught:
        with extra(name):
            import a_package_of_no_one  # noqa: F401
    assert caught.value.name == "a_package_of_no_one"


def test_the_diagonal_of_a_hessian_is_the_same_by_both_ways() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    H = vl.Hessian(net, nn.MSELoss(), data)
    by_layers = H.diagonal(route="backpack")
    torch.testing.assert_close(by_layers, H.diagonal(route="products"))
