"""The tests on the pretended GPU: pytest -p tests.rehearsal.battery --device cuda.

The pretence is slow; ``--every 20`` takes a twentieth of the tests.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from .pretended import PretendedGPU  # first: before torch looks for a GPU

import pytest  # isort: skip
import torch  # isort: skip

# A pretended parameter is replaced when its module is converted; writing to ``.data``
# would leave its numbers.
torch.__future__.set_swap_module_params_on_conversion(True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=int, default=1, help="one test of so many")


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    items[:] = items[:: config.getoption("--every")]


class _Ended:
    status = 1


def pytest_sessionfinish(exitstatus: int) -> None:
    _Ended.status = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    sys.stdout.flush()
    os._exit(_Ended.status)  # torch would look for a device to clean up


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    with PretendedGPU():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    with PretendedGPU():
        return (yield)
