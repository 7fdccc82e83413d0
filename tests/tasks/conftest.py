"""What tests of several tasks read."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The file of each task, over eight small images."""
    from task_runs import write_task_files

    return write_task_files(tmp_path_factory.mktemp("tasks"))
