"""Visual entailment end to end on drawn scenes: it learns, resumes, evaluates, and says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from task_runs import assert_resumes_exactly, logged, run_task

from tercet.cli import main
from tercet.config import Config, ObjectivesConfig
from tercet.data.entailment_files import draw_entailments
from tercet.errors import TercetError
from tercet.model.hub import load_model
from tercet.tasks.classification import ENTAILMENT, ClassificationTask
from tercet.tasks.task import evaluate_task

RECIPE = "demo-entailment"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty steps over eight scenes, which the model can learn by heart."""
    return run_task(
        RECIPE,
        tmp_path_factory.mktemp("entailment") / "run",
        train__max_steps=50,
        train__batch_size=16,
        train__checkpoint_every=100,
        optim__lr=3e-3,
        optim__schedule="constant",
        data__test=["scenes:test"],
    )


def test_it_learns_what_it_sees(run: Path) -> None:
    losses = [line["entailment"] for line in logged(run, "train")]
    assert losses[0] == pytest.approx(torch.tensor(3.0).log().item(), abs=0.3)
    assert sum(losses[-5:]) / 5 < 0.9  # the teacher, who follows slowly, keeps it from falling lower
    model = load_model(run / "model")
    result = evaluate_task("entailment", model, draw_entailments(8, "train"), Config())
    assert result.metrics["entailment"]["accuracy"] > 85
    assert logged(run, "evaluate")[-1]["size"] == {"samples": 24}


def test_a_run_resumes_exactly(tmp_path: Path) -> None:
    assert_resumes_exactly(RECIPE, tmp_path)


def test_the_command_line_measures_and_writes_predictions(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "guesses.json"
    flags = ["--data", "scenes:test", "--data.workers", "0", "--train.device", "cpu", "--evaluate.limit", "30"]
    assert main(["evaluate", str(run), *flags, "--json", "--predictions", str(written)]) == 0
    metrics = json.loads(capsys.readouterr().out)
    guesses = json.loads(written.read_text())
    assert len(guesses) == 30
    right = sum(guess["label"] == guess["gold"] for guess in guesses)
    assert metrics["entailment"]["accuracy"] == pytest.approx(100 * right / 30)
    assert sum(metrics["confusion"].values()) == 30
    assert all(sum(guess["probabilities"].values()) == pytest.approx(1, abs=1e-5) for guess in guesses)
    assert main(["evaluate", str(run / "model"), *flags, "--task", "entailment"]) == 0
    table = capsys.readouterr().out
    assert f"{metrics['entailment']['accuracy']:.2f}" in table
    assert "confusion: label, then predicted  contradiction" in table
    assert "entailment" in (run / "model" / "config.json").read_text()


def test_a_model_without_the_head_gets_one_or_is_refused(run: Path, tmp_path: Path) -> None:
    plain = run_task("demo", tmp_path / "plain", train__max_steps=1, objectives__queue_size=8, data__augment="light")
    with pytest.raises(TercetError, match="no head for entailment; fine-tune it first: tercet train entailment"):
        evaluate_task("entailment", load_model(plain / "model"), draw_entailments(2, "test"), Config())
    tuned = run_task(
        RECIPE, tmp_path / "tuned", init=str(plain / "model"), train__max_steps=1, train__checkpoint_every=1
    )
    events = [line["message"] for line in logged(tuned, "event")]
    assert f"starts from {plain / 'model'}; new in it: entailment_head" in events
    again = run_task(RECIPE, tmp_path / "again", init=str(tuned / "model"), train__max_steps=1)
    assert f"starts from {tuned / 'model'}" in [line["message"] for line in logged(again, "event")]


def test_only_what_the_logits_need_learns(run: Path) -> None:
    student = load_model(run / "model").train()
    task = ClassificationTask(student, ENTAILMENT, ObjectivesConfig())
    learning = {name.split(".")[0] for name, value in student.named_parameters() if value.requires_grad}
    assert learning == set(ENTAILMENT.parts)
    assert task.teacher is not None
    assert {name.split(".")[0] for name, _ in task.teacher.model.named_parameters()} == set(ENTAILMENT.parts)
    assert ClassificationTask(student, ENTAILMENT, ObjectivesConfig(alpha=0)).teacher is None


def test_metrics_of_known_predictions() -> None:
    targets = [{"label": label} for label in (0, 0, 1, 2, 2, 2)]
    metrics = ENTAILMENT.metrics([0, 1, 1, 2, 2, 0], targets)
    assert metrics["entailment"] == pytest.approx(
        {
            "accuracy": 100 * 4 / 6,
            "accuracy_contradiction": 50,
            "accuracy_neutral": 100,
            "accuracy_entailment": 100 * 2 / 3,
        }
    )
    assert {name: count for name, count in metrics["confusion"].items() if count} == {
        "contradiction_as_contradiction": 1,
        "contradiction_as_neutral": 1,
        "neutral_as_neutral": 1,
        "entailment_as_entailment": 2,
        "entailment_as_contradiction": 1,
    }
