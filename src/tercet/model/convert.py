"""Weights of others to a model folder: published TCL and ALBEF checkpoints, BERT, DeiT and ViT.

A published checkpoint gives a whole model.  BERT gives the text and fusion encoders without their cross-attention, a
vision transformer the image encoder; what a file does not hold comes from a base model, or is made new.  Converting
one with the other as base gives the start of the paper (arXiv 2202.10401, section 4.1).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import Tensor

from tercet.config import ModelConfig, merge
from tercet.errors import TercetError
from tercet.model.conversion import ConversionReport, part_of
from tercet.model.hub import empty_model, load_model, model_card, save_model
from tercet.model.published import (
    PRETRAINING,
    QUEUES,
    Names,
    find_names,
    find_stack,
    gather,
    is_teacher,
    layout,
    tied_names,
)
from tercet.model.sizes import needed, published_config, text_sizes, vision_sizes
from tercet.model.tercet import Tercet
from tercet.model.vision import resize_position_embed
from tercet.model.weights_file import find_weights, read_weights

if TYPE_CHECKING:
    from tercet.data.tokenizer import Tokenizer

_HEADS = ("vision_projection", "text_projection", "itm_head", "mlm_head", "temperature")
_FOREIGN_HEADS = ("head", "head_dist", "dist_token", "pre_logits", "pooler", "cls")
_VOCABULARIES = ("tokenizer.json", "vocab.txt")


@dataclass(frozen=True)
class _Source:
    """A recognised checkpoint.

    Attributes:
        kind: what it is, in words.
        state: its tensors, under names that `layout` knows.
        names: where the parts stand.
        sizes: the sections of the model's config that it fixes.
        optional: parts of our model (the first word of a key) that this kind need not hold.
        notes: what a user should know.
    """

    kind: str
    state: dict[str, Tensor]
    names: Names
    sizes: dict[str, Any]
    optional: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)


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
        base: model folder or hub id that gives what `file` does not hold, where the shapes fit; default: made new.
        tokenizer: `vocab.txt`, `tokenizer.json` or a folder of one; default the one beside `file`.
        image_size: side of the images in pixels that the position embeddings are resized for; default as in `file`.
        vision_heads: attention heads of the vision transformer; default 64 channels a head.
        text_heads: attention heads of the text stack; default as the config.json beside a BERT says, else 64 channels
            a head.
        seed: what the values that are made new follow from.

    Raises:
        TercetError: no such file, nothing that is known, a needed tensor missing or of another shape, a checkpoint that
            holds code, a tokenizer that does not fit.
    """
    path = find_weights(Path(file).expanduser())
    base_model = None if base is None else load_model(base)
    with _errors_name(path):
        source = _recognise(read_weights(path), path, vision_heads, text_heads)
        gathered, used = gather(source.state, source.names, find_stack(source.state, source.names))
        config = _build_config(source, base_model)
        _check(source, gathered, used, config)
        left_over = _leave(source, used)
    weights, kept, made_new = _fill(gathered, config, base_model, seed)
    config, resized = _resize(weights, config, image_size)
    words, notes = _find_tokenizer(path, tokenizer, source, base_model)
    if words is not None:
        config = _with_tokens_of(config, words)
    model = empty_model(config)
    model.load_state_dict(weights, assign=True)
    model.tokenizer = words
    notes = source.notes + notes
    report = ConversionReport(path, Path(to), source.kind, config, used, made_new, kept, resized, left_over, notes)
    save_model(model, to, f"{model_card(model)}\n## Origin\n\n{report.summary()}\n")
    return report


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Put the file's name in front of what is wrong with it."""
    try:
        yield
    except TercetError as error:
        raise TercetError(str(error) if str(error).startswith(f"{path}: ") else f"{path}: {error}") from error
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        key = ".".join(["model", *map(str, detail["loc"])])
        raise TercetError(f"{path}: its sizes make no Tercet model: {key}: {detail['msg']}") from error


