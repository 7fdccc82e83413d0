"""Grounding without box supervision: where a heatmap points, and which of a detector's boxes it chooses.

Training is that of retrieval, on expressions in place of captions (section 5.2 of arXiv 2107.07651); boxes are only
measured against.  A box is (left, top, right, bottom) in pixels.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tercet.config import Config
from tercet.data.grounding_readers import check_boxes, open_expressions
from tercet.data.inputs import to_batch
from tercet.data.table import Sample, SampleTable
from tercet.data.tokenizer import clean_question
from tercet.errors import TercetError
from tercet.model.tercet import Tercet
from tercet.tasks.answering import first_pieces
from tercet.tasks.encoding import tokenise
from tercet.tasks.evaluation import Metrics, TaskResult, map_over_ranks, require_some
from tercet.tasks.heatmaps import (
    answer_heatmaps,
    average_words,
    blur,
    contrast_heatmaps,
    enlarge,
    match_heatmaps,
    to_grid,
)
from tercet.tasks.retrieval import build_pretraining
from tercet.tasks.task import TaskSpec

Box = tuple[float, float, float, float]
HIT = 0.5  # intersection over union from which a box counts as found


@dataclass(frozen=True)
class Localization:
    """Where the heatmap of one expression is strongest.

    Attributes:
        sample: the expression.
        size: (width, height) of the image in the pixels that boxes are given in; None where it is not known.
        point: the strongest point of the map, in those pixels; None where nothing pointed.
        box: the chosen box of the detector; None where there is no detector.
    """

    sample: Sample
    size: tuple[float, float] | None
    point: tuple[float, float] | None
    box: Box | None

    @property
    def boxes(self) -> list[Box]:
        """What the expression means."""
        return [as_box(box) for box in self.sample.target["boxes"]]

    @property
    def pointed(self) -> bool:
        """Whether the point lies in one of its boxes."""
        return self.point is not None and inside(self.point, self.boxes)

    @property
    def centred(self) -> bool:
        """Whether the middle of the image lies in one of its boxes: the baseline that never looks."""
        return self.size is not None and inside((self.size[0] / 2, self.size[1] / 2), self.boxes)

    @property
    def chosen(self) -> bool:
        """Whether the chosen box overlaps one of its boxes by half."""
        return self.box is not None and any(overlap(self.box, box) >= HIT for box in self.boxes)


def grounding_metrics(found: Sequence[Localization]) -> Metrics:
    """Percentages of expressions.

    Returns:
        `pointing`, where there are points: `all` whose point lies in a box of theirs, `centre` whose box holds the
        middle of the image, and those of each kind of thing that are pointed at.  `boxes`, where a detector gave some:
        `all` whose chosen box overlaps by half, and those of each split.
    """
    result: Metrics = {}
    if any(item.point is not None for item in found):
        result["pointing"] = {"all": _percent(item.pointed for item in found)}
        if all(item.size is not None for item in found):
            result["pointing"]["centre"] = _percent(item.centred for item in found)
        by_kind: dict[str, list[bool]] = defaultdict(list)
        for item in found:
            for kind in item.sample.target["kinds"]:
                by_kind[kind].append(item.pointed)
        result["pointing"] |= {kind: _percent(by_kind[kind]) for kind in sorted(by_kind)}
    if any(item.box is not None for item in found):
        result["boxes"] = {"all": _percent(item.chosen for item in found)}
        by_split: dict[str, list[bool]] = defaultdict(list)
        for item in found:
            by_split[item.sample.target["split"] or ""].append(item.chosen)
        result["boxes"] |= {split: _percent(by_split[split]) for split in sorted(by_split) if split}
    return result


def evaluate_grounding(model: Tercet, source: SampleTable, config: Config) -> TaskResult:
    """Point at every expression of a source, and choose among a detector's boxes where there are any.

    Args:
        model: with its tokenizer, in evaluation mode.
        source: expressions with boxes.
        config: `data` and `evaluate` are read; `evaluate.limit` counts images.

    Raises:
        TercetError: a box lies outside its image, no image can be read, the model has no tokenizer or no such layer, or
            it points by answers and has no answer decoder, or a question has no slot for the expression.
    """
    for question in config.evaluate.heatmap_questions:
        if "{}" not in question:
            raise TercetError(
                f"evaluate.heatmap_questions: {question!r} has no {{}} where the expression goes, as in 'what is {{}}?'"
            )
    by_image: dict[int, list[Sample]] = defaultdict(list)
    for sample in map(source.sample, range(source.sample_count)):
        by_image[sample.images[0]].append(sample)

    def localize(images: Sequence[int]) -> tuple[list[Localization], list[str]]:
        """The expressions of some images, and why others are skipped."""
        read: dict[int, np.ndarray] = {}
        problems: list[str] = []
        for image in images:
            try:
                read[image] = source.pixels(image, config.data.pixel_limit)
            except (OSError, TercetError) as error:
                problems.append(f"{by_image[image][0].key}: {' '.join(str(error).split())}")
        if not read:
            return [], problems
        samples = [sample for image in read for sample in by_image[image]]
        batch = to_batch(list(read.values()), model.config.vision.image_size)
        maps = expression_maps(model, batch, samples, config)
        shapes = [read[sample.images[0]].shape[:2] for sample in samples]
        located = [read_map(*each) for each in zip(maps, samples, shapes, strict=True)]
        return located, problems

    parts = map_over_ranks(localize, list(by_image)[: config.evaluate.limit], config.evaluate.batch_size)
    found = [item for part, _ in parts for item in part]
    problems = [problem for _, part in parts for problem in part]
    require_some(found, len(by_image), "images", problems)
    sizes = {"samples": len(found), "images": len({item.sample.images for item in found})}
    return TaskResult(grounding_metrics(found), sizes, problems, [_prediction(item) for item in found])


def _prediction(item: Localization) -> dict[str, Any]:
    """The point of an expression, and the chosen box where there is a detector; see `tercet.tasks.score`."""
    row: dict[str, Any] = {"sample": item.sample.key, "text": item.sample.text, "point": item.point}
    row |= {"ref_id": item.sample.target["ref_id"], "box": item.box}
    return {key: value for key, value in row.items() if value is not None}


def expression_maps(model: Tercet, images: Tensor, samples: Sequence[Sample], config: Config) -> list[Tensor]:
    """A map `[rows, columns]` for each expression, on the host.

    Args:
        model: in evaluation mode.
        images: the images of the samples, each once, in the order in which the samples name them.
        samples: expressions, those of one image beside each other.
        config: `data` and `evaluate` are read.
    """
    device, layer, mode = model.temperature.device, config.evaluate.heatmap_layer, config.evaluate.heatmap
    texts, images = [sample.text for sample in samples], images.to(device)
    counts = [len(list(own)) for _, own in itertools.groupby(sample.images[0] for sample in samples)]
    if mode == "itc":
        input_ids, attention_mask = (part.to(device) for part in tokenise(model, texts, config.data))
        feats = model.project_text(model.encode_text(input_ids, attention_mask)[:, 0]).split(counts)
        maps = torch.cat([contrast_heatmaps(model, images[row][None], own, layer) for row, own in enumerate(feats)])
    else:
        image_embeds = model.encode_image(images)
        if mode == "itm":
            tokens = tokenise(model, texts, config.data)
            maps = _fusion_maps(model, image_embeds, counts, tokens, match_heatmaps, layer)
        else:
            maps = torch.zeros(len(texts), image_embeds.shape[1] - 1, device=device)
            answered = partial(answer_heatmaps, pieces=first_pieces(model))
            for question in config.evaluate.heatmap_questions:
                asked = [question.replace("{}", text) for text in texts]
                tokens = tokenise(model, asked, config.data, clean_question)
                own = _fusion_maps(model, image_embeds, counts, tokens, answered, layer)
                # Every question weighs the same, however sure the model is of its answer.
                maps += own / own.sum(dim=1, keepdim=True).clamp(min=torch.finfo(own.dtype).tiny)
    side = model.config.vision.image_size
    return list(blur(to_grid(maps.float().cpu(), side, side), config.evaluate.heatmap_blur))


def _fusion_maps(
    model: Tercet,
    image_embeds: Tensor,
    counts: Sequence[int],
    tokens: tuple[Tensor, Tensor],
    heatmaps: Callable[[Tercet, Tensor, Tensor, Tensor, int | None], tuple[Tensor, Tensor]],
    layer: int | None,
) -> Tensor:
    """`heatmaps` of texts `[texts, patches]`, averaged over words; `counts` of them are of each image in turn."""
    input_ids, mask = (part.to(image_embeds.device) for part in tokens)
    text_embeds = model.encode_text(input_ids, mask)
    maps = []
    for row, (own, own_mask) in enumerate(zip(text_embeds.split(counts), mask.split(counts), strict=True)):
        # Padded to the longest of its own image alone.
        longest = int(own_mask.sum(dim=1).max())
        own_mask = own_mask[:, :longest]
        words, _ = heatmaps(model, image_embeds[row][None], own[:, :longest], own_mask, layer)
        maps.append(average_words(words, own_mask))
    return torch.cat(maps)


def read_map(heatmap: Tensor, sample: Sample, shape: tuple[int, int]) -> Localization:
    """Where a map points, and which candidate it chooses.

    Args:
        heatmap: `[rows, columns]`.
        sample: the expression.
        shape: (height, width) of the image as it was read; boxes are in these pixels where the sample gives no size.

    Raises:
        TercetError: a box lies outside the image; names file and row.
    """
    target = sample.target
    width, height = target["size"] or (shape[1], shape[0])
    check_boxes([as_box(box) for box in target["boxes"]], width, height, sample.key)
    large = enlarge(heatmap[None], round(height), round(width))[0]
    candidates = [as_box(box) for box in target["candidates"] or []]
    box = candidates[choose_box(large, candidates)[0]] if candidates else None
    return Localization(sample, (width, height), peak(large), box)


def as_box(box: Sequence[float]) -> Box:
    """Four numbers, as JSON has them, as a box."""
    left, top, right, bottom = box
    return left, top, right, bottom


def box_scores(heatmap: Tensor, boxes: Sequence[Box]) -> Tensor:
    """How much of a map lies in each box: the sum over its pixels over the root of its area, `[boxes]`.

    Args:
        heatmap: `[height, width]`, at the size that the boxes are given in.
        boxes: the candidates.
    """
    scores = []
    for left, top, right, bottom in boxes:
        within = heatmap[max(0, int(top)) : max(0, int(bottom)), max(0, int(left)) : max(0, int(right))]
        scores.append(within.sum() / ((right - left) * (bottom - top)) ** 0.5)
    return torch.stack(scores)


def choose_box(heatmap: Tensor, boxes: Sequence[Box]) -> tuple[int, float]:
    """Index and score of the box with the highest score; of equal ones the first.

    Where no score is positive, the published code keeps the box of the expression before; here it is still the best.
    """
    scores = box_scores(heatmap, boxes)
    best = int(scores.argmax())
    return best, float(scores[best])


def overlap(first: Box, second: Box, published: bool = False) -> float:
    """Intersection over union of two boxes; `published` counts one of at most a pixel across, or down, as none."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    least = 1.0 if published else 0.0
    if width <= least or height <= least:
        return 0.0
    shared = width * height
    return shared / (_area(first) + _area(second) - shared)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def peak(heatmap: Tensor) -> tuple[float, float]:
    """The middle (x, y) of the strongest pixel of a map `[height, width]`."""
    row, column = divmod(int(heatmap.argmax()), heatmap.shape[1])
    return column + 0.5, row + 0.5


def inside(point: tuple[float, float], boxes: Iterable[Box]) -> bool:
    """Whether a point lies in any of the boxes, their edges included."""
    x, y = point
    return any(left <= x <= right and top <= y <= bottom for left, top, right, bottom in boxes)


def _percent(hits: Iterable[bool]) -> float:
    values = list(hits)
    return 100.0 * sum(values) / len(values) if values else float("nan")


TASKS = {
    # Trained as retrieval is, with expressions for captions; boxes are only measured against.
    "grounding": TaskSpec(
        open=open_expressions,
        evaluate=evaluate_grounding,
        build=build_pretraining,
        selection_metrics=("boxes.all", "pointing.all"),
        samples=False,
    )
}
