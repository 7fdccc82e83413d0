"""Checkpoints, pictures and batches that are damaged."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from faults.runs import Run
from tercet.config_io import load_config
from tercet.tasks.pretrain import Pretraining
from tercet.train.checkpoint import list_checkpoints
from tercet.train.loop import train
from tiny_run import TINY, assert_equal, events, lines


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


SHARD = "shard-00001-model-00001-of-00001.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a bit": (flip, SHARD),
    "cut": (cut, SHARD),
    "gone": (Path.unlink, SHARD),
    "record": (cut, "checkpoint.json"),
}


def test_damaged_checkpoints(unbroken: Path, tmp_path: Path) -> None:
    """The damaged checkpoint is named, and the one before it is used."""
    stopped = Run(tmp_path / "stopped", train__max_steps=5)
    stopped.finish()
    runs = []
    for name, (damage, file) in DAMAGE.items():
        folder = tmp_path / name
        shutil.copytree(stopped.folder, folder)
        newest = list_checkpoints(folder / "checkpoints")[0]
        damage(newest / file)
        runs.append((Run(folder, resume=True, train__max_steps="none"), newest.name))
    for run, newest in runs:
        run.finish()
        assert f"{newest} is damaged" in events(run.folder)
        assert "resumed at step 4" in events(run.folder)
        assert_equal(unbroken, run.folder)


def picture(number: int, kind: str = "JPEG", mode: str = "RGB", **options: object) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (40, 48, 3), np.uint8)
    image = Image.fromarray(noise).convert(mode) if mode != "I;16" else Image.fromarray(noise[..., 0].astype(np.uint16))
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


ROTATED = Image.Exif()
ROTATED[0x0112] = 6

# All names end in .jpg, whatever the files hold: the most common fault of all.
BROKEN = {
    "empty": b"",
    "truncated": picture(1)[:-300],
    "page": b"<!DOCTYPE html><html>404 Not Found</html>",
    "huge": picture(1).replace(b"\xff\xc0\x00\x11\x08\x00\x28\x00\x30", b"\xff\xc0\x00\x11\x08\xff\xdc\xff\xdc"),
    "noise": bytes(range(256)) * 4,
    "drawing": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
}
ODD = {
    "extension": picture(2, "PNG"),
    "cmyk": picture(3, mode="CMYK"),
    "sixteen": picture(4, "PNG", "I;16"),
    "animated": picture(5, "GIF", "P", save_all=True, append_images=[Image.new("P", (48, 40))]),
    "rotated": picture(1, exif=ROTATED),
    "transparent": picture(6, "PNG", "RGBA"),
}


def test_five_percent_of_the_pictures_are_broken(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    whole = {f"photo{number}": picture(number) for number in range(108)}
    everything = {**whole, **BROKEN, **ODD}
    for number, (name, content) in enumerate(everything.items()):
        (folder / f"{name}.jpg").write_bytes(content)
        (folder / f"{name}.txt").write_text(f"picture {number} with something red", "utf-8")
    assert len(BROKEN) / len(everything) == 0.05
    run = Run(tmp_path / "run", data__train=str(folder), train__batch_size=10, train__epochs=2, data__workers=2)
    run.finish()
    steps, messages = lines(run.folder), events(run.folder)
    assert len(steps) == 24
    assert sum(line["skipped"] for line in steps) == 2 * len(BROKEN)
    assert f"{2 * len(BROKEN)} samples could not be read and were skipped" in messages
    assert all(f"skipped: {name}.jpg: " in messages for name in BROKEN), messages
    assert not any(f"{name}.jpg" in messages for name in ODD)
    assert "skipped: huge.jpg: more pixels than" in messages


def test_a_batch_with_nan_is_skipped_and_the_run_finishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pixels of one batch of a whole run are not finite."""
    prepare, calls = Pretraining.prepare, []

    def poisoned(self: Pretraining, batch: object, *rest: object) -> object:
        calls.append(batch)
        if len(calls) == 5:
            batch.images = torch.full(batch.images.shape, float("nan"))  # type: ignore[attr-defined]
        return prepare(self, batch, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Pretraining, "prepare", poisoned)
    run = train(load_config("demo", {**TINY, "output": str(tmp_path / "run")}))
    assert events(run).count("not finite; the step is skipped") == 1
    named = next(line for line in lines(run, "event") if "not finite" in line["message"])
    assert named["step"] == 5 and calls[4].keys[0] in named["message"]
    after = [line["loss"] for line in lines(run) if line["step"] > 5]
    assert len(after) == 7 and all(isinstance(loss, float) and np.isfinite(loss) for loss in after)
    assert json.loads((run / "run.json").read_text("utf-8"))["recipe"] == "demo"
