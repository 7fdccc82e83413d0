"""Commands that come before training: `convert`, `tokenizer` and `recipes`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tercet.arguments import FLAT, DataKeys, parse, split_flags
from tercet.commands.printing import print_table
from tercet.errors import TercetError

_OF_OTHERS = ("base", "tokenizer", "image_size", "vision_heads", "text_heads")


@dataclass(frozen=True)
class ConvertArguments:
    """Turn weights of others (TCL, ALBEF, BERT, DeiT, ViT) into a model folder, or a model into a TCL checkpoint.

    BERT and ViT weights make one model in two calls, the second with --base and the folder of the first.
    With --layout published, FILE is a model of Tercet and --to the checkpoint to write.
    """

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """the checkpoint: .pth, .bin or .safetensors, or a Hugging Face folder of one"""
    to: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """model folder to write"""
    layout: Literal["tercet", "published"] = "tercet"
    """published: write a model folder, run folder or hub id as a checkpoint that the code of TCL and ALBEF loads"""
    style: Literal["pretraining", "downstream"] | None = None
    """with --layout published: the form of a pre-trained or of a fine-tuned checkpoint; default: by its heads"""
    base: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """model folder or hub id that gives what FILE does not hold; default: made new"""
    tokenizer: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """vocab.txt, tokenizer.json or a folder of one; default: the one beside FILE"""
    image_size: Annotated[int | None, tyro.conf.arg(metavar="PIXELS", aliases=["--image-size"])] = None
    """side of the images that the position embeddings are resized for; default: as in FILE"""
    vision_heads: Annotated[int | None, tyro.conf.arg(metavar="N", aliases=["--vision-heads"])] = None
    """attention heads of the vision transformer; default: 64 channels a head"""
    text_heads: Annotated[int | None, tyro.conf.arg(metavar="N", aliases=["--text-heads"])] = None
    """attention heads of the text stack; default: what a config.json beside FILE says, else 64 channels a head"""


@dataclass(frozen=True)
class TokenizerArguments:
    """Train a word-piece tokenizer on captions."""

    captions: Annotated[list[str], tyro.conf.Positional, tyro.conf.arg(metavar="CAPTIONS")]
    """sources of captions, as --data.train takes them"""
    to: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """folder to write tokenizer.json into"""
    size: Annotated[int, tyro.conf.arg(metavar="N")] = 8192
    """word pieces"""
    config: Annotated[DataKeys, FLAT, tyro.conf.FlagConversionOff] = field(default_factory=DataKeys)


@dataclass(frozen=True)
class NoArguments:
    """List the recipes that come with the package."""


def convert(arguments: list[str]) -> None:
    """Turn weights of others (TCL, ALBEF, BERT, DeiT, ViT) into a model folder, or a model into a TCL checkpoint."""
    options = parse(ConvertArguments, "convert", arguments)
    if options.layout == "published":
        _to_published(options)
        return
    if options.style is not None:
        raise TercetError("--style belongs to --layout published")

    from tercet.model.convert import convert as convert_weights

    result = convert_weights(
        options.file,
        options.to,
        base=options.base,
        tokenizer=options.tokenizer,
        image_size=options.image_size,
        vision_heads=options.vision_heads,
        text_heads=options.text_heads,
    )
    print(result.summary())
    print(f"The model is {options.to}.")


def _to_published(options: ConvertArguments) -> None:
    foreign = [name for name in _OF_OTHERS if getattr(options, name) is not None]
    if foreign:
        raise TercetError(f"--{foreign[0]} belongs to checkpoints of others; leave it out with --layout published")

    from tercet import load
    from tercet.model.published_file import write_published

    # A hub id is no path, but Path leaves it as it is.
    written = write_published(load(str(options.file)), options.to, options.style)
    print(f"{written.entries} tensors in the published form of {written.style} are in {written.file}.")
    if written.left_out:
        print(f"Note: that form has no place for {', '.join(written.left_out)}.")


def tokenizer(arguments: list[str]) -> None:
    """Train a word-piece tokenizer on captions."""
    overrides, rest = split_flags(arguments, TokenizerArguments)
    options = parse(TokenizerArguments, "tokenizer", rest)
    if not options.captions:
        raise TercetError("name the sources of captions: tercet tokenizer CAPTIONS... --to DIR")

    from tercet.config_io import default_config
    from tercet.data.loader import cleaned_captions
    from tercet.data.sources import open_sources
    from tercet.data.tokenizer import Tokenizer

    data = default_config(overrides).data
    captions = cleaned_captions(open_sources(options.captions, data, "train"), data.max_words)
    trained = Tokenizer.train(captions, options.size)
    trained.save(options.to)
    print(f"{trained.vocabulary_size} word pieces are in {options.to}; use them with --data.tokenizer {options.to}")


def recipes(arguments: list[str]) -> None:
    """List the recipes that come with the package."""
    from tercet.config_io import recipe_meaning, recipe_names

    parse(NoArguments, "recipes", arguments)
    print_table(["recipe", "what it does"], [[name, recipe_meaning(name)] for name in recipe_names()])
