"""Files of the classification tasks and of probes: the published rows, and mistakes that are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scene_files import write_image, write_rows
from tercet.config import DataConfig
from tercet.data.class_readers import LABELS, open_entailments, read_entailments, read_probes, read_statements
from tercet.errors import TercetError


class TestEntailmentFiles:
    def test_official_rows(self, data_dir: Path, tmp_path: Path) -> None:
        sample = data_dir / "format_samples" / "snli_ve" / "snli_ve_dev.sample.jsonl"
        rows = [json.loads(line) for line in sample.read_text().splitlines()]
        for name in {row["Flickr30K_ID"] for row in rows}:
            write_image(tmp_path / "flickr30k-images" / f"{name}.jpg")
        source = read_entailments(str(sample), None, DataConfig(image_root=str(tmp_path)))
        assert source.sample_count == len(rows)
        assert source.image_count == len({row["Flickr30K_ID"] for row in rows})
        for index, row in enumerate(rows):
            found = source.sample(index)
            assert LABELS[found.target["label"]] == row["gold_label"]
            assert found.target["id"] == row["pairID"]
            assert found.text == row["sentence2"]
            assert found.key == f"{sample} line {index + 1}"
            assert source.key(found.images[0]) == f"flickr30k-images/{row['Flickr30K_ID']}.jpg"
            assert source.pixels(found.images[0], 10**6).shape == (20, 30, 3)

    def test_albef_rows(self, tmp_path: Path) -> None:
        write_image(tmp_path / "a.png")
        rows = [{"image": "a.png", "sentence": f"a {label}", "label": label} for label in LABELS]
        source = read_entailments(write_rows(tmp_path / "ve.json", rows), None, DataConfig())
        assert [source.sample(index).target["label"] for index in range(3)] == [0, 1, 2]
        assert source.image_count == 1

    def test_rows_without_agreement_are_rejected(self, tmp_path: Path) -> None:
        write_image(tmp_path / "7.jpg")
        rows = [{"Flickr30K_ID": 7, "gold_label": label, "sentence2": "a dog"} for label in ("-", "neutral")]
        file = write_rows(tmp_path / "ve.jsonl", rows, lines=True)
        source = read_entailments(file, None, DataConfig())
        assert source.sample_count == 1
        assert list(source.rejected) == [f"{file} line 1: its annotators did not agree on a label"]

    @pytest.mark.parametrize(
        ("row", "wanted"),
        [
            ({"label": "maybe"}, "row 2: the label 'maybe' is none of contradiction, neutral, entailment"),
            ({"label": 1}, "row 2: 'label' is '1', not a text"),
            ({"sentence": ""}, "row 2: 'sentence' is '', not a text"),
            ({"image": None}, "row 2: 'image' is 'None', not a text"),
        ],
    )
    def test_mistakes_name_file_and_row(self, tmp_path: Path, row: dict, wanted: str) -> None:
        write_image(tmp_path / "a.png")
        good = {"image": "a.png", "sentence": "a dog", "label": "neutral"}
        file = write_rows(tmp_path / "ve.json", [good, good | row])
        with pytest.raises(TercetError) as error:
            read_entailments(file, None, DataConfig())
        assert str(error.value) == f"{file} {wanted}"

    def test_missing_keys_and_broken_files(self, tmp_path: Path) -> None:
        write_image(tmp_path / "a.png")
        for content, wanted in (
            ('[{"image": "a.png", "sentence": "x"}]', "row 1: no 'gold_label' or 'label'"),
            ('[{"sentence": "x"}]', "row 1: no 'Flickr30K_ID'"),
            ("[3]", "row 1: int '3' is no object"),
            ('[{"image": "a.png"', "cut short"),
            ('{"image": \n', "line 1: not JSON"),
            ("[]", "no samples in it"),
            ('[{"image": "b.png", "sentence": "x", "label": "neutral"}]', "none of its images exists"),
        ):
            (tmp_path / "ve.json").write_text(content)
            with pytest.raises(TercetError, match=r"ve\.json") as error:
                read_entailments(str(tmp_path / "ve.json"), None, DataConfig())
            assert wanted in str(error.value), content

    def test_splits_of_a_file(self, tmp_path: Path) -> None:
        write_image(tmp_path / "a.png")
        splits = ("train", "test")
        rows = [{"image": "a.png", "sentence": split, "label": "neutral", "split": split} for split in splits]
        file = write_rows(tmp_path / "ve.json", rows)
        source = open_entailments([f"{file}#test"], DataConfig(), "train")
        assert [source.sample(index).text for index in range(source.sample_count)] == ["test"]
        for specs, message in (
            ([file], "holds several splits"),
            ([], "no data given"),
            (["none.json"], "no file .*none"),
        ):
            with pytest.raises(TercetError, match=message):
                open_entailments(specs, DataConfig(), "train")


class TestStatementFiles:
    @pytest.mark.parametrize("layout", ["{name}", "dev/{name}", "images/dev/{name}"])
    def test_official_rows(self, data_dir: Path, tmp_path: Path, layout: str) -> None:
        sample = data_dir / "format_samples" / "nlvr2" / "dev.sample.json"
        rows = [json.loads(line) for line in sample.read_text().splitlines()]
        for row in rows:
            stem = row["identifier"].rpartition("-")[0]
            for side in (0, 1):
                write_image(tmp_path / layout.format(name=f"{stem}-img{side}.png"), shade=100 * side)
        source = read_statements(str(sample), None, DataConfig(image_root=str(tmp_path)))
        assert (source.sample_count, source.images_per_sample) == (len(rows), 2)
        for index, row in enumerate(rows):
            found = source.sample(index)
            assert found.target["label"] == (row["label"] == "True")
            assert found.target["id"] == row["identifier"]
            assert [int(source.pixels(image, 10**6)[0, 0, 0]) for image in found.images] == [0, 100]
        groups = {row["sentence"]: set() for row in rows}
        for index, row in enumerate(rows):
            groups[row["sentence"]].add(source.sample(index).target["group"])
        assert all(len(group) == 1 for group in groups.values())
        assert len(set.union(*groups.values())) == len(groups)

    def test_training_images_lie_in_numbered_folders(self, tmp_path: Path) -> None:
        row = {"identifier": "train-10-3-1", "directory": 41, "sentence": "two dogs", "label": "True"}
        for side in (0, 1):
            write_image(tmp_path / "images" / "train" / "41" / f"train-10-3-img{side}.png")
        source = read_statements(write_rows(tmp_path / "train.json", [row], lines=True), None, DataConfig())
        assert source.key(source.sample(0).images[1]) == "images/train/41/train-10-3-img1.png"

    def test_albef_rows(self, tmp_path: Path) -> None:
        for name in ("a.png", "b.png"):
            write_image(tmp_path / name)
        rows = [{"images": ["a.png", "b.png"], "sentence": "two dogs", "label": label} for label in ("True", "False")]
        source = read_statements(write_rows(tmp_path / "nlvr.json", rows), None, DataConfig())
        assert [source.sample(index).target["label"] for index in (0, 1)] == [1, 0]
        assert source.sample(0).images == source.sample(1).images == (0, 1)
        assert source.sample(0).target["group"] == source.sample(1).target["group"]

    @pytest.mark.parametrize(
        ("row", "wanted"),
        [
            ({"label": "yes"}, "'label' is 'yes', not True or False"),
            ({"images": ["a.png"]}, "'images' is \"['a.png']\", not a list of two file names"),
            ({"images": ["a.png", None]}, "not a list of two file names"),
            ({"images": ["a.png", "b.png", "c.png"]}, "not a list of two file names"),
            ({"sentence": 4}, "'sentence' is '4', not a text"),
        ],
    )
    def test_mistakes_name_file_and_row(self, tmp_path: Path, row: dict, wanted: str) -> None:
        write_image(tmp_path / "a.png")
        good = {"images": ["a.png", "a.png"], "sentence": "two dogs", "label": "True"}
        file = write_rows(tmp_path / "nlvr.json", [good, good | row])
        with pytest.raises(TercetError) as error:
            read_statements(file, None, DataConfig())
        assert str(error.value).startswith(f"{file} row 2: ")
        assert wanted.replace('"', "") in str(error.value).replace('"', "")

    def test_an_identifier_that_names_no_pair(self, tmp_path: Path) -> None:
        file = write_rows(tmp_path / "dev.json", [{"identifier": "dev-1", "sentence": "x", "label": "True"}])
        with pytest.raises(TercetError, match="row 1: the identifier 'dev-1' is not SPLIT-SET-PAIR-SENTENCE"):
            read_statements(file, None, DataConfig())


SUGARCREPE = {
    "0": {"filename": "000000085329.jpg", "caption": "A dog on a mat.", "negative_caption": "A cat on a mat."},
    "2": {"filename": "000000085330.jpg", "caption": "A red cup.", "negative_caption": "A blue cup."},
}
RELATION = {
    "image_id": "2354786",
    "image_path": "2354786.jpg",
    "bbox_x": 10,
    "bbox_y": 20,
    "bbox_w": 100,
    "bbox_h": 50,
    "relation_name": "on",
    "true_caption": "the cat is on the mat",
    "false_caption": "the mat is on the cat",
}
ATTRIBUTION = {
    "image_path": "1.jpg",
    "bbox_x": 0,
    "bbox_y": 0,
    "bbox_w": 8,
    "bbox_h": 8,
    "attributes": ["red", "wet"],
    "true_caption": "the red cup and the wet dog",
    "false_caption": "the wet cup and the red dog",
}
WINOGROUND = {
    "id": 0,
    "image_0": "ex_0_img_0",
    "image_1": "ex_0_img_1",
    "caption_0": "an old person kisses a young person",
    "caption_1": "a young person kisses an old person",
    "tag": "Adjective-Age",
    "collapsed_tag": "Object",
}


@pytest.mark.parametrize(
    ("name", "rows", "benchmark", "probe"),
    [
        ("swap_att.json", SUGARCREPE, "sugarcrepe",
         ("row '2'", ("000000085330.jpg",), ("A red cup.", "A blue cup."), "swap_att", None)),
        ("visual_genome_relation.json", [ATTRIBUTION, RELATION], "aro",
         ("row 2", ("2354786.jpg",), ("the cat is on the mat", "the mat is on the cat"), "on", (10, 20, 110, 70))),
        ("visual_genome_attribution.json", [RELATION, ATTRIBUTION], "aro",
         ("row 2", ("1.jpg",), ("the red cup and the wet dog", "the wet cup and the red dog"), "red_wet",
          (0, 0, 8, 8))),
        ("examples.jsonl", [WINOGROUND, WINOGROUND | {"id": 1}], "winoground",
         ("line 2", ("ex_0_img_0", "ex_0_img_1"), (WINOGROUND["caption_0"], WINOGROUND["caption_1"]), "Object", None)),
    ],
)  # fmt: skip
def test_probes_of_every_benchmark(tmp_path: Path, name: str, rows: Any, benchmark: str, probe: tuple) -> None:
    path = write_rows(tmp_path / name, rows, lines=name.endswith("jsonl"))
    found, (_, second) = read_probes(path)
    assert found == benchmark
    where, *wanted = probe
    assert second.where == f"{path} {where}"
    assert [second.images, second.texts, second.kind, second.crop] == wanted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([RELATION, RELATION | {"true_caption": ""}], "row 2: 'true_caption' is '', not a text"),
        ([RELATION | {"bbox_w": 0}], r"row 1: the box \[10.0, 20.0, 0.0, 50.0\]"),
        ([RELATION | {"bbox_x": "ten"}], "row 1: 'bbox_x' is 'ten', not a number"),
        ([{key: value for key, value in RELATION.items() if key != "relation_name"}], "row 1: no 'attributes'"),
        ([{"image": "a.jpg", "caption": "a"}], "row 1: has none of the forms"),
        ([], "no rows"),
        ("text", "not a list or object of rows"),
    ],
)
def test_a_wrong_row_of_a_probe_is_named(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(TercetError, match=message):
        read_probes(write_rows(tmp_path / "rows.json", content))
    (tmp_path / "cut.json").write_text('[{"caption": "a"', "utf-8")
    with pytest.raises(TercetError, match=r"cut\.json: the JSON ends too early; .*line 1"):
        read_probes(str(tmp_path / "cut.json"))
