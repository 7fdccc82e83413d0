"""An evaluation on several ranks gives the result of one rank, sample by sample, and its errors on all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rank_runs import run_ranks
from task_runs import evaluations, write_image, write_task_files


def write_probes_and_classes(folder: Path) -> dict[str, str]:
    """Rows of probes, and labelled images, of which a whole batch of the test images is broken."""
    captions = [f"caption {index}" for index in range(10)]
    images = [f"{index}.png" for index in range(9)]
    for split, counts in {"train": (3, 3, 4), "test": (3, 2, 4)}.items():
        for label, count in enumerate(counts):
            (folder / split / f"class {label}").mkdir(parents=True)
            for number in range(count):
                write_image(folder / split / f"class {label}" / f"{number}.png", 3 * label + number)
    for name in ("class 0/2", "class 1/0"):  # the second batch, of the second rank
        (folder / f"test/{name}.png").write_bytes(b"broken")
    for index, name in enumerate(images):
        write_image(folder / name, index)
    (folder / "4.png").write_bytes(b"broken")
    said: dict[str, Any] = {"true_caption": "a", "false_caption": "b", "relation_name": "on"}
    outside = [{"image_path": "0.png", **said} for _ in images]
    for row in (3, 5, 8):  # the first of them in the second rank's first batch
        outside[row] |= {"bbox_x": 64 + row, "bbox_y": 0, "bbox_w": 5, "bbox_h": 5}
    rows = {
        "sugarcrepe": [
            {"filename": name, "caption": captions[index], "negative_caption": captions[index + 1]}
            for index, name in enumerate(images)
        ],
        "winoground": [
            {"image_0": images[a], "image_1": images[b], "caption_0": captions[a], "caption_1": captions[b]}
            for a, b in ((number, (number + 3) % 9) for number in range(7))
        ],
        "outside": outside,
    }
    for name, own in rows.items():
        (folder / f"{name}.json").write_text(json.dumps(own), "utf-8")
    return {f"probes-{name}": str(folder / f"{name}.json") for name in rows} | {"classify": str(folder / "test")}


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_merge_unequal_parts_to_the_result_of_one(tmp_path: Path, world: int) -> None:
    (tmp_path / "tasks").mkdir()
    files = write_task_files(tmp_path / "tasks", 7) | write_probes_and_classes(tmp_path)
    overrides = {"evaluate.batch_size": 2, "evaluate.limit": 9, "classify.train": [str(tmp_path / "train")]}
    ((alone, images),) = run_ranks(1, evaluations, files, overrides)
    together = run_ranks(world, evaluations, files, overrides)
    for found, encoded in together:
        assert found.keys() == alone.keys()
        for name, own in alone.items():
            assert found[name] == own, name
        assert encoded < images
    metrics, sizes, problems, _ = alone["classify"]
    assert sizes == {"images": 7, "classes": 3} and len(problems) == 2
    assert set(metrics["linear probe"]) >= {"1 shots", "2 shots", "all"}
    assert alone["retrieval"][1]["images"] == 7 and "reranked" in alone["retrieval"][0]
    assert alone["probes-sugarcrepe"][1] == {"samples": 8} and alone["probes-winoground"][1] == {"samples": 5}
    assert "outside.json row 4: the box (67, 0, 72, 5) lies outside" in alone["probes-outside"]
