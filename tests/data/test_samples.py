"""Samples: readers of each task's files, their mistakes by file and row, and the loader's batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from scene_files import scene_file, write_image, write_rows
from tercet.config import DataConfig
from tercet.data.batch import Batch
from tercet.data.class_readers import open_entailments, open_statements, read_entailments, read_statements
from tercet.data.images import resize
from tercet.data.loader import TrainLoader, sample_batches
from tercet.data.table import SampleTable
from tercet.data.tokenizer import Tokenizer, clean_caption

PLAIN = DataConfig(workers=0, augment="none")


@pytest.fixture(scope="module")
def scenes() -> SampleTable:
    return open_entailments([scene_file("entailment", 12)], DataConfig(), "train")


@pytest.fixture(scope="module")
def tokenizer(scenes: SampleTable) -> Tokenizer:
    texts = (clean_caption(scenes.sample(index).text, 30) for index in range(scenes.sample_count))
    return Tokenizer.train(texts, 200)


def assert_same(first: Batch, second: Batch) -> None:
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.input_ids, second.input_ids)
    assert (first.keys, first.targets, first.texts) == (second.keys, second.targets, second.texts)


def half_white(tmp_path: Path, rows: list[tuple[str, str]]) -> SampleTable:
    """Neutral hypotheses of pictures, each written here, whose left half is white."""
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:, :8] = 255
    for name, _ in rows:
        cv2.imwrite(str(tmp_path / name), picture)
    whole = [{"image": name, "sentence": text, "label": "neutral"} for name, text in rows]
    return read_entailments(write_rows(tmp_path / "ve.json", whole), None, DataConfig())


class TestLoader:
    def test_every_sample_once_an_epoch(self, scenes: SampleTable, tokenizer: Tokenizer) -> None:
        loader = TrainLoader(scenes, tokenizer, PLAIN, 32, 7, seed=3, drop_last=False)
        batches = list(loader.batches(0))
        keys = [key for batch in batches for key in batch.keys]
        assert sorted(keys) == sorted(scenes.sample(index).key for index in range(scenes.sample_count))
        assert [key for batch in loader.batches(1) for key in batch.keys] != keys
        assert batches[0].images.shape == (7, 3, 32, 32)
        assert batches[0].image_rows is None
        index_of = {scenes.sample(index).key: index for index in range(scenes.sample_count)}
        for view, key, target in zip(batches[0].images, batches[0].keys, batches[0].targets, strict=True):
            sample = scenes.sample(index_of[key])
            assert target == sample.target
            pixels = resize(scenes.pixels(sample.images[0], 10**6), 32)
            assert np.array_equal(view.permute(1, 2, 0).numpy(), pixels)

    def test_samples_of_an_image_come_together(self, scenes: SampleTable, tokenizer: Tokenizer) -> None:
        data = PLAIN.model_copy(update={"share_images": True})
        loader = TrainLoader(scenes, tokenizer, data, 32, 5, seed=3, drop_last=False)
        batches = list(loader.batches(0))
        assert [len(batch.images) for batch in batches] == [5, 5, 2]
        index_of = {scenes.sample(index).key: index for index in range(scenes.sample_count)}
        assert sorted(key for batch in batches for key in batch.keys) == sorted(index_of)
        for batch in batches:
            assert batch.image_rows is not None
            assert batch.image_rows.shape == (len(batch), 1)
            for key, row in zip(batch.keys, batch.image_rows[:, 0].tolist(), strict=True):
                pixels = resize(scenes.pixels(scenes.sample(index_of[key]).images[0], 10**6), 32)
                assert np.array_equal(batch.images[row].permute(1, 2, 0).numpy(), pixels)
        statements = open_statements([scene_file("nlvr-test", 6)], DataConfig(), "test")
        pairs = next(TrainLoader(statements, tokenizer, data, 32, 4, seed=0).batches(0))
        assert pairs.image_rows is not None and pairs.image_rows.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]

    def test_workers_and_resume_change_nothing(self, scenes: SampleTable, tokenizer: Tokenizer) -> None:
        data = DataConfig(workers=0, augment="full", crop_scale=(0.5, 1.0))
        whole = list(TrainLoader(scenes, tokenizer, data, 32, 8, seed=1).batches(2))
        worked = TrainLoader(scenes, tokenizer, data.model_copy(update={"workers": 2}), 32, 8, seed=1)
        for first, second in zip(whole[3:], worked.batches(2, 3), strict=True):
            assert_same(first, second)
        worked.close()

    def test_two_images_lie_beside_each_other(self, tokenizer: Tokenizer) -> None:
        source = open_statements([scene_file("nlvr-test", 6)], DataConfig(), "test")
        batch = next(TrainLoader(source, tokenizer, PLAIN, 64, 4, seed=0).batches(0))
        assert batch.images.shape == (8, 3, 64, 64)
        first = source.sample(int(batch.keys[0].rpartition(" ")[2]) - 1)
        for view, image in zip(batch.images, first.images, strict=False):
            assert np.array_equal(view.permute(1, 2, 0).numpy(), source.pixels(image, 10**6))

    @pytest.mark.parametrize(("compat", "mirrored"), [("tercet", False), ("published", True)])
    def test_texts_of_left_and_right_are_not_mirrored(
        self, tmp_path: Path, tokenizer: Tokenizer, compat: Any, mirrored: bool
    ) -> None:
        sides = ("to the left", "RIGHT", "above")
        source = half_white(tmp_path, [("a.png", f"{side} number {n}") for n in range(8) for side in sides])
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
        texts = [("left.png", "a dog"), ("left.png", "a dog on the left"), ("free.png", "a dog"), ("free.png", "a cat")]
        source = half_white(tmp_path, texts)
        data = DataConfig(workers=0, augment="light", crop_scale=(0.99, 1.0), share_images=True)
        loader = TrainLoader(source, tokenizer, data, 16, 2, seed=0)
        flips = {True: 0, False: 0}
        for epoch in range(8):
            batch = next(loader.batches(epoch))
            assert batch.image_rows is not None and len(batch.images) == 2
            left = int(batch.image_rows[batch.texts.index("a dog on the left"), 0])
            for row, view in enumerate(batch.images):
                flips[row == left] += int(view[0, 8, 1] < 128)
        assert flips[True] == 0 and flips[False] > 0

    def test_a_broken_image_is_skipped_and_named_by_file_and_row(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
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
                scene = scenes.sample(int(key.rpartition(" ")[2]) - 1).images[0]
                assert np.array_equal(batch.images[row].permute(1, 2, 0).numpy(), scenes.pixels(scene, 10**6))
            keys += batch.keys
        assert keys == [scenes.sample(index).key for index in range(33)]
