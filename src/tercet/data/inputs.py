"""Images and texts as a caller has them, one or several: paths, files' bytes, Pillow images, arrays, tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tercet.data.augment import Pixels
from tercet.data.images import decode, from_pillow, resize
from tercet.data.storage import read_bytes
from tercet.errors import TercetError

ImageInput = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor
ImageInputs = ImageInput | Iterable[ImageInput]
TextInputs = str | Iterable[str]

_SINGLE = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)
_FORMS = "a path, a file's bytes, a Pillow image, an array [height, width, 3] or a tensor [3, height, width]"


def list_images(images: ImageInputs) -> tuple[list[ImageInput], bool]:
    """The images, and whether one was given alone.  An array or tensor of four axes holds several.

    Raises:
        TercetError: no image, or nothing that holds images.
    """
    if isinstance(images, np.ndarray | Tensor):
        if images.ndim <= 3:
            return [images], True
        if images.ndim > 4:
            raise TercetError(f"an array of {images.ndim} axes is no batch of images; give {_FORMS}, or a list of them")
    elif isinstance(images, _SINGLE) or not isinstance(images, Iterable):
        return [images], True  # pyright: ignore[reportReturnType] - bytes-like; to_pixels rejects the rest
    several: list[ImageInput] = list(images)
    if not several:
        raise TercetError("no image given; give one or more")
    return several, False


def list_texts(texts: TextInputs) -> tuple[list[str], bool]:
    """The texts, and whether one was given alone.

    Raises:
        TercetError: no text, or something else among them.
    """
    if isinstance(texts, str):
        return [texts], True
    if not isinstance(texts, Iterable):
        raise TercetError(f"the text is {type(texts).__name__}, not a string or a list of them")
    several = list(texts)
    if not several:
        raise TercetError("no text given; give one or more")
    for number, text in enumerate(several, 1):
        if not isinstance(text, str):
            raise TercetError(f"text {number} is {type(text).__name__}, not a string")
    return several, False


def to_pixels(image: ImageInput, name: str = "the image") -> Pixels:
    """One image of any form as uint8 RGB `[height, width, 3]`.

    Args:
        image: the path of a file, its bytes, a Pillow image, an array `[height, width]`, `[height, width, 1, 3 or 4]`,
            or a tensor `[1, 3 or 4, height, width]`.  uint8 goes from 0 to 255, floats from 0 to 1.
        name: names it in errors, where it has no path.

    Raises:
        TercetError: not an image, or values or axes are ambiguous.
    """
    if isinstance(image, str | os.PathLike):
        return decode(read_bytes(os.fspath(image)), os.fspath(image))
    if isinstance(image, bytes | bytearray | memoryview):
        return decode(bytes(image), name)
    if isinstance(image, Image.Image):
        return from_pillow(image, name)
    if isinstance(image, Tensor):
        return _from_array(_channels_last(image.detach().cpu(), name), name)
    if isinstance(image, np.ndarray):
        return _from_array(image, name)
    raise TercetError(f"{name} is {type(image).__name__}; give {_FORMS}")


def to_batch(images: Sequence[Pixels], size: int) -> Tensor:
    """uint8 `[batch, 3, size, size]`, each image resized as in every evaluation."""
    return torch.from_numpy(np.stack([resize(image, size) for image in images])).permute(0, 3, 1, 2).contiguous()


def _channels_last(image: Tensor, name: str) -> np.ndarray:
    if image.ndim == 3 and image.shape[0] not in (1, 3, 4):
        raise TercetError(
            f"{name} is a tensor of shape {list(image.shape)}; give [3, height, width], or an array for the other order"
        )
    values = image.float() if image.is_floating_point() else image
    return (values.permute(1, 2, 0) if image.ndim == 3 else values).numpy()


def _from_array(image: np.ndarray, name: str) -> Pixels:
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))) or 0 in image.shape:
        raise TercetError(f"{name} is an array of shape {list(image.shape)}; give [height, width, 3] of RGB")
    if np.issubdtype(image.dtype, np.floating):
        if not (np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1):
            raise TercetError(
                f"{name} has floats outside 0 to 1; scale them, or give uint8 from 0 to 255 "
                "(images already normalised go to encode_image)"
            )
        image = np.rint(image * 255).astype(np.uint8)
    if image.dtype != np.uint8:
        raise TercetError(f"{name} holds {image.dtype} values; give uint8 from 0 to 255, or floats from 0 to 1")
    return from_pillow(Image.fromarray(np.ascontiguousarray(image)), name)
