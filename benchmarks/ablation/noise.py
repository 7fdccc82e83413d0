"""Noisy pairs: a share of the images exchange their captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tercet.config import DataConfig
from tercet.data.readers import open_sources
from tercet.files import write_atomic


def unpack(specs: Sequence[str], folder: Path) -> Path:
    """Write the images of any source into `folder`, with an annotation file of their captions; once.

    Returns:
        The annotation file.
    """
    annotations = folder / "pairs.json"
    if annotations.is_file():
        return annotations
    source = open_sources(list(specs), DataConfig(), "train")
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(source.image_count):
        name = f"{index:06d}.jpg"
        (folder / name).write_bytes(source.image(index))
        rows.append({"image": name, "caption": source.captions(index)})
    write_atomic(annotations, json.dumps(rows))
    return annotations


def shuffle_captions(annotations: Path, share: float, seed: int) -> Path:
    """An annotation file beside `annotations` in which `share` of the images have the captions of another image.

    The chosen images are permuted in one random cycle, so that none keeps its own captions.
    """
    if share == 0:
        return annotations
    noisy = annotations.with_name(f"pairs-noise{round(100 * share)}-seed{seed}.json")
    if noisy.is_file():
        return noisy
    rows = json.loads(annotations.read_text("utf-8"))
    generator = np.random.default_rng([seed, round(100 * share)])
    chosen = generator.permutation(len(rows))[: round(share * len(rows))]
    captions = [rows[index]["caption"] for index in np.roll(chosen, 1)]
    for index, moved in zip(chosen, captions, strict=True):
        rows[index] = {**rows[index], "caption": moved}
    write_atomic(noisy, json.dumps(rows))
    return noisy
