"""SIGTERM as clusters send it, ten seconds before SIGKILL: while training, evaluating and writing."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from faults.runs import Run, assert_gone, leftovers
from scene_files import scene_file
from tiny_run import assert_equal, events, lines

GRACE = 10  # seconds between a cluster's SIGTERM and its SIGKILL


def stop(run: Run, group: bool = False) -> None:
    """SIGTERM: the run ends by itself within the grace, says so in one line, and leaves a checkpoint of its last step.

    Where more processes want to run than there are cores, each gets its share of them alone, and the grace grows.
    """
    sent = time.monotonic()
    run.send(signal.SIGTERM, group)
    assert run.end() == 130, run.messages
    waited, share = time.monotonic() - sent, max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    print(f"ended {waited:.2f} s after SIGTERM, {share:.1f} processes a core")
    assert waited < GRACE * share
    assert "Traceback" not in run.messages
    assert "stopped by SIGTERM; go on with: tercet train --resume" in run.messages.splitlines()[-1]
    assert run.checkpoints()[0].name == f"step-{lines(run.folder)[-1]['step']:08d}"
    assert leftovers(run.folder) == []


@pytest.mark.parametrize("group", [False, True], ids=["trainer", "whole group"])
def test_while_training(unbroken: Path, tmp_path: Path, group: bool) -> None:
    run = Run(tmp_path / "run", data__workers=2, train__checkpoint_every=1000).until_step(3)
    workers = run.children()
    assert len(workers) == 2
    stop(run, group)
    assert "worker process died" not in run.messages
    assert_gone(workers)
    Run(run.folder, resume=True).finish()
    assert_equal(unbroken, run.folder)


def test_while_evaluating(tmp_path: Path) -> None:
    """500 scenes at a batch of one: the evaluation takes far longer than the grace."""
    slow = {"data__validation": [scene_file("validation", 500)], "train__evaluate_every": 3, "evaluate__batch_size": 1}
    run = Run(tmp_path / "run", evaluate__rerank=400, **slow)
    run.until(lambda: "evaluating on validation" in run.messages)
    time.sleep(0.5)
    stop(run)
    assert lines(run.folder, "evaluate") == []
    Run(run.folder, resume=True, evaluate__limit=8, evaluate__rerank=0).finish()
    assert "resumed at step 3" in events(run.folder)


def test_while_a_checkpoint_is_written(unbroken: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", train__checkpoint_every=1)
    run.until(lambda: bool(list(run.folder.glob("checkpoints/.step-*"))), pause=0)
    stop(run)
    Run(run.folder, resume=True).finish()
    assert_equal(unbroken, run.folder)


def test_workers_end_when_their_trainer_is_killed(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", data__workers=2).until_step(1)
    workers = run.children()
    run.kill()
    assert len(workers) == 2
    assert_gone(workers)
