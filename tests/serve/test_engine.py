"""Batches of requests give what single calls give, whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tercet.data.images import resize
from tercet.errors import TercetError
from tercet.model.tercet import Tercet
from tercet.serve.engine import AskJob, ClassifyJob, EmbedJob, Engine, ExplainJob, MatchJob
from tercet.tasks.answering import Answer
from tercet.tasks.explaining import Explanation
from tiny_model import SCENES, TEXTS, make_model

IMAGES = [resize(SCENES.array(index), 32) for index in range(4)]


@pytest.fixture(scope="module")
def model() -> Tercet:
    made = make_model()
    made.add_heads(["answer"])
    return made


@pytest.fixture(scope="module")
def engine(model: Tercet) -> Engine:
    return Engine(model)


def test_match(model: Tercet, engine: Engine) -> None:
    asked = [TEXTS[:1], TEXTS[:3], TEXTS[1:2], TEXTS[1:], TEXTS[3:]]
    jobs = [MatchJob(IMAGES[index % 4], texts) for index, texts in enumerate(asked)]
    results = engine.run(("match",), jobs)
    for job, result in zip(jobs, results, strict=True):
        chances, cosines = model.match([job.pixels], job.texts), model.similarity([job.pixels], job.texts)
        assert isinstance(chances, Tensor) and isinstance(cosines, Tensor)
        assert [each.match for each in result] == pytest.approx(chances[0].tolist(), abs=1e-5)
        assert [each.cosine for each in result] == pytest.approx(cosines[0].tolist(), abs=1e-5)


def test_classify(model: Tercet, engine: Engine) -> None:
    labels = ("a red circle", "a blue star", "a green heart")
    jobs = [ClassifyJob(image, labels, ()) for image in IMAGES] + [ClassifyJob(IMAGES[0], labels[:2], ("one {}",))]
    results = engine.run(("classify",), jobs)
    expected = model.classify(IMAGES, labels)
    assert isinstance(expected, list)
    for found, right in zip(results, expected, strict=False):
        assert list(found) == list(right) and found == pytest.approx(right, abs=1e-5)
    alone = model.classify(IMAGES[0], labels[:2], ["one {}"])
    assert isinstance(alone, dict) and results[4] == pytest.approx(alone, abs=1e-5)


def test_ask(model: Tercet, engine: Engine) -> None:
    questions = ["what colour is it?", "how many hearts are there in the picture?"]
    for answers in ((), ("red", "blue", "green")):
        results = engine.run(("ask", answers), [AskJob(IMAGES[index], questions[index]) for index in range(2)])
        for index in range(2):
            alone = model.answer(IMAGES[index], questions[index], list(answers) or None)
            assert isinstance(alone, Answer)
            assert results[index].text == alone.text
            assert results[index].score == pytest.approx(alone.score, abs=1e-5)


def test_another_model_can_answer(model: Tercet) -> None:
    plain = make_model()
    engine = Engine(plain, answering=model)
    assert engine.answers_questions
    (found,) = engine.run(("ask", ("red", "blue")), [AskJob(IMAGES[0], "what colour is it?")])
    alone = model.answer(IMAGES[0], "what colour is it?", ["red", "blue"])
    assert isinstance(alone, Answer) and found.text == alone.text
    assert "answer" not in plain.config.heads


def test_embed(model: Tercet, engine: Engine) -> None:
    jobs = [EmbedJob(IMAGES[:2], []), EmbedJob([], TEXTS[:1]), EmbedJob(IMAGES[2:3], TEXTS[1:])]
    results = engine.run(("embed",), jobs)
    for job, (image_feats, text_feats) in zip(jobs, results, strict=True):
        if job.pixels:
            torch.testing.assert_close(torch.tensor(image_feats), model.embed_images(job.pixels), rtol=0, atol=1e-5)
        if job.texts:
            torch.testing.assert_close(torch.tensor(text_feats), model.embed_texts(job.texts), rtol=0, atol=1e-5)
        assert (len(image_feats), len(text_feats)) == (len(job.pixels), len(job.texts))


def test_explain(model: Tercet, engine: Engine) -> None:
    texts = [*TEXTS[:3], "redcircle star"]  # the last has a word of several pieces
    jobs = [ExplainJob(image, text) for image, text in zip(IMAGES, texts, strict=True)]
    results = engine.run(("explain", "itm"), jobs)
    for job, found in zip(jobs, results, strict=True):
        alone = model.explain(job.pixels, job.text)
        assert isinstance(alone, Explanation)
        torch.testing.assert_close(found.heatmap, alone.heatmap, rtol=1e-4, atol=1e-6)
        assert found.match == pytest.approx(model.match(job.pixels, job.text), abs=1e-5)
        assert [heat.word for heat in found.words] == [heat.word for heat in alone.words]
        for heat, other in zip(found.words, alone.words, strict=True):
            torch.testing.assert_close(heat.heatmap, other.heatmap, rtol=1e-4, atol=1e-6)
    assert [heat.word for heat in results[-1].words] == ["redcircle", "star"]


def test_mistakes_name_the_mend(engine: Engine) -> None:
    with pytest.raises(TercetError, match="nothing is left of the text"):
        engine.run(("match",), [MatchJob(IMAGES[0], ["?!"])])
    with pytest.raises(TercetError, match="stands twice"):
        engine.run(("classify",), [ClassifyJob(IMAGES[0], ("a", "a"), ())])
    with pytest.raises(TercetError, match="no head for answer"):
        Engine(make_model()).run(("ask", ()), [AskJob(IMAGES[0], "what?")])


def test_features_of_classes_are_kept_within_bounds(model: Tercet) -> None:
    engine = Engine(model)
    for number in range(40):
        engine.run(("classify",), [ClassifyJob(IMAGES[0], (f"star {number}", "a heart"), ())])
    assert len(engine._classes) == 32
