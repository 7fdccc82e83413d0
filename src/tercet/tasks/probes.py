"""Compositional probes: does the model prefer the true sentence to one made of nearly the same words?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tercet.config import Config, DataConfig
from tercet.data.class_readers import Benchmark, Probe, read_probes
from tercet.data.images import decode
from tercet.data.inputs import to_batch
from tercet.data.readers import find_files
from tercet.data.rows import choose_layout, image_root
from tercet.data.storage import is_url, missing, read_image
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
_LAYOUT_SAMPLES = 8


class BoxOutsideError(TercetError):
    """A row's box lies outside its image: a mistake in the file, unlike an image that cannot be read."""


@dataclass(frozen=True)
class ProbeSet:
    """Rows of one or more files of one benchmark, and where their images are.

    Attributes:
        benchmark: whose form the files have.
        probes: the rows.
        folders: the folder or URL of each row's images.
        suffixes: what follows each row's image names on the disk.
    """

    benchmark: Benchmark
    probes: list[Probe]
    folders: list[str]
    suffixes: list[str]

    def pixels(self, index: int, slot: int, pixel_limit: int) -> np.ndarray:
        """Image `slot` of row `index`, uint8 `[height, width, 3]`, cut to the row's part of it.

        Raises:
            TercetError: it cannot be read or decoded; begins with the row.
            BoxOutsideError: no pixel of it lies in the row's box.
        """
        probe = self.probes[index]
        location = f"{self.folders[index].rstrip('/')}/{probe.images[slot]}{self.suffixes[index]}"
        try:
            image = decode(read_image(location), location, pixel_limit)
        except FileNotFoundError as error:
            raise TercetError(f"{probe.where}: {missing(location)}") from error
        except (OSError, TercetError) as error:
            raise TercetError(f"{probe.where}: {error}") from error
        if probe.crop is None:
            return image
        height, width = image.shape[:2]
        left, top, right, bottom = (round(side) for side in probe.crop)
        cut = image[top:bottom, left:right]  # what reaches over an edge of the image is cut off
        if cut.size == 0:
            raise BoxOutsideError(
                f"{probe.where}: the box ({left}, {top}, {right}, {bottom}) lies outside {location}, "
                f"which has {width}x{height} pixels"
            )
        return cut


def open_probes(specs: Sequence[str], data: DataConfig, split: str) -> ProbeSet:
    """The rows of files of SugarCrepe, ARO or Winoground, over images below `data.image_root` or beside the file.

    Raises:
        TercetError: a file is missing or of no known form, files of different benchmarks, or no image is there.
    """
    del split  # these benchmarks have one
    found: list[tuple[str, Benchmark, list[Probe]]] = []
    for file in (file for spec in specs for file in find_files(spec)[0]):
        found.append((file, *read_probes(file)))
    if not found:
        raise TercetError("no probe given; name files of SugarCrepe, ARO or Winoground")
    benchmark = found[0][1]
    result = ProbeSet(benchmark, [], [], [])
    for file, kind, probes in found:
        if kind != benchmark:
            raise TercetError(f"{file} is of {kind}, {found[0][0]} of {benchmark}; measure one benchmark at a time")
        folder, suffix = _find_images(file, probes, data)
        result.probes.extend(probes)
        result.folders.extend([folder] * len(probes))
        result.suffixes.extend([suffix] * len(probes))
    return result


