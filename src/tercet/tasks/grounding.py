"""Grounding without box supervision: where a heatmap points, and which of a detector's boxes it chooses.

Training is that of retrieval, on expressions in place of captions (section 5.2 of arXiv 2107.07651); boxes are only
measured against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tercet.config import Config
from tercet.data.grounding_files import check_boxes
from tercet.data.inputs import to_batch
from tercet.data.loader import dealt
from tercet.data.samples import Sample, SampleSource
from tercet.data.tokenizer import clean_question
from tercet.distributed import Ranks
from tercet.errors import TercetError
from tercet.model.tercet import Tercet
from tercet.tasks.answering import first_pieces
from tercet.tasks.boxes import HIT, Box, choose_box, inside, overlap, peak
from tercet.tasks.encoding import evaluating, tokenise
from tercet.tasks.heatmaps import (
    answered_heatmaps,
    average_words,
    blur,
    contrast_heatmaps,
    enlarge,
    matched_heatmaps,
    to_grid,
)


@dataclass(frozen=True)
class Found:
    """What the heatmap of one expression found.

    Attributes:
        sample: the expression.
        size: (width, height) of the image in the pixels that boxes are given in; None where it is not known.
        point: the strongest point of the map, in those pixels; None where nothing pointed.
        box: the detector's box that was chosen; None where there is no detector.
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
        """Whether the middle of the image lies in one of its boxes: what pointing without looking finds."""
        return self.size is not None and inside((self.size[0] / 2, self.size[1] / 2), self.boxes)

    @property
    def chosen(self) -> bool:
        """Whether the chosen box overlaps one of its boxes by half."""
        return self.box is not None and any(overlap(self.box, box) >= HIT for box in self.boxes)


@dataclass
class GroundingResult:
    """An evaluation.

    Attributes:
        found: every expression whose image could be read.
        problems: why others were left out.
    """

    found: list[Found] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def metrics(self) -> dict[str, dict[str, float]]:
        """See `grounding_scores`."""
        return grounding_scores(self.found)

    @property
    def sizes(self) -> dict[str, int]:
        """How many expressions, in how many images."""
        return {"samples": len(self.found), "images": len({found.sample.images for found in self.found})}

    def predictions(self) -> list[dict[str, Any]]:
        """The point, and the chosen box where there is a detector, of each expression; see `tercet.tasks.score`."""
        rows = []
        for found in self.found:
            row: dict[str, Any] = {"sample": found.sample.key, "text": found.sample.text, "point": found.point}
            row["ref_id"] = found.sample.target["ref_id"]
            row["box"] = found.box
            rows.append({key: value for key, value in row.items() if value is not None})
        return rows


def grounding_scores(found: Sequence[Found]) -> dict[str, dict[str, float]]:
    """Shares of expressions, in percent.

    Returns:
        `pointing`, where there are points: `all` whose point lies in a box of theirs, `centre` whose box holds the
        middle of the image, and those of each kind of thing that are pointed at.  `boxes`, where a detector gave some:
        `all` whose chosen box overlaps by half, and those of each split.
    """
    result: dict[str, dict[str, float]] = {}
    if any(item.point is not None for item in found):
        pointing = {"all": _percent(item.pointed for item in found)}
        if all(item.size is not None for item in found):
            pointing["centre"] = _percent(item.centred for item in found)
        for kind in sorted({kind for item in found for kind in item.sample.target["kinds"]}):
            pointing[kind] = _percent(item.pointed for item in found if kind in item.sample.target["kinds"])
        result["pointing"] = pointing
    if any(item.box is not None for item in found):
        result["boxes"] = {"all": _percent(item.chosen for item in found)}
        for split in sorted({item.sample.target["split"] or "" for item in found} - {""}):
            result["boxes"][split] = _percent(item.chosen for item in found if item.sample.target["split"] == split)
    return result


def evaluate_grounding(model: Tercet, source: SampleSource, config: Config) -> GroundingResult:
    """Point at every expression of a source, and choose among a detector's boxes where there are any.

    Args:
        model: with its tokenizer; its mode is kept.
        source: expressions with boxes.
        config: `data` and `evaluate` are read.

    Raises:
        TercetError: a box lies outside its image, no image can be read, the model has no tokenizer or no such layer, or
            it points by answers and has no answer decoder, or a question has no place for the expression.
    """
    for question in config.evaluate.heatmap_questions:
        if "{}" not in question:
            raise TercetError(
                f"evaluate.heatmap_questions: {question!r} has no {{}} where the expression goes, as in 'what is {{}}?'"
            )
    result = GroundingResult()
    ranks = Ranks()
    done: list[tuple[list[Found], list[str]]] = []
    with evaluating(model):
        for samples, images, pixels, problems in _chunks(source, config, model.config.vision.image_size, ranks):
            maps = [] if images is None else expression_maps(model, images, samples, config)
            read = zip(maps, samples, pixels, strict=True)
            done.append(([read_map(heatmap, sample, own.shape[:2]) for heatmap, sample, own in read], problems))
    for found, problems in ranks.gather_interleaved(done):
        result.found += found
        result.problems += problems
    if not result.found:
        first = f"; the first: {result.problems[0]}" if result.problems else ""
        raise TercetError(f"no expression whose image can be read{first}")
    return result


