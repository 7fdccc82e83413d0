"""Scenes as files: the ordinary readers find every image and annotation, and what exists is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from scene_files import COUNT, scene_file, scene_folder
from tercet.config import DataConfig
from tercet.data import scene_files as writing
from tercet.data.class_readers import open_entailments, open_statements
from tercet.data.grounding_readers import open_expressions
from tercet.data.images import decode
from tercet.data.readers import open_sources
from tercet.data.scene_files import write_pairs, write_task
from tercet.data.scenes import split_scenes
from tercet.data.task_readers import open_questions
from tercet.errors import TercetError


def test_pairs_are_those_of_the_scenes() -> None:
    for split, captions in (("shapes", 3), ("train", 3), ("validation", 1), ("test", 1)):
        table = open_sources([scene_file(split)], DataConfig())
        scenes = list(split_scenes(split, COUNT))
        assert [table.captions(index) for index in range(COUNT)] == [scene.captions[:captions] for scene in scenes]
        pixels = decode(table.image(7), "scene").astype(int)
        assert abs(pixels - scenes[7].image).mean() < 3


@pytest.mark.parametrize(
    ("task", "opener"),
    [
        ("vqa", open_questions),
        ("entailment", open_entailments),
        ("nlvr", open_statements),
        ("grounding", open_expressions),
    ],
)
def test_annotations_find_their_images_in_the_shards_beside_them(task: str, opener: object) -> None:
    assert callable(opener)
    for name, split in ((task, "train"), (f"{task}-validation", "validation"), (f"{task}-test", "test")):
        table = opener([scene_file(name)], DataConfig(), split)
        assert table.sample_count > COUNT // 2 and not len(table.rejected)
        sample = table.sample(table.sample_count - 1)
        assert len(sample.images) == (2 if task == "nlvr" else 1)
        assert all(decode(table.image(image), "scene").shape == (64, 64, 3) for image in sample.images)


def test_pairs_of_one_sentence_share_their_group_and_differ_in_truth() -> None:
    table = open_statements([scene_file("nlvr-test")], DataConfig(), "test")
    first, second = table.sample(6), table.sample(7)
    assert first.text == second.text and first.target["group"] == second.target["group"]
    assert first.target["label"] != second.target["label"]
    assert len({table.sample(index).target["group"] for index in range(COUNT)}) == COUNT // 2


def test_candidates_are_the_boxes_of_all_objects() -> None:
    data = DataConfig(detections=str(scene_folder() / "detections.json"))
    table = open_expressions([scene_file("grounding-test")], data, "test")
    for index in range(table.sample_count):
        target = table.sample(index).target
        assert any(target["boxes"][0] == pytest.approx(box) for box in target["candidates"])


def test_what_exists_is_kept_and_what_is_short_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "SHARD_SIZE", 4)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    write_pairs(tmp_path, "train", 6)
    whole, short = sorted(tmp_path.iterdir())
    before = whole.stat().st_mtime_ns
    assert whole.name == "train-000000.tar" and open_sources([str(short)], DataConfig()).image_count == 2
    write_pairs(tmp_path, "train", 8)
    assert whole.stat().st_mtime_ns == before and open_sources([str(short)], DataConfig()).image_count == 4


def test_shards_are_the_same_from_one_process_and_from_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files: list[bytes] = []
    for cores in (1, 2):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        monkeypatch.setattr(writing, "SHARD_SIZE", 3)
        write_pairs(tmp_path / str(cores), "test", 6)
        files.append(b"".join(path.read_bytes() for path in sorted((tmp_path / str(cores)).iterdir())))
    assert files[0] == files[1]


def test_an_unknown_task_is_named(tmp_path: Path) -> None:
    with pytest.raises(TercetError, match="captioning"):
        write_task(tmp_path, "captioning")
