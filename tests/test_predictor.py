"""The one-line calls: single in, single out; several in, as many out; whatever form the inputs have."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tercet
from scene_files import png_of
from tercet.cli import main
from tercet.errors import TercetError
from tercet.model.hub import save_model
from tercet.predictor import CACHED_CLASSES, Predictor
from tercet.tasks.answering import Answer
from tercet.tasks.explaining import Explanation
from tiny_model import SCENES, TEXTS, make_model

IMAGES = [SCENES[index].image for index in range(4)]


@pytest.fixture(scope="module")
def predictor() -> Any:
    return Predictor(make_model())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    answering = make_model()
    answering.add_heads(["answer"])
    return save_model(answering, tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def answering(folder: Path) -> Any:
    return tercet.load(folder)


def close(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_embedding_one_or_several(predictor: Any, tmp_path: Path) -> None:
    feats = predictor.embed_images(IMAGES)
    assert feats.shape == (4, 16)
    close(feats.norm(dim=1), torch.ones(4))
    Image.fromarray(IMAGES[2]).save(tmp_path / "2.png")
    file = tmp_path / "2.png"
    for form in (IMAGES[2], file, str(file), file.read_bytes(), Image.fromarray(IMAGES[2])):
        close(predictor.embed_images(form), feats[2])
    close(predictor.embed_images(np.stack(IMAGES)), feats)
    close(predictor.embed_images(torch.from_numpy(np.stack(IMAGES)).permute(0, 3, 1, 2)), feats)

    texts = predictor.embed_texts(TEXTS)
    assert texts.shape == (4, 16)
    close(predictor.embed_texts(TEXTS[1]), texts[1])


def test_more_than_a_batch_of_images(predictor: Any) -> None:
    many = [IMAGES[index % 4] for index in range(70)]
    feats = predictor.embed_images(many)
    assert feats.shape == (70, 16)
    close(feats[69], feats[1])
    chances = predictor.match(many, [TEXTS[index % 4] for index in range(70)], paired=True)
    assert chances.shape == (70,)
    close(chances[66], chances[2])


def test_match_and_similarity(predictor: Any) -> None:
    table, cosines = predictor.match(IMAGES, TEXTS), predictor.similarity(IMAGES, TEXTS)
    assert table.shape == cosines.shape == (4, 4)
    assert ((table > 0) & (table < 1)).all() and (cosines.abs() <= 1 + 1e-6).all()
    for call, every in ((predictor.match, table), (predictor.similarity, cosines)):
        one = call(IMAGES[1], TEXTS[2])
        assert isinstance(one, float)
        assert one == pytest.approx(every[1, 2].item(), abs=1e-5)
        close(call(IMAGES[1], TEXTS), every[1])
        close(call(IMAGES, TEXTS[2]), every[:, 2])
        assert call([IMAGES[1]], [TEXTS[2]]).shape == (1, 1)
    close(predictor.match(IMAGES, TEXTS, paired=True), table.diagonal())
    with pytest.raises(TercetError, match="4 images and 2 texts"):
        predictor.match(IMAGES, TEXTS[:2], paired=True)


def test_classify(predictor: Any) -> None:
    labels = ["a red circle", "a blue star", "a green heart"]
    (alone,), several = predictor.classify(IMAGES[:1], labels), predictor.classify(IMAGES, labels)
    assert predictor.classify(IMAGES[0], labels) == alone
    assert set(alone) == set(labels) and sum(alone.values()) == pytest.approx(1)
    assert list(alone.values()) == sorted(alone.values(), reverse=True)
    assert isinstance(several, list) and len(several) == 4 and several[0] == pytest.approx(alone)
    # With one template, the classes are ranked as the similarity to its sentences.
    cosines = predictor.similarity(IMAGES[0], labels)
    assert next(iter(predictor.classify(IMAGES[0], labels, templates=["{}"]))) == labels[int(cosines.argmax())]
    for number in range(CACHED_CLASSES + 8):
        predictor.classify(IMAGES[0], [f"star {number}", "a heart"])
    assert len(predictor._class_feats) == CACHED_CLASSES


@pytest.mark.parametrize(
    ("labels", "templates", "message"),
    [
        (["a", "a"], None, "'a'"),
        ([], None, "list of labels"),
        ("a cat", None, "list of labels"),
        (["a"], ["a photo"], "'a photo' needs one {}"),
        (["?!"], ["{}"], r"'\?!'"),
    ],
)
def test_classify_rejects(predictor: Any, labels: list[str], templates: list[str] | None, message: str) -> None:
    with pytest.raises(TercetError, match=message):
        predictor.classify(IMAGES[0], labels, templates)


@pytest.mark.parametrize("mode", ["itm", "itc"])
def test_ground(predictor: Any, mode: str) -> None:
    ground = partial(predictor.ground, mode=mode)
    alone = ground(Image.fromarray(IMAGES[0]).resize((60, 40)), "a red circle")
    assert isinstance(alone, Explanation)
    assert alone.heatmap.shape == (4, 4)
    assert alone.enlarged().shape == (40, 60)
    x, y = alone.point
    assert 0 < x < 60 and 0 < y < 40
    assert (alone.words == []) is (mode == "itc")
    if mode == "itm":
        total = torch.stack([heat.heatmap for heat in alone.words]).sum(dim=0)
        assert (total <= alone.heatmap * (len(alone.words) + 1) + 1e-6).all()  # the rest is that of [CLS]

    several, one_image, one_text = ground(IMAGES, TEXTS), ground(IMAGES[1], TEXTS), ground(IMAGES, TEXTS[1])
    assert isinstance(several, list) and isinstance(one_image, list) and isinstance(one_text, list)
    assert len(several) == len(one_image) == len(one_text) == 4
    close(several[1].heatmap, one_image[1].heatmap)
    close(several[1].heatmap, one_text[1].heatmap)


def test_ground_refuses(predictor: Any) -> None:
    with pytest.raises(TercetError, match="4 images and 3 texts"):
        predictor.ground(IMAGES, TEXTS[:3])
    with pytest.raises(TercetError, match=r"'gradcam'.* itm, itc and answer"):
        predictor.ground(IMAGES[0], TEXTS[0], mode="gradcam")
    with pytest.raises(TercetError, match="layer 1 has no cross-attention"):
        predictor.ground(IMAGES[0], TEXTS[0], layer=1)


def test_an_explained_answer(predictor: Any, answering: Any) -> None:
    question = "What is the heart?"
    with pytest.raises(TercetError, match="no head for answer"):
        predictor.ground(IMAGES[0], question, mode="answer")
    seen = answering.ground(IMAGES[0], question, mode="answer")
    found = answering.explain(IMAGES[0], question, mode="answer")
    assert isinstance(seen, Explanation) and isinstance(found, Explanation)
    close(seen.heatmap, found.heatmap)
    assert "".join(heat.word for heat in found.words) == "whatistheheart"
    assert all(heat.heatmap.max() > 0 for heat in found.words)
    alone = answering.answer(IMAGES[0], question)
    assert isinstance(alone, Answer) and found.answer == alone.text
    assert found.match == pytest.approx(answering.match(IMAGES[0], question), abs=1e-3)


def test_answer(predictor: Any, answering: Any) -> None:
    with pytest.raises(TercetError, match="no head for answer"):
        predictor.answer(IMAGES[0], "what colour?")
    question, choices = "what colour is it?", ["red", "blue", "green"]
    generated, chosen = answering.answer(IMAGES[0], question), answering.answer(IMAGES[0], question, choices)
    assert isinstance(generated, Answer) and isinstance(generated.text, str)
    assert isinstance(chosen, Answer) and chosen.text in choices
    assert chosen.score + sum(score for _, score in chosen.others) == pytest.approx(1)
    questions = [question, "how many hearts are there in the picture?"]
    one_image = answering.answer(IMAGES[0], questions, choices)
    paired = answering.answer([IMAGES[0]] * 2, questions, choices)
    assert isinstance(one_image, list) and isinstance(paired, list)
    assert [found.text for found in one_image] == [found.text for found in paired]
    assert paired[0].score == pytest.approx(chosen.score, abs=1e-4)


def test_the_model_stays_in_the_mode_that_it_was_in(predictor: Any) -> None:
    first = predictor.match(IMAGES[0], TEXTS[0])
    predictor.model.train()
    try:
        assert predictor.match(IMAGES[0], TEXTS[0]) == first  # no dropout
        assert predictor.model.training
    finally:
        predictor.model.eval()


def test_without_a_tokenizer_it_embeds_images_alone() -> None:
    bare = Predictor(make_model())
    bare.model.tokenizer = None
    assert bare.embed_images(IMAGES[0]).shape == (16,)
    with pytest.raises(TercetError, match="no tokenizer"):
        bare.match(IMAGES[0], TEXTS[0])


def test_each_image_with_its_own_texts(predictor: Any) -> None:
    texts = [TEXTS[:1], TEXTS[:3], TEXTS[1:2], TEXTS[1:], TEXTS * 5]
    images = [IMAGES[index % 4] for index in range(5)]
    for image, own, scores in zip(images, texts, predictor.match_each(images, texts), strict=True):
        matches, cosines = predictor.match([image], own), predictor.similarity([image], own)
        assert [score.match for score in scores] == pytest.approx(matches[0].tolist(), abs=1e-5)
        assert [score.cosine for score in scores] == pytest.approx(cosines[0].tolist(), abs=1e-5)


def test_explanations_in_a_batch_are_those_of_single_calls(predictor: Any) -> None:
    texts = [*TEXTS[:3], "redcircle star"]  # the last has a word of several pieces
    together = predictor.explain(IMAGES, texts)
    assert isinstance(together, list)
    for image, text, found in zip(IMAGES, texts, together, strict=True):
        alone = predictor.explain(image, text)
        assert isinstance(alone, Explanation)
        close(found.heatmap, alone.heatmap)
        assert found.match == pytest.approx(predictor.match(image, text), abs=1e-5)
        assert [heat.word for heat in found.words] == [heat.word for heat in alone.words]
    assert [heat.word for heat in together[-1].words] == ["redcircle", "star"]


@pytest.fixture
def picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("a.png").write_bytes(png_of(SCENES[0]))
    return "a.png"


def test_commands(folder: Path, answering: Any, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> Any:
        assert main([*words, "--model", str(folder), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    rows = run("match", picture, *TEXTS[:2])
    assert [row["text"] for row in rows] == TEXTS[:2]
    assert rows[1]["match"] == pytest.approx(answering.match(IMAGES[0], TEXTS[1]), abs=1e-5)
    assert rows[1]["cosine"] == pytest.approx(answering.similarity(IMAGES[0], TEXTS[1]), abs=1e-5)
    labels = ["a red circle", "a blue star"]
    assert run("classify", picture, "--labels", *labels) == pytest.approx(answering.classify(IMAGES[0], labels))
    found = run("ask", picture, "what colour is it?", "--answers", "red", "blue")
    assert found["answer"] in ("red", "blue") and len(found["others"]) == 1


def test_the_default_model_is_the_demo(folder: Path, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["match", picture, "a heart"]) == 2
    assert "name a model with --model; the default, runs/demo/model" in capsys.readouterr().err
    Path("runs/demo").mkdir(parents=True)
    Path("runs/demo/model").symlink_to(folder)
    assert main(["match", picture, "a heart"]) == 0
    assert "%" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "names"), [("match a.pngx heart", "did you mean"), ("classify a.png", "labels")])
def test_mistakes_are_one_line(
    words: str, names: str, folder: Path, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words.split(), "--model", str(folder)]) == 2
    assert names in capsys.readouterr().err
