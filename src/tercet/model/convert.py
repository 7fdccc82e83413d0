"""Weights of others to a model folder, by the tables of `names.py`.

A published TCL or ALBEF checkpoint gives a whole model.  BERT gives text and fusion encoder without cross-attention, a
vision transformer (DeiT, ViT) the image encoder; what a file does not hold comes from a base model, or is random.
Converting one with the other as base gives the start of the paper (arXiv 2202.10401, section 4.1).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from tercet.config import ModelConfig, merge
from tercet.data.tokenizer import Tokenizer
from tercet.errors import TercetError
from tercet.model.hub import empty_model, load_model, model_card, save_model
from tercet.model.names import (
    DOWNSTREAM,
    FOREIGN_HEADS,
    SKIPPED,
    Family,
    Gathered,
    find_family,
    gather,
)
from tercet.model.tercet import Tercet
from tercet.model.vision import resize_position_embed
from tercet.model.weights import find_weights, read_weights

HEAD_WIDTH = 64  # channels of an attention head in every published vision transformer and BERT
_VOCABULARIES = ("tokenizer.json", "vocab.txt")
_HEAD_KINDS = {
    "answer_decoder": ("answer", "question answering"),
    "entailment_head": ("entailment", "visual entailment"),
    "nlvr_head": ("nlvr", "NLVR2"),
    "assignment_head": ("assignment", "text-assignment"),
}


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did with every tensor.

    Attributes:
        source: the file of weights.
        folder: the model folder that was written.
        kind: what the file is.
        config: the sizes of the model.
        used: our keys, and theirs that each was made of.
        random: our keys that got random values.
        kept: our keys that came from the base model.
        resized: what was resized, from what to what.
        skipped: their keys that were not used, by reason.
        notes: what a user should know.
    """

    source: Path
    folder: Path
    kind: str
    config: ModelConfig
    used: dict[str, list[str]]
    random: list[str]
    kept: list[str]
    resized: list[str]
    skipped: dict[str, list[str]]
    notes: list[str]

    def summary(self) -> str:
        """A few lines: counts and notes."""
        parts = ", ".join(dict.fromkeys(map(part_of, self.random)))
        counts = [
            f"{len(self.used)} tensors of the model come from it",
            f"{len(self.kept)} from the base model" if self.kept else "",
            f"{len(self.random)} are random ({parts})" if self.random else "",
            f"{sum(map(len, self.skipped.values()))} of its entries were skipped ({', '.join(self.skipped)})"
            if self.skipped
            else "",
        ]
        return "\n".join(
            [
                f"{self.source.name} is a {self.kind}.",
                "; ".join(filter(None, counts)) + ".",
                *(f"Resized: {line}." for line in self.resized),
                *(f"Note: {line}." for line in self.notes),
            ]
        )


def part_of(name: str) -> str:
    """The part of the model that our key `name` belongs to; cross-attention counts as one of its own."""
    return "cross-attention" if ".cross_" in name else name.split(".")[0]


