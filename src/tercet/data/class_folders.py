"""Labelled images: a folder for each class, or pairs whose caption is the label."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tercet.config import DataConfig
from tercet.data.builders import PairBuilder
from tercet.data.readers import IMAGE_SUFFIXES, open_sources
from tercet.data.rows import Rejected
from tercet.data.storage import is_url
from tercet.data.table import SampleTable, concatenate
from tercet.errors import TercetError


def open_labelled(specs: Sequence[str], data: DataConfig, split: str) -> SampleTable:
    """Labelled images as images with one caption, the label.

    Args:
        specs: folders with a folder for each class, whose name with spaces for underscores is the label; or any source
            of pairs, whose `data.caption_column` holds the label.
        data: names of columns, root of image paths.
        split: 'train', 'validation' or 'test'.

    Raises:
        TercetError: a file is missing or cannot be parsed, or gives no labelled image.
    """
    return concatenate(
        [
            read_class_folders(Path(spec), data) if _has_class_folders(spec) else open_sources([spec], data, split)
            for spec in ([specs] if isinstance(specs, str) else specs)
        ]
    )


def labels_of(source: SampleTable) -> list[str]:
    """The label of each image.

    Raises:
        TercetError: an image has several.
    """
    labels = []
    for index in range(source.image_count):
        captions = source.captions(index)
        if len(set(captions)) > 1:
            raise TercetError(
                f"{source.key(index)}: {len(captions)} labels, such as {captions[0]!r} and {captions[1]!r}; an image "
                "has one here (data.caption_column names the column that holds it)"
            )
        labels.append(captions[0])
    return labels


def read_class_folders(folder: Path, data: DataConfig) -> SampleTable:
    """The images of the folders in `folder`, each labelled with the name of its own."""
    builder = PairBuilder(Rejected(), data.max_words)
    for part in sorted(part for part in folder.iterdir() if part.is_dir()):
        label = part.name.replace("_", " ")
        for image in sorted(image for image in part.rglob("*") if image.suffix.lower() in IMAGE_SUFFIXES):
            builder.add(str(image), str(image.relative_to(folder)), label)
    return builder.finish().in_files(str(folder), builder.rejected)


def _has_class_folders(spec: str) -> bool:
    """Whether `spec` is a folder of folders of images without captions beside them."""
    folder = Path(spec)
    if is_url(spec) or not folder.is_dir() or any(entry.is_file() for entry in folder.iterdir()):
        return False
    images = (image for image in folder.rglob("*") if image.suffix.lower() in IMAGE_SUFFIXES)
    first = next(images, None)
    return first is not None and not first.with_suffix(".txt").exists()
