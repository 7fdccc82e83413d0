"""What tests of several tasks read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The file of each task, over eight small images."""
    from task_runs import write_task_files

    return write_task_files(tmp_path_factory.mktemp("tasks"))