def convert(
    file: str | Path,
    to: str | Path,
    *,
    base: str | Path | None = None,
    tokenizer: str | Path | None = None,
    image_size: int | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
    seed: int = 0,
) -> ConversionReport:
    """Turn weights of others into a model folder.

    Args:
        file: `.pth`, `.bin` or `.safetensors`, or a Hugging Face folder of one.
        to: the model folder to write.
        base: model folder or hub id that gives what `file` does not hold, where the shapes fit; default: random values.
        tokenizer: `vocab.txt`, `tokenizer.json` or a folder of one; default the one beside `file`.
        image_size: side of the images in pixels that the position embeddings are resized for; default as in `file`.
        vision_heads: attention heads of the vision transformer; default 64 channels a head.
        text_heads: attention heads of the text stack; default as the config.json beside a BERT says, else 64 channels
            a head.
        seed: of the random values.

    Raises:
        TercetError: no such file, no known family, a needed tensor missing or of another shape, a checkpoint that
            holds code, a tokenizer that does not fit.
    """
    path = find_weights(Path(file).expanduser())
    base_model = None if base is None else load_model(base)
    state = read_weights(path)
    with _errors_name(path):
        family, state, notes = _recognise(state)
        gathered = gather(state, family)
        settings = _bert_settings(path.parent / "config.json") if family.kind == "BERT" else {}
        sizes = read_sizes(gathered, vision_heads, text_heads or settings.get("num_attention_heads"))
        _apply_settings(sizes, settings)
        start = ModelConfig() if base_model is None else base_model.config
        config = ModelConfig.model_validate(merge(start.model_dump(), sizes))
        _check(state, family, gathered, config)
        skipped = skipped_entries(state, family, gathered)
    weights, kept, random = _fill(gathered.weights, config, base_model, seed)
    config, resized = _resize(weights, config, image_size)
    words, tokenizer_notes = _find_tokenizer(path, tokenizer, "text" in sizes, base_model)
    if words is not None:
        ids = {name: getattr(words, name) for name in ("pad_id", "cls_id", "sep_id", "mask_id")}
        config = ModelConfig.model_validate(merge(config.model_dump(), {"text": ids}))
    model = empty_model(config)
    model.load_state_dict(weights, assign=True)
    model.tokenizer = words
    kind, notes = _kind(family, config), notes + tokenizer_notes
    report = ConversionReport(path, Path(to), kind, config, gathered.used, random, kept, resized, skipped, notes)
    save_model(model, to, f"{model_card(model)}\n## Origin\n\n{report.summary()}\n")
    return report


def published_config(
    state: Mapping[str, Tensor], vision_heads: int | None = None, text_heads: int | None = None
) -> ModelConfig:
    """The sizes of a published model, read off its shapes; arguments as of `convert`.

    Raises:
        TercetError: a tensor that a size is read from is missing, or a number of heads must be given.
    """
    gathered = gather(state, find_family(state) or DOWNSTREAM)
    return ModelConfig.model_validate(read_sizes(gathered, vision_heads, text_heads))


