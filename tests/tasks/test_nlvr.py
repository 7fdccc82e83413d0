"""Statements about two images end to end on drawn pairs, and consistency."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from task_runs import TINY, assert_resumes_exactly, logged, run_task

from tercet.cli import main
from tercet.config import Config, DataConfig, ModelConfig, ObjectivesConfig
from tercet.data.nlvr_files import draw_statements
from tercet.model.hub import load_model
from tercet.model.tercet import Tercet
from tercet.tasks.classification import NLVR, ClassificationTask, open_statements
from tercet.tasks.task import evaluate_task

RECIPE = "demo-nlvr-first"


def small_model() -> Tercet:
    sizes = {"vision": {}, "text": {}}
    for key, value in TINY.items():
        section, _, name = key.removeprefix("model.").partition(".")
        if key.startswith("model.") and section in sizes:
            sizes[section][name] = value
    sizes["text"] |= {"vocabulary_size": 150, "max_positions": 40, "cls_id": 2, "sep_id": 3, "mask_id": 4}
    torch.manual_seed(0)
    return Tercet(ModelConfig.model_validate(sizes | {"embed_dim": 16}))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_task(
        RECIPE,
        tmp_path_factory.mktemp("nlvr") / "run",
        train__max_steps=160,
        train__batch_size=16,
        train__checkpoint_every=200,
        optim__lr=2e-3,
        optim__schedule="constant",
        data__test=["scenes:test"],
    )


def test_it_learns_what_it_sees(run: Path) -> None:
    losses = [line["nlvr"] for line in logged(run, "train")]
    assert losses[0] == pytest.approx(torch.tensor(2.0).log().item(), abs=0.3)
    result = evaluate_task("nlvr", load_model(run / "model"), draw_statements(8, "train"), Config())
    assert result.metrics["nlvr"]["accuracy"] > 85
    assert logged(run, "evaluate")[-1]["size"] == {"samples": 24, "sentences": 12}


def test_hard_pairs_have_few_easy_statements() -> None:
    hard = open_statements(["scenes:hard"], DataConfig(scenes=10), "train")
    assert hard.image_count == 20 and 10 + 8 < hard.sample_count <= 10 + 10 * 2
    assert hard.sample(0) == draw_statements(10, "train").sample(0)
    assert open_statements(["scenes:hard"], DataConfig(scenes=10), "test").sample_count == 500


@pytest.mark.parametrize("sharing", [{}, {"data__share_images": True, "train__batch_size": 2}])
def test_a_run_resumes_exactly(tmp_path: Path, sharing: dict[str, Any]) -> None:
    assert_resumes_exactly(RECIPE, tmp_path, **sharing)


def test_the_command_line_measures_and_writes_predictions(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "guesses.json"
    flags = ["--data", "scenes:test", "--data.workers", "0", "--train.device", "cpu", "--evaluate.limit", "20"]
    assert main(["evaluate", str(run), *flags, "--json", "--predictions", str(written)]) == 0
    metrics = json.loads(capsys.readouterr().out)["nlvr"]
    guesses = json.loads(written.read_text())
    right = [guess["label"] == guess["gold"] for guess in guesses]
    assert metrics["accuracy"] == pytest.approx(100 * sum(right) / 20)
    both = [one and other for one, other in zip(right[::2], right[1::2], strict=True)]
    assert metrics["consistency"] == pytest.approx(100 * sum(both) / 10)


def test_text_assignment_then_statements(tmp_path: Path) -> None:
    """The second layers and all below them go on from the pre-training; the new head starts afresh."""
    before = run_task("demo-nlvr-pretrain", tmp_path / "before", train__max_steps=2, data__test=["scenes:test"])
    assert logged(before, "train")[0]["assignment"] == pytest.approx(torch.tensor(3.0).log().item(), abs=0.4)
    assert 0 <= logged(before, "evaluate")[-1]["assignment"]["accuracy"] <= 100
    tuned = run_task(RECIPE, tmp_path / "tuned", init=str(before / "model"), train__max_steps=1, optim__lr=1e-9,
                     optim__min_lr=0, optim__warmup_lr=0)  # fmt: skip
    assert f"starts from {before / 'model'}; new in it: nlvr_head" in [
        line["message"] for line in logged(tuned, "event")
    ]
    old, new = load_model(before / "model"), load_model(tuned / "model")
    assert old.second_fusion is not None and new.second_fusion is not None
    for name, value in old.second_fusion.state_dict().items():
        torch.testing.assert_close(new.second_fusion.state_dict()[name], value, rtol=0, atol=1e-6)
    assert new.config.heads == ["assignment", "nlvr"]


def test_text_assignment_resumes_exactly(tmp_path: Path) -> None:
    assert_resumes_exactly("demo-nlvr-pretrain", tmp_path, train__batch_size=4)


def test_a_new_second_fusion_copies_the_first() -> None:
    model = small_model()
    assert model.add_heads(["nlvr"]) == ["second_fusion", "nlvr_head"]
    assert model.second_fusion is not None
    first = model.fusion.state_dict()
    second = model.second_fusion.state_dict()
    assert second.keys() == {name for name in first if ".key_value." not in name}
    assert all(torch.equal(second[name], first[name]) for name in second)
    assert model.add_heads(["assignment"]) == ["assignment_head"]
    assert model.add_heads(["nlvr", "assignment"]) == []


def test_the_order_of_the_images_matters_and_padding_does_not() -> None:
    model = small_model()
    model.add_heads(["nlvr"])
    model.eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    ids = torch.tensor([[2, 9, 17, 30, 0, 0]])
    mask = ids != 0
    with torch.no_grad():
        memory = model.project_kv(model.encode_image(images))
        one, other = memory.select(torch.tensor([0])), memory.select(torch.tensor([1]))

        def fused(first, second, width: int) -> torch.Tensor:
            texts = model.encode_text(ids[:, :width], mask[:, :width])
            return model.second_fusion(model.fusion, texts, mask[:, :width], first, second)[:, 0]

        assert not torch.allclose(fused(one, other, 4), fused(other, one, 4), atol=1e-4)
        torch.testing.assert_close(fused(one, other, 4), fused(one, other, 6), rtol=1e-5, atol=1e-6)


def test_a_fresh_teacher_does_not_start_from_the_student() -> None:
    student = small_model()
    student.add_heads(["nlvr"])
    copied, fresh = (ClassificationTask(student, NLVR, ObjectivesConfig(), own).teacher for own in (False, True))
    assert copied is not None and fresh is not None
    weight = student.fusion.layers[0].get_parameter("mlp.up.weight")
    assert torch.equal(copied.model.fusion.layers[0].get_parameter("mlp.up.weight"), weight)
    assert not torch.equal(fresh.model.fusion.layers[0].get_parameter("mlp.up.weight"), weight)
    assert {name.split(".")[0] for name, _ in fresh.model.named_parameters()} == set(NLVR.parts)


@given(st.lists(st.tuples(st.integers(0, 1), st.booleans(), st.sampled_from("abcde")), min_size=1))
def test_consistency_counts_sentences_without_a_mistake(samples: list[tuple[int, bool, str]]) -> None:
    targets = [{"label": label, "group": group} for label, _, group in samples]
    chosen = [label if right else 1 - label for label, right, _ in samples]
    metrics = NLVR.metrics(chosen, targets)["nlvr"]
    wrong = {group for _, right, group in samples if not right}
    groups = {group for *_, group in samples}
    assert metrics["consistency"] == pytest.approx(100 * (1 - len(wrong) / len(groups)))
    for name, label in (("true", 1), ("false", 0)):
        own = [right for each, right, _ in samples if each == label]
        assert metrics.get(f"accuracy_{name}") == (pytest.approx(100 * sum(own) / len(own)) if own else None)
