"""Grounding: trained on expressions without boxes, measured by points and by a detector's boxes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from task_runs import assert_resumes_exactly, logged, run_task, write_image
from tercet.config import Config, DataConfig
from tercet.config_io import load_config
from tercet.data.inputs import to_batch
from tercet.data.table import Sample
from tercet.errors import TercetError
from tercet.model.tercet import Tercet
from tercet.predictor import Predictor
from tercet.tasks.explaining import Explanation
from tercet.tasks.grounding import box_scores, choose_box, expression_maps, inside, overlap, peak, read_map
from tercet.tasks.heatmaps import average_words, contrast_heatmaps, match_heatmaps
from tercet.tasks.task import evaluate_task, open_data
from tiny_model import make_model


def config(**evaluate: Any) -> Config:
    return Config.model_validate({"data": {"workers": 0}, "evaluate": {"batch_size": 3, **evaluate}})


def target(boxes: list[list[float]], size: list[float] | None = None, **others: object) -> dict[str, object]:
    empty = {"kinds": [], "split": None, "ref_id": None, "candidates": None}
    return {"boxes": boxes, "size": size} | empty | others


def expressions(files: dict[str, str]) -> tuple[torch.Tensor, list[Sample]]:
    """Images at the size of the model, and an expression of each."""
    source = open_data("grounding", [files["grounding"]], DataConfig(), "test")
    pixels = [source.pixels(index, 10**6) for index in range(source.image_count)]
    return to_batch(pixels, 32), [source.sample(index) for index in range(source.sample_count)]


def answering_model() -> Tercet:
    model = make_model()
    model.add_heads(["answer"])
    return model.eval()


def test_it_trains_evaluates_and_resumes(tmp_path: Path, files: dict[str, str]) -> None:
    file = files["grounding"]
    settings = {f"objectives__{name}": 0 for name in ("imc", "lmi", "mlm")} | {"objectives__teacher": False}
    run = run_task("grounding", file, tmp_path / "run", train__max_steps=40, data__test=[file], **settings)
    lines = logged(run, "train")
    assert {"cma", "itm"} <= set(lines[0]) and not {"imc", "lmi", "mlm"} & set(lines[0])
    assert sum(line["loss"] for line in lines[-5:]) < sum(line["loss"] for line in lines[:5])
    measured = logged(run, "evaluate")[-1]
    assert measured["size"] == {"samples": 8, "images": 8}
    assert 0 <= measured["pointing"]["all"] <= 100
    assert_resumes_exactly("grounding", file, tmp_path, **settings)


@pytest.mark.parametrize("mode", ["itm", "itc"])
def test_maps_are_those_of_each_expression_alone(mode: str, files: dict[str, str]) -> None:
    model = make_model()
    images, samples = expressions(files)
    assert model.tokenizer is not None
    maps = expression_maps(model, images, samples, config(heatmap=mode))
    for sample, heatmap in zip(samples, maps, strict=True):
        own = images[sample.images[0]][None]
        input_ids, mask = model.tokenizer.encode([sample.text], 25)
        text_embeds = model.encode_text(input_ids, mask)
        if mode == "itm":
            words, _ = match_heatmaps(model, model.encode_image(own), text_embeds, mask)
            expected = average_words(words, mask)
        else:
            expected = contrast_heatmaps(model, own, model.project_text(text_embeds[:, 0]))
        torch.testing.assert_close(heatmap.flatten(), expected[0], rtol=1e-4, atol=1e-7)


def test_maps_of_answers_add_up_over_equally_weighted_questions(files: dict[str, str]) -> None:
    model = answering_model()
    images, samples = expressions(files)

    def maps(*asked: str) -> torch.Tensor:
        settings = config(heatmap="answer", heatmap_questions=list(asked))
        return torch.stack(expression_maps(model, images, samples, settings))

    questions = ["What colour is {}?", "is there {}"]
    both = maps(*questions)
    torch.testing.assert_close(both, maps(questions[0]) + maps(questions[1]))
    torch.testing.assert_close(both.sum(dim=(1, 2)), torch.full((len(samples),), 2.0))
    image = images[samples[0].images[0]].permute(1, 2, 0).numpy()
    alone = Predictor(model).ground(image, f"what colour is {samples[0].text}?", mode="answer")
    assert isinstance(alone, Explanation)
    torch.testing.assert_close(maps(questions[0])[0], alone.heatmap / alone.heatmap.sum(), rtol=1e-4, atol=1e-6)


def test_the_heat_is_of_an_answer_in_the_models_list() -> None:
    model, image = answering_model(), np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)

    def heat(answers: list[str] | None) -> torch.Tensor:
        model.answers = answers
        found = Predictor(model).ground(image, "is it red", mode="answer")
        assert isinstance(found, Explanation)
        return found.heatmap

    unrestricted, one, other = heat(None), heat(["red"]), heat(["circle", "large"])
    assert not torch.allclose(one, other) and not torch.allclose(one, unrestricted)
    both = heat(["red", "circle", "large"])
    assert torch.allclose(both, one) or torch.allclose(both, other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heatmap": "answer"}, "no head for answer; fine-tune it first"),
        ({"heatmap": "answer", "heatmap_questions": ["what is it?"]}, r"heatmap_questions: 'what is it\?' has no {}"),
    ],
)
def test_what_heat_of_answers_needs(settings: dict[str, Any], message: str, files: dict[str, str]) -> None:
    source = open_data("grounding", [files["grounding"]], DataConfig(), "test")
    with pytest.raises(TercetError, match=message):
        evaluate_task("grounding", make_model(), source, config(**settings))


def test_points_and_boxes_are_read_at_the_size_of_the_annotation() -> None:
    heatmap = torch.zeros(4, 4)
    heatmap[0, 3] = 1.0
    candidates = [[0, 0, 90, 90], [310, 0, 400, 95]]
    sample = Sample((0,), "a dog", target([[300, 0, 400, 100]], [400, 400], candidates=candidates), "f row 1")
    found = read_map(heatmap, sample, (40, 40))
    assert found.pointed and found.chosen and not found.centred
    assert found.box == (310, 0, 400, 95)
    assert found.point is not None and found.point[0] > 340 and found.point[1] < 60


def test_without_a_size_boxes_are_in_pixels_of_the_image() -> None:
    heatmap = torch.zeros(4, 4)
    heatmap[3, 0] = 1.0
    found = read_map(heatmap, Sample((0,), "a dog", target([[0, 30, 10, 40]]), "f row 1"), (40, 60))
    assert found.size == (60, 40) and found.pointed and found.box is None
    with pytest.raises(TercetError, match=r"f row 2: the box \(0, 30, 10, 50\) .* 60x40"):
        read_map(heatmap, Sample((0,), "a dog", target([[0, 30, 10, 50]]), "f row 2"), (40, 60))


def test_a_broken_image_is_skipped_and_named(tmp_path: Path) -> None:
    write_image(tmp_path / "0.png", 1, 64)
    (tmp_path / "1.png").write_bytes(b"no image")
    rows = [
        {"image": "1.png", "text": "a circle", "boxes": [[0, 0, 9, 9]], "types": ["shape"]},
        {"image": "0.png", "text": "a star", "boxes": [[0, 0, 64, 64]], "types": ["shape"]},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows), "utf-8")
    source = open_data("grounding", [str(tmp_path / "rows.json")], DataConfig(), "test")
    result = evaluate_task("grounding", make_model(), source, config())
    assert result.sizes == {"samples": 1, "images": 1}
    assert result.metrics == {"pointing": {"all": 100.0, "centre": 100.0, "shape": 100.0}}
    assert "rows.json row 1" in result.problems[0]
    assert result.predictions[0]["sample"].endswith("rows.json row 2")


PUBLISHED = {
    "model.vision.image_size": 384,
    "train.batch_size": 8 * 32,
    "optim.min_lr": 1e-6,
    "optim.weight_decay": 0.02,
    "objectives.alpha": 0.4,
}
PUBLISHED_GROUNDING = {
    "train.epochs": 5,
    "optim.lr": 1e-5,
    "optim.warmup_lr": 1e-5,
    "optim.warmup_epochs": 1,
    "objectives.enabled": ("cma", "imc", "lmi", "itm"),
    "data.augment": "whole",
}
PUBLISHED_VQA = {
    "train.epochs": 8,
    "evaluate.batch_size": 16,
    "optim.lr": 2e-5,
    "optim.warmup_lr": 1e-5,
    "optim.warmup_epochs": 4,
    "objectives.momentum": 0.995,
    "objectives.alpha_warmup": 1.0,
    "data.crop_scale": (0.5, 1.0),
    "data.max_words": 30,
    "data.max_tokens": 25,
    "vqa.max_words": 50,
    "vqa.candidates": 128,
}


@pytest.mark.parametrize(("recipe", "settings"), [("grounding", PUBLISHED_GROUNDING), ("vqa", PUBLISHED_VQA)])
def test_recipes_have_the_published_settings(recipe: str, settings: dict[str, Any]) -> None:
    for key, expected in (PUBLISHED | settings).items():
        value: Any = load_config(recipe)
        for name in key.split("."):
            value = getattr(value, name)
        assert value == expected, key


def test_boxes_that_reach_over_the_edge_count_what_is_inside() -> None:
    scores = box_scores(torch.ones(10, 20), [(-5, -5, 5, 5), (0, 0, 10, 10), (15, 5, 25, 15)])
    assert scores.tolist() == pytest.approx([2.5, 10.0, 2.5])
    # A map without any positive score still chooses.
    assert choose_box(-torch.ones(8, 8), [(0, 0, 4, 4), (0, 0, 2, 2)]) == (1, -2.0)


def test_peak_and_inside() -> None:
    heatmap = torch.zeros(6, 8)
    heatmap[4, 5] = 1
    assert peak(heatmap) == (5.5, 4.5)
    assert inside((5.5, 4.5), [(0, 0, 1, 1), (5, 4, 6, 5)])
    assert not inside((5.5, 4.5), [(0, 0, 5, 5)])


sides = st.floats(0, 100, allow_nan=False)


@given(st.tuples(sides, sides, sides, sides), st.tuples(sides, sides, sides, sides))
def test_overlap_is_symmetric_and_within_bounds(first: tuple, second: tuple) -> None:
    one = (first[0], first[1], first[0] + first[2] + 1, first[1] + first[3] + 1)
    other = (second[0], second[1], second[0] + second[2] + 1, second[1] + second[3] + 1)
    assert overlap(one, one) == pytest.approx(1)
    assert 0 <= overlap(one, other) <= 1 + 1e-9
    assert overlap(one, other) == pytest.approx(overlap(other, one))
    # The published measure differs only where the boxes share a pixel or less.
    assert overlap(one, other, published=True) in (0.0, pytest.approx(overlap(one, other)))
