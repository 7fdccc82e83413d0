"""Training views a second on one core, ours and a plain Pillow pipeline of the same operations in turn, as JSON.

    python benchmarks/pipeline.py            # 200 JPEGs of 640x480, 5 rounds
    python benchmarks/pipeline.py --quick    # under 50 s on 2 cores

Both decode every JPEG once and make two views of it (crop, colour jitter, grey, blur, flip and RandAugment), and both
end with uint8 `[3, size, size]`.  Photographs are read from a folder where there is one (`--photographs`); synthetic
scenes are used if it does not exist.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

import pillow_views
from tercet.data.images import EncodedImage, ViewTransform
from tercet.data.loader import stack
from tercet.device import processor_name

WIDTH, HEIGHT, QUALITY = 640, 480, 90
PHOTOGRAPHS = Path(__file__).resolve().parents[2] / "shared" / "data" / "flickr8k" / "originals"


def photographs(folder: Path, count: int) -> list[bytes]:
    """JPEGs of 640x480 made from the photographs of a folder, over and over."""
    files = sorted(folder.glob("*.jpg"))[:count]
    made = [encode(Image.open(file).convert("RGB")) for file in files]
    return [made[index % len(made)] for index in range(count)]


def scenes(count: int) -> list[bytes]:
    """JPEGs of 640x480 made from synthetic scenes."""
    from tercet.data.scenes import draw_scene

    return [encode(Image.fromarray(draw_scene(seed).image)) for seed in range(count)]


def encode(image: Image.Image) -> bytes:
    """A JPEG of 640x480."""
    stream = io.BytesIO()
    image.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def run_ours(images: list[bytes], transform: ViewTransform) -> None:
    """What a worker does with a batch."""
    views: list[np.ndarray] = []
    for number, data in enumerate(images):
        views += transform(EncodedImage(data, "image"), np.random.default_rng(number))
    stack(views, transform.size)


def run_plain(images: list[bytes], size: int) -> None:
    """The same with Pillow."""
    views: list[np.ndarray] = []
    for number, data in enumerate(images):
        image, rng = pillow_views.decode(data), np.random.default_rng(number)
        views += [pillow_views.view(image, size, rng), pillow_views.view(image, size, rng)]
    np.stack(views)


def views_per_second(run: Callable[[], None], count: int) -> float:
    """By processor time, so that other processes on the machine count little."""
    started = time.process_time()
    run()
    return 2 * count / (time.process_time() - started)


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Make the images, run in turn, compare."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    count, rounds = (60, 5) if arguments.quick else (200, 7)
    folder = Path(arguments.photographs)
    real = folder.is_dir()
    images = photographs(folder, count) if real else scenes(count)
    transform = ViewTransform(arguments.size)
    runs: dict[str, Callable[[], None]] = {
        "ours": lambda: run_ours(images, transform),
        "plain": lambda: run_plain(images, arguments.size),
    }
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            rates[name].append(views_per_second(run, count))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "name": "pipeline",
        "ours": round(medians["ours"], 1),
        "plain": round(medians["plain"], 1),
        "ratio": round(statistics.median(a / b for a, b in zip(rates["ours"], rates["plain"], strict=True)), 2),
        "unit": "views/s a core",
        "size": arguments.size,
        "images": f"{count} {'photographs' if real else 'synthetic scenes'} as JPEGs of {WIDTH}x{HEIGHT}",
        "spread": {name: [round(min(values), 1), round(max(values), 1)] for name, values in rates.items()},
        "machine": {"processor": processor_name(), "cores": os.cpu_count(), "clock": "processor"},
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer images, under 50 s on 2 cores")
    parser.add_argument("--size", type=int, default=256, help="side of a view in pixels")
    parser.add_argument("--photographs", default=str(PHOTOGRAPHS), help="folder of .jpg files")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
