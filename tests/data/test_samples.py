"""Samples: readers of each task's files, their mistakes by file and row, and the loader's batches."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from tercet.config import DataConfig
from tercet.data.batch import Batch
from tercet.data.drawn import open_samples
from tercet.data.entailment_files import LABELS, draw_entailments, read_entailments
from tercet.data.images import resize
from tercet.data.loader import TrainLoader, sample_batches
from tercet.data.nlvr_files import PairDrawings, draw_statements, read_statements
from tercet.data.scene_tasks import entailments
from tercet.data.scenes import SceneSource
from tercet.data.table import SampleTable
from tercet.data.tokenizer import Tokenizer, clean_caption
from tercet.errors import TercetError

PLAIN = DataConfig(workers=0, augment="none")


def write_image(path: Path, shade: int = 90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((20, 30, 3), shade, np.uint8))


def write_rows(path: Path, rows: list[Any], lines: bool = False) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows)
    path.write_text(text)
    return str(path)


@pytest.fixture(scope="module")
def scenes() -> SampleTable:
    return draw_entailments(12, "train")


@pytest.fixture(scope="module")
def tokenizer(scenes: SampleTable) -> Tokenizer:
    texts = (clean_caption(scenes.sample(index).text, 30) for index in range(scenes.sample_count))
    return Tokenizer.train(texts, 200)


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

    def test_rows_without_agreement_are_left_out_and_counted(self, tmp_path: Path) -> None:
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
            ('[{"sentence": "x"}]', "row 1: no 'image' or 'Flickr30K_ID'"),
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

    def test_scenes(self, scenes: SampleTable) -> None:
        drawn = SceneSource(12, "train")
        expected = [(text, label, index) for index in range(12) for text, label in entailments(drawn.scene(index))]
        found = [scenes.sample(index) for index in range(scenes.sample_count)]
        assert [(one.text, LABELS[one.target["label"]], one.images[0]) for one in found] == expected
        assert np.array_equal(scenes.pixels(3, 10**6), drawn.scene(3).image)


class TestPairFiles:
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
            ({"label": "yes"}, "the label 'yes' is neither True nor False"),
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

    def test_drawn_pairs(self) -> None:
        source = draw_statements(20, "test")
        drawings = PairDrawings(20, "test")
        assert (source.sample_count, source.image_count) == (20, 40)
        for number in range(0, 20, 2):
            pair = [source.sample(number), source.sample(number + 1)]
            assert pair[0].text == pair[1].text
            assert {one.target["label"] for one in pair} == {0, 1}
            assert pair[0].target["group"] == pair[1].target["group"]
        statement = drawings.statement(7)
        assert np.array_equal(source.pixels(14, 10**6), statement.scene_a.image)
        assert np.array_equal(source.pixels(15, 10**6), statement.scene_b.image)
        others = draw_statements(20, "train")
        assert not np.array_equal(source.pixels(0, 10**6), others.pixels(0, 10**6))

    def test_pairs_to_train_on_have_several_statements(self) -> None:
        source, drawings = draw_statements(10, "train"), PairDrawings(10, "train")
        samples = [source.sample(index) for index in range(source.sample_count)]
        further = drawings.more_statements([drawings.statement(number) for number in range(10)], 8)
        assert source.image_count == 20
        for number in range(10):
            own = [sample for sample in samples if sample.images == (2 * number, 2 * number + 1)]
            assert own[0].text == drawings.statement(number).sentence
            told = [(sample.text, bool(sample.target["label"])) for sample in own[1:]]
            assert told == further[number]
        assert len(samples) > 10 + 8 * 4
        assert len({sample.key for sample in samples}) == len(samples)
        assert len({sample.target["group"] for sample in samples}) == len(samples) - 5


class TestOpening:
    def test_files_and_scenes_joined(self, tmp_path: Path) -> None:
        write_image(tmp_path / "a.png", shade=33)
        rows = [{"image": "a.png", "sentence": "one", "label": "neutral"}]
        file = write_rows(tmp_path / "ve.json", rows)
        data = DataConfig(scenes=8)
        source = open_samples(["scenes", file], data, "train", read_entailments, draw_entailments)
        last = source.sample(source.sample_count - 1)
        assert last.text == "one"
        assert source.key(last.images[0]) == "a.png"
        assert int(source.pixels(last.images[0], 10**6)[0, 0, 0]) == 33
        assert source.sample(0) == draw_entailments(8, "train").sample(0)
        again = pickle.loads(pickle.dumps(source))
        assert again.sample(source.sample_count - 1) == last

    def test_splits_of_a_file(self, tmp_path: Path) -> None:
        write_image(tmp_path / "a.png")
        rows = [
            {"image": "a.png", "sentence": split, "label": "neutral", "split": split} for split in ("train", "test")
        ]
        file = write_rows(tmp_path / "ve.json", rows)
        source = open_samples([f"{file}#test"], DataConfig(), "train", read_entailments)
        assert [source.sample(index).text for index in range(source.sample_count)] == ["test"]
        with pytest.raises(TercetError, match="holds several splits"):
            open_samples([file], DataConfig(), "train", read_entailments)

    def test_mistakes(self) -> None:
        with pytest.raises(TercetError, match="no data given"):
            open_samples([], DataConfig(), "train", read_entailments)
        with pytest.raises(TercetError, match="drawn scenes have no samples"):
            open_samples(["scenes"], DataConfig(), "train", read_entailments)
        with pytest.raises(TercetError, match="write scenes:validation"):
            open_samples(["scenes:validaton"], DataConfig(), "train", read_entailments, draw_entailments)
        with pytest.raises(TercetError, match=r"no file .*none\.json"):
            open_samples(["none.json"], DataConfig(), "train", read_entailments)


def assert_same(first: Batch, second: Batch) -> None:
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.input_ids, second.input_ids)
    assert (first.keys, first.targets, first.texts) == (second.keys, second.targets, second.texts)


class TestLoader:
    def test_every_sample_once_an_epoch(self, scenes: SampleTable, tokenizer: Tokenizer) -> None:
        loader = TrainLoader(scenes, tokenizer, PLAIN, 32, 7, seed=3, drop_last=False)
        batches = list(loader.batches(0))
        keys = [key for batch in batches for key in batch.keys]
        assert sorted(keys) == sorted(scenes.sample(index).key for index in range(scenes.sample_count))
        assert [key for batch in loader.batches(1) for key in batch.keys] != keys
        assert batches[0].images.shape == (7, 3, 32, 32)
        assert batches[0].image_rows is None
        place = {scenes.sample(index).key: index for index in range(scenes.sample_count)}
        for view, key, target in zip(batches[0].images, batches[0].keys, batches[0].targets, strict=True):
            sample = scenes.sample(place[key])
            assert target == sample.target
            pixels = resize(scenes.pixels(sample.images[0], 10**6), 32)
            assert np.array_equal(view.permute(1, 2, 0).numpy(), pixels)

    def test_samples_of_an_image_come_together(self, scenes: SampleTable, tokenizer: Tokenizer) -> None:
        data = PLAIN.model_copy(update={"share_images": True})
        loader = TrainLoader(scenes, tokenizer, data, 32, 5, seed=3, drop_last=False)
        batches = list(loader.batches(0))
        assert [len(batch.images) for batch in batches] == [5, 5, 2]
        place = {scenes.sample(index).key: index for index in range(scenes.sample_count)}
        assert sorted(key for batch in batches for key in batch.keys) == sorted(place)
        for batch in batches:
            assert batch.image_rows is not None
            assert batch.image_rows.shape == (len(batch), 1)
            for key, row in zip(batch.keys, batch.image_rows[:, 0].tolist(), strict=True):
                pixels = resize(scenes.pixels(scenes.sample(place[key]).images[0], 10**6), 32)
                assert np.array_equal(batch.images[row].permute(1, 2, 0).numpy(), pixels)
        pairs = next(TrainLoader(draw_statements(6, "test"), tokenizer, data, 32, 4, seed=0).batches(0))
        assert pairs.image_rows is not None and pairs.image_rows.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]

    def test_workers_and_resume_change_nothing(self, scenes: SampleTable, tokenizer: Tokenizer) -> None:
        data = DataConfig(workers=0, augment="full", crop_scale=(0.5, 1.0))
        whole = list(TrainLoader(scenes, tokenizer, data, 32, 8, seed=1).batches(2))
        worked = TrainLoader(scenes, tokenizer, data.model_copy(update={"workers": 2}), 32, 8, seed=1)
        for first, second in zip(whole[3:], worked.batches(2, 3), strict=True):
            assert_same(first, second)
        worked.close()

    def test_two_images_lie_beside_each_other(self, tokenizer: Tokenizer) -> None:
        source = draw_statements(6, "test")
        batch = next(TrainLoader(source, tokenizer, PLAIN, 64, 4, seed=0).batches(0))
        assert batch.images.shape == (8, 3, 64, 64)
        first = source.sample(int(batch.keys[0].partition("#")[2]))
        for view, image in zip(batch.images, first.images, strict=False):
            assert np.array_equal(view.permute(1, 2, 0).numpy(), source.pixels(image, 10**6))

    @pytest.mark.parametrize(("compat", "mirrored"), [("tercet", False), ("published", True)])
    def test_what_tells_left_from_right_is_not_mirrored(
        self, tmp_path: Path, tokenizer: Tokenizer, compat: Any, mirrored: bool
    ) -> None:
        picture = np.zeros((16, 16, 3), np.uint8)
        picture[:, :8] = 255
        cv2.imwrite(str(tmp_path / "a.png"), picture)
        rows = [{"image": "a.png", "sentence": f"{side} number {n}", "label": "neutral"} for n in range(8) for side in
                ("to the left", "RIGHT", "above")]  # fmt: skip
        source = read_entailments(write_rows(tmp_path / "ve.json", rows), None, DataConfig())
        data = DataConfig(workers=0, augment="light", crop_scale=(0.99, 1.0))
        flips = {"left": 0, "right": 0, "above": 0}
        loader = TrainLoader(source, tokenizer, data, 16, 24, seed=0, compat=compat)
        for epoch in range(3):
            for batch in loader.batches(epoch):
                for view, text in zip(batch.images, batch.texts, strict=True):
                    side = next(word for word in flips if word in text)
                    flips[side] += int(view[0, 8, 1] < 128)
        assert flips["above"] > 0
        assert (flips["left"] > 0, flips["right"] > 0) == (mirrored, mirrored)

    def test_images_that_samples_share_are_mirrored_for_all_of_them_or_not(
        self, tmp_path: Path, tokenizer: Tokenizer
    ) -> None:
        picture = np.zeros((16, 16, 3), np.uint8)
        picture[:, :8] = 255
        for name in ("told.png", "free.png"):
            cv2.imwrite(str(tmp_path / name), picture)
        texts = [("told.png", "a dog"), ("told.png", "a dog on the left"), ("free.png", "a dog"), ("free.png", "a cat")]
        rows = [{"image": image, "sentence": text, "label": "neutral"} for image, text in texts]
        source = read_entailments(write_rows(tmp_path / "ve.json", rows), None, DataConfig())
        data = DataConfig(workers=0, augment="light", crop_scale=(0.99, 1.0), share_images=True)
        loader = TrainLoader(source, tokenizer, data, 16, 2, seed=0)
        flips = {True: 0, False: 0}
        for epoch in range(8):
            batch = next(loader.batches(epoch))
            assert batch.image_rows is not None and len(batch.images) == 2
            told = int(batch.image_rows[batch.texts.index("a dog on the left"), 0])
            for row, view in enumerate(batch.images):
                flips[row == told] += int(view[0, 8, 1] < 128)
        assert flips[True] == 0 and flips[False] > 0

    def test_a_broken_image_is_left_out_and_named_by_file_and_row(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        for name in ("a.png", "b.png"):
            write_image(tmp_path / name)
        (tmp_path / "broken.png").write_bytes(b"<html>")
        pairs = [["a.png", "b.png"], ["a.png", "broken.png"], ["gone.png", "b.png"]]
        rows = [{"images": pair, "sentence": "two dogs", "label": "True"} for pair in pairs]
        file = write_rows(tmp_path / "nlvr.json", rows)
        source = read_statements(file, None, DataConfig())
        loader = TrainLoader(source, tokenizer, PLAIN, 16, 8, seed=0)
        batch = next(loader.batches(0))
        assert batch.keys == [f"{file} row 1"]
        assert (len(batch.skipped), len(batch.images)) == (2, 2)
        assert loader.report.count == 2
        shared = TrainLoader(source, tokenizer, PLAIN.model_copy(update={"share_images": True}), 16, 8, seed=0)
        together = next(shared.batches(0))
        assert (together.keys, len(together.skipped)) == (batch.keys, 2)
        assert any(line.startswith(f"{file} row 2: broken.png: a web page") for line in batch.skipped)
        assert any(line.startswith(f"{file} row 3: No such file") for line in batch.skipped)
        only = next(sample_batches(source, tokenizer, PLAIN, 16, 8))
        assert (only.keys, len(only.skipped)) == (batch.keys, 2)

    def test_a_batch_of_nothing_but_broken_images(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        (tmp_path / "broken.png").write_bytes(b"x")
        rows = [{"images": ["broken.png", "broken.png"], "sentence": "two dogs", "label": "True"}]
        source = read_statements(write_rows(tmp_path / "nlvr.json", rows), None, DataConfig())
        batch = next(sample_batches(source, tokenizer, PLAIN, 16, 8))
        assert len(batch) == 0
        assert batch.image_rows is not None
        assert batch.image_rows.shape == (0, 2)
        assert batch.images.shape == (0, 3, 16, 16)

    def test_evaluation_sends_each_image_once(self, scenes: SampleTable, tokenizer: Tokenizer) -> None:
        keys: list[str] = []
        for batch in sample_batches(scenes, tokenizer, PLAIN, 64, 10, limit=33):
            assert batch.image_rows is not None
            assert len(batch.images) == len(batch.image_rows.unique()) < len(batch)
            for row, key in zip(batch.image_rows[:, 0].tolist(), batch.keys, strict=True):
                scene = int(key.partition("#")[2].split()[0])
                assert np.array_equal(batch.images[row].permute(1, 2, 0).numpy(), scenes.pixels(scene, 10**6))
            keys += batch.keys
        assert keys == [scenes.sample(index).key for index in range(33)]