def read_sizes(gathered: Gathered, vision_heads: int | None, text_heads: int | None) -> dict[str, Any]:
    """The keys of `ModelConfig` that a checkpoint decides, read off the shapes of its tensors.

    Raises:
        TercetError: a tensor that a size is read from is missing, the grid is not square, or heads must be given.
    """
    layers, theirs = gathered.layers, gathered.rows

    def shape(name: str) -> torch.Size:
        if name not in gathered.weights:
            missing = theirs[name][0] if name in theirs else f"what {name} is made of"
            raise TercetError(f"{missing} is missing; the file is incomplete or of another architecture")
        return gathered.weights[name].shape

    sizes: dict[str, Any] = {}
    if "vision.patch_embed.weight" in theirs:
        width, values = shape("vision.patch_embed.weight")
        patch, cells = math.isqrt(values // 3), shape("vision.position_embed")[1] - 1
        grid = math.isqrt(cells)
        if grid * grid != cells:
            table = theirs["vision.position_embed"][0]
            raise TercetError(f"{table} has {cells} rows besides the class row, which make no square grid")
        sizes["vision"] = {
            "image_size": grid * patch,
            "patch_size": patch,
            "width": width,
            "depth": len(layers["vision"]),
            "heads": _heads(width, vision_heads, "--vision-heads"),
            "mlp_ratio": _ratio(shape("vision.blocks.0.mlp.up.weight")[0], width),
        }
    if "text.word_embed.weight" in theirs:
        vocabulary, width = shape("text.word_embed.weight")
        sizes["text"] = {
            "vocabulary_size": vocabulary,
            "max_positions": shape("text.position_embed.weight")[0],
            "width": width,
            "mlp_width": shape("text.layers.0.mlp.up.weight")[0],
            "depth": len(layers["text"]) + len(layers["fusion"]),
            "fusion_layer": len(layers["text"]),
            "heads": _heads(width, text_heads, "--text-heads"),
        }
    if "vision_projection.weight" in gathered.weights:
        sizes["embed_dim"] = shape("vision_projection.weight")[0]
    if "vision" in sizes and "text" in sizes:
        parts = {name.split(".")[0] for name in gathered.weights}
        sizes["heads"] = [head for part, (head, _) in _HEAD_KINDS.items() if part in parts]
    return sizes


def _heads(width: int, heads: int | None, flag: str) -> int:
    if heads is None and width % HEAD_WIDTH:
        raise TercetError(f"the number of attention heads cannot be read off width {width}; give it as {flag}")
    heads = width // HEAD_WIDTH if heads is None else heads
    if heads < 1 or width % heads:
        raise TercetError(f"{flag} {heads} does not divide width {width}")
    return heads


def _ratio(hidden: int, width: int) -> float:
    """The smallest quotient that gives `hidden` back as `int(width * ratio)`."""
    ratio = hidden / width
    while int(width * ratio) < hidden:
        ratio = math.nextafter(ratio, math.inf)
    return ratio


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Begin errors with the file's name."""
    try:
        yield
    except TercetError as error:
        raise TercetError(str(error) if str(error).startswith(f"{path}") else f"{path}: {error}") from error
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        key = ".".join(["model", *map(str, detail["loc"])])
        raise TercetError(f"{path}: its sizes make no Tercet model: {key}: {detail['msg']}") from error


def _recognise(state: dict[str, Tensor]) -> tuple[Family, dict[str, Tensor], list[str]]:
    """The family of a checkpoint, its tensors under that family's names, and notes."""
    old = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # in BERTs of 2018
    state = {re.sub(r"LayerNorm\.(gamma|beta)$", lambda match: old[match[0]], name): own for name, own in state.items()}
    family = find_family(state)
    if family is None and "vision.patch_embed.weight" in state:
        raise TercetError("these are Tercet's own weights; load the folder that they are in")
    if family is None:
        first = ", ".join(list(state)[:3])
        raise TercetError(
            "neither a TCL or ALBEF checkpoint, nor BERT, nor a vision transformer under timm's names; its first keys "
            f"are {first}"
        )
    if "dist_token" not in state or "pos_embed" not in state:
        return family, state, []
    table = state["pos_embed"]
    state["pos_embed"] = torch.cat([table[:, :1], table[:, 2:]], dim=1)
    return family, state, ["the distillation token and its position were dropped; only the class token is read"]


def _kind(family: Family, config: ModelConfig) -> str:
    if family.kind == "BERT":
        last = config.text.fusion_layer - 1
        return f"BERT; layers 0 to {last} encode the text, the others start the fusion encoder"
    if family is not DOWNSTREAM and not family.two_images:
        return family.kind
    task = next((kind for head, kind in reversed(_HEAD_KINDS.values()) if head in config.heads), "retrieval")
    return f"published {task} model"


def _bert_settings(path: Path) -> dict[str, Any]:
    """The config.json of a BERT, where there is one."""
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TercetError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(settings, dict):
        raise TercetError(f"{path}: not the config of a BERT; move it away, the sizes then come from the weights")
    wanted = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
    for key, value in wanted.items():
        if settings.get(key, value) != value:
            raise TercetError(f"{path}: {key} is {settings[key]!r}; Tercet's text encoder needs {value!r}")
    return settings


def _apply_settings(sizes: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Compare a BERT's config.json with the sizes, and take its dropout."""
    for theirs, ours in {"hidden_size": "width", "num_hidden_layers": "depth", "vocab_size": "vocabulary_size"}.items():
        if theirs in settings and settings[theirs] != sizes["text"][ours]:
            raise TercetError(
                f"the weights have {theirs} {sizes['text'][ours]}, config.json beside them {settings[theirs]}"
            )
    if "hidden_dropout_prob" in settings:
        sizes["text"]["dropout"] = settings["hidden_dropout_prob"]


def _check(state: Mapping[str, Tensor], family: Family, gathered: Gathered, config: ModelConfig) -> None:
    """Every needed tensor is there, every shape fits, and tied tensors are equal.

    Raises:
        TercetError: names the entry of the checkpoint.
    """
    weights, used, theirs = gathered.weights, gathered.used, gathered.rows
    parts = {name.split(".")[0] for name in weights}
    for name, value in empty_model(config).state_dict().items():
        part = name.split(".")[0]
        if name not in weights:
            if name in theirs and (part in parts or part not in family.optional):
                raise TercetError(f"{theirs[name][0]} is missing, and {name} needs it; the file is incomplete")
        elif weights[name].shape != value.shape:
            raise TercetError(
                f"{', '.join(used[name])} give {name} the shape {list(weights[name].shape)}, "
                f"the rest of the file asks for {list(value.shape)}"
            )
        elif not weights[name].is_floating_point():
            raise TercetError(f"{used[name][0]} holds {weights[name].dtype}, not floats; convert the original file")
    for alias, first in gathered.tied.items():
        if alias in state and first in state and not torch.equal(state[alias], state[first]):
            raise TercetError(f"{alias} differs from {first}; in Tercet, as in the published model, they are tied")


def skipped_entries(state: Mapping[str, Tensor], family: Family, gathered: Gathered) -> dict[str, list[str]]:
    """The entries of the checkpoint that were not used, by reason.

    Raises:
        TercetError: one of them belongs to an encoder, which then computes something else.
    """
    taken = {name for names in gathered.used.values() for name in names}
    skipped: dict[str, list[str]] = {}
    for name in state:
        if name in taken:
            continue
        reason = next((reason for reason, pattern in SKIPPED.items() if re.fullmatch(pattern, name)), None)
        reason = reason or ("second names of tied tensors" if name in gathered.tied else "heads of other tasks")
        if reason == "heads of other tasks":
            for prefix in family.encoders:
                if name.startswith(prefix) and not re.fullmatch(FOREIGN_HEADS, name.removeprefix(prefix)):
                    raise TercetError(
                        f"{name} is no part of Tercet's encoders; the checkpoint has another architecture"
                    )
        skipped.setdefault(reason, []).append(name)
    return skipped


def _fill(
    gathered: Mapping[str, Tensor], config: ModelConfig, base: Tercet | None, seed: int
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """All weights in our order, and the names of those from the base model and of the random ones."""
    shapes = {name: value.shape for name, value in empty_model(config).state_dict().items()}
    spare = {} if base is None else base.state_dict()
    missing = [name for name in shapes if name not in gathered]
    # A part comes from the base model whole or not at all: a bias is worth nothing without its matrix.
    unfit = {part_of(name) for name in missing if name not in spare or spare[name].shape != shapes[name]}
    kept = [name for name in missing if part_of(name) not in unfit]
    random = [name for name in missing if part_of(name) in unfit]
    fresh: dict[str, Tensor] = {}
    if random:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = Tercet(config).state_dict()
    sources = {**{name: value.float() for name, value in gathered.items()}, **{name: spare[name] for name in kept}}
    return {name: sources[name] if name in sources else fresh[name] for name in shapes}, kept, random


def _resize(weights: dict[str, Tensor], config: ModelConfig, image_size: int | None) -> tuple[ModelConfig, list[str]]:
    """Resize the position embeddings in `weights` for images of `image_size` pixels."""
    vision = config.vision
    if image_size is None or image_size == vision.image_size:
        return config, []
    if image_size < vision.patch_size or image_size % vision.patch_size:
        raise TercetError(f"image size {image_size} is not a multiple of the patch size {vision.patch_size}")
    grid = image_size // vision.patch_size
    weights["vision.position_embed"] = resize_position_embed(weights["vision.position_embed"], grid, grid)
    resized = f"vision.position_embed from a grid of {vision.grid}x{vision.grid} to {grid}x{grid} ({image_size} pixels)"
    return ModelConfig.model_validate(merge(config.model_dump(), {"vision": {"image_size": image_size}})), [resized]


def _find_tokenizer(
    path: Path, given: str | Path | None, has_text: bool, base: Tercet | None
) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer that was given, or the one beside the file, or of a base model whose text encoder is kept."""
    if given is not None:
        return Tokenizer.load(Path(given).expanduser()), []
    if has_text:
        beside = next((path.parent / name for name in _VOCABULARIES if (path.parent / name).is_file()), None)
        if beside is not None:
            return Tokenizer.load(beside), [f"the tokenizer is the {beside.name} beside it"]
        reason = f"there is no vocab.txt beside {path.name}"
    else:
        if base is not None and base.tokenizer is not None:
            return base.tokenizer, []
        reason = "its text encoder is new" if base is None else "the base model has none"
    return None, [f"the model has no tokenizer ({reason}) and cannot read text; give one with --tokenizer"]
