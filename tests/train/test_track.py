"""What a run writes while it goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tercet.train.track import METRICS, Tracker


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / METRICS).read_text("utf-8").splitlines()]


def test_lines_beyond_the_resumed_step_and_half_lines_are_dropped(tmp_path: Path) -> None:
    written = [json.dumps({"kind": "train", "step": step}) for step in range(1, 6)]
    (tmp_path / METRICS).write_text("\n".join(written) + '\n{"kind": "tra', "utf-8")
    with Tracker(tmp_path, total=10, step=3) as tracker:
        tracker.log_train(4, {"loss": 1.0, "pairs_per_second": 2.0})
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_numbers_that_are_none_stay_valid_json(tmp_path: Path) -> None:
    with Tracker(tmp_path, total=2) as tracker:
        tracker.log_train(1, {"loss": float("nan"), "grad_norm": float("inf"), "pairs_per_second": 1.0})
        tracker.log_evaluation(1, "test", {"dual": {"r_mean": 12.5}})
    first, second = (json.loads(line) for line in (tmp_path / METRICS).read_text("utf-8").splitlines())
    assert first["loss"] is None and first["grad_norm"] is None
    assert second["data"] == "test" and second["dual"]["r_mean"] == 12.5


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Tracker(tmp_path, total=2) as tracker:
        tracker.log_train(1, {"loss": 1.5, "pairs_per_second": 1.0})
        tracker.log_evaluation(2, "test", {"dual": {"r_mean": 12.5}})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("train/loss")[0].value == 1.5
    assert events.Scalars("evaluate/dual/r_mean")[0].value == 12.5


def test_the_missing_extra_is_named_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with Tracker(tmp_path, total=2) as tracker, tracker.waiting("evaluating on [test]"):
        pass
    shown = capsys.readouterr().err
    assert "pip install 'tercet[track]'" in shown and "evaluating on [test] ..." in shown
