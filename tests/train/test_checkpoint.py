"""Checkpoints: a full disk, what is kept, and foreign formats."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from tercet.errors import TercetError
from tercet.train.checkpoint import RECORD, Position, list_checkpoints, load_newest, save_checkpoint


def parts(seed: int) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(3, 64)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_everything_comes_back(tmp_path: Path) -> None:
    model, optimizer = parts(0)
    save_checkpoint(tmp_path, model, optimizer, Position(7, "abc"), keep=2)
    other, other_optimizer = parts(1)
    position, complaints = load_newest(tmp_path, other, other_optimizer)
    assert position == Position(7, "abc") and complaints == []
    for first, second in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(first, second)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[first][name], other_optimizer.state[second][name])


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    model, optimizer = parts(0)
    for step in (2, 4, 10):
        save_checkpoint(tmp_path, model, optimizer, Position(step, ""), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000004"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000010"]


def test_a_write_that_fails_leaves_the_old_checkpoint_and_no_rubbish(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: both make `write` fail half-way."""
    model, optimizer = parts(0)
    save_checkpoint(tmp_path, model, optimizer, Position(1, ""), keep=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(TercetError, match="cannot write"):
            save_checkpoint(tmp_path, model, optimizer, Position(2, ""), keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert load_newest(tmp_path, *parts(1))[0].step == 1


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    model, optimizer = parts(0)
    path = save_checkpoint(tmp_path, model, optimizer, Position(1, ""), keep=1)
    record = json.loads((path / RECORD).read_text("utf-8"))
    (path / RECORD).write_text(json.dumps({**record, "format_version": 99}), "utf-8")
    with pytest.raises(TercetError, match="update tercet"):
        load_newest(tmp_path, model, optimizer)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, *parts(0), Position(1, ""), keep=1)
    other = nn.Linear(32, 64)
    with pytest.raises(TercetError, match="does not fit"):
        load_newest(tmp_path, other, torch.optim.AdamW(other.parameters()))


def test_none_at_all(tmp_path: Path) -> None:
    with pytest.raises(TercetError, match="no checkpoint"):
        load_newest(tmp_path, *parts(0))
