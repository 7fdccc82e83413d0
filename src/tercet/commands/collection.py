"""Commands on the data itself: `data pack`, `data inspect` and `data filter`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from tercet.arguments import FLAT, DataKeys, EvaluateKeys, ModelFlag, Switch, parse, split_flags
from tercet.commands.printing import print_table
from tercet.errors import TercetError

if TYPE_CHECKING:
    from tercet.data.inspection import Inspection
    from tercet.data.packing import KeptPairs
    from tercet.data.sources import Source

SourceArguments = Annotated[list[str], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]

NAMED = 10  # groups of duplicates and broken images that are named


@dataclass(frozen=True)
class PackArguments:
    """Write pairs as WebDataset shards.  Run again after a stop of any kind, it writes the shards that are missing."""

    sources: SourceArguments
    """sources of pairs, as --data.train takes them"""
    to: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """folder of the shards"""
    name: Annotated[str, tyro.conf.arg(metavar="NAME")] = "pairs"
    """what the names of the shards begin with"""
    shard_size: Annotated[int, tyro.conf.arg(metavar="N", aliases=["--shard-size"])] = 5000
    """samples a shard"""
    resize: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None
    """shrink images whose shorter side is longer than this; default: as they are"""
    encoding: Literal["keep", "jpg", "png", "webp"] = "keep"
    """keep: images that are not shrunk stay as they came, to the byte; else all are encoded anew"""
    quality: Annotated[int, tyro.conf.arg(metavar="1..100")] = 92
    """of JPEG and WebP"""
    keep: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """pack only the pairs that `tercet data filter` wrote to this file"""
    split: Literal["train", "validation", "test"] = "train"
    """which scenes `scenes` draws"""
    json: Switch = False
    """print the numbers as one JSON object"""
    config: Annotated[DataKeys, FLAT, tyro.conf.FlagConversionOff] = field(default_factory=DataKeys)


@dataclass(frozen=True)
class InspectArguments:
    """Show what is in a source of pairs: counts, broken images, sizes, caption lengths, duplicates, a contact sheet."""

    sources: SourceArguments
    """sources of pairs, as --data.train takes them"""
    sheet: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png")] = None
    """draw a contact sheet"""
    sheet_images: Annotated[int, tyro.conf.arg(metavar="N", aliases=["--sheet-images"])] = 48
    """pictures on the sheet, spread evenly over the source"""
    split: Literal["train", "validation", "test"] = "train"
    """which scenes `scenes` draws"""
    json: Switch = False
    """print the numbers, and the names of broken images and duplicates, as one JSON object"""
    config: Annotated[DataKeys, FLAT, tyro.conf.FlagConversionOff] = field(default_factory=DataKeys)


@dataclass(frozen=True)
class FilterArguments:
    """Keep the pairs that a model finds to belong together.  Run again after a stop, it goes on where it was."""

    sources: SourceArguments
    """sources of pairs, as --data.train takes them"""
    to: Annotated[Path, tyro.conf.arg(metavar="FILE.jsonl")]
    """file of the kept pairs with their scores, a line each; FILE.jsonl.scores beside it holds all scores"""
    model: ModelFlag = None
    """model folder, run folder, or hub id; default: runs/demo/model"""
    by: Literal["match", "similarity"] = "match"
    """match: probability by the fusion encoder; similarity: cosine of the dual encoder, for models without matching"""
    threshold: Annotated[float | None, tyro.conf.arg(metavar="SCORE")] = None
    """keep pairs with this score at least"""
    share: Annotated[float | None, tyro.conf.arg(metavar="0..1")] = None
    """instead: keep this share of the pairs, the best ones"""
    split: Literal["train", "validation", "test"] = "train"
    """which scenes `scenes` draws"""
    json: Switch = False
    """print the numbers as one JSON object"""
    config: Annotated[EvaluateKeys, FLAT, tyro.conf.FlagConversionOff] = field(default_factory=EvaluateKeys)


def data_pack(arguments: list[str]) -> None:
    """Write pairs as WebDataset shards, resumable, images resized if asked."""
    overrides, rest = split_flags(arguments, PackArguments)
    options = parse(PackArguments, "data pack", rest)
    _require_sources(options.sources, "tercet data pack SOURCE... --to DIR")
    if options.shard_size < 1 or not 1 <= options.quality <= 100 or (options.resize is not None and options.resize < 1):
        raise TercetError("--shard_size and --resize are 1 at least, --quality lies between 1 and 100")

    from tercet.config_io import default_config
    from tercet.data.packing import PackOptions, PackReport, pack
    from tercet.data.sources import open_sources

    data = default_config(overrides).data
    source = open_sources(options.sources, data, options.split)
    _tell_refused(source)
    how = PackOptions(
        options.name, options.shard_size, options.resize, options.encoding, options.quality, data.pixel_limit
    )
    kept = None if options.keep is None else _kept_pairs(options.keep)
    report, before = PackReport(), None
    for done, total, so_far in pack(source, options.sources, options.to, how, data.workers, kept):
        if before is None and done:
            print(f"{done} of {total} shards were there already", file=sys.stderr)
        before, report = done, so_far
        _progress(done, total, "shards")
    for problem in report.problems[:NAMED]:
        print(f"left out: {problem}", file=sys.stderr)
    if options.json:
        print(json.dumps(asdict(report)))
    else:
        print(
            f"{report.images} images with {report.pairs} captions in {report.shards} shards, "
            f"{report.bytes / 1e6:.1f} MB; {report.skipped} images could not be read"
        )
        print(f"They are in {options.to}; train on them with --data.train {options.to}")


def data_inspect(arguments: list[str]) -> None:
    """Show counts, broken images, sizes, duplicates and a contact sheet of pairs."""
    overrides, rest = split_flags(arguments, InspectArguments)
    options = parse(InspectArguments, "data inspect", rest)
    _require_sources(options.sources, "tercet data inspect SOURCE...")

    from tercet.config_io import default_config
    from tercet.data.contact_sheet import write_sheet
    from tercet.data.inspection import inspect_source
    from tercet.data.sources import open_sources

    data = default_config(overrides).data
    source = open_sources(options.sources, data, options.split)
    found = None
    for done, so_far in inspect_source(source, data.pixel_limit, data.max_words, data.workers):
        found = so_far
        _progress(done, source.image_count, "images")
    assert found is not None
    if options.sheet is not None:
        write_sheet(source, options.sheet, options.sheet_images, data.pixel_limit)
    named = _names(source, found)
    if options.json:
        print(json.dumps({**found.summary(), **named}))
        return
    _print_inspection(found.summary(), named)
    if options.sheet is not None:
        print(f"The contact sheet is {options.sheet}")


def data_filter(arguments: list[str]) -> None:
    """Keep the pairs that a model finds to belong together."""
    overrides, rest = split_flags(arguments, FilterArguments)
    options = parse(FilterArguments, "data filter", rest)
    _require_sources(options.sources, "tercet data filter SOURCE... --model M --to FILE.jsonl --share 0.6")

    from tercet.commands.models import DEMO_MODEL, load_chosen, model_and_config
    from tercet.data.sources import open_sources
    from tercet.tasks.filtering import FilterReport, filter_pairs

    folder, config = model_and_config(options.model or DEMO_MODEL, overrides)
    model = load_chosen(None if options.model is None else folder)
    source = open_sources(options.sources, config.data, options.split)
    _tell_refused(source)
    identity = {"model": model_fingerprint(model), "source": [*options.sources, options.split]}
    report = None
    for step in filter_pairs(model, source, config, options.to, identity, options.by, options.threshold, options.share):
        if isinstance(step, FilterReport):
            report = step
        else:
            _progress(step, source.image_count, "images")
    assert report is not None
    for problem in report.problems[:NAMED]:
        print(f"left out: {problem}", file=sys.stderr)
    numbers = {
        "scored": report.scored,
        "kept": report.kept,
        "kept_share": round(report.kept / report.scored, 4),
        "by": report.by,
        "threshold": report.threshold,
        "skipped_images": report.skipped,
    }
    if options.json:
        print(json.dumps(numbers))
    else:
        print(
            f"{report.kept} of {report.scored} pairs ({100 * report.kept / report.scored:.1f} %) have a "
            f"{report.by} of {report.threshold:.4f} at least; {report.skipped} images could not be read"
        )
        print(f"They are in {options.to}")


def model_fingerprint(model: Any) -> str:
    """Tells a model from one with other weights."""
    import hashlib

    sums = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        sums.update(f"{name} {tuple(value.shape)} {value.double().sum().item()!r}".encode())
    return sums.hexdigest()[:16]


def _require_sources(sources: list[str], usage: str) -> None:
    if not sources:
        raise TercetError(f"name the sources of pairs: {usage}")


def _tell_refused(source: Source) -> None:
    from tercet.data.rows import Problems

    problems = source.problems
    for line in problems.lines(NAMED) if isinstance(problems, Problems) else list(problems)[:NAMED]:
        print(f"refused: {line}", file=sys.stderr)


def _progress(done: int, total: int, what: str) -> None:
    """A line that counts, where somebody looks at it."""
    if sys.stderr.isatty():
        print(f"\r{done} of {total} {what}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _kept_pairs(file: Path) -> KeptPairs:
    from tercet.data.packing import KeptPairs

    def rows() -> Iterator[tuple[str, str]]:
        try:
            with file.open("rb") as stream:
                for number, line in enumerate(stream, 1):
                    row = json.loads(line)
                    if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in ("image", "caption")):
                        raise TercetError(f"{file} line {number}: not a pair as `tercet data filter` writes it")
                    yield row["image"], row["caption"]
        except OSError as error:
            raise TercetError(f"cannot read {file}: {error.strerror}") from error
        except ValueError as error:
            raise TercetError(
                f"{file}: not a line of JSON a pair, as `tercet data filter` writes it: {error}"
            ) from error

    return KeptPairs(rows())


def _names(source: Source, found: Inspection) -> dict[str, Any]:
    """Broken images and duplicates by name."""

    def named(groups: list[list[int]]) -> list[list[str]]:
        return [[source.key(index) for index in group] for group in groups[:NAMED]]

    return {
        "refused": found.refused[:NAMED],
        "broken": found.measured.problems[:NAMED],
        "duplicates": named(found.exact_duplicates()),
        "near_duplicates": named(found.near_duplicates()),
    }


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
    for title in ("refused", "broken"):
        for line in named[title]:
            print(f"{title}: {line}")
    for title in ("duplicates", "near_duplicates"):
        for group in named[title]:
            # The folder or shard that all of them share is named once, by the first.
            shared = max(os.path.commonprefix(group).rfind(mark) for mark in "/#") + 1  # noqa: RUF071 - '#' ends it too
            names = [group[0], *(name[shared:] for name in group[1:4])]
            more = f" and {len(group) - 4} more" * (len(group) > 4)
            print(f"{title.replace('_', ' ')}: {', '.join(names)}{more}")
