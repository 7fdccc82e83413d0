"""Commands on the data itself: `data pack`, `data inspect`, `data filter`, `data scenes` and `tokenizer`."""

from __future__ import annotations

import json as json_format
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tercet.arguments import DataKeys, EvaluateKeys
from tercet.commands.models import DEMO_MODEL, load_predictor, model_and_config
from tercet.commands.terminal import print_problems, print_table, progress_bar
from tercet.config_io import default_config
from tercet.errors import TercetError

if TYPE_CHECKING:
    from tercet.data.packing import KeptPairs

NAMED = 10  # groups of duplicates and broken images that are named


def data_pack(
    sources: list[str],
    *,
    output: Path,
    name: str = "pairs",
    shard_size: int = 5000,
    resize: int | None = None,
    encoding: Literal["keep", "jpg", "png", "webp"] = "keep",
    quality: int = 92,
    keep: Path | None = None,
    json: bool = False,
    **overrides: DataKeys,
) -> None:
    """Write pairs as WebDataset shards.  Run again after a stop of any kind, it writes the shards that are missing.

    Args:
        sources: sources of pairs, as --data.train takes them.
        output: folder of the shards.
        name: prefix of the shards' names.
        shard_size: samples in each shard.
        resize: shrink images whose shorter side is longer than this; default: no resizing.
        encoding: keep: images that are not shrunk stay as they are, to the byte; else all are encoded again.
        quality: of JPEG and WebP, 1 to 100.
        keep: pack only the pairs that `tercet data filter` wrote to this file.
        json: print the numbers as one JSON object.
    """
    if shard_size < 1 or not 1 <= quality <= 100 or (resize is not None and resize < 1):
        raise TercetError("--shard-size and --resize must be 1 or more, --quality between 1 and 100")
    from tercet.data.packing import PackOptions, PackReport, pack
    from tercet.data.readers import open_sources

    data = default_config(overrides).data
    source = open_sources(sources, data)
    print_problems("rejected", source.rejected)
    options = PackOptions(name, shard_size, resize, encoding, quality, data.pixel_limit)
    report, before = PackReport(), None
    with progress_bar("packing", "shards") as progress:
        kept = None if keep is None else _kept_pairs(keep)
        for done, total, report in pack(source, sources, output, options, data.workers, kept):
            if before is None and done:
                print(f"{done} of {total} shards exist already", file=sys.stderr)
            before = report
            progress(done, total)
    print_problems("skipped", report.problems)
    if json:
        print(json_format.dumps(asdict(report)))
        return
    print(
        f"{report.images} images with {report.pairs} captions in {report.shards} shards, "
        f"{report.bytes / 1e6:.1f} MB; {report.skipped} images could not be read"
    )
    print(f"They are in {output}; train on them with --data.train {output}")


def data_inspect(
    sources: list[str],
    *,
    sheet: Path | None = None,
    sheet_images: int = 48,
    json: bool = False,
    **overrides: DataKeys,
) -> None:
    """Show what is in a source of pairs: counts, broken images, sizes, caption lengths, duplicates, a contact sheet.

    Args:
        sources: sources of pairs, as --data.train takes them.
        sheet: draw a contact sheet, a PNG file.
        sheet_images: images on the sheet, spread evenly over the source.
        json: print the numbers, and the names of broken images and duplicates, as one JSON object.
    """
    from tercet.data.inspection import Inspection, inspect_table, write_sheet
    from tercet.data.readers import open_sources

    data = default_config(overrides).data
    source = open_sources(sources, data)
    found: Inspection | None = None
    with progress_bar("inspecting", "images") as progress:
        for done, so_far in inspect_table(source, data.pixel_limit, data.max_words, data.workers):
            found = so_far
            progress(done, source.image_count)
    assert found is not None
    if sheet is not None:
        write_sheet(source, sheet, sheet_images, data.pixel_limit)

    def keys(groups: list[list[int]]) -> list[list[str]]:
        return [[source.key(index) for index in group] for group in groups[:NAMED]]

    summary = found.summary()
    named = {
        "rejected": list(found.rejected)[:NAMED],
        "broken": found.measured.broken[:NAMED],
        "duplicates": keys(found.exact_duplicates()),
        "near_duplicates": keys(found.near_duplicates()),
    }
    if json:
        print(json_format.dumps({**summary, **named}))
        return
    _print_inspection(summary, named)
    if sheet is not None:
        print(f"The contact sheet is {sheet}")


