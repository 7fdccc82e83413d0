"""Filtering: scores of every pair, continued after a kill, another threshold without the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from task_runs import write_image
from tercet.cli import main
from tercet.config import Config, DataConfig
from tercet.data.readers import open_sources
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
    """Ten pairs, the first with two captions, one of a broken image."""
    rows = []
    for index in range(10):
        write_image(tmp_path / f"{index}.png", index, 33 + index)
        rows.append({"image": f"{index}.png", "caption": f"image {index}", "image_id": index // 2})
    rows[0]["caption"] = [rows[0]["caption"], "nothing of the kind"]
    (tmp_path / "7.png").write_bytes(b"")
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    return tmp_path / "pairs.json"


def opened(path: Path | str) -> SampleTable:
    return open_sources([str(path)], DataConfig(), "test")


def run(path: Path, to: Path, **options: Any) -> FilterReport:
    return filter_pairs(MODEL, opened(path), CONFIG, to, {"model": "tiny"}, **options)


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
    report = run(pairs, tmp_path / "out" / "kept.jsonl", fraction=0.5, by="similarity")
    rows = lines(tmp_path / "out" / "kept.jsonl")
    assert report.kept == len(rows) == 5
    assert min(row["similarity"] for row in rows) == pytest.approx(report.threshold)
    every = lines(tmp_path / "out" / "kept.jsonl.scores")[1:]
    assert sum(row["similarity"] >= report.threshold for batch in every for row in batch["rows"]) == 5
    source = opened(tmp_path / "out" / "kept.jsonl")
    assert source.image(0) == opened(pairs).image(int(Path(rows[0]["image"]).stem))
    assert len(set(source.image_ids.tolist())) == len({int(Path(row["image"]).stem) // 2 for row in rows})


def test_another_threshold_needs_no_model(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(pairs, tmp_path / "kept.jsonl", fraction=1.0)
    monkeypatch.setattr(filtering, "score_batch", lambda *_: pytest.fail("scored again"))
    assert run(pairs, tmp_path / "kept.jsonl", fraction=0.3).kept == 3
    assert len(lines(tmp_path / "kept.jsonl")) == 3


@pytest.mark.parametrize("cut", [1, 40, 400])
def test_it_continues_after_a_kill(pairs: Path, tmp_path: Path, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run(pairs, tmp_path / "whole.jsonl", fraction=0.6)
    done: list[int] = []

    def stop(images: int, total: int) -> None:
        done.append(images)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pairs, tmp_path / "kept.jsonl", fraction=0.6, progress=stop)
    assert done == [4, 8]
    journal = tmp_path / "kept.jsonl.scores"
    journal.write_bytes(journal.read_bytes()[:-cut])  # in the middle of a line, as a kill leaves it
    assert not (tmp_path / "kept.jsonl").exists()
    scored = []
    real = filtering.score_batch
    monkeypatch.setattr(filtering, "score_batch", lambda *given: scored.append(given[2].keys) or real(*given))
    run(pairs, tmp_path / "kept.jsonl", fraction=0.6)
    assert len(scored) == 2  # the batch that was cut, and the last
    assert journal.read_bytes() == (tmp_path / "whole.jsonl.scores").read_bytes()
    assert (tmp_path / "kept.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_errors(pairs: Path, tmp_path: Path) -> None:
    output = tmp_path / "kept.jsonl"
    with pytest.raises(TercetError, match="give either a threshold of the score or the fraction"):
        run(pairs, output)
    with pytest.raises(TercetError, match=r"the fraction of pairs to keep is 1\.5"):
        run(pairs, output, fraction=1.5)
    run(pairs, output, fraction=0.5)
    with pytest.raises(TercetError, match=r"kept\.jsonl\.scores holds scores of another model"):
        filter_pairs(MODEL, opened(pairs), CONFIG, output, {"model": "other"}, fraction=0.5)
    other = CONFIG.model_copy(update={"evaluate": CONFIG.evaluate.model_copy(update={"batch_size": 5})})
    with pytest.raises(TercetError, match=r"batches of 4 images; .* --evaluate\.batch_size 4"):
        filter_pairs(MODEL, opened(pairs), other, output, {"model": "tiny"}, fraction=0.5)


def test_the_command_and_the_shards_of_what_it_kept(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(MODEL, tmp_path / "model")
    shards, kept = tmp_path / "shards", tmp_path / "kept.jsonl"
    assert main(["data", "pack", str(pairs), "--output", str(shards), "--data.workers", "0"]) == 0
    command = ["data", "filter", str(shards), "--model", str(tmp_path / "model"), "--output", str(kept)]
    capsys.readouterr()
    assert main([*command, "--fraction", "0.5", "--data.workers", "0", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["scored"], report["kept"], report["by"], report["skipped_images"]) == (10, 5, "match", 0)
    arguments = ["data", "pack", str(shards), "--keep", str(kept), "--output", str(tmp_path / "clean")]
    assert main([*arguments, "--data.workers", "0"]) == 0
    clean = opened(tmp_path / "clean")
    captions = [caption for index in range(clean.image_count) for caption in clean.captions(index)]
    assert sorted(captions) == sorted(row["caption"] for row in lines(kept))
    assert main(command) == 2
    assert "give either a threshold" in capsys.readouterr().err
