"""Folders of the shared test inputs.  Tests that need them are skipped, with the reason, where they are absent."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

# Tests do not fail because a machine is busy.
hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))  # for `tiny_model`, which tests of several folders read


def _folder(variable: str, default: str) -> Path:
    folder = Path(os.environ.get(variable, REPOSITORY.parent / "shared" / default))
    if not folder.is_dir():
        pytest.skip(f"no {default} data at {folder}; set {variable} to its folder")
    return folder


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """Folder of the numbers that the published method gives."""
    return _folder("TERCET_PARITY", "parity")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real images with captions."""
    return _folder("TERCET_DATA", "data")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