def data_filter(
    sources: list[str],
    *,
    output: Path,
    model: str = DEMO_MODEL,
    by: Literal["match", "similarity"] = "match",
    threshold: float | None = None,
    fraction: float | None = None,
    json: bool = False,
    **overrides: EvaluateKeys,
) -> None:
    """Keep the pairs that a model finds to belong together.  Run again after a stop, it continues.

    Args:
        sources: sources of pairs, as --data.train takes them.
        output: file of the kept pairs with their scores, a line of JSON each; OUTPUT.scores beside it holds all scores.
        model: model folder, run folder, or hub id.
        by: match: probability by the fusion encoder; similarity: cosine of the dual encoder, for models without
            matching.
        threshold: keep pairs with at least this score.
        fraction: instead: keep this fraction of the pairs, the best ones.
        json: print the numbers as one JSON object.
    """
    from tercet.data.readers import open_sources
    from tercet.tasks.filtering import filter_pairs

    folder, config = model_and_config(model, overrides)
    predictor = load_predictor(folder)
    source = open_sources(sources, config.data)
    print_problems("rejected", source.rejected)
    identity = {"model": model_fingerprint(predictor.model), "source": sources}
    with progress_bar("scoring", "images") as progress:
        report = filter_pairs(predictor.model, source, config, output, identity, by, threshold, fraction, progress)
    print_problems("skipped", report.problems)
    if json:
        numbers = {
            "scored": report.scored,
            "kept": report.kept,
            "kept_fraction": round(report.kept / report.scored, 4),
            "by": report.by,
            "threshold": report.threshold,
            "skipped_images": report.skipped,
        }
        print(json_format.dumps(numbers))
        return
    print(
        f"{report.kept} of {report.scored} pairs ({100 * report.kept / report.scored:.1f} %) have a "
        f"{report.by} of at least {report.threshold:.4f}; {report.skipped} images could not be read"
    )
    print(f"They are in {output}")


def data_scenes(
    tasks: list[Literal["vqa", "entailment", "nlvr", "grounding"]],
    *,
    output: Path = Path("runs/demo/data"),
    count: int | None = None,
) -> None:
    """Write synthetic scenes for the demo's tasks, as annotation files and tar shards.  Shards that exist are kept.

    Args:
        tasks: vqa, entailment, nlvr or grounding.
        output: folder to write into; the demo-* recipes read the default.
        count: write at most so many scenes of each kind, for a quick trial.
    """
    from tercet.data.scene_files import write_task

    for task in tasks:
        print(f"writing scenes for {task} into {output}", file=sys.stderr)
        write_task(output, task, count)


def tokenizer(captions: list[str], *, output: Path, size: int = 8192, **overrides: DataKeys) -> None:
    """Train a WordPiece tokenizer on captions.

    Args:
        captions: sources of captions, as --data.train takes them.
        output: folder to write tokenizer.json into.
        size: tokens of the vocabulary.
    """
    from tercet.data.loader import cleaned_captions
    from tercet.data.readers import open_sources
    from tercet.data.tokenizer import Tokenizer

    data = default_config(overrides).data
    trained = Tokenizer.train(cleaned_captions(open_sources(captions, data, "train"), data.max_words), size)
    trained.save(output)
    print(f"{trained.vocabulary_size} tokens are in {output}; use them with --data.tokenizer {output}")


def model_fingerprint(model: Any) -> str:
    """Distinguishes a model from one with other weights."""
    import hashlib

    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.double().sum().item()!r}".encode())
    return digest.hexdigest()[:16]


def _kept_pairs(file: Path) -> KeptPairs:
    from tercet.data.packing import KeptPairs

    def rows() -> Iterator[tuple[str, str]]:
        try:
            with file.open("rb") as stream:
                for number, line in enumerate(stream, 1):
                    row = json_format.loads(line)
                    if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in ("image", "caption")):
                        raise TercetError(f"{file} line {number}: not a pair as `tercet data filter` writes it")
                    yield row["image"], row["caption"]
        except OSError as error:
            raise TercetError(f"cannot read {file}: {error.strerror}") from error
        except ValueError as error:
            raise TercetError(f"{file}: not JSON lines, as `tercet data filter` writes them: {error}") from error

    return KeptPairs(rows())


def _print_inspection(summary: dict[str, Any], named: dict[str, Any]) -> None:
    counts = {name: value for name, value in summary.items() if not isinstance(value, dict)}
    print_table(["what", "count"], [[name.replace("_", " "), f"{value}"] for name, value in counts.items()])
    spreads = {name: value for name, value in summary.items() if isinstance(value, dict) and value}
    columns = ["least", "median", "p95", "greatest", "mean"]
    print()
    print_table(
        ["", *columns],
        [[name.replace("_", " "), *(f"{value[column]:g}" for column in columns)] for name, value in spreads.items()],
    )
    for title in ("rejected", "broken"):
        for line in named[title]:
            print(f"{title}: {line}")
    for title in ("duplicates", "near_duplicates"):
        for group in named[title]:
            # The folder or shard that all of them share is named once, by the first.
            shared = max(os.path.commonprefix(group).rfind(mark) for mark in "/#") + 1  # noqa: RUF071 - '#' ends it too
            names = [group[0], *(name[shared:] for name in group[1:4])]
            more = f" and {len(group) - 4} more" * (len(group) > 4)
            print(f"{title.replace('_', ' ')}: {', '.join(names)}{more}")
