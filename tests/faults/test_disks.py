"""Disks that are full, read-only or used by another trainer."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from faults.runs import Run, leftovers
from tiny_run import assert_equal, lines


def assert_one_line(run: Run, *words: str) -> None:
    """The run ended with one line that says what is wrong."""
    assert run.end() == 2, run.messages
    assert "Traceback" not in run.messages, run.messages
    last = run.messages.strip().splitlines()[-1]
    assert last.startswith("tercet: error: ") and all(word in last for word in words), last


def fill(disk: Path) -> Path:
    """Use all the space that is left."""
    file = disk / "filling"
    with file.open("ab", buffering=0) as stream:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    stream.write(bytes(size))
            except OSError:
                continue
    return file


@pytest.mark.parametrize("when", ["during training", "before the first checkpoint"])
def test_a_full_disk(unbroken: Path, small_disk: Path, when: str) -> None:
    folder = small_disk / "run"
    if when == "during training":
        run = Run(folder, train__checkpoint_every=1)
        run.until(lambda: bool(run.checkpoints()))
        filling = fill(small_disk)
        assert_one_line(run, "cannot write", "No space left on device")
        lines(folder)  # every line is whole
        assert run.checkpoints()
        assert_one_line(Run(folder, resume=True), "cannot write", "No space left on device")
    else:  # space for the lines of metrics.jsonl and none for tensors: the thread that writes checkpoints fails
        filling = small_disk / "filling"
        filling.write_bytes(bytes((16 << 20) - 150_000))
        run = Run(folder)
        assert_one_line(run, "cannot write", "free some space and resume the run")
        assert run.checkpoints() == []
    assert leftovers(folder) == []
    filling.unlink()
    Run(folder, resume=True).finish()
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