def _recognise(state: dict[str, Tensor], path: Path, vision_heads: int | None, text_heads: int | None) -> _Source:
    if any(name.startswith("visual_encoder.") for name in state):
        return _published_source(state, vision_heads, text_heads)
    old = re.compile(r"LayerNorm\.(gamma|beta)$")
    kinds = {"gamma": "weight", "beta": "bias"}
    renamed = {old.sub(lambda match: f"LayerNorm.{kinds[match[1]]}", name): value for name, value in state.items()}
    for prefix in ("bert.", ""):
        if f"{prefix}embeddings.word_embeddings.weight" in renamed:
            return _bert_source(renamed, prefix, path, text_heads)
    if "patch_embed.proj.weight" in state:
        return _vision_source(state, vision_heads)
    if "vision.patch_embed.weight" in state:
        raise TercetError("these are Tercet's own weights; load the folder that they lie in")
    first = ", ".join(list(state)[:3])
    raise TercetError(
        "neither a TCL or ALBEF checkpoint, nor BERT, nor a vision transformer under timm's names; "
        f"it begins with {first}"
    )


def _published_source(state: dict[str, Tensor], vision_heads: int | None, text_heads: int | None) -> _Source:
    names = find_names(state)
    config = published_config(state, vision_heads, text_heads)
    sizes = config.model_dump(include={"vision", "text", "embed_dim", "heads"})
    if "vision_proj.weight" not in state:
        del sizes["embed_dim"]
    if names == PRETRAINING:
        return _Source("published pre-training model", state, names, sizes)
    parts = {name.split(".")[0] for name in state}
    stack = find_stack(state, names)
    if "ta_head" in parts:
        kind = "published text-assignment model"
    elif "cls_head" in parts:
        kind = "published NLVR2 model" if stack.doubled else "published visual entailment model"
    elif "text_decoder" in parts:
        kind = "published question answering model"
    else:
        kind = "published retrieval model"
    return _Source(kind, state, names, sizes, optional=_HEADS)


def _bert_source(state: dict[str, Tensor], prefix: str, path: Path, heads: int | None) -> _Source:
    names = Names(text=prefix, prediction="cls.predictions.")
    settings = _bert_settings(path.parent / "config.json")
    sizes = text_sizes(state, prefix, find_stack(state, names), heads or settings.get("num_attention_heads"))
    for theirs, ours in {"hidden_size": "width", "num_hidden_layers": "depth", "vocab_size": "vocabulary_size"}.items():
        if theirs in settings and settings[theirs] != sizes[ours]:
            raise TercetError(f"the weights have {theirs} {sizes[ours]}, config.json beside them {settings[theirs]}")
    if "hidden_dropout_prob" in settings:
        sizes["dropout"] = settings["hidden_dropout_prob"]
    kind = f"BERT; layers 0 to {sizes['fusion_layer'] - 1} encode the text, the others start the fusion encoder"
    return _Source(kind, state, names, {"text": sizes}, optional=("vision", *_HEADS))


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


def _vision_source(state: dict[str, Tensor], heads: int | None) -> _Source:
    notes, state = [], dict(state)
    if "dist_token" in state:
        table = needed(state, "pos_embed")
        state["pos_embed"] = torch.cat([table[:, :1], table[:, 2:]], dim=1)
        notes.append("the distillation token and its position were dropped; the class token alone starts the encoder")
    sizes = vision_sizes(state, "", heads)
    return _Source("vision transformer", state, Names(vision=""), {"vision": sizes}, ("text", "fusion", *_HEADS), notes)


def _build_config(source: _Source, base: Tercet | None) -> ModelConfig:
    """The sizes of the checkpoint over those of the base model, or over the base size."""
    dump = ModelConfig().model_dump() if base is None else base.config.model_dump()
    return ModelConfig.model_validate(merge(dump, source.sizes))


