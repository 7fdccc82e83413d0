"""Writing any source of pairs as WebDataset shards: KEY.jpg with KEY.json.

    DIR/NAME-000000.tar              samples 0 to shard_size - 1 of the source, those that can be read
    DIR/NAME-000000_stats.json       what became of them; written after the shard, so that it stands for a whole one
    DIR/NAME-pack.json               what is packed and how

A shard follows from the source and the options alone, whichever process writes it, so that packing goes on after a kill
by writing the shards that are missing.
"""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from tercet.data.loader import describe
from tercet.data.rows import digest
from tercet.data.table import SampleTable
from tercet.data.workers import WorkerPool
from tercet.errors import TercetError
from tercet.files import atomic_stream, only_writer, write_atomic

Encoding = Literal["keep", "jpg", "png", "webp"]

_KINDS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_PILLOW = {kind: name for name, kind in _KINDS.items()}
MESSAGES_KEPT = 20


@dataclass(frozen=True)
class PackOptions:
    """How shards are written.

    Attributes:
        name: what their names begin with.
        shard_size: samples of the source a shard.
        resize: pixels of the shorter side of images that are larger; None: as they are.
        encoding: "keep" leaves images that are not resized as they came (JPEG, PNG and WebP; others become PNG);
            otherwise all are encoded again, so.
        quality: of JPEG and WebP.
        pixel_limit: images with more pixels are skipped.
    """

    name: str = "pairs"
    shard_size: int = 5000
    resize: int | None = None
    encoding: Encoding = "keep"
    quality: int = 92
    pixel_limit: int = 89_478_485


@dataclass
class PackReport:
    """What became of samples.

    Attributes:
        images, pairs: written.
        skipped: images that could not be read.
        bytes: of the shards.
        shards: written, by this call and by earlier ones.
        problems: why images were skipped, the first of them.
    """

    images: int = 0
    pairs: int = 0
    skipped: int = 0
    bytes: int = 0
    shards: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, other: PackReport) -> None:
        """Count the samples of another shard."""
        self.images += other.images
        self.pairs += other.pairs
        self.skipped += other.skipped
        self.bytes += other.bytes
        self.shards += other.shards
        self.problems += other.problems[: MESSAGES_KEPT - len(self.problems)]


class KeptPairs:
    """The pairs that a file of `tercet data filter` lists: 64 bits of memory each.

    Args:
        rows: (image, caption) of each.
    """

    def __init__(self, rows: Iterator[tuple[str, str]]) -> None:
        self.digests = np.unique(np.fromiter((_pair_digest(*row) for row in rows), np.uint64))

    def __contains__(self, pair: tuple[str, str]) -> bool:
        wanted = np.uint64(_pair_digest(*pair))
        row = int(np.searchsorted(self.digests, wanted))
        return row < len(self.digests) and self.digests[row] == wanted


