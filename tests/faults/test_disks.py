"""Disks that are full, read-only or taken by another trainer."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

from faults.runs import Run, assert_equal, lines, rubbish
from tercet.train.checkpoint import list_checkpoints

MISTAKE = 2


def assert_one_line(run: Run, *words: str) -> None:
    """The run ended with one line that says what is wrong."""
    assert run.end() == MISTAKE, run.messages
    assert "Traceback" not in run.messages, run.messages
    said = run.messages.strip().splitlines()[-1]
    assert said.startswith("tercet: error: "), said
    for word in words:
        assert word in said, said


def fill(disk: Path) -> Path:
    """Take all the room that is left."""
    file = disk / "filling"
    with file.open("ab", buffering=0) as stream:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    stream.write(bytes(size))
            except OSError:
                continue
    return file


def test_a_disk_that_fills_up_while_training(unbroken: Path, small_disk: Path) -> None:
    folder = small_disk / "run"
    run = Run(folder, train__checkpoint_every=1)
    run.until(lambda: len(list_checkpoints(folder / "checkpoints")) > 0)
    filling = fill(small_disk)
    assert_one_line(run, "cannot write", "No space left on device")
    assert rubbish(folder) == []
    lines(folder)  # every line is whole
    assert list_checkpoints(folder / "checkpoints")
    assert_one_line(Run(folder, resume=True), "cannot write", "No space left on device")
    filling.unlink()
    again = Run(folder, resume=True)
    again.finish()
    assert_equal(unbroken, folder)


def test_a_disk_without_room_for_a_checkpoint(unbroken: Path, small_disk: Path) -> None:
    """Room for the lines of metrics.jsonl, and none for tensors: the write beside the training fails."""
    filling = small_disk / "filling"
    filling.write_bytes(bytes((16 << 20) - 150_000))
    folder = small_disk / "run"
    assert_one_line(Run(folder), "cannot write", "free some space and resume the run")
    assert rubbish(folder) == [] and list_checkpoints(folder / "checkpoints") == []
    filling.unlink()
    again = Run(folder, resume=True)
    again.finish()
    assert_equal(unbroken, folder)


def test_a_disk_that_becomes_read_only(small_disk: Path) -> None:
    folder = small_disk / "run"
    Run(folder, train__max_steps=2).finish()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert_one_line(Run(folder, resume=True), "Read-only file system")
    assert_one_line(Run(small_disk / "another"), "cannot make the run folder", "Read-only file system")


def test_two_trainers_in_one_folder(unbroken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = Run(folder, data__workers=1).until_step(1)
    first.send(signal.SIGSTOP)  # it must not end while the second waits for it
    assert_one_line(Run(folder, resume=True), "another process is training in", str(folder))
    first.send(signal.SIGCONT)
    first.finish()
    assert_equal(unbroken, folder)
    assert not (folder / ".lock").exists()
    Run(folder, resume=True).finish()
