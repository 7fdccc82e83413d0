"""Reading weights of others from a file, without running anything that the file may hold."""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tercet.errors import TercetError

_IN_FOLDER = ("model.safetensors", "pytorch_model.bin")
_NESTED = ("model", "state_dict")


def find_weights(path: Path) -> Path:
    """The file of weights at `path`: itself, or the one that a Hugging Face folder holds.

    Raises:
        TercetError: there is none.
    """
    if path.is_dir():
        for name in _IN_FOLDER:
            if (path / name).is_file():
                return path / name
        raise TercetError(f"{path}: holds neither {' nor '.join(_IN_FOLDER)}; name the file of weights itself")
    if not path.is_file():
        raise TercetError(f"no file {path}; check the path")
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """The named tensors of a `.safetensors` file or of a PyTorch checkpoint, mapped from the disk where possible.

    A checkpoint may hold them under `model` or `state_dict`, and under a wrapper's `module.`; what else it holds is not
    read.

    Raises:
        TercetError: not such a file, cut short, or a checkpoint that holds more than plain data.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError, MemoryError) as error:
            raise TercetError(f"{path}: cut short or not a safetensors file ({error}); download it again") from error
    content = _read_pickle(path)
    for name in _NESTED:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    if not isinstance(content, dict):
        raise TercetError(f"{path}: holds a {type(content).__name__}, not named weights; save a model's state_dict()")
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    for name, value in state.items():
        _check_stored(path, name, value)
    if not state:
        raise TercetError(f"{path}: no tensors in it; its keys are {', '.join(map(str, list(content)[:5]))}")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def _check_stored(path: Path, name: str, value: Tensor) -> None:
    """Refuse a tensor that is not all there: strides of 0 let a few bytes stand for any number of gigabytes."""
    whole = value.layout == torch.strided and value.device.type == "cpu"
    if not whole or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise TercetError(f"{path}: {name} {list(value.shape)} is not stored whole; save its contiguous() instead")


def _refuse_packed(path: Path) -> None:
    """Refuse a checkpoint whose members are compressed, which PyTorch never writes: a small one can unpack to any size.

    Raises:
        TercetError: it is compressed.
    """
    with zipfile.ZipFile(path) as archive:
        packed = next((item for item in archive.infolist() if item.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise TercetError(f"{path}: {packed.filename} in it is compressed, as no checkpoint of PyTorch is; unpack it")


def _read_pickle(path: Path) -> Any:
    try:
        if zipfile.is_zipfile(path):
            _refuse_packed(path)
        # Checkpoints often keep the parsed command line beside the weights; it is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise TercetError(_explain(path, error)) from error
    except TercetError:
        raise
    except Exception as error:  # hostile bytes bring the readers of zip and pickle to raise nearly anything
        reason = " ".join(str(error).split())
        raise TercetError(
            f"{path}: cut short or not a PyTorch checkpoint ({reason[:200]}); download it again"
        ) from error


def _explain(path: Path, error: Exception) -> str:
    named = re.search(r"(?:GLOBAL|Unsupported class|Unsupported global:)\s+(?:GLOBAL\s+)?([\w.]+)", str(error))
    if named is None:
        return f"{path}: cut short or not a PyTorch checkpoint; download it again"
    return (
        f"{path}: holds {named.group(1)}, which can run code when it is read, so it was not read; if you trust its "
        f"origin, save its weights alone where it was made: torch.save(torch.load('{path.name}', "
        "weights_only=False)['model'], 'weights.pth')"
    )