def _find_images(file: str, probes: list[Probe], data: DataConfig) -> tuple[str, str]:
    """The folder of a file's images and what follows their names: Winoground writes names without `.png`."""
    root = image_root(file, data)
    step = max(1, len(probes) // _LAYOUT_SAMPLES)
    names = [name for probe in probes[::step] for name in probe.images]
    ways = [(inside, suffix) for inside in ("", "images/") for suffix in ("", ".png", ".jpg")]
    layouts = [[f"{inside}{name}{suffix}" for name in names] for inside, suffix in ways]
    inside, suffix = ways[choose_layout(root, layouts)]
    if not is_url(root) and choose_layout(root, [[], *layouts]) == 0:
        raise TercetError(
            f"{file}: none of its images is there, such as {root}/{names[0]}; "
            "set data.image_root to the folder that the names start from"
        )
    return f"{root.rstrip('/')}/{inside}", suffix


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


def evaluate_probes(model: Tercet, probes: ProbeSet, config: Config) -> TaskResult:
    """Score every row by the dual encoder and by the fusion encoder; rows whose image is broken are skipped.

    Returns:
        Metrics are percentages by scorer, see `choice_scores` and, for Winoground, `winoground_scores`; predictions are
        the scores of each row.

    Raises:
        TercetError: a box lies outside its image, no row can be read, or the model has no tokenizer.
    """

    def score(rows: Sequence[int]) -> tuple[list[tuple[int, dict[str, Tensor]]], list[str]]:
        images: dict[int, list[np.ndarray]] = {}
        problems: list[str] = []
        for row in rows:
            try:
                slots = range(len(probes.probes[row].images))
                images[row] = [probes.pixels(row, slot, config.data.pixel_limit) for slot in slots]
            except BoxOutsideError:
                raise
            except TercetError as error:
                problems.append(str(error))
        return _score_rows(model, probes, images, config) if images else [], problems

    rows = range(len(probes.probes))[: config.evaluate.limit]
    parts = map_over_ranks(score, rows, config.evaluate.batch_size)
    found = [(probes.probes[row], scores) for part, _ in parts for row, scores in part]
    problems = [problem for _, part in parts for problem in part]
    require_some(found, len(rows), "rows", problems)
    measure = winoground_scores if probes.benchmark == "winoground" else choice_scores
    kinds = [probe.kind for probe, _ in found]
    return TaskResult(
        metrics={name: measure([scores[name] for _, scores in found], kinds) for name in SCORERS},
        sizes={"samples": len(found)},
        problems=problems,
        predictions=[
            {"row": probe.where, "texts": list(probe.texts)} | {name: own.tolist() for name, own in scores.items()}
            for probe, scores in found
        ],
    )


def _score_rows(
    model: Tercet, probes: ProbeSet, images: dict[int, list[np.ndarray]], config: Config
) -> list[tuple[int, dict[str, Tensor]]]:
    """For each row, whose decoded `images` are given, and by each scorer, `[images, texts]`."""
    device = model.temperature.device
    texts = encode_sentences(model, [text for row in images for text in probes.probes[row].texts], config.data)
    batch = to_batch([image for own in images.values() for image in own], model.config.vision.image_size)
    image_embeds = model.encode_image(batch.to(device))
    image_feats = model.project_image(image_embeds[:, 0]).cpu()
    scored: list[tuple[int, dict[str, Tensor]]] = []
    image, text = 0, 0
    for row, own in images.items():
        shown = slice(image, image + len(own))
        asked = slice(text, text + len(probes.probes[row].texts))
        tokens = [embeds.to(device) for embeds in texts.text_embeds[asked]]
        matching = torch.stack([match_image(model, embeds, tokens)[:, 1].cpu() for embeds in image_embeds[shown]])
        similarity = cosines(image_feats[shown], texts.text_feats[asked])
        scored.append((row, {"similarity": similarity, "matching": matching}))
        image, text = shown.stop, asked.stop
    return scored


def _by_kind(right: Sequence[bool], kinds: Sequence[str]) -> dict[str, list[bool]]:
    found: dict[str, list[bool]] = {}
    for correct, kind in zip(right, kinds, strict=True):
        found.setdefault(kind, []).append(correct)
    return dict(sorted(found.items()))


def _percent(right: Sequence[bool]) -> float:
    return 100.0 * sum(right) / len(right)


TASKS = {"probes": TaskSpec(open=open_probes, evaluate=evaluate_probes)}
