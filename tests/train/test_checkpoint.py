"""Checkpoints: a full disk, what is kept, and foreign formats."""

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


def parts(seed: int) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(3, 64)).sum().backward()
    optimizer.step()
    return model, optimizer


def write(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, keep: int) -> Path:
    checkpoints = Checkpoints(folder, keep)
    checkpoints.save(model, optimizer, Position(step, "abc", 8))
    checkpoints.wait()
    return list_checkpoints(folder)[0]


def test_everything_comes_back(tmp_path: Path) -> None:
    model, optimizer = parts(0)
    write(tmp_path, model, optimizer, 7, keep=2)
    other, other_optimizer = parts(1)
    position, complaints = Checkpoints(tmp_path, 2).load(other, other_optimizer)
    assert position == Position(7, "abc", 8) and complaints == []
    for first, second in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(first, second)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[first][name], other_optimizer.state[second][name])


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    model, optimizer = parts(0)
    for step in (2, 4, 10):
        write(tmp_path, model, optimizer, step, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000004"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000010"]


def test_a_step_that_is_saved_already_is_not_written_again(tmp_path: Path) -> None:
    model, optimizer = parts(0)
    checkpoints = Checkpoints(tmp_path, keep=2)
    written = []
    for step in (1, 1, 2):
        checkpoints.save(model, optimizer, Position(step, "abc", 8))
        checkpoints.wait()
        written.append((list_checkpoints(tmp_path)[0] / RECORD).stat().st_mtime_ns)
    assert written[0] == written[1] < written[2]


def test_a_write_that_fails_leaves_the_old_checkpoint_and_no_rubbish(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: both make `write` fail half-way."""
    model, optimizer = parts(0)
    write(tmp_path, model, optimizer, 1, keep=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(TercetError, match="cannot write"):
            write(tmp_path, model, optimizer, 2, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert Checkpoints(tmp_path, 2).load(*parts(1))[0].step == 1


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    model, optimizer = parts(0)
    path = write(tmp_path, model, optimizer, 1, keep=1)
    record = json.loads((path / RECORD).read_text("utf-8"))
    (path / RECORD).write_text(json.dumps({**record, "format_version": 99}), "utf-8")
    with pytest.raises(TercetError, match="another version"):
        Checkpoints(tmp_path, 2).load(model, optimizer)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    write(tmp_path, *parts(0), 1, keep=1)
    other = nn.Linear(32, 64)
    with pytest.raises(TercetError, match="does not fit"):
        Checkpoints(tmp_path, 2).load(other, torch.optim.AdamW(other.parameters()))


def test_none_at_all(tmp_path: Path) -> None:
    with pytest.raises(TercetError, match="no checkpoint"):
        Checkpoints(tmp_path, 2).load(*parts(0))


def test_what_is_written_is_the_state_when_it_was_asked_for(tmp_path: Path) -> None:
    model, optimizer = parts(0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(model, optimizer, Position(1, "", 8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)  # the run goes on while the thread writes
    checkpoints.wait()
    checkpoints.load(model, optimizer)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_what_a_killed_run_left_half_written_is_never_read_and_goes(tmp_path: Path) -> None:
    model, optimizer = parts(0)
    write(tmp_path, model, optimizer, 1, keep=2)
    for name in (".step-00000002.partial", ".step-00000003.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard-00001.safetensors").write_bytes(b"half")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    checkpoints = Checkpoints(tmp_path, 2)
    assert checkpoints.load(model, optimizer)[0].step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    checkpoints.save(model, optimizer, Position(2, "", 8))
    checkpoints.wait()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000001"]


def test_the_best_one_outlives_the_newest_few(tmp_path: Path) -> None:
    model, optimizer = parts(0)
    checkpoints = Checkpoints(tmp_path, 1)
    for step in (2, 4, 6):
        checkpoints.save(model, optimizer, Position(step, "", 8))
        if step == 2:
            checkpoints.keep_best(Best(step, "dual.r_mean", 31.5))
    checkpoints.wait()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000006", "step-00000002"]
    again = Checkpoints(tmp_path, 1)
    assert again.best == Best(2, "dual.r_mean", 31.5)
    again.save(model, optimizer, Position(8, "", 8))
    again.keep_best(Best(8, "dual.r_mean", 32.0))
    again.save(model, optimizer, Position(10, "", 8))
    again.wait()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000008"]


def test_a_damaged_one_is_written_anew_when_the_run_comes_there_again(tmp_path: Path) -> None:
    model, optimizer = parts(0)
    write(tmp_path, model, optimizer, 1, keep=2)
    damaged = write(tmp_path, model, optimizer, 2, keep=2)
    (damaged / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"")
    checkpoints = Checkpoints(tmp_path, 2)
    position, complaints = checkpoints.load(model, optimizer)
    assert position.step == 1 and "step-00000002 is damaged" in complaints[0]
    checkpoints.save(model, optimizer, Position(2, "", 8))
    checkpoints.wait()
    assert checkpoints.load(model, optimizer) == (Position(2, "", 8), [])


@pytest.mark.parametrize("moment", ["_on_rank0", "save", "_digest"])
def test_a_rank_that_dies_while_a_checkpoint_is_written_is_named_as_the_cause(tmp_path: Path, moment: str) -> None:
    run = tmp_path / "gloo"  # a word of the errors that tell of a lost rank, which a path is not
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