def expression_maps(model: Tercet, images: Tensor, samples: Sequence[Sample], config: Config) -> list[Tensor]:
    """A map `[rows, columns]` for each expression, on the host.

    Args:
        model: in evaluation mode.
        images: the images of the samples, each once, in the order in which the samples name them.
        samples: expressions, those of one image beside each other.
        config: `data` and `evaluate` are read.
    """
    device, layer = next(model.parameters()).device, config.evaluate.heatmap_layer
    texts, images = [sample.text for sample in samples], images.to(device)
    side = model.config.vision.image_size
    counts = list(_runs([sample.images[0] for sample in samples]))
    if config.evaluate.heatmap == "itc":
        input_ids, attention_mask = tokenise(model, texts, config.data)
        text_embeds = model.encode_text(input_ids.to(device), attention_mask.to(device))
        feats = model.project_text(text_embeds[:, 0]).split(counts)
        maps = torch.cat([contrast_heatmaps(model, images[row][None], own, layer) for row, own in enumerate(feats)])
        return _grids(maps, side, config)
    image_embeds = model.encode_image(images)
    if config.evaluate.heatmap == "itm":
        maps = _fusion_maps(model, image_embeds, counts, tokenise(model, texts, config.data), matched_heatmaps, layer)
        return _grids(maps, side, config)
    answered = partial(answered_heatmaps, pieces=first_pieces(model))
    total = torch.zeros(len(texts), image_embeds.shape[1] - 1, device=device)
    for question in config.evaluate.heatmap_questions:
        asked = [question.replace("{}", text) for text in texts]
        tokens = tokenise(model, asked, config.data, clean_question)
        maps = _fusion_maps(model, image_embeds, counts, tokens, answered, layer)
        # Every question weighs alike, however sure the model is of its answer.
        total += maps / maps.sum(dim=1, keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
    return _grids(total, side, config)


def _grids(maps: Tensor, side: int, config: Config) -> list[Tensor]:
    """Maps `[texts, patches]` of square images as `[rows, columns]` each, on the host."""
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


def read_map(heatmap: Tensor, sample: Sample, shape: tuple[int, int]) -> Found:
    """Where a map points, and which candidate it chooses.

    Args:
        heatmap: `[rows, columns]`.
        sample: the expression.
        shape: (height, width) of the image as it was read; boxes are in these pixels where the sample tells no size.

    Raises:
        TercetError: a box lies outside the image; names file and row.
    """
    target = sample.target
    width, height = target["size"] or (shape[1], shape[0])
    check_boxes([as_box(box) for box in target["boxes"]], width, height, sample.key)
    large = enlarge(heatmap[None], round(height), round(width))[0]
    candidates = [as_box(box) for box in target["candidates"] or []]
    box = candidates[choose_box(large, candidates)[0]] if candidates else None
    return Found(sample, (width, height), peak(large), box)


def as_box(box: Sequence[float]) -> Box:
    """Four numbers, as JSON gives them, as a box."""
    left, top, right, bottom = box
    return left, top, right, bottom


def _chunks(
    source: SampleSource, config: Config, size: int, ranks: Ranks
) -> Iterator[tuple[list[Sample], Tensor | None, list[np.ndarray], list[str]]]:
    """Expressions of some images at a time, with their images resized, for each expression its image as read, and why
    others are left out; those chunks that are dealt to this rank."""
    by_image: dict[int, list[int]] = {}
    for index in range(source.sample_count):
        by_image.setdefault(source.sample(index).images[0], []).append(index)
    images = list(by_image)[: config.evaluate.limit]
    batch = config.evaluate.batch_size
    for number in dealt(-(-len(images) // batch), ranks):
        start, problems = number * batch, []
        samples: list[Sample] = []
        read: list[np.ndarray] = []
        pixels: list[np.ndarray] = []
        for image in images[start : start + batch]:
            own = [source.sample(index) for index in by_image[image]]
            try:
                read.append(source.pixels(image, config.data.pixel_limit))
            except (OSError, TercetError) as error:
                problems.append(f"{own[0].key}: {' '.join(str(error).split())}")
                continue
            samples += own
            pixels += [read[-1]] * len(own)
        yield samples, to_batch(read, size) if read else None, pixels, problems


def _runs(values: Sequence[int]) -> Iterator[int]:
    """Lengths of the runs of equal neighbours."""
    start = 0
    for index in range(1, len(values) + 1):
        if index == len(values) or values[index] != values[start]:
            yield index - start
            start = index


def _percent(hits: Iterable[bool]) -> float:
    values = list(hits)
    return 100.0 * sum(values) / len(values) if values else float("nan")
