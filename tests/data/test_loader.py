"""Batches: the same bits from any number of workers, broken images skipped and counted, resume in mid-epoch."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scene_files import png_header
from tercet.config import DataConfig
from tercet.data.batch import Batch, ImageBatch, SkipReport, to_device
from tercet.data.images import decode, resize
from tercet.data.loader import TrainLoader, caption_owners, cleaned_captions, image_batches
from tercet.data.readers import open_sources
from tercet.data.table import SampleTable
from tercet.data.tokenizer import Tokenizer

SIZE = 32


@pytest.fixture
def source(tmp_path: Path, tar: Callable[..., Path], jpeg: Callable[..., bytes]) -> SampleTable:
    """23 photographs in a shard, with 1 to 3 captions each."""
    members: dict[str, bytes] = {}
    for number in range(23):
        captions = [f"Photograph number {number}, caption {count} ." for count in range(1 + number % 3)]
        members |= {f"{number}.jpg": jpeg(number), f"{number}.json": json.dumps({"caption": captions}).encode()}
    return open_sources([str(tar(tmp_path / "s.tar", members))], DataConfig(), "train")


def tokenizer_of(source: SampleTable) -> Tokenizer:
    return Tokenizer.train(cleaned_captions(source, 30), 200)


def loader_of(source: SampleTable, batch_size: int = 5, seed: int = 3, workers: int = 0, **options) -> TrainLoader:
    data = DataConfig(workers=workers, **options.pop("data", {}))
    return TrainLoader(source, tokenizer_of(source), data, SIZE, batch_size, seed, **options)


def assert_same(first: Batch, second: Batch) -> None:
    assert (first.epoch, first.step, first.keys, first.texts) == (second.epoch, second.step, second.keys, second.texts)
    assert first.skipped == second.skipped
    assert first.second_views is not None
    assert second.second_views is not None
    for field in ("images", "second_views", "input_ids", "attention_mask", "image_ids"):
        one, other = getattr(first, field), getattr(second, field)
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_a_batch(source: SampleTable) -> None:
    batch = next(loader_of(source).batches(2))
    assert batch.images.shape == (5, 3, SIZE, SIZE)
    assert batch.images.dtype == torch.uint8
    assert batch.second_views is not None
    assert batch.second_views.shape == (5, 3, SIZE, SIZE)
    assert not torch.equal(batch.images, batch.second_views)
    assert batch.input_ids.dtype == torch.int64
    assert batch.attention_mask.dtype == torch.bool
    assert batch.input_ids.shape == batch.attention_mask.shape
    assert batch.attention_mask[:, 0].all()
    assert batch.image_ids.shape == (5,)
    assert (batch.epoch, batch.step, batch.skipped, len(batch)) == (2, 0, [], 5)
    for key, caption, image_id in zip(batch.keys, batch.texts, batch.image_ids.tolist(), strict=True):
        number = key.rpartition("#")[2]
        assert caption.startswith(f"photograph number {number} caption")
        assert source.key(image_id) == key


def test_one_view_is_the_first_of_two(source: SampleTable) -> None:
    data = {"augment": "full"}
    two, one = (next(loader_of(source, data=dict(data), views=views).batches(0)) for views in (2, 1))
    assert torch.equal(one.images, two.images)
    assert one.second_views is None
    assert two.second_views is not None


@pytest.mark.parametrize("choice", ["random", "each"])
def test_any_number_of_workers_gives_the_same_bits(source: SampleTable, choice: str) -> None:
    alone = loader_of(source, data={"caption_choice": choice})
    two = loader_of(source, workers=2, data={"caption_choice": choice})
    for epoch in (0, 1):  # the second by the same worker processes
        batches = list(zip(alone.batches(epoch), two.batches(epoch), strict=True))
        assert len(batches) == alone.steps_per_epoch
        for first, second in batches:
            assert_same(first, second)
    two.close()


def test_resume_in_mid_epoch(source: SampleTable) -> None:
    whole = list(loader_of(source).batches(4))
    for first, second in zip(whole[2:], loader_of(source).batches(4, first_step=2), strict=True):
        assert_same(first, second)
    assert list(loader_of(source).batches(4, first_step=len(whole))) == []


def test_an_epoch_left_early_does_not_disturb_the_next(source: SampleTable) -> None:
    alone, two = loader_of(source), loader_of(source, workers=2)
    iterator = two.batches(0)
    next(iterator)
    iterator.close()
    for first, second in zip(alone.batches(1), two.batches(1), strict=True):
        assert_same(first, second)
    two.close()


def test_ranks_share_a_batch(source: SampleTable) -> None:
    whole = next(loader_of(source, batch_size=6).batches(0))
    parts = [next(loader_of(source, batch_size=6, rank=rank, world=2).batches(0)) for rank in (0, 1)]
    assert whole.keys == parts[0].keys + parts[1].keys
    assert torch.equal(whole.images, torch.cat([part.images for part in parts]))


def test_epochs_and_seeds_differ(source: SampleTable) -> None:
    first, other_epoch = (next(loader_of(source, batch_size=23).batches(epoch)) for epoch in (0, 1))
    other_seed = next(loader_of(source, batch_size=23, seed=4).batches(0))
    assert sorted(first.keys) == sorted(other_epoch.keys) == sorted(other_seed.keys)
    assert first.keys != other_epoch.keys
    assert first.keys != other_seed.keys
    row = other_epoch.keys.index(first.keys[0])
    assert not torch.equal(first.images[0], other_epoch.images[row])


def test_a_set_smaller_than_a_batch(source: SampleTable) -> None:
    loader = loader_of(source, batch_size=64)
    assert loader.steps_per_epoch == 1
    assert [len(batch) for batch in loader.batches(0)] == [23]


def test_the_last_batch(source: SampleTable) -> None:
    assert [len(batch) for batch in loader_of(source).batches(0)] == [5] * 4
    assert [len(batch) for batch in loader_of(source, drop_last=False).batches(0)] == [5] * 4 + [3]
    each = loader_of(source, data={"caption_choice": "each"}, drop_last=False)
    captions = [caption for batch in each.batches(0) for caption in batch.texts]
    assert sorted(captions) == sorted(cleaned_captions(source, 30))


def test_no_augmentation_is_a_resize(source: SampleTable) -> None:
    batch = next(loader_of(source, data={"augment": "none"}, compat="published").batches(0))
    assert batch.second_views is not None
    for image, view, image_id in zip(batch.images, batch.second_views, batch.image_ids.tolist(), strict=True):
        wanted = resize(decode(source.image(image_id), "x"), SIZE)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), wanted)
        assert torch.equal(image, view)


@pytest.fixture
def broken(photo_folder: Path, jpeg: Callable[..., bytes]) -> tuple[SampleTable, set[str]]:
    """Six good photographs, and images that are broken in every way, one of which is a folder and one is not there."""
    bad = {
        "cut.jpg": jpeg(1)[:200],
        "empty.jpg": b"",
        "page.jpg": b"<!DOCTYPE html><html>404</html>",
        "text.png": b"no image at all",
        "bomb.png": png_header(10_000, 10_000),
        "half.png": png_bytes()[: len(png_bytes()) // 2],
        "noise.jpg": jpeg(1)[:2] + b"\0" * 300 + b"\xff\xd9",
    }
    for name, data in bad.items():
        (photo_folder / "images" / name).write_bytes(data)
    (photo_folder / "images" / "folder.jpg").mkdir()
    names = [f"images/{name}" for name in (*bad, "folder.jpg", "gone.jpg", "nul\0.jpg")]
    rows = [{"image": name, "caption": f"of {name}"} for name in (*(f"images/{n}.jpg" for n in range(6)), *names)]
    (photo_folder / "a.json").write_text(json.dumps(rows))
    return open_sources([str(photo_folder / "a.json")], DataConfig(), "train"), set(names)


def png_bytes() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_skipped_and_named(broken: tuple[SampleTable, set[str]], workers: int) -> None:
    source, bad = broken
    loader = loader_of(source, batch_size=4, workers=workers, drop_last=False)
    batches = list(loader.batches(0))
    loader.close()
    assert sorted(key for batch in batches for key in batch.keys) == [f"images/{n}.jpg" for n in range(6)]
    assert [len(batch) + len(batch.skipped) for batch in batches] == [4, 4, 4, 4]
    for batch in batches:
        assert batch.images.shape[0] == batch.input_ids.shape[0] == len(batch.texts) == len(batch)
    assert loader.report.count == len(bad)
    for name in bad:
        assert sum(message.startswith(f"{name}: ") for message in loader.report.messages) == 1
    reasons = "\n".join(loader.report.messages)
    for reason in ("empty", "web page", "pixel_limit", "No such file", "cut short", "null character"):
        assert reason in reasons
    assert loader.report.lines()[0] == f"{len(bad)} samples were skipped because their image is broken:"


def test_a_batch_of_broken_images_alone(tmp_path: Path, tar: Callable[..., Path]) -> None:
    members = {f"{n}.{part}": b"not an image %d" % n for n in range(3) for part in ("jpg", "txt")}
    source = open_sources([str(tar(tmp_path / "s.tar", members))], DataConfig(), "train")
    loader = loader_of(source, batch_size=3)
    (batch,) = loader.batches(0)
    assert batch.images.shape == (0, 3, SIZE, SIZE)
    assert batch.second_views is not None
    assert batch.second_views.shape == (0, 3, SIZE, SIZE)
    assert batch.input_ids.shape[0] == batch.attention_mask.shape[0] == batch.image_ids.shape[0] == 0
    assert (len(batch), len(batch.skipped)) == (0, 3)
    assert loader.report.count == 3


def test_the_report_keeps_twenty_messages() -> None:
    report = SkipReport()
    assert report.lines() == []
    empty = torch.zeros(0)
    for number in range(30):
        report.add(ImageBatch(empty, empty, [], [f"{number}.jpg: broken"]))
        report.add(ImageBatch(empty, empty, [], [f"{number}.jpg: broken"]))
    assert report.count == 60
    assert report.messages == [f"{number}.jpg: broken" for number in range(20)]
    assert len(report.lines()) == 22


def test_moving_a_batch(source: SampleTable) -> None:
    for views in (1, 2):
        batch = next(loader_of(source, views=views).batches(0))
        moved = to_device(batch, "meta")
        assert moved.images.device.type == moved.input_ids.device.type == "meta"
        assert (moved.second_views is None) == (views == 1)
        assert moved.keys == batch.keys
        assert batch.images.device.type == "cpu"


@pytest.mark.gpu
def test_batches_on_the_gpu(source: SampleTable) -> None:
    loader = loader_of(source, workers=2)
    for batch, wanted in zip(loader.batches(0), loader_of(source).batches(0), strict=True):
        assert batch.images.is_pinned()
        moved = to_device(batch, "cuda")
        torch.cuda.synchronize()
        assert torch.equal(moved.images.cpu(), wanted.images)
        assert torch.equal(moved.input_ids.cpu(), wanted.input_ids)
    loader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_batches(source: SampleTable, workers: int) -> None:
    data = DataConfig(workers=workers)
    images = list(image_batches(source, data, SIZE, 4))
    assert torch.cat([batch.indices for batch in images]).tolist() == list(range(23))
    assert images[1].keys == [source.key(index) for index in range(4, 8)]
    wanted = resize(decode(source.image(5), "x"), SIZE)
    assert np.array_equal(images[1].images[1].permute(1, 2, 0).numpy(), wanted)


def test_evaluation_on_the_first_images(source: SampleTable) -> None:
    data = DataConfig(workers=0)
    assert sum(len(batch) for batch in image_batches(source, data, SIZE, 4, limit=7)) == 7
    owners = caption_owners(source, 7)
    assert owners.tolist() == [0, 1, 1, 2, 2, 2, 3, 4, 4, 5, 5, 5, 6]
    assert len(list(cleaned_captions(source, 30, limit=7))) == len(owners)


def test_evaluation_skips_broken_images(broken: tuple[SampleTable, set[str]]) -> None:
    source, bad = broken
    batches = list(image_batches(source, DataConfig(workers=0), SIZE, 5))
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(6))
    assert sum(len(batch.skipped) for batch in batches) == len(bad)
    assert len(batches[2]) == 0


def test_flickr8k(data_dir: Path) -> None:
    shards = data_dir / "flickr8k" / "shards"
    source = open_sources([str(shards / "flickr8k-*.tar") + "#val"], DataConfig(), "validation")
    assert source.image_count == 1000
    tokenizer = Tokenizer.train(cleaned_captions(source, 30, limit=200), 400)
    loader = TrainLoader(source, tokenizer, DataConfig(workers=0), 112, 16, 0)
    assert loader.steps_per_epoch == 62
    for batch, _ in zip(loader.batches(0), range(2), strict=False):
        assert (len(batch), batch.skipped) == (16, [])
        assert batch.images.float().std() > 20
        assert batch.input_ids.shape[1] <= 25
