"""kill -9 at random moments, during a checkpoint, of a worker; the resumed run equals an unbroken one."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from faults.runs import Run, assert_gone, leftovers
from tiny_run import assert_equal, events


def assert_survives(folder: Path, whole: Path, kills: int, seed: int, workers: int, **keys: int) -> int:
    """Kill a run repeatedly, resume it each time, and compare it with `whole`; returns the steps compared."""
    draw = random.Random(seed)
    run = Run(folder, data__workers=workers, **keys)
    for number in range(kills):
        run.until(lambda: (folder / "metrics.jsonl").is_file())
        if number % 4:  # otherwise at any moment of the start
            run.until_step(run.steps() + 1)
        time.sleep(draw.uniform(0, 0.25))
        assert run.process.is_alive(), f"only {number} kills before the run ended: {run.messages}"
        orphans = run.children()
        run.kill()
        assert run.process.exitcode == -signal.SIGKILL
        assert_gone(orphans)
        run = Run(folder, resume=True, data__workers=workers, **keys)
    run.finish()
    assert leftovers(folder) == []
    assert events(folder).count("resumed at step") + events(folder).count("it starts again") <= kills
    return assert_equal(whole, folder)


def test_killed_at_random_moments(unbroken: Path, tmp_path: Path) -> None:
    assert_survives(tmp_path / "run", unbroken, kills=2, seed=0, workers=0)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_twenty_times(tmp_path: Path, workers: int) -> None:
    keys = {"train__epochs": 25, "train__checkpoint_every": 1}
    whole = Run(tmp_path / "whole", data__workers=workers, **keys)
    whole.finish()
    steps = assert_survives(tmp_path / "run", whole.folder, kills=20, seed=1, workers=workers, **keys)
    print(f"20 kills survived with {workers} workers; {steps} steps compared")


def test_killed_while_a_checkpoint_is_written(unbroken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    caught = False
    for attempt in range(10):
        run = Run(folder, resume=attempt > 0)
        left = set(folder.glob("checkpoints/.step-*"))
        while run.process.is_alive() and set(folder.glob("checkpoints/.step-*")) <= left:
            time.sleep(0.0005)
        run.kill()
        caught = bool(set(folder.glob("checkpoints/.step-*")) - left)
        if caught or run.process.exitcode == 0:
            break
    assert caught, "no kill came while a checkpoint was being written"
    whole = run.checkpoints()
    Run(folder, resume=True).finish()
    assert not whole or f"resumed at step {int(whole[0].name[-8:])}" in events(folder)
    assert leftovers(folder) == []
    assert_equal(unbroken, folder)


def test_a_killed_worker_is_replaced(unbroken: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", data__workers=2).until_step(2)
    run.send(signal.SIGSTOP)
    workers = run.children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)
    run.send(signal.SIGCONT)
    run.finish()
    assert_equal(unbroken, run.folder)
