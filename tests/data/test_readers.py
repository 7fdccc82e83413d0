"""Annotation files and folders: what each format gives, and how bad input is rejected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tercet.config import DataConfig
from tercet.data.readers import open_sources
from tercet.data.table import SampleTable
from tercet.errors import TercetError


def opened(path: Path | str, **data: object) -> SampleTable:
    return open_sources([str(path)], DataConfig.model_validate(data), "train")


def pairs(source: SampleTable) -> dict[str, list[str]]:
    return {source.key(index): source.captions(index) for index in range(source.image_count)}


ROWS = [
    {"image": "images/0.jpg", "caption": "A dog ."},
    {"image": "images/1.jpg", "caption": ["Two cats .", "Cats, two of them"]},
]
WANTED = {"images/0.jpg": ["A dog ."], "images/1.jpg": ["Two cats .", "Cats, two of them"]}


def test_json_list(photo_folder: Path) -> None:
    (photo_folder / "a.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8-sig")
    source = opened(photo_folder / "a.json")
    assert pairs(source) == WANTED
    assert source.image(1) == (photo_folder / "images/1.jpg").read_bytes()


def test_rows_of_one_image_are_one_image(photo_folder: Path) -> None:
    names = ["images/1.jpg", "images/0.jpg", "images/1.jpg", "images/2.jpg", "images/0.jpg"]
    rows = [{"image": name, "caption": f"c{n}"} for n, name in enumerate(names)]
    (photo_folder / "a.json").write_text(json.dumps(rows))
    source = opened(photo_folder / "a.json")
    assert pairs(source) == {"images/1.jpg": ["c0", "c2"], "images/0.jpg": ["c1", "c4"], "images/2.jpg": ["c3"]}
    assert source.caption_counts.tolist() == [2, 2, 1]
    assert source.image(2) == (photo_folder / "images/2.jpg").read_bytes()
    assert source.image_ids.tolist() == [0, 1, 2]


def test_image_ids_of_the_file_join_images(photo_folder: Path) -> None:
    rows = [{"image": f"images/{n}.jpg", "caption": "c", "image_id": identity} for n, identity in enumerate("aba")]
    (photo_folder / "a.json").write_text(json.dumps(rows))
    assert opened(photo_folder / "a.json").image_ids.tolist() == [0, 1, 0]


def test_jsonl(photo_folder: Path) -> None:
    text = (
        "\n".join(map(json.dumps, ROWS)) + '\n\n{"image": "images/2.jpg", "caption": "line\u2028break"}\n{"image": "im'
    )
    (photo_folder / "a.jsonl").write_text(text, encoding="utf-8")
    source = opened(photo_folder / "a.jsonl")
    assert pairs(source) == {**WANTED, "images/2.jpg": ["line\u2028break"]}
    assert list(source.rejected) == [
        f"{photo_folder}/a.jsonl line 5: not JSON: Unterminated string starting at (column 11)"
    ]


def test_json_lines_under_the_name_json(photo_folder: Path) -> None:
    (photo_folder / "a.json").write_text("\n".join(map(json.dumps, ROWS)))
    assert pairs(opened(photo_folder / "a.json")) == WANTED


def test_csv_with_named_columns(photo_folder: Path) -> None:
    lines = [["path", "n", "text"], ["images/0.jpg", "1", '"said ""hi"", twice"'], ["images/0.jpg", "2", "again"]]
    lines += [["images/1.jpg", "3"], ["", "4", "nothing"], ["images/2.jpg", "5", "..."]]
    file = photo_folder / "a.csv"
    file.write_text("\r\n".join(",".join(line) for line in lines), encoding="utf-8-sig")
    source = opened(file, image_column="path", caption_column="text")
    assert pairs(source) == {"images/0.jpg": ['said "hi", twice', "again"]}
    assert list(source.rejected) == [
        f"{file} line 4: 2 cells where the header names 3 columns",
        f"{file} line 5: 'path' is empty",
        f"{file} line 6: the caption '...' is empty after cleaning",
    ]
    with pytest.raises(TercetError, match=r"no column 'image'; set data.image_column .*: path, n, text"):
        opened(file)


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("a.tsv", 'image\tcaption\nimages/0.jpg\t"hello\nimages/1.jpg\t"Home" sign\n', ['"hello', '"Home" sign']),
        ("a.csv", "image\tcaption\nimages/0.jpg\ta, b\nimages/1.jpg\tc\n", ["a, b", "c"]),
        ("a.csv", "image;caption\nimages/0.jpg;a, b\nimages/1.jpg;c\n", ["a, b", "c"]),
        ("a.csv", 'image, caption\nimages/0.jpg, "a, b"\nimages/1.jpg, c\n', ["a, b", "c"]),
        ("a.csv", 'image| n| caption\nimages/0.jpg| 0| a "b" ,\nimages/1.jpg| 1| c\n', ['a "b" ,', "c"]),
        ("captions.txt", "image,caption\nimages/0.jpg,a b\nimages/1.jpg,c\n", ["a b", "c"]),
    ],
)
def test_separators_are_found_and_quotes_are_characters_in_tsv(
    photo_folder: Path, name: str, text: str, wanted: list[str]
) -> None:
    (photo_folder / name).write_text(text)
    source = opened(photo_folder / name)
    assert [source.captions(index) for index in range(source.image_count)] == [[caption] for caption in wanted]


def test_an_open_quote_is_rejected(photo_folder: Path) -> None:
    (photo_folder / "a.csv").write_text('image,caption\nimages/0.jpg,"open\nimages/1.jpg,x\n')
    with pytest.raises(TercetError, match=r"a\.csv line 3: .*a quote may be left open"):
        opened(photo_folder / "a.csv")
    (photo_folder / "b.csv").write_text("")
    with pytest.raises(TercetError, match="its first line must name the columns"):
        opened(photo_folder / "b.csv")


def test_folder_with_sidecars(photo_folder: Path) -> None:
    images = photo_folder / "images"
    (images / "sub").mkdir()
    (images / "sub" / "z.JPG").write_bytes((images / "5.jpg").read_bytes())
    for name, text in (("0", "first\n\n second \n"), ("1", "\n"), ("2", "..."), ("sub/z", "deep")):
        (images / f"{name}.txt").write_text(text)
    (images / "3.txt").write_bytes(b"caf\xe9")
    source = opened(images)
    assert pairs(source) == {"0.jpg": ["first", " second "], "sub/z.JPG": ["deep"]}
    assert source.image(1) == (images / "5.jpg").read_bytes()
    assert len(source.rejected) == 5
    text = "\n".join(source.rejected)
    assert "1.jpg: 1.txt holds no caption" in text
    assert "2.jpg: the caption '...' is empty" in text
    assert "3.txt: not UTF-8 at line 1, byte 3" in text
    assert "5.jpg: no caption; looked for 5.txt beside it" in text


def test_hidden_folders_are_skipped_and_unreadable_images_named(photo_folder: Path) -> None:
    images = photo_folder / "images"
    for name in ("0.jpg", "x.JFIF", ".hidden.jpg", ".ipynb_checkpoints/0.jpg", "@eaDir/0.jpg", "y.heic"):
        (images / name).parent.mkdir(exist_ok=True)
        (images / name).write_bytes((images / "5.jpg").read_bytes())
        (images / name).with_suffix(".txt").write_text("a caption")
    source = opened(images)
    assert list(pairs(source)) == ["0.jpg", "x.JFIF"]
    assert "y.heic: .heic images cannot be read; convert it" in "\n".join(source.rejected)


def test_names_that_cannot_exist_say_why(photo_folder: Path) -> None:
    for name, reason in (("images\\0.jpg", "backslashes"), ("/other/machine/0.jpg", "absolute paths")):
        (photo_folder / "a.json").write_text(json.dumps([{"image": name, "caption": "c"}]))
        with pytest.raises(TercetError, match=reason):
            opened(photo_folder / "a.json")


def test_image_root(photo_folder: Path) -> None:
    (photo_folder / "lists").mkdir()
    file = photo_folder / "lists" / "a.json"
    file.write_text(json.dumps([{"image": "0.jpg", "caption": "c"}]))
    assert opened(file, image_root=str(photo_folder / "images")).image(0).startswith(b"\xff\xd8")
    with pytest.raises(TercetError, match=r"none of its images exists, such as .*lists/0\.jpg; set data\.image_root"):
        opened(file)


def test_absolute_and_url_names(photo_folder: Path) -> None:
    file = photo_folder / "a.json"
    photo = photo_folder / "images" / "0.jpg"
    names = [str(photo), f"file://{photo}", "images/0.jpg"]
    file.write_text(json.dumps([{"image": name, "caption": "c"} for name in names]))
    source = opened(file)
    assert {source.image(index) for index in range(3)} == {photo.read_bytes()}
    file.write_text(json.dumps([{"image": name, "caption": "c"} for name in names[1:]]))
    source = opened(f"file://{file}")
    assert {source.image(index) for index in range(2)} == {photo.read_bytes()}
    with pytest.raises(TercetError, match="cannot read"):
        opened("file:///nowhere/at/all.json")


def test_bad_rows_are_rejected_one_by_one(photo_folder: Path) -> None:
    rows = [
        {"image": "images/0.jpg", "caption": "good"},
        {"caption": "no image"},
        {"image": None, "caption": "null"},
        {"image": 7, "caption": "number"},
        {"image": "", "caption": "nameless"},
        {"image": "images/1.jpg"},
        {"image": "images/1.jpg", "caption": None},
        {"image": "images/1.jpg", "caption": {"a": 1}},
        {"image": "images/1.jpg", "caption": []},
        {"image": "images/1.jpg", "caption": ["", " . ! ", 5, "one good"]},
        "text",
        {"image": "images/2.jpg", "caption": "lone \ud83d surrogate"},
    ]
    file = photo_folder / "a.json"
    file.write_text(json.dumps(rows))
    source = opened(file)
    assert pairs(source) == {
        "images/0.jpg": ["good"],
        "images/1.jpg": ["one good"],
        "images/2.jpg": ["lone ? surrogate"],
    }
    assert [message.removeprefix(f"{file} ") for message in source.rejected] == [
        "row 2: no 'image'; the keys there are caption",
        "row 3: 'image' is NoneType None, not a file name",
        "row 4: 'image' is int 7, not a file name",
        "row 5: 'image' is str '', not a file name",
        "row 6: no 'caption'; the keys there are image",
        "row 7: no caption",
        "row 8: the caption is dict {'a': 1}, not text",
        "row 9: the list of captions is empty",
        "row 10: the caption '' is empty after cleaning",
        "row 10: the caption ' . ! ' is empty after cleaning",
        "row 10: the caption is int 5, not text",
        "row 11: str 'text' is not an object with an image and a caption",
    ]


def test_nothing_usable_says_what_was_looked_for(photo_folder: Path) -> None:
    file = photo_folder / "a.json"
    file.write_text(json.dumps([{"img": "images/0.jpg", "caption": "c"}]))
    with pytest.raises(TercetError) as caught:
        opened(file)
    assert str(caught.value) == (
        f"{file}: no image with a caption found; looked for rows with 'image' and 'caption'; "
        f"1 rejected, the first: {file} row 1: no 'image'; the keys there are img, caption"
    )
    file.write_text("[]")
    with pytest.raises(TercetError, match="no image with a caption found"):
        opened(file)
    (photo_folder / "empty").mkdir()
    with pytest.raises(TercetError, match=r"looked for images with a \.txt file"):
        opened(photo_folder / "empty")


def test_truncated_json_is_rejected_with_its_place(photo_folder: Path) -> None:
    whole = json.dumps(ROWS * 20, indent=1)
    file = photo_folder / "a.json"
    for end in range(1, len(whole), 37):
        file.write_text(whole[:end])
        with pytest.raises(TercetError, match=r"a\.json: the JSON ends too early.*line \d+, column \d+, character \d+"):
            opened(file)
    for text, reason in [("[{]", "not JSON"), ("", "ends too early"), ("[1}", "not JSON"), ("3", "neither a list")]:
        file.write_text(text)
        with pytest.raises(TercetError, match=reason):
            opened(file)
    file.write_text("[" * 100_000)
    with pytest.raises(TercetError, match=r"a\.json: nested too deep"):
        opened(file)
    file.write_bytes(json.dumps(ROWS).encode("utf-16"))
    with pytest.raises(TercetError, match="not UTF-8 at line 1"):
        opened(file)


def test_coco_captions(photo_folder: Path) -> None:
    value = {
        "images": [{"id": 8, "file_name": "0.jpg"}, {"id": 9, "file_name": "1.jpg"}, {"id": 10}],
        "annotations": [{"image_id": 8, "caption": "a"}, {"image_id": 8, "caption": "b"}, {"image_id": 8}],
    }
    (photo_folder / "a.json").write_text(json.dumps(value))
    source = opened(photo_folder / "a.json", image_root=str(photo_folder / "images"))
    assert pairs(source) == {"0.jpg": ["a", "b"]}
    assert len(source.rejected) == 3


def test_karpathy_sample(data_dir: Path, tmp_path: Path) -> None:
    sample = data_dir / "format_samples" / "karpathy" / "dataset_flickr8k.sample.json"
    names = [image["filename"] for image in json.loads(sample.read_text())["images"]]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    source = opened(f"{sample}#train", image_root=str(tmp_path))
    assert list(pairs(source)) == names
    assert source.captions(0)[0] == "A black dog is running after a white dog in the snow ."
    assert source.caption_counts.tolist() == [5, 5]

    coco = data_dir / "format_samples" / "karpathy" / "dataset_coco.sample.json"
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / "COCO_val2014_000000391895.jpg").write_bytes(b"x")
    source = opened(coco, image_root=str(tmp_path))
    assert list(pairs(source)) == ["val2014/COCO_val2014_000000391895.jpg"]


def test_flickr8k_token_file(data_dir: Path, tmp_path: Path) -> None:
    folder = data_dir / "format_samples" / "flickr8k_text"
    tokens = folder / "Flickr8k.token.sample.txt"
    names = list(dict.fromkeys(line.split("#")[0] for line in tokens.read_text().splitlines() if line.strip()))
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    source = opened(tokens, image_root=str(tmp_path))
    assert list(pairs(source)) == names
    assert source.captions(0)[1] == "A girl going into a wooden building ."
    (tmp_path / "part.txt").write_text(names[0] + "\n")
    (tmp_path / "tokens.txt").write_text(tokens.read_text() + "no tab here\n")
    chosen = opened(f"{tmp_path}/tokens.txt#part.txt")
    assert list(pairs(chosen)) == names[:1]
    assert list(chosen.rejected) == [
        f"{tmp_path}/tokens.txt line {len(tokens.read_text().splitlines()) + 1}: not an image name, a tab and a caption"
    ]


def test_flickr8k_json_needs_its_images(data_dir: Path) -> None:
    with pytest.raises(TercetError, match=r"flickr8k\.json: none of its images exists"):
        opened(f"{data_dir}/flickr8k/flickr8k.json#test")
