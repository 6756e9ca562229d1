"""Fixtures that all tests share."""

import pytest
import torch

DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.cuda))


@pytest.fixture(params=DEVICES)
def device(request):
    """Each device that this machine has."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """Small problems are cut into pieces too, by a small ``memory=``."""
    monkeypatch.setattr("vivit_linop.net.pieces._LEAST_BYTES", 0)
