"""Compositional probes: does the model prefer the true sentence to one made of nearly the same words?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tercet.config import Config, DataConfig
from tercet.data.images import decode
from tercet.data.inputs import to_batch
from tercet.data.json_rows import choose_layout, image_root
from tercet.data.loader import dealt
from tercet.data.probe_files import Benchmark, Probe, read_probes
from tercet.data.sources import find_files
from tercet.data.storage import is_url, missing, read_image
from tercet.device import cosines
from tercet.distributed import Ranks
from tercet.errors import TercetError
from tercet.model.tercet import Tercet
from tercet.tasks.encoding import encode_sentences, evaluating
from tercet.tasks.rerank import score_image

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

    def pixels(self, index: int, place: int, pixel_limit: int) -> np.ndarray:
        """Image `place` of row `index`, uint8 `[height, width, 3]`, cut to the row's part of it.

        Raises:
            TercetError: it cannot be read or decoded; begins with the row.
            BoxOutsideError: no pixel of it lies in the row's box.
        """
        probe = self.probes[index]
        location = f"{self.folders[index].rstrip('/')}/{probe.images[place]}{self.suffixes[index]}"
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
        cut = image[top:bottom, left:right]  # what reaches over an edge of the image is left out
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


@dataclass
class ProbeResult:
    """Scores of every row that could be read.

    Attributes:
        benchmark: which one.
        probes: the rows.
        scores: for each of `SCORERS`, of each row `[images, texts]`.
        problems: why other rows were left out.
    """

    benchmark: Benchmark
    probes: list[Probe] = field(default_factory=list)
    scores: dict[str, list[Tensor]] = field(default_factory=lambda: {name: [] for name in SCORERS})
    problems: list[str] = field(default_factory=list)

    def metrics(self) -> dict[str, dict[str, float]]:
        """Percentages by scorer: see `choice_scores`, for Winoground `winoground_scores`."""
        kinds = [probe.kind for probe in self.probes]
        measure = winoground_scores if self.benchmark == "winoground" else choice_scores
        return {name: measure(scores, kinds) for name, scores in self.scores.items()}

    @property
    def sizes(self) -> dict[str, int]:
        """How many rows were scored."""
        return {"samples": len(self.probes)}

    def predictions(self) -> list[dict[str, Any]]:
        """The scores of each row."""
        rows = []
        for index, probe in enumerate(self.probes):
            row: dict[str, Any] = {"row": probe.where, "texts": list(probe.texts)}
            rows.append(row | {name: scores[index].tolist() for name, scores in self.scores.items()})
        return rows


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


def evaluate_probes(model: Tercet, probes: ProbeSet, config: Config) -> ProbeResult:
    """Score every row by the dual encoder and by the fusion encoder; rows whose image is broken are left out.

    The rows are shared out over the ranks, and every rank gets all scores.

    Raises:
        TercetError: a box lies outside its image, no row can be read, or the model has no tokenizer.
    """
    result = ProbeResult(probes.benchmark)
    ranks = Ranks()
    rows = range(len(probes.probes))[: config.evaluate.limit]
    done: list[_Chunk | BoxOutsideError] = []
    with evaluating(model):
        try:
            for chunk, images in _chunks(probes, rows, config, model.config.vision.image_size, ranks):
                done.append(chunk)
                if images is not None:
                    _score(model, probes, chunk, images, config)
        except BoxOutsideError as error:
            done.append(error)
    for found in ranks.gather_interleaved(done):
        if isinstance(found, BoxOutsideError):
            raise found
        result.probes += [probes.probes[row] for row in found.rows]
        result.problems += found.problems
        for name, scores in found.scores.items():
            result.scores[name] += scores
    if not result.probes:
        raise TercetError(f"none of {len(rows)} rows can be read; the first: {result.problems[0]}")
    return result


@dataclass
class _Chunk:
    """Some rows: those that could be read, their scores as in `ProbeResult`, and why others were left out."""

    rows: list[int] = field(default_factory=list)
    scores: dict[str, list[Tensor]] = field(default_factory=lambda: {name: [] for name in SCORERS})
    problems: list[str] = field(default_factory=list)


def _score(model: Tercet, probes: ProbeSet, chunk: _Chunk, images: Tensor, config: Config) -> None:
    """Fill in the scores of a chunk's rows, whose images are `[images, 3, size, size]`."""
    device = next(model.parameters()).device
    encoded = encode_sentences(model, [text for row in chunk.rows for text in probes.probes[row].texts], config.data)
    image_embeds = model.encode_image(images.to(device))
    image_feats = model.project_image(image_embeds[:, 0]).cpu()
    image, text = 0, 0
    for row in chunk.rows:
        probe = probes.probes[row]
        ours = slice(image, image + len(probe.images))
        said = slice(text, text + len(probe.texts))
        embeds = [tokens.to(device) for tokens in encoded.text_embeds[said]]
        matching = [score_image(model, own, embeds).cpu() for own in image_embeds[ours]]
        chunk.scores["similarity"].append(cosines(image_feats[ours], encoded.text_feats[said]))
        chunk.scores["matching"].append(torch.stack(matching))
        image, text = ours.stop, said.stop


def _chunks(
    probes: ProbeSet, rows: range, config: Config, size: int, ranks: Ranks
) -> Iterator[tuple[_Chunk, Tensor | None]]:
    """Some rows at a time with their images `[images, 3, size, size]`, None where none can be read; those chunks that
    are dealt to this rank."""
    batch = config.evaluate.batch_size
    for number in dealt(-(-len(rows) // batch), ranks):
        chunk = _Chunk()
        images: list[np.ndarray] = []
        for row in rows[number * batch : (number + 1) * batch]:
            probe = probes.probes[row]
            try:
                own = [probes.pixels(row, place, config.data.pixel_limit) for place in range(len(probe.images))]
            except BoxOutsideError:
                raise
            except TercetError as error:
                chunk.problems.append(str(error))
                continue
            chunk.rows.append(row)
            images += own
        yield chunk, to_batch(images, size) if images else None


def _by_kind(right: Sequence[bool], kinds: Sequence[str]) -> dict[str, list[bool]]:
    found: dict[str, list[bool]] = {}
    for correct, kind in zip(right, kinds, strict=True):
        found.setdefault(kind, []).append(correct)
    return dict(sorted(found.items()))


def _percent(right: Sequence[bool]) -> float:
    return 100.0 * sum(right) / len(right)
