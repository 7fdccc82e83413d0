"""What a run logs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tercet.train.log import METRICS, open_logger
from tiny_run import lines


def test_lines_after_the_resumed_step_and_half_lines_are_dropped(tmp_path: Path) -> None:
    written = [json.dumps({"kind": "train", "step": step}) for step in range(1, 6)]
    (tmp_path / METRICS).write_text("\n".join(written) + '\n{"kind": "tra', "utf-8")
    with open_logger(tmp_path, 10, step=3) as logger:
        logger.log_train(4, {"loss": 1.0, "pairs_per_second": 2.0})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_metrics_jsonl_and_tensorboard_have_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_logger(tmp_path, 2) as logger:
        logger.log_train(1, {"loss": 1.5, "grad_norm": float("inf"), "pairs_per_second": 1.0})
        logger.log_evaluation(2, "test", {"dual": {"r_mean": 12.5}})
    (first,), (second,) = lines(tmp_path), lines(tmp_path, "evaluate")
    assert first["loss"] == 1.5 and first["grad_norm"] is None  # JSON has no infinity
    assert second["data"] == "test" and second["dual"]["r_mean"] == 12.5
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("train/loss")[0].value == 1.5
    assert events.Scalars("evaluate/dual/r_mean")[0].value == 12.5


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_logger(tmp_path, 2, writes=False) as logger:
        logger.log_train(1, {"loss": 1.5, "pairs_per_second": 1.0})
        logger.event(1, "something")
    assert not list(tmp_path.iterdir()) and capsys.readouterr() == ("", "")


def test_the_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with open_logger(tmp_path, 2) as logger:
        logger.status("evaluating on [test]")
    shown = capsys.readouterr().err
    assert "tercet[track]" in shown and "evaluating on [test]" in shown
