"""Schemathesis over the OpenAPI description: whatever it makes up, the server answers as the description says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from serve_runs import Serving

CONFIG = Path(__file__).with_name("schemathesis.toml")


def run_schemathesis(server: Serving, *options: str) -> None:
    """Test every operation of the server."""
    program = shutil.which("st", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("schemathesis is not installed; pip install 'tercet[dev]'")
    command = [program, "--config-file", str(CONFIG), "run", f"{server.url}openapi.json", "--seed", "1", "--no-color"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=3600)
    report = done.stdout[-6000:] + done.stderr[-2000:]
    assert done.returncode == 0, report
    with urllib.request.urlopen(f"{server.url}openapi.json") as answer:
        paths = json.load(answer)["paths"]
    assert f"Tested: {sum(len(operations) for operations in paths.values())}" in report


def test_a_short_run(serve: Callable[..., Serving]) -> None:
    run_schemathesis(serve(window=0.0), "--phases", "fuzzing", "--max-examples", "5")


@pytest.mark.slow
def test_a_long_run(serve: Callable[..., Serving]) -> None:
    run_schemathesis(serve(window=0.0), "--phases", "coverage,fuzzing,stateful", "--max-examples", "200")
