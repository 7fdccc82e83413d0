"""Entailment, statements about two images and text assignment: they learn, resume, evaluate and share their heads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from task_runs import assert_resumes_exactly, logged, run_task
from tercet.cli import main
from tercet.config import Config, ObjectivesConfig
from tercet.errors import TercetError
from tercet.model.hub import load_model
from tercet.model.tercet import Tercet
from tercet.tasks.classification import ENTAILMENT, NLVR, ClassHead, ClassificationTask
from tercet.tasks.task import evaluate_task, get_task, open_data
from tiny_model import make_model

HEADS = {"entailment": ENTAILMENT, "nlvr": NLVR}
CONFIG = Config.model_validate({"data": {"workers": 0}, "evaluate": {"batch_size": 5}})


@pytest.fixture(scope="module", params=["entailment", "nlvr"])
def learned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, files: dict[str, str]) -> Path:
    """A run long enough to learn eight images by heart, which it evaluates."""
    file, output = files[request.param], tmp_path_factory.mktemp(request.param) / "run"
    settings = {"optim__schedule": "constant", "train__checkpoint_every": 1000, "data__test": [file]}
    return run_task(request.param, file, output, train__max_steps=200, objectives__alpha=0, **settings)


def test_it_learns_evaluates_and_writes_predictions(
    learned: Path, tmp_path: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    task = learned.parent.name[:-1]
    classes = len(HEADS[task].classes)
    losses = [line[task] for line in logged(learned, "train")]
    assert losses[0] == pytest.approx(math.log(classes), abs=0.4)
    assert sum(losses[-5:]) / 5 < losses[0] / 2
    measured = logged(learned, "evaluate")[-1]
    assert measured[task]["accuracy"] > 85
    assert measured["size"] == ({"samples": 24} if task == "entailment" else {"samples": 8, "sentences": 1})

    written = tmp_path / "predictions.json"
    flags = ["--data", files[task], "--data.workers", "0", "--train.device", "cpu", "--predictions", str(written)]
    assert main(["evaluate", str(learned), *flags, "--json"]) == 0
    metrics, rows = json.loads(capsys.readouterr().out), json.loads(written.read_text("utf-8"))
    assert metrics == {name: measured[name] for name in metrics}
    assert metrics[task]["accuracy"] == pytest.approx(100 * sum(r["label"] == r["gold"] for r in rows) / len(rows))
    assert all(sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5) for row in rows)


@pytest.mark.parametrize(
    ("task", "sharing"),
    [("entailment", {}), ("nlvr", {"data__share_images": True, "train__batch_size": 2}), ("nlvr_pretrain", {})],
)
def test_a_run_resumes_exactly(tmp_path: Path, files: dict[str, str], task: str, sharing: dict[str, Any]) -> None:
    assert_resumes_exactly(task, files[task], tmp_path, **sharing)


def test_text_assignment_then_statements(tmp_path: Path, files: dict[str, str]) -> None:
    """The second layers and all below them continue from the pre-training; the new head is initialised."""
    file = files["retrieval"]
    before = run_task("nlvr_pretrain", file, tmp_path / "before", train__max_steps=2, data__test=[file])
    assert logged(before, "train")[0]["assignment"] == pytest.approx(math.log(3), abs=0.4)
    assert 0 <= logged(before, "evaluate")[-1]["assignment"]["accuracy"] <= 100
    frozen = {"optim__lr": 1e-9, "optim__min_lr": 0, "optim__warmup_lr": 0, "train__max_steps": 1}
    tuned = run_task("nlvr", files["nlvr"], tmp_path / "tuned", init=str(before / "model"), **frozen)
    assert any("new in it: nlvr_head" in line["message"] for line in logged(tuned, "event"))
    old, new = load_model(before / "model"), load_model(tuned / "model")
    assert old.second_fusion is not None and new.second_fusion is not None
    for name, value in old.second_fusion.state_dict().items():
        torch.testing.assert_close(new.second_fusion.state_dict()[name], value, rtol=0, atol=1e-6)
    assert new.config.heads == ["assignment", "nlvr"]


def student(task: str) -> Tercet:
    model = make_model()
    model.add_heads(get_task(task).heads)
    return model.train()


def test_a_model_without_the_head_is_refused(files: dict[str, str]) -> None:
    source = open_data("entailment", [files["entailment"]], CONFIG.data, "test")
    with pytest.raises(TercetError, match="no head for entailment; fine-tune it first"):
        evaluate_task("entailment", make_model(), source, CONFIG)


@pytest.mark.parametrize("task", ["entailment", "nlvr"])
def test_only_what_the_logits_need_learns(task: str) -> None:
    model, head = student(task), HEADS[task]
    teacher = ClassificationTask(model, head, ObjectivesConfig()).teacher
    assert {name.split(".")[0] for name, value in model.named_parameters() if value.requires_grad} == set(head.parts)
    assert teacher is not None
    assert {name.split(".")[0] for name, _ in teacher.model.named_parameters()} == set(head.parts)
    assert ClassificationTask(model, head, ObjectivesConfig(alpha=0)).teacher is None


def test_the_published_teacher_of_nlvr_is_fresh() -> None:
    build = get_task("nlvr").build
    assert build is not None
    for compat, init, fresh in (("published", "m", True), ("published", None, False), ("tercet", "m", False)):
        model = student("nlvr")
        task = build(Config.model_validate({"task": "nlvr", "compat": compat, "init": init}), model)
        assert isinstance(task, ClassificationTask) and task.teacher is not None
        name = "fusion.layers.0.mlp.up.weight"
        assert torch.equal(task.teacher.model.get_parameter(name), model.get_parameter(name)) != fresh


samples = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.sampled_from("abcde")), min_size=1)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@given(samples)
def test_accuracy_by_class_confusion_and_consistency(head: ClassHead, rows: list[tuple[int, int, str]]) -> None:
    rows = [(gold % len(head.classes), chosen % len(head.classes), group) for gold, chosen, group in rows]
    targets = [{"label": gold, "group": group} for gold, _, group in rows]
    metrics = head.metrics([chosen for _, chosen, _ in rows], targets)
    numbers = dict(metrics[head.name])
    right = [gold == chosen for gold, chosen, _ in rows]
    assert numbers.pop("accuracy") == pytest.approx(100 * sum(right) / len(right))
    if head is NLVR:
        wrong, groups = {group for gold, chosen, group in rows if gold != chosen}, {group for *_, group in rows}
        assert numbers.pop("consistency") == pytest.approx(100 * (1 - len(wrong) / len(groups)))
    else:
        pairs = [f"{head.classes[gold]}_as_{head.classes[chosen]}" for gold, chosen, _ in rows]
        assert {name: count for name, count in metrics["confusion"].items() if count} == {
            name: pairs.count(name) for name in set(pairs)
        }
    for label, name in enumerate(head.classes):
        own = [good for good, (gold, *_) in zip(right, rows, strict=True) if gold == label]
        expected = 100 * sum(own) / len(own) if own else None
        assert numbers.pop(f"accuracy_{name.lower()}", None) == (None if expected is None else pytest.approx(expected))
    assert not numbers
