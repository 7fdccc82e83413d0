"""Indexing: what is new is read, embedded and committed in batches, so that a stop loses no more than the last one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from tercet.config import DataConfig
from tercet.data.listing import ListedImage, find_images, lies_under
from tercet.data.rows import Problems, is_empty
from tercet.errors import TercetError
from tercet.model.tercet import Tercet
from tercet.search.index import Index, model_digest
from tercet.search.known import KnownImages
from tercet.search.nearest import QUERIES, Build, build_if_large, sample_captions
from tercet.search.preparing import Prepared, prepare_some
from tercet.search.writing import COMMIT_IMAGES, COMMIT_SECONDS, TableWriter, lock_index
from tercet.tasks.encoding import encode_sentences

READ_AHEAD = 4  # batches that are being read while one is embedded
BATCH = 32
THREADS = 4

Engine = Literal["local", "ray"]


@dataclass
class Embedded:
    """A batch that was read and embedded.

    Attributes:
        prepared: the images.
        image_feats: float32 `[images, embed_dim]`.
        broken: why the others of the batch were left out.
    """

    prepared: list[Prepared]
    image_feats: np.ndarray
    broken: list[str]


@dataclass
class IndexReport:
    """What indexing did.

    Attributes:
        added: images that are new.
        changed: images that were embedded anew, or whose caption or time was noted.
        unchanged: images that were there already as they are.
        removed: rows of images that lie no more where they were named.
        broken: images that could not be read.
        seconds: from the start.
        build: of the approximate index, where it was built.
    """

    added: int = 0
    changed: int = 0
    unchanged: int = 0
    removed: int = 0
    broken: Problems = field(default_factory=Problems)
    seconds: float = 0.0
    build: Build | None = None


# Called with the number of images done, and of those to be done.
Progress = Callable[[int, int], None]


def build_index(
    specs: Sequence[str],
    model: Tercet,
    model_name: str,
    path: str,
    progress: Progress = lambda done, total: None,
    embed: Callable[[list[ListedImage]], Iterator[Embedded]] | None = None,
) -> tuple[Index, IndexReport]:
    """Bring the index at `path` up to date with the images that `specs` name, making it where there is none.

    Images of other places that the index holds stay in it.

    Args:
        specs: as in `find_images`.
        model: in evaluation mode, on the device that is to embed.
        model_name: its folder or hub id, noted in a new index.
        path: folder or URI of the index.
        progress: told how far it is.
        embed: reads and embeds listed images; default `embed_here` with the model.

    Raises:
        TercetError: no image is found, the index was made by another model, another process writes to it, or the disk
            is full.
    """
    started = time.monotonic()
    report = IndexReport()
    with lock_index(path):
        listed = find_images(specs, report.broken)
        first = next(listed)  # a source that names nothing is told before an index is made
        index = _open_or_create(path, model, model_name)
        known = KnownImages(index)
        due: list[ListedImage] = []
        changed: set[str] = set()
        for image in (one for part in ([first], listed) for one in part):
            state = known.find(image)
            if state == "same":
                report.unchanged += 1
            elif state != "again":
                due.append(image)
                changed.update([image.uri] if state == "changed" else [])
        _embed_due(due, changed, embed or (lambda images: embed_here(model, images)), index, report, progress)
        gone = known.lost(index, [lies_under(spec) for spec in specs])
        writer = TableWriter(index)
        writer.delete(gone)
        report.removed = len(gone)
        writer.compact()
        report.build = build_if_large(index, lambda: _caption_feats(index, model))
    report.seconds = time.monotonic() - started
    return index, report


def _embed_due(
    due: list[ListedImage],
    changed: set[str],
    embed: Callable[[list[ListedImage]], Iterator[Embedded]],
    index: Index,
    report: IndexReport,
    progress: Progress,
) -> None:
    """Embed and commit; what was embedded before an interruption is committed too."""
    writer = TableWriter(index)
    done = 0
    committed = time.monotonic()
    progress(0, len(due))
    if not due:
        return
    try:
        for batch in embed(due):
            for reason in batch.broken:
                report.broken.add(reason)
            for prepared, feats in zip(batch.prepared, batch.image_feats, strict=True):
                writer.put(prepared, feats, replaces=prepared.image.uri in changed)
            done += len(batch.prepared) + len(batch.broken)
            if writer.waiting >= COMMIT_IMAGES or time.monotonic() - committed > COMMIT_SECONDS:
                writer.commit()
                committed = time.monotonic()
            progress(done, len(due))
    finally:
        writer.commit()
        report.added, report.changed = writer.added, writer.replaced


def embed_here(model: Tercet, images: Sequence[ListedImage]) -> Iterator[Embedded]:
    """Read in threads, embed on the model's device."""
    size = model.config.vision.image_size
    chunks = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
    waiting: deque[Future[list[Prepared | str]]] = deque()
    with ThreadPoolExecutor(THREADS, "tercet-read") as readers:
        try:
            for chunk in chunks:
                waiting.append(readers.submit(prepare_some, chunk, size))
                if len(waiting) > READ_AHEAD:
                    yield embed_prepared(model, waiting.popleft().result())
            while waiting:
                yield embed_prepared(model, waiting.popleft().result())
        finally:
            for future in waiting:
                future.cancel()


@torch.no_grad()
def embed_prepared(model: Tercet, prepared: Sequence[Prepared | str]) -> Embedded:
    """The embeddings of images that were read; strings among them are reasons why one was not."""
    sound = [one for one in prepared if isinstance(one, Prepared)]
    broken = [one for one in prepared if isinstance(one, str)]
    if not sound:
        return Embedded([], np.zeros((0, model.config.embed_dim), np.float32), broken)
    device = next(model.parameters()).device
    pixels = torch.from_numpy(np.stack([one.pixels for one in sound])).permute(0, 3, 1, 2).contiguous()
    feats = model.project_image(model.encode_image(pixels.to(device))[:, 0])
    return Embedded(sound, feats.float().cpu().numpy(), broken)


def _caption_feats(index: Index, model: Tercet) -> np.ndarray:
    """`text_feats` of captions of the index, to measure the approximate index with, float32 `[captions, embed_dim]`."""
    captions = sample_captions(index, QUERIES) if model.tokenizer is not None else []
    texts = [caption for caption in captions if not is_empty(caption, DataConfig().max_words)]
    if not texts:
        return np.zeros((0, index.embed_dim), np.float32)
    return encode_sentences(model, texts, DataConfig()).text_feats.numpy()


def _open_or_create(path: str, model: Tercet, model_name: str) -> Index:
    digest = model_digest(model)
    if not Index.exists(path):
        return Index.create(path, model_name, digest, model.config.embed_dim)
    index = Index.open(path)
    if index.model_digest != digest:
        raise TercetError(
            f"{path} was made by another model, {index.model}; index with that one, or choose a new folder"
        )
    return index
