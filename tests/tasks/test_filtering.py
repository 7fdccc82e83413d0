"""Filtering: scores of every pair, on after a kill, another threshold without the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tercet.cli import main
from tercet.config import Config, DataConfig
from tercet.data.readers import open_sources
from tercet.data.scenes import SceneSource
from tercet.data.table import SampleTable
from tercet.errors import TercetError
from tercet.model.hub import save_model
from tercet.predictor import Predictor
from tercet.tasks import filtering
from tercet.tasks.filtering import FilterReport, filter_pairs
from tiny_model import make_model

MODEL = make_model()
CONFIG = Config.model_validate({"data": {"workers": 0}, "evaluate": {"batch_size": 4}})


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Ten drawn scenes as files, the first with two captions, one broken."""
    scenes = SceneSource(10, "test", distinct=True)
    rows = []
    for index in range(10):
        (tmp_path / f"{index}.png").write_bytes(scenes.image(index))
        rows.append({"image": f"{index}.png", "caption": scenes.captions(index)[0], "image_id": index // 2})
    rows[0]["caption"] = [rows[0]["caption"], "nothing of the kind"]
    (tmp_path / "7.png").write_bytes(b"")
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    return tmp_path / "pairs.json"


def opened(path: Path | str) -> SampleTable:
    return open_sources([str(path)], DataConfig(), "test")


def run(path: Path, to: Path, **options: Any) -> FilterReport:
    steps = list(filter_pairs(MODEL, opened(path), CONFIG, to, {"model": "tiny"}, **options))
    assert isinstance(steps[-1], FilterReport)
    return steps[-1]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_scores_are_the_models_own(pairs: Path, tmp_path: Path) -> None:
    report = run(pairs, tmp_path / "kept.jsonl", threshold=0.0)
    rows = lines(tmp_path / "kept.jsonl")
    assert (report.scored, report.kept, report.skipped) == (10, 10, 1)
    assert "7.png: the image file is empty" in report.problems[0]
    images, texts = [row["image"] for row in rows], [row["caption"] for row in rows]
    assert texts[1] == "nothing of the kind" and images[0] == images[1] == str(tmp_path / "0.png")
    matches = Predictor(MODEL).match(images, texts, paired=True)
    assert [row["match"] for row in rows] == pytest.approx(matches.tolist(), abs=2e-5)  # type: ignore[union-attr]
    cosines = Predictor(MODEL).similarity(images, texts).diagonal()  # type: ignore[union-attr]
    assert [row["similarity"] for row in rows] == pytest.approx(cosines.tolist(), abs=2e-5)


def test_what_is_kept_is_a_source_with_the_same_ids(pairs: Path, tmp_path: Path) -> None:
    report = run(pairs, tmp_path / "out" / "kept.jsonl", share=0.5, by="similarity")
    rows = lines(tmp_path / "out" / "kept.jsonl")
    assert report.kept == len(rows) == 5
    assert min(row["similarity"] for row in rows) == pytest.approx(report.threshold)
    every = lines(tmp_path / "out" / "kept.jsonl.scores")[1:]
    assert sum(row["similarity"] >= report.threshold for batch in every for row in batch["rows"]) == 5
    source = opened(tmp_path / "out" / "kept.jsonl")
    assert source.image(0) == opened(pairs).image(int(Path(rows[0]["image"]).stem))
    assert len(set(source.image_ids.tolist())) == len({int(Path(row["image"]).stem) // 2 for row in rows})


def test_another_threshold_needs_no_model(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(pairs, tmp_path / "kept.jsonl", share=1.0)
    monkeypatch.setattr(filtering, "score_batch", lambda *_: pytest.fail("scored again"))
    assert run(pairs, tmp_path / "kept.jsonl", share=0.3).kept == 3
    assert len(lines(tmp_path / "kept.jsonl")) == 3


@pytest.mark.parametrize("cut", [1, 40, 400])
def test_it_goes_on_after_a_kill(pairs: Path, tmp_path: Path, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run(pairs, tmp_path / "whole.jsonl", share=0.6)
    wanted = (tmp_path / "whole.jsonl.scores").read_bytes()
    steps = filter_pairs(MODEL, opened(pairs), CONFIG, tmp_path / "kept.jsonl", {"model": "tiny"}, share=0.6)
    assert [next(steps), next(steps), next(steps)] == [0, 4, 8]
    steps.close()
    journal = tmp_path / "kept.jsonl.scores"
    journal.write_bytes(journal.read_bytes()[:-cut])  # in the middle of a line, as a kill leaves it
    assert not (tmp_path / "kept.jsonl").exists()
    scored = []
    real = filtering.score_batch
    monkeypatch.setattr(filtering, "score_batch", lambda *given: scored.append(given[2].keys) or real(*given))
    run(pairs, tmp_path / "kept.jsonl", share=0.6)
    assert len(scored) == 2  # the batch that was cut, and the last
    assert journal.read_bytes() == wanted
    assert (tmp_path / "kept.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_refusals(pairs: Path, tmp_path: Path) -> None:
    to = tmp_path / "kept.jsonl"
    with pytest.raises(TercetError, match="give either a threshold of the score or the share"):
        run(pairs, to)
    with pytest.raises(TercetError, match=r"the share of pairs to keep is 1\.5"):
        run(pairs, to, share=1.5)
    run(pairs, to, share=0.5)
    with pytest.raises(TercetError, match="holds scores of another model; delete it, or choose another file"):
        list(filter_pairs(MODEL, opened(pairs), CONFIG, to, {"model": "other"}, share=0.5))
    other = CONFIG.model_copy(update={"evaluate": CONFIG.evaluate.model_copy(update={"batch_size": 5})})
    with pytest.raises(TercetError, match=r"batches of 4 images; go on with --evaluate\.batch_size 4"):
        list(filter_pairs(MODEL, opened(pairs), other, to, {"model": "tiny"}, share=0.5))


def test_the_command_and_the_shards_of_what_it_kept(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(MODEL, tmp_path / "model")
    shards = tmp_path / "shards"
    assert main(["data", "pack", str(pairs), "--output", str(shards), "--data.workers", "0"]) == 0
    kept = tmp_path / "kept.jsonl"
    flags = [
        "--model",
        str(tmp_path / "model"),
        "--output",
        str(kept),
        "--fraction",
        "0.5",
        "--data.workers",
        "0",
        "--json",
    ]
    capsys.readouterr()
    assert main(["data", "filter", str(shards), *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["scored"], report["kept"], report["by"], report["skipped_images"]) == (10, 5, "match", 0)
    arguments = ["data", "pack", str(shards), "--keep", str(kept), "--output", str(tmp_path / "clean")]
    assert main([*arguments, "--data.workers", "0"]) == 0
    clean = opened(tmp_path / "clean")
    captions = [caption for index in range(clean.image_count) for caption in clean.captions(index)]
    assert sorted(captions) == sorted(row["caption"] for row in lines(kept))
    assert main(["data", "filter", str(shards), "--output", str(kept), "--model", str(tmp_path / "model")]) == 2
    assert "give either a threshold" in capsys.readouterr().err