@dataclass
class ShardWriter:
    """Writes shard `number` of a source; copied to every worker process."""

    table: SampleTable
    folder: Path
    options: PackOptions
    kept: KeptPairs | None

    def __post_init__(self) -> None:
        ids = self.table.image_ids
        self._ids = ids if np.any(ids != np.arange(len(ids))) else None

    def __call__(self, number: int) -> PackReport:
        """Write it; nothing is left of it when that fails."""
        report = PackReport(shards=1)
        start = number * self.options.shard_size
        path = self.shard(number)
        with atomic_stream(path) as stream, tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for index in range(start, min(start + self.options.shard_size, self.table.image_count)):
                captions = self._captions(index)
                if not captions:
                    continue
                try:
                    data, kind, size = self._encode(index)
                except (OSError, TercetError) as error:
                    report.skipped += 1
                    report.problems += [describe(self.table.key(index), error)][: MESSAGES_KEPT - len(report.problems)]
                    continue
                record: dict[str, Any] = {"caption": captions if len(captions) > 1 else captions[0]}
                record |= {"key": self.table.key(index), "width": size[1], "height": size[0]}
                if self._ids is not None:
                    record["image_id"] = int(self._ids[index])
                _add(tar, f"{index:09d}.{kind}", data)
                _add(tar, f"{index:09d}.json", json.dumps(record, ensure_ascii=False).encode("utf-8", "replace"))
                report.images += 1
                report.pairs += len(captions)
        report.bytes = path.stat().st_size
        write_atomic(self.stats(number), json.dumps(asdict(report)))
        return report

    def shard(self, number: int) -> Path:
        """Where shard `number` lies."""
        return self.folder / f"{self.options.name}-{number:06d}.tar"

    def stats(self, number: int) -> Path:
        """Where it is written what became of its samples."""
        return self.folder / f"{self.options.name}-{number:06d}_stats.json"

    def _captions(self, index: int) -> list[str]:
        captions = self.table.captions(index)
        if self.kept is None:
            return captions
        image = self.table.location(index)
        return [caption for caption in captions if (image, caption) in self.kept]

    def _encode(self, index: int) -> tuple[bytes, str, tuple[int, int]]:
        """An image's bytes, its kind and its height and width."""
        options = self.options
        encoded = self.table.encoded(index, options.pixel_limit)
        size = encoded.height, encoded.width
        pixels = encoded.pixels()  # also of those kept as they are: a broken one must not be packed
        shrink = options.resize is not None and min(size) > options.resize
        kind = options.encoding
        if kind == "keep":
            if encoded.format in _KINDS and not shrink:
                return encoded.data, _KINDS[encoded.format], size
            kind = _KINDS.get(encoded.format, "png")
        image = Image.fromarray(pixels)
        if shrink:
            assert options.resize is not None
            scale = options.resize / min(image.size)
            width, height = (max(1, round(side * scale)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
        stream = io.BytesIO()
        image.save(stream, _PILLOW[kind], **({} if kind == "png" else {"quality": options.quality}))
        return stream.getvalue(), kind, (image.height, image.width)


def pack(
    table: SampleTable,
    specs: list[str],
    folder: Path,
    options: PackOptions,
    workers: int,
    kept: KeptPairs | None = None,
) -> Iterator[tuple[int, int, PackReport]]:
    """Write a source as shards, and go on where an earlier call was stopped.

    Args:
        table: the pairs.
        specs: what names it; another source is not packed over this one.
        folder: where the shards go.
        options: how they are written.
        workers: processes that write.
        kept: the pairs that are packed; None: all.

    Yields:
        Shards that are done, of how many, and what became of their samples; once at the start, then a shard at a time.

    Raises:
        TercetError: the folder holds another packing, or cannot be written, or another process packs into it.
    """
    writer = ShardWriter(table, folder, options, kept)
    total = -(-table.image_count // options.shard_size)
    plan = {
        "source": specs,
        "images": table.image_count,
        "kept": None if kept is None else digest(kept.digests.tobytes()),
        **asdict(options),
    }
    with only_writer(folder, f"{options.name}-"):
        _begin(folder / f"{options.name}-pack.json", plan)
        report = PackReport()
        missing: list[int] = []
        for number in range(total):
            written = _done(writer, number)
            if written is None:
                missing.append(number)
            else:
                report.add(written)
        yield total - len(missing), total, report
        pool: WorkerPool[PackReport] = WorkerPool(writer, workers)
        with contextlib.closing(pool):
            for done, written in enumerate(pool.run(missing), total - len(missing) + 1):
                report.add(written)
                yield done, total, report


def _begin(path: Path, plan: dict[str, Any]) -> None:
    """Write what is packed, or see that the same is packed as before."""
    if not path.is_file():
        write_atomic(path, json.dumps(plan, indent=1))
        return
    try:
        before = json.loads(path.read_text("utf-8"))
    except ValueError:
        before = None
    if before != plan:
        differ = [key for key in plan if not isinstance(before, dict) or before.get(key) != plan[key]]
        raise TercetError(
            f"{path.parent} holds a packing with another {' and '.join(differ)}; choose another folder or --name, "
            "or delete it first"
        )


def _done(writer: ShardWriter, number: int) -> PackReport | None:
    """What an earlier call wrote as shard `number`; None when it did not come to its end."""
    path = writer.stats(number)
    if not path.is_file():
        return None
    try:
        report = PackReport(**json.loads(path.read_text("utf-8")))
        return report if writer.shard(number).stat().st_size == report.bytes else None
    except (OSError, ValueError, TypeError):
        return None


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    tar.addfile(info, io.BytesIO(data))


def _pair_digest(image: str, caption: str) -> int:
    return digest(f"{image}\n{caption}".encode("utf-8", "surrogatepass"))
