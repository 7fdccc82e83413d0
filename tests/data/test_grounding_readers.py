"""Referring expressions in every published form, and what is refused with file and row."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from scene_files import write_rows
from tercet.config import DataConfig
from tercet.data.grounding_readers import open_expressions, unpickle_plain
from tercet.errors import TercetError

ROW = {"image": "images/1.jpg", "text": "the left dog", "boxes": [[4, 5, 20, 30]], "size": [48, 40]}


def official(data_dir: Path, folder: Path) -> tuple[list[dict[str, Any]], str, str]:
    """The real reference, with instances made for it, and the folder laid out as COCO is."""
    rows = json.loads((data_dir / "format_samples/refcoco/refs_unc.one_row.json").read_text("utf-8"))
    (folder / "train2014").mkdir()
    (folder / "images/0.jpg").rename(folder / "train2014/COCO_train2014_000000581857.jpg")
    instances = {
        "images": [{"id": 581857, "width": 48, "height": 40, "file_name": "COCO_train2014_000000581857.jpg"}],
        "annotations": [{"id": 1719310, "image_id": 581857, "bbox": [10.5, 4.0, 20.0, 30.0]}],
    }
    return rows, write_rows(folder / "refs.json", rows), write_rows(folder / "instances.json", instances)


def test_rows_with_boxes(photo_folder: Path) -> None:
    source = open_expressions(
        [write_rows(photo_folder / "rows.json", [ROW, ROW | {"text": "a cat"}])], DataConfig(), "test"
    )
    assert (source.image_count, source.sample_count) == (1, 2)
    sample = source.sample(1)
    assert sample.text == "a cat"
    assert sample.key.endswith("rows.json row 2")
    assert sample.target["boxes"] == [[4, 5, 20, 30]] and sample.target["size"] == [48, 40]
    assert source.pixels(0, 10**6).shape == (40, 48, 3)


def test_official_references_with_coco_instances(photo_folder: Path, data_dir: Path) -> None:
    _, refs, instances = official(data_dir, photo_folder)
    source = open_expressions([f"{refs}#train"], DataConfig(instances=instances), "test")
    assert [source.sample(index).text for index in range(3)] == [
        "the lady with the blue shirt",
        "lady with back to us",
        "blue shirt",
    ]
    target = source.sample(0).target
    assert target["boxes"] == [[10.5, 4.0, 30.5, 34.0]]
    assert (target["size"], target["split"], target["ref_id"]) == ([48, 40], "train", 0)
    assert source.key(0) == "train2014/COCO_train2014_000000581857.jpg"
    with pytest.raises(TercetError, match=r"refs\.json: no row of split 'testA'"):
        open_expressions([f"{refs}#testA"], DataConfig(instances=instances), "test")
    with pytest.raises(TercetError, match=r"refs\.json: the boxes .* set data\.instances"):
        open_expressions([refs], DataConfig(), "test")


def test_the_official_pickle_gives_what_its_json_gives(photo_folder: Path, data_dir: Path) -> None:
    rows, refs, instances = official(data_dir, photo_folder)
    for protocol in (0, 2):  # what Python 2 wrote
        (photo_folder / "refs(unc).p").write_bytes(pickle.dumps(rows, protocol))
        pickled = open_expressions([str(photo_folder / "refs(unc).p")], DataConfig(instances=instances), "test")
        plain = open_expressions([refs], DataConfig(instances=instances), "test")
        assert [pickled.sample(i).target for i in range(3)] == [plain.sample(i).target for i in range(3)]


class Harmful:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_that_runs_programs_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "bad.p").write_bytes(pickle.dumps([Harmful(tmp_path / "done")]))
    with pytest.raises(TercetError, match=r"bad\.p: a pickle that asks for posix\.mkdir|nt\.mkdir"):
        unpickle_plain(str(tmp_path / "bad.p"))
    assert not (tmp_path / "done").exists()
    (tmp_path / "cut.p").write_bytes(pickle.dumps([{"a": 1}])[:-3])
    with pytest.raises(TercetError, match=r"cut\.p: not a pickle that can be read"):
        unpickle_plain(str(tmp_path / "cut.p"))


def test_albef_rows_find_boxes_and_candidates_by_ref_id(photo_folder: Path, data_dir: Path) -> None:
    _, refs, instances = official(data_dir, photo_folder)
    image = "train2014/COCO_train2014_000000581857.jpg"
    rows = write_rows(photo_folder / "refcoco+_test.json", [{"image": image, "text": "blue shirt", "ref_id": 0}])
    detections = write_rows(photo_folder / "dets.json", {"581857": [[1, 2, 10, 10, 0.9], [10, 4, 20, 30, 0.8]]})
    data = DataConfig(references=refs, instances=instances, detections=detections)
    target = open_expressions([rows], data, "test").sample(0).target
    assert target["boxes"] == [[10.5, 4.0, 30.5, 34.0]]
    assert target["candidates"] == [[1, 2, 11, 12], [10, 4, 30, 34]]
    with pytest.raises(TercetError, match=r"row 1: no boxes; .* --data\.references"):
        open_expressions([rows], DataConfig(), "test")
    unknown = write_rows(photo_folder / "other.json", [{"image": image, "text": "blue shirt", "ref_id": 7}])
    with pytest.raises(TercetError, match=r"other\.json row 1: ref_id 7 has no box in .*refs\.json"):
        open_expressions([unknown], data, "test")
    nothing = write_rows(photo_folder / "nothing.json", {"1": [[1, 2, 3, 4]]})
    with pytest.raises(TercetError, match=r"row 1: no boxes of image 581857 in .*nothing\.json"):
        open_expressions([rows], data.model_copy(update={"detections": nothing}), "test")


def test_training_reads_expressions_as_captions_and_needs_no_box(photo_folder: Path) -> None:
    rows = [{"image": f"images/{number}.jpg", "text": text} for number, text in ((1, "b"), (0, "a"), (1, "c"))]
    pairs = open_expressions([write_rows(photo_folder / "rows.json", rows)], DataConfig(), "train")
    found = {pairs.key(index): pairs.captions(index) for index in range(pairs.image_count)}
    assert found == {"images/1.jpg": ["b", "c"], "images/0.jpg": ["a"]}
    assert pairs.caption_counts.tolist() == [len(captions) for captions in found.values()]
    assert pairs.image(0) == (photo_folder / pairs.key(0)).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": [[4, 5, 60, 30]]}, r"row 1: the box \(4, 5, 60, 30\) reaches outside its image of 48x40 pixels"),
        ({"boxes": [[20, 5, 4, 30]]}, r"row 1: the box \(20, 5, 4, 30\) holds no pixel"),
        ({"boxes": [[4, 5, 20]]}, r"row 1: 'boxes' is '\[\[4, 5, 20\]\]', not a list of \[left"),
        ({"boxes": [[True, 5, 20, 30]]}, r"row 1: 'boxes' is"),
        ({"size": [48]}, r"row 1: 'size' is '\[48\]', not \[width, height\]"),
        ({"text": ""}, r"row 1: 'text' is '', not a text"),
        ({"text": "?!"}, r"row 1: the expression '\?!' is empty after cleaning"),
        ({"kinds": "people"}, r"row 1: 'kinds' is 'people', not a list of texts"),
        ({"image": None}, r"row 1: 'image' is"),
    ],
)
def test_a_wrong_row_is_named(photo_folder: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(TercetError, match=rf"rows\.json {message}"):
        open_expressions([write_rows(photo_folder / "rows.json", [ROW | change])], DataConfig(), "test")


def test_real_phrases(data_dir: Path) -> None:
    file = data_dir / "flickr8k/grounding/phrases_val.json"
    shards = str(data_dir / "flickr8k/shards/flickr8k-val-*.tar")
    source = open_expressions([str(file)], DataConfig(image_root=shards), "test")
    assert (source.sample_count, source.image_count, len(source.rejected)) == (13123, 1000, 0)
    sample = source.sample(0)
    assert sample.text == "the boy"
    assert sample.target["kinds"] == ["people"]
    height, width, _ = source.pixels(sample.images[0], 10**7).shape
    assert width / height == pytest.approx(sample.target["size"][0] / sample.target["size"][1], rel=0.02)
