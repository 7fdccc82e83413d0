"""Checkpoints: what comes back, what is kept, full disks, lost ranks, foreign formats."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from rank_runs import SMALL, fail_while_writing, run_ranks
from tercet.errors import TercetError
from tercet.train.checkpoint import RECORD, Best, Checkpoints, Position, list_checkpoints

Parts = tuple[nn.Module, torch.optim.AdamW]


def make_parts(seed: int) -> Parts:
    torch.manual_seed(seed)
    model = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(3, 64)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def parts() -> Parts:
    return make_parts(0)


def write(folder: Path, parts: Parts, step: int, keep: int = 2) -> Path:
    checkpoints = Checkpoints(folder, keep)
    checkpoints.save(*parts, Position(step, "abc", 8))
    checkpoints.wait()
    return list_checkpoints(folder)[0]


def names(folder: Path) -> list[str]:
    """Every entry of the folder, newest first: nothing but whole checkpoints."""
    listed = [path.name for path in list_checkpoints(folder)]
    assert sorted(path.name for path in folder.iterdir() if path.name != "best.json") == sorted(listed)
    return listed


def test_everything_comes_back_as_it_was_when_it_was_saved(tmp_path: Path, parts: Parts) -> None:
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(*parts, Position(7, "abc", 8))
    with torch.no_grad():
        for parameter in parts[0].parameters():
            parameter.add_(1)  # the run goes on while the thread writes
    checkpoints.wait()
    (model, optimizer), (expected, expected_optimizer) = make_parts(1), make_parts(0)
    assert Checkpoints(tmp_path, 2).load(model, optimizer) == (Position(7, "abc", 8), [])
    for first, second in zip(expected.parameters(), model.parameters(), strict=True):
        assert torch.equal(first, second)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(expected_optimizer.state[first][name], optimizer.state[second][name])


def test_the_newest_few_are_kept_and_none_is_written_twice(tmp_path: Path, parts: Parts) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    written = []
    for step in (2, 4, 4, 10):
        checkpoints.save(*parts, Position(step, "abc", 8))
        checkpoints.wait()
        written.append((list_checkpoints(tmp_path)[0] / RECORD).stat().st_mtime_ns)
    assert written[0] < written[1] == written[2] < written[3]
    assert names(tmp_path) == ["step-00000010", "step-00000004"]


def test_the_best_one_outlives_the_newest_few(tmp_path: Path, parts: Parts) -> None:
    checkpoints = Checkpoints(tmp_path, 1)
    for step in (2, 4, 6):
        checkpoints.save(*parts, Position(step, "", 8))
        if step == 2:
            checkpoints.keep_best(Best(step, "dual.r_mean", 31.5))
    checkpoints.wait()
    assert names(tmp_path) == ["step-00000006", "step-00000002"]
    again = Checkpoints(tmp_path, 1)
    assert again.best == Best(2, "dual.r_mean", 31.5)
    again.save(*parts, Position(8, "", 8))
    again.keep_best(Best(8, "dual.r_mean", 32.0))
    again.save(*parts, Position(10, "", 8))
    again.wait()
    assert names(tmp_path) == ["step-00000010", "step-00000008"]


def test_a_failed_write_keeps_the_old_checkpoint_and_leaves_nothing(tmp_path: Path, parts: Parts) -> None:
    """A limit on the size of files stands for a full disk: both make `write` fail half-way."""
    write(tmp_path, parts, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(TercetError, match="cannot write"):
            write(tmp_path, parts, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["step-00000001"]
    assert Checkpoints(tmp_path, 2).load(*make_parts(1))[0].step == 1


def test_half_written_checkpoints_are_never_read_and_are_removed(tmp_path: Path, parts: Parts) -> None:
    write(tmp_path, parts, 1)
    for name in (".step-00000002.partial", ".step-00000003.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard-00001.safetensors").write_bytes(b"half")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    assert Checkpoints(tmp_path, 2).load(*parts)[0].step == 1
    assert names(tmp_path) == ["step-00000001"]
    write(tmp_path, parts, 2)
    assert names(tmp_path) == ["step-00000002", "step-00000001"]


def test_a_damaged_checkpoint_is_written_again_when_the_run_reaches_its_step(tmp_path: Path, parts: Parts) -> None:
    write(tmp_path, parts, 1)
    damaged = write(tmp_path, parts, 2)
    (damaged / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"")
    checkpoints = Checkpoints(tmp_path, 2)
    position, complaints = checkpoints.load(*parts)
    assert position.step == 1 and "step-00000002 is damaged" in complaints[0]
    checkpoints.save(*parts, Position(2, "", 8))
    checkpoints.wait()
    assert checkpoints.load(*parts) == (Position(2, "", 8), [])


def test_what_cannot_be_loaded_is_refused(tmp_path: Path, parts: Parts) -> None:
    with pytest.raises(TercetError, match="no checkpoint"):
        Checkpoints(tmp_path, 2).load(*parts)
    record = write(tmp_path, parts, 1) / RECORD
    other = nn.Linear(32, 64)
    with pytest.raises(TercetError, match="does not fit"):
        Checkpoints(tmp_path, 2).load(other, torch.optim.AdamW(other.parameters()))
    record.write_text(json.dumps({**json.loads(record.read_text("utf-8")), "format_version": 99}), "utf-8")
    with pytest.raises(TercetError, match="another version"):
        Checkpoints(tmp_path, 2).load(*parts)


@pytest.mark.parametrize("moment", ["_on_rank0", "save", "_digest"])
def test_a_rank_that_dies_during_a_write_is_named_as_the_cause(tmp_path: Path, moment: str) -> None:
    run = tmp_path / "gloo"  # a word of the errors about a lost rank, which a path is not
    error, nothing = run_ranks(2, fail_while_writing, {**SMALL, "output": str(run)}, 1, moment)
    assert isinstance(error, TercetError) and nothing is None
    newest = run / "checkpoints" / "step-00000002"
    assert str(error).startswith(f"another of the 2 processes is gone, and {newest} is not written; ")
    assert "resume the run" in str(error) and "space" not in str(error)
    assert sorted(path.name for path in newest.parent.iterdir()) == ["step-00000001"]


@pytest.mark.parametrize("full", [0, 1])
def test_a_disk_that_is_full_for_one_rank_is_named_as_the_cause_on_all(tmp_path: Path, full: int) -> None:
    run = tmp_path / "gloo"
    for error in run_ranks(2, fail_while_writing, {**SMALL, "output": str(run)}, full, None):
        assert isinstance(error, TercetError)
        assert str(error).startswith(f"cannot write {run}") and "free some space" in str(error)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000001"]
