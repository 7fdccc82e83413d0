"""Keeping the pairs of a noisy source that a model finds to belong together.

    FILE                 kept pairs with their scores, a JSON object a line
    FILE.scores          every pair with its scores, as far as they were computed; another threshold needs no model

Pairs come in the order of the source and are scored a batch at a time, so that a run that was stopped goes on behind
the last whole line, and no more than a batch is in memory beside eight bytes a pair.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch

from tercet.config import Config
from tercet.data.batch import ImageBatch
from tercet.data.loader import image_batches, tokenize
from tercet.data.table import SampleTable
from tercet.data.tokenizer import clean_caption
from tercet.errors import TercetError
from tercet.files import atomic_stream
from tercet.model.hub import require_tokenizer
from tercet.model.tercet import Tercet
from tercet.tasks.evaluation import evaluating

Score = Literal["match", "similarity"]


@dataclass
class FilterReport:
    """What a filter did.

    Attributes:
        scored: pairs that have a score.
        kept: pairs at or above the threshold.
        threshold: the least score that is kept.
        by: which score.
        scores: float32 [scored]; of every pair.
        skipped: images that could not be read.
        problems: why, the first of them.
    """

    scored: int
    kept: int
    threshold: float
    by: Score
    scores: np.ndarray
    skipped: int = 0
    problems: list[str] = field(default_factory=list)


def filter_pairs(
    model: Tercet,
    source: SampleTable,
    config: Config,
    to: Path,
    identity: dict[str, Any],
    by: Score = "match",
    threshold: float | None = None,
    share: float | None = None,
) -> Iterator[int | FilterReport]:
    """Score the pairs of a source and write those that are kept.

    Args:
        model: with its tokenizer.
        source: the pairs.
        config: `data` and `evaluate.batch_size` are read.
        to: where the kept pairs go.
        identity: what the scores follow from (model, sources); scores of another are not gone on with.
        by: "match": the probability of a match by the fusion encoder; "similarity": the cosine of the dual encoder.
        threshold: the least score that is kept.
        share: instead, the share of the pairs that is kept, the best ones.

    Yields:
        How many images are done, a batch at a time; the report at the end.

    Raises:
        TercetError: neither or both of threshold and share; scores of another run lie there; nothing can be written.
    """
    if (threshold is None) == (share is None):
        raise TercetError("give either a threshold of the score or the share of pairs to keep")
    if share is not None and not 0 < share <= 1:
        raise TercetError(f"the share of pairs to keep is {share}; it lies above 0 and up to 1")
    path = to.with_name(f"{to.name}.scores")
    ids = source.image_ids
    ids = ids if np.any(ids != np.arange(len(ids))) else None
    with contextlib.closing(_Journal(path, identity)) as journal:
        size = config.evaluate.batch_size
        first = journal.batches_done(size)
        yield min(first * size, source.image_count)
        with evaluating(model) as device:
            batches = image_batches(source, config.data, model.config.vision.image_size, size, first_batch=first)
            for number, batch in enumerate(batches, first):
                rows = score_batch(model, source, batch, config, device, ids)
                journal.append(number, size, rows, batch.skipped)
                yield min((number + 1) * size, source.image_count)
    scores, skipped, problems = _read_scores(path, by)
    if not len(scores):
        why = f"; the first problem: {problems[0]}" if problems else ""
        raise TercetError(f"no pair could be scored{why}")
    if share is not None:
        kept_at_least = max(1, round(share * len(scores)))
        threshold = float(np.partition(scores, len(scores) - kept_at_least)[len(scores) - kept_at_least])
    assert threshold is not None
    kept = _write_kept(path, to, by, threshold)
    yield FilterReport(len(scores), kept, threshold, by, scores, skipped, problems)


def score_batch(
    model: Tercet,
    source: SampleTable,
    batch: ImageBatch,
    config: Config,
    device: torch.device,
    ids: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """A row for each pair of a batch of images: `image`, `caption`, `match`, `similarity`, `image_id` if there are."""
    if not len(batch):
        return []
    indices = batch.indices.tolist()
    captions = [source.captions(index) for index in indices]
    owners = torch.tensor([place for place, own in enumerate(captions) for _ in own])
    texts = [caption for own in captions for caption in own]
    data = config.data
    length = min(data.max_tokens, model.config.text.max_positions)
    cleaned = [clean_caption(text, data.max_words) for text in texts]
    input_ids, mask = (part.to(device) for part in tokenize(require_tokenizer(model), cleaned, length))
    image_embeds = model.encode_image(batch.images.to(device))
    text_embeds = model.encode_text(input_ids, mask)
    image_feats = model.project_image(image_embeds[:, 0])
    similarity = (image_feats[owners.to(device)] * model.project_text(text_embeds[:, 0])).sum(dim=1)
    memory = model.project_kv(image_embeds).select(owners.to(device))
    chance = model.match_logits(text_embeds, mask, memory).softmax(dim=1)[:, 1]
    rows: list[dict[str, Any]] = []
    for place, text, match, cosine in zip(owners.tolist(), texts, chance.tolist(), similarity.tolist(), strict=True):
        index = indices[place]
        row: dict[str, Any] = {"image": source.location(index), "caption": text}
        if ids is not None:
            row["image_id"] = int(ids[index])
        rows.append(row | {"match": round(match, 6), "similarity": round(cosine, 6)})
    return rows


class _Journal:
    """The scores so far: a line that says what they are of, then a line a batch."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self._path = path
        wanted = {"scores": 1, **identity}
        self._sizes: list[int] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream: BinaryIO = path.open("r+b" if path.exists() else "w+b")
        except OSError as error:
            raise TercetError(f"cannot write {path}: {error.strerror}; choose another file with --output") from error
        end = 0
        for number, line in enumerate(self._stream):
            value = _whole_line(line)
            if value is None:
                break  # what a run wrote last when it was killed
            if number == 0 and value != wanted:
                self._stream.close()
                differ = [key for key in wanted if not isinstance(value, dict) or value.get(key) != wanted[key]]
                raise TercetError(
                    f"{path} holds scores of another {' and '.join(differ)}; delete it, or choose another file"
                )
            if number:
                self._sizes.append(int(value["size"]))
            end += len(line)
        self._stream.seek(end)
        self._stream.truncate()
        if not end:
            self._write(wanted)

    def batches_done(self, size: int) -> int:
        """How many batches of `size` images have their scores."""
        if any(other != size for other in self._sizes):
            raise TercetError(
                f"{self._path} holds batches of {self._sizes[0]} images; go on with --evaluate.batch_size "
                f"{self._sizes[0]}, or delete it"
            )
        return len(self._sizes)

    def append(self, number: int, size: int, rows: list[dict[str, Any]], problems: list[str]) -> None:
        """Add the scores of a batch; once this returns, a kill does not lose them."""
        assert number == len(self._sizes)
        self._write({"size": size, "rows": rows, "problems": problems})
        self._sizes.append(size)

    def _write(self, value: dict[str, Any]) -> None:
        try:
            self._stream.write(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape") + b"\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise TercetError(
                f"cannot write {self._path}: {error.strerror}; free some space and run the same command again: "
                "it goes on where it stopped"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _whole_line(line: bytes) -> Any:
    if not line.endswith(b"\n"):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return None


def _batches(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as stream:
        next(stream)
        for line in stream:
            yield json.loads(line)


def _read_scores(path: Path, by: Score) -> tuple[np.ndarray, int, list[str]]:
    parts = [np.zeros(0, np.float64)]
    skipped, problems = 0, []
    for batch in _batches(path):
        parts.append(np.array([row[by] for row in batch["rows"]], np.float64))
        skipped += len(batch["problems"])
        problems += batch["problems"][: 20 - len(problems)]
    return np.concatenate(parts), skipped, problems


def _write_kept(path: Path, to: Path, by: Score, threshold: float) -> int:
    kept = 0
    with atomic_stream(to) as stream:
        for batch in _batches(path):
            for row in batch["rows"]:
                if row[by] >= threshold:
                    stream.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogateescape") + b"\n")
                    kept += 1
    return kept
