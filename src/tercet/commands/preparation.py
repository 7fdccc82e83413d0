"""Commands that come before training: `convert`, `tokenizer` and `recipes`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from tercet.arguments import FLAT, DataKeys, parse, split_flags
from tercet.commands.printing import print_table
from tercet.errors import TercetError


@dataclass(frozen=True)
class ConvertArguments:
    """Turn a checkpoint of others (TCL, ALBEF, BERT, DeiT, ViT) into a model folder.

    BERT and ViT weights make one model in two calls, the second with --base and the folder of the first.
    """

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """the checkpoint: .pth, .bin or .safetensors, or a Hugging Face folder of one"""
    to: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """model folder to write"""
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
    """Turn a checkpoint of others (TCL, ALBEF, BERT, DeiT, ViT) into a model folder."""
    options = parse(ConvertArguments, "convert", arguments)

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


def tokenizer(arguments: list[str]) -> None:
    """Train a word-piece tokenizer on captions."""
    overrides, rest = split_flags(arguments, TokenizerArguments)
    options = parse(TokenizerArguments, "tokenizer", rest)
    if not options.captions:
        raise TercetError("name the sources of captions: tercet tokenizer CAPTIONS... --to DIR")

    from tercet.config_io import default_config
    from tercet.data.loader import cleaned_captions
    from tercet.data.sources import open_sources
    from tercet.data.texts import Tokenizer

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
