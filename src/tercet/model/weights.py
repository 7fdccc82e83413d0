"""Checkpoint files of others: read without running anything that they may hold, and written in the published form."""

from __future__ import annotations

import argparse
import io
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from tercet.config import ModelConfig
from tercet.errors import TercetError
from tercet.files import write_atomic
from tercet.model.hub import WEIGHTS_ERRORS
from tercet.model.names import PublishedStyle, state_to_published
from tercet.model.tercet import Tercet

_IN_FOLDER = ("model.safetensors", "pytorch_model.bin")
# What the published code keeps a moving average of.
_TAUGHT = ("visual_encoder", "text_encoder", "vision_proj", "text_proj", "text_decoder", "cls_head")
_TWO_IMAGES = {"nlvr", "assignment"}


def find_weights(path: Path) -> Path:
    """The file of weights at `path`: itself, or the one that a Hugging Face folder holds.

    Raises:
        TercetError: there is none.
    """
    if path.is_dir():
        found = next((path / name for name in _IN_FOLDER if (path / name).is_file()), None)
        if found is None:
            raise TercetError(f"{path}: holds neither {' nor '.join(_IN_FOLDER)}; name the file of weights itself")
        return found
    if not path.is_file():
        raise TercetError(f"no file {path}; check the path")
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """The named tensors of a `.safetensors` file or of a PyTorch checkpoint, mapped from the disk where possible.

    A checkpoint may hold them under `model` or `state_dict`, and under a wrapper's `module.`; the rest is ignored.

    Raises:
        TercetError: not such a file, cut short, or a checkpoint that holds more than plain data.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except WEIGHTS_ERRORS as error:
            raise TercetError(f"{path}: cut short or not a safetensors file ({error}); download it again") from error
    content = _read_pickle(path)
    for name in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    if not isinstance(content, dict):
        raise TercetError(f"{path}: holds a {type(content).__name__}, not named weights; save a model's state_dict()")
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    for name, value in state.items():
        # Strides of 0 let a few bytes stand for any number of gigabytes.
        stored = value.layout == torch.strided and value.device.type == "cpu"
        if not stored or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise TercetError(f"{path}: {name} {list(value.shape)} is not stored whole; save its contiguous() instead")
    if not state:
        raise TercetError(f"{path}: no tensors in it; its keys are {', '.join(map(str, list(content)[:5]))}")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def _read_pickle(path: Path) -> Any:
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _check_uncompressed(path)
        # Checkpoints often keep the parsed command line beside the weights; it is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except TercetError:
        raise
    except Exception as error:  # hostile bytes bring the readers of zip and pickle to raise nearly anything
        named = re.search(r"(?:GLOBAL|Unsupported class|Unsupported global:)\s+(?:GLOBAL\s+)?([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and named is not None:
            raise TercetError(
                f"{path}: holds {named[1]}, which can run code when it is read, so it was not read; if you trust its "
                f"origin, save its weights alone where it was made: torch.save(torch.load('{path.name}', "
                "weights_only=False)['model'], 'weights.pth')"
            ) from error
        reason = " ".join(str(error).split())[:200]
        raise TercetError(f"{path}: cut short or not a PyTorch checkpoint ({reason}); download it again") from error


def _check_uncompressed(path: Path) -> None:
    """PyTorch never compresses a checkpoint, and a small compressed one can unpack to any size."""
    with zipfile.ZipFile(path) as archive:
        packed = next((item for item in archive.infolist() if item.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise TercetError(f"{path}: {packed.filename} in it is compressed, which PyTorch never does; unpack it")


@dataclass(frozen=True)
class PublishedFile:
    """A checkpoint that was written.

    Attributes:
        file: where.
        style: how deep the text stack is nested.
        entries: how many tensors it holds.
        skipped: parts of the model that the published form cannot hold.
    """

    file: Path
    style: PublishedStyle
    entries: int
    skipped: list[str]


def write_published(model: Tercet, file: str | Path, style: PublishedStyle | None = None) -> PublishedFile:
    """Write `model` under the published names; `tercet.model.convert.convert` reads it back bit for bit.

    The published fine-tuning scripts also read the moving averages, so they are written too, equal to the weights.  The
    queues are not: they hold the features of past batches.

    Args:
        model: any; its heads for tasks are written too.
        file: `.pth` (a dict with the weights under `model`, as published) or `.safetensors`.
        style: default that of pre-training, and of a model with heads for tasks that of fine-tuning.

    Raises:
        TercetError: another suffix, a model that the published form cannot hold, or a full disk.
    """
    file = Path(file).expanduser()
    if file.suffix not in (".pth", ".pt", ".safetensors"):
        raise TercetError(f"{file}: name the checkpoint FILE.pth or FILE.safetensors")
    if file.is_dir():
        raise TercetError(f"{file} is a folder; name a file")
    heads: set[str] = set(model.config.heads)
    _check_publishable(model.config)
    style = style or ("downstream" if heads else "pretraining")
    if style == "pretraining" and heads:
        raise TercetError(f"the pre-training form cannot hold {', '.join(sorted(heads))}; remove --style")
    state = {name: value.detach().float().cpu() for name, value in model.state_dict().items()}
    # A model for two images is known by its lack of a matching head.
    skipped = ["itm_head"] if heads & _TWO_IMAGES else []
    published = state_to_published({k: v for k, v in state.items() if k.split(".")[0] not in skipped}, style)
    published |= teacher_names(published)
    if file.suffix == ".safetensors":
        # This format refuses tensors that share memory, which tied and averaged ones do.
        data = save({name: value.clone().contiguous() for name, value in published.items()}, {"format": "pt"})
    else:
        stream = io.BytesIO()
        torch.save({"model": published}, stream)
        data = stream.getvalue()
    write_atomic(file, data)
    return PublishedFile(file, style, len(published), skipped)


def teacher_names(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The averaged weights again under the names of their moving averages."""
    parts = [(name.partition("."), value) for name, value in published.items()]
    return {f"{part}_m{dot}{rest}": value for (part, dot, rest), value in parts if part in _TAUGHT}


def _check_publishable(config: ModelConfig) -> None:
    classifiers = sorted({*config.heads} & {"entailment", *_TWO_IMAGES})
    if "entailment" in classifiers and len(classifiers) > 1:
        raise TercetError(
            f"the model has heads for {' and '.join(classifiers)}, which share one name in the published form; "
            "convert the models that were fine-tuned for each"
        )
    vision, text = config.vision, config.text
    ours = {
        "model.vision.stem": (vision.stem, "patch"),
        "model.vision.pool": (vision.pool, "class"),
        "model.vision.window": (vision.window, None),
        "model.text.pool": (text.pool, "class"),
    }
    for key, (value, published) in ours.items():
        if value != published:
            raise TercetError(f"the published form cannot hold {key} {value}; train with {key} {published}")