def _check(source: _Source, gathered: Mapping[str, Tensor], used: Mapping[str, list[str]], config: ModelConfig) -> None:
    """Every needed tensor is there, every shape fits, and tied tensors are equal.

    Raises:
        TercetError: names the entry of the checkpoint.
    """
    theirs = {piece.ours: piece.theirs for piece in layout(source.names, find_stack(source.state, source.names))}
    parts = {name.split(".")[0] for name in gathered}
    for name, value in empty_model(config).state_dict().items():
        part = name.split(".")[0]
        if name not in gathered:
            newly = name not in theirs or (part in source.optional and part not in parts)
            if not newly and not (source.names.vision is None and ".cross_" in name):
                raise TercetError(f"{theirs[name][0]} is missing, and {name} needs it; the file is incomplete")
        elif gathered[name].shape != value.shape:
            raise TercetError(
                f"{', '.join(used[name])} give {name} the shape {list(gathered[name].shape)}, "
                f"the rest of the file asks for {list(value.shape)}"
            )
        elif not gathered[name].is_floating_point():
            raise TercetError(f"{used[name][0]} holds {gathered[name].dtype}, not floats; convert the original file")
    for alias, first in tied_names(source.names, find_stack(source.state, source.names)).items():
        if alias in source.state and first in source.state:
            _check_tied(alias, source.state[alias], first, source.state[first])


def _check_tied(alias: str, second: Tensor, first_name: str, first: Tensor) -> None:
    if not torch.equal(first, second):
        raise TercetError(
            f"{alias} differs from {first_name}; in Tercet's model, as in the published one, they are tied"
        )


def _leave(source: _Source, used: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The entries of the checkpoint that were not used, by reason.

    Raises:
        TercetError: one of them belongs to a layer that was used, so that the layer computes something else.
    """
    taken = {name for names in used.values() for name in names}
    second_names = tied_names(source.names, find_stack(source.state, source.names))
    left_over: dict[str, list[str]] = {}
    for name in source.state:
        if name not in taken:
            left_over.setdefault(_reason(name, source.names, second_names), []).append(name)
    return left_over


def _reason(name: str, names: Names, second_names: Collection[str]) -> str:
    if is_teacher(name):
        return "the momentum teacher"
    if name in QUEUES:
        return "queues of features"
    if name in second_names:
        return "second names of tied tensors"
    if name.endswith("embeddings.position_ids"):
        return "position numbers"
    for prefix in (names.vision, names.text):
        if prefix is None:
            continue
        if name.startswith(prefix) and name.removeprefix(prefix).split(".")[0] not in _FOREIGN_HEADS:
            raise TercetError(f"{name} is no part of Tercet's encoders; the checkpoint is of another architecture")
    return "heads of other tasks"


def _fill(
    gathered: dict[str, Tensor], config: ModelConfig, base: Tercet | None, seed: int
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """All weights in our order, and the names that came from the base model and that were made new."""
    shapes = {name: value.shape for name, value in empty_model(config).state_dict().items()}
    spare = {} if base is None else base.state_dict()
    missing = [name for name in shapes if name not in gathered]
    # A part comes from the base model whole or not at all: a bias is worth nothing without its matrix.
    unfit = {part_of(name) for name in missing if name not in spare or spare[name].shape != shapes[name]}
    kept = [name for name in missing if part_of(name) not in unfit]
    made_new = [name for name in missing if part_of(name) in unfit]
    fresh: dict[str, Tensor] = {}
    if made_new:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = Tercet(config).state_dict()
    new, old = set(made_new), set(kept)
    weights = {
        name: fresh[name] if name in new else spare[name] if name in old else gathered[name].float() for name in shapes
    }
    return weights, kept, made_new


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


def _with_tokens_of(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    ids = {name: getattr(tokenizer, name) for name in ("pad_id", "cls_id", "sep_id", "mask_id")}
    return ModelConfig.model_validate(merge(config.model_dump(), {"text": ids}))


def _find_tokenizer(
    path: Path, given: str | Path | None, source: _Source, base: Tercet | None
) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer of the text encoder: the one given, the one beside the file, or the base model's."""
    from tercet.data.tokenizer import Tokenizer

    if given is not None:
        return Tokenizer.load(Path(given).expanduser()), []
    if source.names.text is None:
        words = None if base is None else base.tokenizer
        reason = "its text encoder is new" if base is None else "the base model has none"
    else:
        beside = next((path.parent / name for name in _VOCABULARIES if (path.parent / name).is_file()), None)
        words = None if beside is None else Tokenizer.load(beside)
        reason = f"there is no vocab.txt beside {path.name}"
        if beside is not None:
            return words, [f"the tokenizer is the {beside.name} beside it"]
    if words is None:
        return None, [f"the model has no tokenizer ({reason}) and cannot read text; give one with --tokenizer"]
    return words, []
