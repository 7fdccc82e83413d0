"""The memory benchmark runs, and the estimate is within the 15 % that it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import memory


def test_a_small_step_takes_what_is_estimated() -> None:
    command = [sys.executable, str(Path(memory.__file__)), "--quick"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["size"] == "small" and found["ours"] > 0
    assert found["ratio"] == pytest.approx(1, abs=0.15)
