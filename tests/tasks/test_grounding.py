"""Grounding end to end: trained on expressions without boxes, measured by points and by a detector's boxes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import pytest
import torch
from task_runs import assert_resumes_exactly, logged, run_task

from tercet.config import Config, DataConfig
from tercet.config_io import load_config
from tercet.data.grounding_files import draw_expressions, open_expressions
from tercet.data.images import ViewTransform
from tercet.data.loader import TrainLoader
from tercet.data.scenes import SceneSource
from tercet.data.table import Sample
from tercet.errors import TercetError
from tercet.predictor import Predictor
from tercet.tasks.explaining import Explanation
from tercet.tasks.grounding import expression_maps, read_map
from tercet.tasks.heatmaps import average_words, contrast_heatmaps, match_heatmaps
from tercet.tasks.task import evaluate_task
from tiny_model import make_model

CONFIG = Config.model_validate({"data": {"workers": 0}, "evaluate": {"batch_size": 3}})


def target(boxes: list[list[float]], size: list[float] | None = None, **others: object) -> dict[str, object]:
    empty = {"kinds": [], "split": None, "ref_id": None, "candidates": None}
    return {"boxes": boxes, "size": size} | empty | others


def test_it_trains_evaluates_and_resumes(tmp_path: Path) -> None:
    run = run_task("demo-grounding", tmp_path / "run", train__max_steps=40, data__test=["scenes:test"])
    lines = logged(run, "train")
    assert {"cma", "itm"} <= set(lines[0]) and not {"imc", "lmi", "mlm"} & set(lines[0])
    assert sum(line["loss"] for line in lines[-5:]) < sum(line["loss"] for line in lines[:5])
    told = logged(run, "evaluate")[-1]
    assert told["size"]["images"] == 24
    assert 0 <= told["pointing"]["all"] <= 100 and 0 <= told["boxes"]["all"] <= 100
    assert_resumes_exactly("demo-grounding", tmp_path)


@pytest.mark.parametrize("mode", ["itm", "itc"])
def test_maps_are_those_of_each_expression_alone(mode: str) -> None:
    model = make_model().eval()
    source = draw_expressions(4, "test")
    samples = [source.sample(index) for index in range(source.sample_count)]
    images = torch.stack([torch.from_numpy(source.pixels(index, 10**6)) for index in range(4)]).permute(0, 3, 1, 2)
    images = torch.nn.functional.interpolate(images, size=32)
    config = Config.model_validate({"data": {"workers": 0}, "evaluate": {"heatmap": mode}})
    used = sorted({sample.images[0] for sample in samples})
    maps = expression_maps(model, images[used], samples, config)
    assert len(maps) == len(samples)
    assert model.tokenizer is not None
    for sample, heatmap in list(zip(samples, maps, strict=True))[::3]:
        own = images[sample.images[0]][None]
        input_ids, mask = model.tokenizer.encode([sample.text], 25)
        text_embeds = model.encode_text(input_ids, mask)
        if mode == "itm":
            expected = average_words(match_heatmaps(model, model.encode_image(own), text_embeds, mask)[0], mask)
        else:
            expected = contrast_heatmaps(model, own, model.project_text(text_embeds[:, 0]))
        torch.testing.assert_close(heatmap.flatten(), expected[0], rtol=1e-4, atol=1e-7)


def test_maps_of_answers_add_up_over_questions_that_weigh_alike() -> None:
    model = make_model()
    model.add_heads(["answer"])
    model.eval()
    source = draw_expressions(2, "test")
    samples = [source.sample(index) for index in range(source.sample_count) if source.sample(index).images == (0,)]
    images = torch.from_numpy(source.pixels(0, 10**6)).permute(2, 0, 1)[None]
    images = torch.nn.functional.interpolate(images, size=32)
    questions = ["What colour is {}?", "is there {}"]

    def maps(*asked: str) -> torch.Tensor:
        settings = {"heatmap": "answer", "heatmap_questions": list(asked)}
        config = Config.model_validate({"data": {"workers": 0}, "evaluate": settings})
        return torch.stack(expression_maps(model, images, samples, config))

    both = maps(*questions)
    torch.testing.assert_close(both, maps(questions[0]) + maps(questions[1]))
    torch.testing.assert_close(both.sum(dim=(1, 2)), torch.full((len(samples),), 2.0))
    alone = Predictor(model).ground(
        images[0].permute(1, 2, 0).numpy(), f"what colour is {samples[0].text}?", mode="answer"
    )
    assert isinstance(alone, Explanation)
    torch.testing.assert_close(maps(questions[0])[0], alone.heatmap / alone.heatmap.sum(), rtol=1e-4, atol=1e-6)


def test_the_answer_whose_heat_is_read_is_one_of_the_models_list() -> None:
    model = make_model()
    model.add_heads(["answer"])
    model.eval()
    picture = SceneSource(1, "test").array(0)

    def seen(answers: list[str] | None) -> torch.Tensor:
        model.answers = answers
        found = Predictor(model).ground(picture, "is it red", mode="answer")
        assert isinstance(found, Explanation)
        return found.heatmap

    freely, one, other = seen(None), seen(["red"]), seen(["circle", "large"])
    assert not torch.allclose(one, other) and not torch.allclose(one, freely)
    both = seen(["red", "circle", "large"])
    assert torch.allclose(both, one) or torch.allclose(both, other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heatmap": "answer"}, "no head for answer; fine-tune it first"),
        ({"heatmap": "answer", "heatmap_questions": ["what is it?"]}, r"heatmap_questions: 'what is it\?' has no {}"),
    ],
)
def test_what_pointing_by_answers_needs(settings: dict[str, object], message: str) -> None:
    config = Config.model_validate({"data": {"workers": 0}, "evaluate": {"limit": 1, **settings}})
    with pytest.raises(TercetError, match=message):
        evaluate_task("grounding", make_model(), draw_expressions(1, "test"), config)


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
    with pytest.raises(TercetError, match=r"f row 2: the box \(0, 30, 10, 50\) reaches outside its image of 60x40"):
        read_map(heatmap, Sample((0,), "a dog", target([[0, 30, 10, 50]]), "f row 2"), (40, 60))


def test_a_file_with_a_broken_image(tmp_path: Path) -> None:
    scenes = SceneSource(2, "test", distinct=True)
    cv2.imwrite(str(tmp_path / "0.png"), scenes.array(0))
    (tmp_path / "1.png").write_bytes(b"no image")
    rows = [
        {"image": "1.png", "text": "a circle", "boxes": [[0, 0, 9, 9]], "types": ["shape"]},
        {"image": "0.png", "text": "a star", "boxes": [[0, 0, 64, 64]], "types": ["shape"]},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows), "utf-8")
    source = open_expressions([str(tmp_path / "rows.json")], DataConfig(), "test")
    result = evaluate_task("grounding", make_model(), source, CONFIG)
    assert result.sizes == {"samples": 1, "images": 1}
    assert result.metrics == {"pointing": {"all": 100.0, "centre": 100.0, "shape": 100.0}}
    assert "rows.json row 1" in result.problems[0]
    assert result.predictions[0]["sample"].endswith("rows.json row 2")


def test_the_published_settings() -> None:
    config = load_config("grounding")
    assert (config.task, config.model.vision.image_size, config.train.batch_size) == ("grounding", 384, 8 * 32)
    optim = config.optim
    assert (optim.lr, optim.min_lr, optim.warmup_lr, optim.warmup_epochs) == (1e-5, 1e-6, 1e-5, 1)
    assert (config.train.epochs, optim.weight_decay, config.objectives.alpha) == (5, 0.02, 0.4)
    assert config.data.augment == "whole"
    assert config.objectives.enabled == ("cma", "imc", "lmi", "itm")


def test_whole_views_keep_all_of_the_image() -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, :30] = 255
    white = []
    for seed in range(40):
        view = ViewTransform(32, "whole")(image, np.random.default_rng(seed), 1, flip=False)[0]
        assert view.shape == (32, 32, 3)
        white.append(view[16, 4].mean() > view[16, 27].mean())
    assert sum(white) > 30  # never mirrored; a few operations wipe the difference out


@pytest.mark.parametrize(
    ("text", "compat", "mirrors"),
    [
        ("the left one", "tercet", False),
        ("the bright one", "tercet", True),
        ("the left one", "published", True),
    ],
)
def test_an_expression_that_tells_sides_is_not_mirrored(
    tmp_path: Path, text: str, compat: Literal["tercet", "published"], mirrors: bool
) -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, :16] = 255
    cv2.imwrite(str(tmp_path / "0.png"), image)
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "0.png", "text": text}]), "utf-8")
    data = DataConfig(workers=0, augment="light", crop_scale=(1.0, 1.0))
    source = open_expressions([str(tmp_path / "rows.json")], data, "train")
    tokenizer = make_model().tokenizer
    assert tokenizer is not None
    loader = TrainLoader(source, tokenizer, data, image_size=32, batch_size=1, seed=0, compat=compat)
    views = [next(iter(loader.batches(epoch))).images[0, 0].float() for epoch in range(20)]
    loader.close()
    mirrored = [bool(view[:, 20:].mean() > view[:, :12].mean()) for view in views]
    assert any(mirrored) is mirrors
