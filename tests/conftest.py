"""Fixtures and options that all tests share."""

import gc
import os
import random

import numpy as np
import pytest
import torch

from tests import placing


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        default="cpu",
        help="where the tests run, cpu or cuda; see CONTRIBUTING.md",
    )


def pytest_configure(config):
    # Before test modules are imported, which have tensors too.
    device = torch.device(config.getoption("--device"))
    if device.type != "cpu":
        placing.place(torch.device(device.type, device.index or 0))


def seed():
    if placing.device() == placing.HOST:
        # torch.manual_seed formats the stack for each kind of GPU, which takes 1 ms.
        torch.default_generator.manual_seed(0)
    else:
        torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_make_collect_report(collector):
    seed()  # the data that a module draws do not depend on those before it


@pytest.fixture(autouse=True)
def same_numbers():
    """Every test draws the same numbers, alone and after others."""
    seed()


def pytest_collection_modifyitems(items):
    if placing.device() == placing.HOST:
        return
    for item in items:
        mark = item.get_closest_marker("host")
        if mark is not None:
            item.add_marker(pytest.mark.skip(reason=f"on the CPU only: {mark.args[0]}"))


def pytest_collection_finish(session):
    # What stays for good need not be looked at by each collection of garbage, of which
    # every traced net asks for one.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    try:
        return (yield)
    finally:
        if hasattr(item.config, "workerinput") and not device_works():
            os._exit(1)  # pytest-xdist starts another worker


def device_works():
    """Whether the device is not in an error that ends all that its process does."""
    if placing.device().type == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
    return True


@pytest.fixture
def device():
    """Where the tests run."""
    return placing.device()


@pytest.fixture(autouse=True, scope="session")
def _small_pieces():
    """Small problems are cut into pieces too, by a small ``memory=``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vivit_linop.net.column_passes.LEAST_BYTES", 0)
        yield
