"""A step that does not fit is foretold, and a lack of memory is one error that says what to pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rank_runs import SMALL, run_ranks, train_in_little_memory
from tercet.config_io import load_config
from tercet.device import DeviceSpec
from tercet.errors import TercetError
from tercet.train import room
from tercet.train.room import memory_told, tight

CPU = DeviceSpec(torch.device("cpu"), "fp32")


def test_a_lack_of_memory_while_training_says_what_to_pass(tmp_path: Path) -> None:
    keys = {**SMALL, "train.batch_size": 24, "objectives.queue_size": 4_000_000, "output": str(tmp_path / "run")}
    (error,) = run_ranks(1, train_in_little_memory, keys, 300 << 20)
    assert isinstance(error, TercetError)
    assert str(error).startswith("not enough memory for a step over 24 pairs; ")
    assert "give --train.batch_size 12 --optim.grad_accum_steps 2, or give --train.grad_checkpointing true" in str(
        error
    )


def test_other_errors_are_left_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="something else"), memory_told(load_config("demo")):
        raise RuntimeError("something else")


def test_only_a_step_that_may_not_fit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("pretrain-4m", {"train.device": "cpu"})
    monkeypatch.setattr(room, "_memory_of", lambda device: 24 << 30)
    told = tight(config, CPU)
    assert told is not None
    assert told.startswith("a step over 512 pairs needs up to about 168.2 GiB and there are 24.0; ")
    assert "--train.batch_size 64 --optim.grad_accum_steps 8" in told
    assert tight(load_config("pretrain-4m", {"train.batch_size": 32}), CPU) is None
    assert tight(load_config("pretrain-4m", {"train.parallel": "fsdp"}), CPU) is None
    assert tight(load_config("vqa"), CPU) is None
    monkeypatch.setattr(room, "_memory_of", lambda device: None)
    assert tight(config, CPU) is None
