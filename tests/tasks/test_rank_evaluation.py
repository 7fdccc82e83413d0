"""An evaluation shared out over ranks gives what one rank gives, sample by sample."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from rank_runs import evaluations, feature_evaluations, run_ranks
from tercet.data.scenes import SceneSource

TASKS = ["retrieval", "embedding", "entailment", "nlvr", "vqa", "grounding", "nlvr_pretrain"]


def test_ranks_merge_unequal_parts_to_the_numbers_of_one() -> None:
    alone = run_ranks(1, evaluations, TASKS)[0]
    assert alone["retrieval"]["sizes"]["images"] == 7 and "reranked" in alone["retrieval"]["metrics"]
    for together in run_ranks(2, evaluations, TASKS):
        for task in TASKS:
            assert together[task] == alone[task], task


def write_files(folder: Path) -> None:
    """Labelled images of three classes, of which a whole batch of the test images is broken, and rows of probes."""
    scenes = SceneSource(20, "test", distinct=True)
    for split, counts in {"train": (3, 3, 4), "test": (3, 2, 4)}.items():
        for label, count in zip(("circle", "square", "star"), counts, strict=True):
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                Image.fromarray(scenes.array(sum(counts) + number)).save(folder / split / label / f"{number}.png")
    for name in ("circle/2", "square/0"):  # the second batch, of the second rank
        (folder / f"test/{name}.png").write_bytes(b"broken")
    for index in range(9):
        Image.fromarray(scenes.array(index)).save(folder / f"{index}.png")
    (folder / "4.png").write_bytes(b"broken")
    texts = [scenes.captions(index)[0] for index in range(10)]
    crepe = [{"filename": f"{n}.png", "caption": texts[n], "negative_caption": texts[n + 1]} for n in range(9)]
    pairs = [(n, (n + 3) % 9) for n in range(7)]
    ground = [
        {"image_0": f"{a}.png", "image_1": f"{b}.png", "caption_0": texts[a], "caption_1": texts[b]} for a, b in pairs
    ]
    said = {"true_caption": texts[0], "false_caption": texts[1], "relation_name": "on"}
    outside: list[dict[str, object]] = [{"image_path": "0.png", **said} for _ in range(9)]
    for row in (3, 5, 8):  # the first of them in the second rank's first chunk
        outside[row] |= {"bbox_x": 64 + row, "bbox_y": 0, "bbox_w": 5, "bbox_h": 5}
    for name, rows in {"crepe": crepe, "ground": ground, "outside": outside}.items():
        (folder / f"{name}.json").write_text(json.dumps(rows), "utf-8")


def test_classes_and_probes_are_shared_out_and_merged_to_the_numbers_of_one(tmp_path: Path) -> None:
    write_files(tmp_path)
    ((alone, images),) = run_ranks(1, feature_evaluations, str(tmp_path))
    metrics, sizes, problems, _ = alone["classify"]
    assert sizes == {"images": 7, "classes": 3} and len(problems) == 2
    assert set(metrics["linear probe"]) >= {"1 shots", "2 shots", "all"}
    assert alone["crepe"][1] == {"samples": 8} and alone["ground"][1] == {"samples": 5}
    assert "outside.json row 4: the box (67, 0, 72, 5) lies outside" in alone["outside"]
    for world in (2, 3):
        together = run_ranks(world, feature_evaluations, str(tmp_path))
        assert all(found == alone for found, _ in together)
        assert max(encoded for _, encoded in together) < images
