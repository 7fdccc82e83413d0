"""Compositional probes: does the model prefer the true sentence to one made of nearly the same words?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tercet.config import Config, DataConfig
from tercet.data.class_readers import Benchmark, Probe, read_probes
from tercet.data.inputs import to_batch
from tercet.data.loader import describe
from tercet.data.readers import find_files
from tercet.data.rows import choose_layout
from tercet.data.table import Sample, SampleTable, concatenate
from tercet.data.task_readers import TaskBuilder
from tercet.device import cosines
from tercet.errors import TercetError
from tercet.model.tercet import Tercet
from tercet.tasks.encoding import encode_sentences
from tercet.tasks.evaluation import TaskResult, map_over_ranks, require_some
from tercet.tasks.rerank import match_image
from tercet.tasks.task import TaskSpec

SCORERS = ("similarity", "matching")
FEWEST_OF_A_KIND = 25  # rows of a kind whose accuracy is worth a number, where there are many kinds
MANY_KINDS = 12
ROWS_PROBED = 8


def open_probes(specs: Sequence[str], data: DataConfig, split: str) -> SampleTable:
    """The rows of files of SugarCrepe, ARO or Winoground, over images below `data.image_root` or beside the file.

    A target is `{"benchmark", "texts", "kind", "crop"}`: text i is true of image i alone; `crop` (left, top, right,
    bottom) is the part of the image that the row is about, or None.

    Raises:
        TercetError: a file is missing or of no known form, files of different benchmarks, or no image is there.
    """
    del split  # these benchmarks have one
    tables: list[SampleTable] = []
    first: tuple[str, Benchmark] | None = None
    for file in (file for spec in specs for file in find_files(spec)[0]):
        benchmark, probes = read_probes(file)
        first = first or (file, benchmark)
        if benchmark != first[1]:
            raise TercetError(f"{file} is of {benchmark}, {first[0]} of {first[1]}; measure one benchmark at a time")
        tables.append(_probe_table(file, benchmark, probes, data))
    if not tables:
        raise TercetError("no probe given; name files of SugarCrepe, ARO or Winoground")
    return concatenate(tables)


def _probe_table(file: str, benchmark: Benchmark, probes: Sequence[Probe], data: DataConfig) -> SampleTable:
    builder = TaskBuilder(file, data)
    # Winoground writes names without their ending.
    step = max(1, len(probes) // ROWS_PROBED)
    names = [name for probe in probes[::step] for name in probe.images]
    ways = [(inside, suffix) for inside in ("", "images/") for suffix in ("", ".png", ".jpg")]
    inside, suffix = choose_layout(builder.root, ways, lambda way: [f"{way[0]}{name}{way[1]}" for name in names])
    for probe in probes:
        target = {"benchmark": benchmark, "texts": probe.texts, "kind": probe.kind, "crop": probe.crop}
        builder.add(probe.where, [f"{inside}{name}{suffix}" for name in probe.images], probe.texts[0], target)
    return builder.finish()


def choice_scores(scores: Sequence[Tensor], kinds: Sequence[str]) -> dict[str, float]:
    """How often the first text, the true one, scores higher than every other; a tie counts as wrong.

    Args:
        scores: `[1, texts]` of each row.
        kinds: what each row tests.
    """
    right = [bool((row[0, 0] > row[0, 1:]).all()) for row in scores]
    by_kind = _by_kind(right, kinds)
    means = {kind: _percent(found) for kind, found in by_kind.items()}
    result = {"all": _percent(right)}
    if len(means) > 1:
        result["mean"] = sum(means.values()) / len(means)
        few = len(means) <= MANY_KINDS
        result |= {kind: mean for kind, mean in means.items() if few or len(by_kind[kind]) >= FEWEST_OF_A_KIND}
    return result


def winoground_scores(scores: Sequence[Tensor], kinds: Sequence[str]) -> dict[str, float]:
    """Winoground's three scores (arXiv 2204.03162, equations 1 to 3), and the group score by kind.

    `text`: for both images the right text scores higher; `image`: for both texts the right image; `group`: both.

    Args:
        scores: `[2 images, 2 texts]` of each row.
        kinds: what each row tests.
    """
    text = [bool(row[0, 0] > row[0, 1] and row[1, 1] > row[1, 0]) for row in scores]
    image = [bool(row[0, 0] > row[1, 0] and row[1, 1] > row[0, 1]) for row in scores]
    group = [first and second for first, second in zip(text, image, strict=True)]
    result = {"text": _percent(text), "image": _percent(image), "group": _percent(group)}
    by_kind = _by_kind(group, kinds)
    if len(by_kind) > 1:
        result |= {f"group {kind}": _percent(found) for kind, found in by_kind.items()}
    return result


def evaluate_probes(model: Tercet, source: SampleTable, config: Config) -> TaskResult:
    """Score every row by the dual encoder and by the fusion encoder; rows whose image is broken are skipped.

    Returns:
        Metrics are percentages by scorer, see `choice_scores` and, for Winoground, `winoground_scores`; predictions are
        the scores of each row.

    Raises:
        TercetError: a box lies outside its image, no row can be read, or the model has no tokenizer.
    """

    def score(rows: Sequence[int]) -> tuple[list[tuple[Sample, dict[str, Tensor]]], list[str]]:
        read: list[tuple[Sample, list[np.ndarray]]] = []
        skipped: list[str] = []
        for sample in map(source.sample, rows):
            try:
                images = [source.pixels(image, config.data.pixel_limit) for image in sample.images]
            except (OSError, TercetError) as error:
                skipped.append(describe(sample.key, error))
                continue
            read.append((sample, [crop(image, sample) for image in images]))
        return score_rows(model, read, config) if read else [], skipped

    rows = range(source.sample_count)[: config.evaluate.limit]
    parts = map_over_ranks(score, rows, config.evaluate.batch_size)
    found = [row for part, _ in parts for row in part]
    problems = [*source.rejected, *(problem for _, part in parts for problem in part)]
    require_some(found, len(rows), "rows", problems)
    samples = [sample for sample, _ in found]
    measure = winoground_scores if samples[0].target["benchmark"] == "winoground" else choice_scores
    kinds = [sample.target["kind"] for sample in samples]
    return TaskResult(
        metrics={name: measure([scores[name] for _, scores in found], kinds) for name in SCORERS},
        sizes={"samples": len(found)},
        problems=problems,
        predictions=[
            {"row": sample.key, "texts": sample.target["texts"]} | {name: own.tolist() for name, own in scores.items()}
            for sample, scores in found
        ],
    )


def crop(image: np.ndarray, sample: Sample) -> np.ndarray:
    """The part of `image`, uint8 `[height, width, 3]`, that a row is about; what reaches over an edge is cut off.

    Raises:
        TercetError: it holds no pixel of the image: a mistake in the file, unlike an image that cannot be read.
    """
    if sample.target["crop"] is None:
        return image
    left, top, right, bottom = (round(side) for side in sample.target["crop"])
    part = image[top:bottom, left:right]
    if part.size == 0:
        height, width = image.shape[:2]
        raise TercetError(
            f"{sample.key}: the box ({left}, {top}, {right}, {bottom}) lies outside its image of {width}x{height} "
            "pixels"
        )
    return part


def score_rows(
    model: Tercet, rows: Sequence[tuple[Sample, list[np.ndarray]]], config: Config
) -> list[tuple[Sample, dict[str, Tensor]]]:
    """For each row, given with its images, and by each scorer, `[images, texts]`."""
    device = model.temperature.device
    texts = encode_sentences(model, [text for sample, _ in rows for text in sample.target["texts"]], config.data)
    batch = to_batch([image for _, images in rows for image in images], model.config.vision.image_size)
    image_embeds = model.encode_image(batch.to(device))
    image_feats = model.project_image(image_embeds[:, 0]).cpu()
    scored: list[tuple[Sample, dict[str, Tensor]]] = []
    image, text = 0, 0
    for sample, images in rows:
        own = slice(image, image + len(images))
        choices = slice(text, text + len(sample.target["texts"]))
        tokens = [embeds.to(device) for embeds in texts.text_embeds[choices]]
        matching = torch.stack([match_image(model, embeds, tokens)[:, 1].cpu() for embeds in image_embeds[own]])
        similarity = cosines(image_feats[own], texts.text_feats[choices])
        scored.append((sample, {"similarity": similarity, "matching": matching}))
        image, text = own.stop, choices.stop
    return scored


def _by_kind(right: Sequence[bool], kinds: Sequence[str]) -> dict[str, list[bool]]:
    found: dict[str, list[bool]] = {}
    for correct, kind in zip(right, kinds, strict=True):
        found.setdefault(kind, []).append(correct)
    return dict(sorted(found.items()))


def _percent(right: Sequence[bool]) -> float:
    return 100.0 * sum(right) / len(right)


TASKS = {"probes": TaskSpec(open=open_probes, evaluate=evaluate_probes)}
