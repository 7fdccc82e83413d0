"""SugarCrepe, ARO and Winoground in their published forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tercet.data.probe_files import read_probes
from tercet.errors import TercetError

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


def write(folder: Path, content: Any, name: str) -> str:
    lines = "\n".join(map(json.dumps, content)) if name.endswith("l") else json.dumps(content)
    (folder / name).write_text(lines, "utf-8")
    return str(folder / name)


def test_sugarcrepe(tmp_path: Path) -> None:
    benchmark, probes = read_probes(write(tmp_path, SUGARCREPE, "swap_att.json"))
    assert benchmark == "sugarcrepe"
    assert probes[1].images == ("000000085330.jpg",)
    assert probes[1].texts == ("A red cup.", "A blue cup.")
    assert probes[1].kind == "swap_att"
    assert probes[1].where.endswith("swap_att.json row '2'")


def test_aro(tmp_path: Path) -> None:
    benchmark, probes = read_probes(write(tmp_path, [RELATION], "visual_genome_relation.json"))
    assert benchmark == "aro"
    assert probes[0].texts == ("the cat is on the mat", "the mat is on the cat")
    assert (probes[0].kind, probes[0].crop) == ("on", (10, 20, 110, 70))
    _, probes = read_probes(write(tmp_path, [ATTRIBUTION], "visual_genome_attribution.json"))
    assert probes[0].kind == "red_wet"


def test_winoground(tmp_path: Path) -> None:
    benchmark, probes = read_probes(write(tmp_path, [WINOGROUND, WINOGROUND | {"id": 1}], "examples.jsonl"))
    assert benchmark == "winoground"
    assert len(probes) == 2
    assert probes[0].images == ("ex_0_img_0", "ex_0_img_1")
    assert (probes[0].kind, probes[0].where) == ("Object", f"{tmp_path}/examples.jsonl line 1")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([RELATION, RELATION | {"true_caption": ""}], "row 2: 'true_caption' is no text"),
        ([RELATION | {"bbox_w": 0}], r"row 1: the box \[10.0, 20.0, 0.0, 50.0\]"),
        ([RELATION | {"bbox_x": "ten"}], "row 1: 'bbox_x' is 'ten', not a number"),
        ([{key: value for key, value in RELATION.items() if key != "relation_name"}], "neither 'relation_name' nor"),
        ([{"image": "a.jpg", "caption": "a"}], "row 1: has none of the forms"),
        ([], "no rows"),
        ("text", "not a list or object of rows"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(TercetError, match=message):
        read_probes(write(tmp_path, content, "rows.json"))


def test_a_file_cut_short(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text('[{"caption": "a"', "utf-8")
    with pytest.raises(TercetError, match=r"cut\.json: the JSON ends too early; .*line 1"):
        read_probes(str(tmp_path / "cut.json"))
