"""Keeping the pairs of a noisy source that a model finds to belong together.

    FILE                 kept pairs with their scores, a JSON object a line
    FILE.scores          every pair with its scores, as far as they were computed; another threshold needs no model

Pairs are scored a batch at a time, in the order of the source, so that a run that was stopped continues after the last
whole line, and no more than a batch is in memory beside eight bytes a pair.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch

from tercet.config import Config
from tercet.data.batch import ImageBatch
from tercet.data.loader import image_batches
from tercet.data.table import SampleTable
from tercet.data.tokenizer import clean_caption
from tercet.errors import TercetError
from tercet.files import atomic_stream
from tercet.model.hub import require_tokenizer
from tercet.model.tercet import Tercet
from tercet.tasks.evaluation import evaluating, within_positions

Score = Literal["match", "similarity"]
PROBLEMS_KEPT = 20


@dataclass
class FilterReport:
    """What a filter did.

    Attributes:
        kept: pairs at or above the threshold.
        threshold: the least score that is kept.
        by: which score.
        scores: of every pair `[pairs]`.
        skipped: images that could not be read.
        problems: why, for the first of them.
    """

    kept: int
    threshold: float
    by: Score
    scores: np.ndarray
    skipped: int
    problems: list[str]

    @property
    def scored(self) -> int:
        """Pairs that have a score."""
        return len(self.scores)


def filter_pairs(
    model: Tercet,
    source: SampleTable,
    config: Config,
    output: Path,
    identity: dict[str, Any],
    by: Score = "match",
    threshold: float | None = None,
    fraction: float | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> FilterReport:
    """Score the pairs of a source and write those that are kept.

    Args:
        model: with its tokenizer.
        source: the pairs.
        config: `data` and `evaluate.batch_size` are read.
        output: file of the kept pairs.
        identity: what the scores depend on (model, sources); a file of other scores is not continued.
        by: "match": the probability of a match by the fusion encoder; "similarity": the cosine of the dual encoder.
        threshold: the least score that is kept.
        fraction: instead, the fraction of the pairs that is kept, the best ones.
        progress: called after each batch with the images done so far, and all images.

    Raises:
        TercetError: neither or both of threshold and fraction; scores of another run lie there; nothing can be written.
    """
    if (threshold is None) == (fraction is None):
        raise TercetError("give either a threshold of the score or the fraction of pairs to keep")
    if fraction is not None and not 0 < fraction <= 1:
        raise TercetError(f"the fraction of pairs to keep is {fraction}; it lies above 0 and up to 1")
    path = output.with_name(f"{output.name}.scores")
    size, count, ids = config.evaluate.batch_size, source.image_count, source.image_ids
    shared_ids = ids if np.any(ids != np.arange(count)) else None
    with contextlib.closing(_Journal(path, {"scores": 1, **identity}, size)) as journal, evaluating(model):
        image_size, first = model.config.vision.image_size, journal.batches
        for batch in image_batches(source, config.data, image_size, size, first_batch=first):
            journal.append(score_batch(model, source, batch, config, shared_ids), batch.skipped)
            if progress is not None:
                progress(min(journal.batches * size, count), count)
    scores, skipped, problems = _read_scores(path, by)
    if not len(scores):
        raise TercetError("no pair could be scored" + (f"; the first problem: {problems[0]}" if problems else ""))
    if threshold is None:
        assert fraction is not None
        least = len(scores) - max(1, round(fraction * len(scores)))
        threshold = float(np.partition(scores, least)[least])
    kept = 0
    with atomic_stream(output) as stream:
        for row in (row for batch in _read_batches(path) for row in batch["rows"] if row[by] >= threshold):
            stream.write(_as_line(row))
            kept += 1
    return FilterReport(kept, threshold, by, scores, skipped, problems)


def score_batch(
    model: Tercet, source: SampleTable, batch: ImageBatch, config: Config, ids: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """A row for each pair of a batch of images: `image`, `caption`, `match`, `similarity`, `image_id` if there are."""
    if not len(batch):
        return []
    device = model.temperature.device
    indices = batch.indices.tolist()
    pairs = [(index, text) for index in indices for text in source.captions(index)]
    rows = {index: row for row, index in enumerate(indices)}
    owners = torch.tensor([rows[index] for index, _ in pairs], device=device)
    data = within_positions(config.data, model)
    texts = [clean_caption(text, data.max_words) for _, text in pairs]
    input_ids, mask = (part.to(device) for part in require_tokenizer(model).encode(texts, data.max_tokens))
    image_embeds, text_embeds = model.encode_image(batch.images.to(device)), model.encode_text(input_ids, mask)
    image_feats, text_feats = model.project_image(image_embeds[:, 0]), model.project_text(text_embeds[:, 0])
    similarity = (image_feats[owners] * text_feats).sum(dim=1).tolist()
    kv = model.project_kv(image_embeds).select(owners)
    match = model.match_logits(text_embeds, mask, kv).softmax(dim=1)[:, 1].tolist()
    return [
        {
            "image": source.location(index),
            "caption": text,
            **({} if ids is None else {"image_id": int(ids[index])}),
            "match": round(match[pair], 6),
            "similarity": round(similarity[pair], 6),
        }
        for pair, (index, text) in enumerate(pairs)
    ]


class _Journal:
    """The scores so far: a line that says what they are of, then a line for each batch.

    Attributes:
        batches: how many batches have their scores.
    """

    def __init__(self, path: Path, header: dict[str, Any], size: int) -> None:
        """Open `path` for batches of `size` images, and cut off what a killed run wrote last."""
        self._path, self._size, self.batches = path, size, 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream: BinaryIO = path.open("r+b" if path.exists() else "w+b")
        except OSError as error:
            raise TercetError(f"cannot write {path}: {error.strerror}; choose another file with --output") from error
        end = 0
        for number, line in enumerate(self._stream):
            value = _parse(line)
            if value is None:
                break
            if number == 0:
                self._check_header(value, header)
            elif value["size"] != size:
                self._stream.close()
                raise TercetError(
                    f"{path} holds batches of {value['size']} images; continue with --evaluate.batch_size "
                    f"{value['size']}, or delete it"
                )
            self.batches, end = number, end + len(line)
        self._stream.seek(end)
        self._stream.truncate()
        if not end:
            self._write(header)

    def _check_header(self, found: Any, header: dict[str, Any]) -> None:
        differ = [key for key in header if not isinstance(found, dict) or found.get(key) != header[key]]
        if differ:
            self._stream.close()
            raise TercetError(
                f"{self._path} holds scores of another {' and '.join(differ)}; delete it, or choose another file"
            )

    def append(self, rows: list[dict[str, Any]], problems: list[str]) -> None:
        """Add the scores of a batch; once this returns, a kill does not lose them."""
        self._write({"size": self._size, "rows": rows, "problems": problems})
        self.batches += 1

    def _write(self, value: dict[str, Any]) -> None:
        try:
            self._stream.write(_as_line(value))
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise TercetError(
                f"cannot write {self._path}: {error.strerror}; free some space and run the same command again: "
                "it continues where it stopped"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _as_line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape") + b"\n"


def _parse(line: bytes) -> Any:
    """The value of a whole line; None of one that was cut off."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None


def _read_batches(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as stream:
        next(stream)
        yield from map(json.loads, stream)


def _read_scores(path: Path, by: Score) -> tuple[np.ndarray, int, list[str]]:
    """The scores of all pairs, how many images were skipped, and why."""
    parts = [np.zeros(0, np.float64)]
    skipped, problems = 0, []
    for batch in _read_batches(path):
        parts.append(np.array([row[by] for row in batch["rows"]], np.float64))
        skipped += len(batch["problems"])
        problems += batch["problems"][: PROBLEMS_KEPT - len(problems)]
    return np.concatenate(parts), skipped, problems
