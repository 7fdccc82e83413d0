"""`tercet train --processes 2`: as under torchrun, from one command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rank_runs import SMALL, run_ranks, train_run
from tercet.cli import main
from tiny_run import flags, losses


def start(folder: Path, keys: dict[str, Any]) -> subprocess.Popen[str]:
    """The command, with all its output in one pipe."""
    command = [sys.executable, "-m", "tercet", "train", "demo", *flags(keys), "--processes", "2"]
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    environment = {name: value for name, value in os.environ.items() if name not in ranks} | {"OMP_NUM_THREADS": "1"}
    command += ["--output", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def test_every_loss_is_that_of_two_ranks(tmp_path: Path) -> None:
    run = start(tmp_path / "run", SMALL)
    shown = run.communicate()[0]
    assert run.returncode == 0, shown
    assert "on 2 ranks (ddp)" in shown and "Warning" not in shown
    assert shown.count("The report is") == 1
    ranks = tmp_path / "ranks"
    assert run_ranks(2, train_run, "demo", {**SMALL, "output": str(ranks)}) == [str(ranks)] * 2
    assert losses(tmp_path / "run") == losses(ranks)


def test_a_mistake_is_reported_without_a_traceback(tmp_path: Path) -> None:
    run = start(tmp_path / "run", {**SMALL, "data.train": [str(tmp_path / "missing.json")]})
    shown = run.communicate()[0]
    assert run.returncode == 2
    assert "missing.json" in shown and "Traceback" not in shown and "ChildFailed" not in shown


def test_a_stopped_run_leaves_a_checkpoint_and_resumes(tmp_path: Path) -> None:
    keys = {**SMALL, "train.epochs": 3000, "train.checkpoint_every": 100_000}
    run = start(tmp_path / "run", keys)
    assert run.stdout is not None
    shown = ""
    for line in run.stdout:
        shown += line
        if " loss " in line:
            run.send_signal(signal.SIGTERM)
            break
    shown += run.communicate()[0]
    assert run.returncode == 130, shown
    assert f"stopped by SIGTERM; go on with: tercet train --resume {tmp_path / 'run'}" in shown
    assert "Traceback" not in shown
    stopped = losses(tmp_path / "run")
    again = ["train", "--resume", str(tmp_path / "run"), "--train.max_steps", str(len(stopped) + 1)]
    assert main(again) == 0
    assert losses(tmp_path / "run")[: len(stopped)] == stopped


@pytest.mark.parametrize(
    ("words", "fix"),
    [("train demo --processes=2", "remove --processes"), ("demo", "under torchrun use tercet train demo")],
)
def test_what_torchrun_cannot_start_is_refused(
    words: str, fix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    assert main(words.split()) == 2
    assert fix in capsys.readouterr().err
