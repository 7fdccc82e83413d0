"""`tercet train --processes 2`: as under torchrun, from one command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from faults.runs import losses
from rank_runs import SMALL, run_ranks, train_run
from tercet.cli import main
from tiny_run import flag

PLACES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def start(folder: Path, keys: dict[str, Any]) -> subprocess.Popen[str]:
    """The command, with all that it says to one pipe."""
    flags = [word for name, value in keys.items() for word in flag(name, value)]
    command = [sys.executable, "-m", "tercet", "train", "demo", *flags, "--processes", "2", "--output", str(folder)]
    environment = {name: value for name, value in os.environ.items() if name not in PLACES}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )


def test_every_loss_is_that_of_two_ranks(tmp_path: Path) -> None:
    run = start(tmp_path / "run", SMALL)
    said = run.communicate()[0]
    assert run.returncode == 0, said
    assert "on 2 ranks (ddp)" in said and "Warning" not in said
    assert said.count("The report is") == 1
    ranks = tmp_path / "ranks"
    assert run_ranks(2, train_run, "demo", {**SMALL, "output": str(ranks)}) == [str(ranks)] * 2
    assert losses(tmp_path / "run") == losses(ranks)


def test_a_mistake_of_the_ranks_is_told_without_a_traceback(tmp_path: Path) -> None:
    run = start(tmp_path / "run", {**SMALL, "data.train": [str(tmp_path / "missing.json")]})
    said = run.communicate()[0]
    assert run.returncode == 2
    assert "missing.json" in said and "Traceback" not in said and "ChildFailed" not in said


def test_told_to_stop_it_leaves_a_checkpoint_and_goes_on(tmp_path: Path) -> None:
    keys = {**SMALL, "train.epochs": 3000, "train.checkpoint_every": 100_000}
    run = start(tmp_path / "run", keys)
    assert run.stdout is not None
    said = ""
    for line in run.stdout:
        said += line
        if " loss " in line:
            run.send_signal(signal.SIGTERM)
            break
    said += run.communicate()[0]
    assert run.returncode == 130, said
    assert f"stopped by SIGTERM; go on with: tercet train --resume {tmp_path / 'run'}" in said
    assert "Traceback" not in said
    stopped = losses(tmp_path / "run")
    again = ["train", "--resume", str(tmp_path / "run"), "--train.max_steps", str(len(stopped) + 1)]
    assert main(again) == 0
    assert losses(tmp_path / "run")[: len(stopped)] == stopped


@pytest.mark.parametrize(
    ("words", "place", "told"),
    [
        ("train demo --processes 0", {}, "--processes 0 would train nothing"),
        ("train demo --processes=2", {"RANK": "0"}, "remove --processes"),
        ("demo", {"RANK": "0"}, "under torchrun use tercet train demo"),
    ],
)
def test_what_cannot_be_started_is_refused(
    words: str,
    place: dict[str, str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    assert main(words.split()) == 2
    assert told in capsys.readouterr().err
