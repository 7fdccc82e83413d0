"""The data path at scale, as JSON: pairs a second, opening ten million entries, and what the order of a step costs.

    python benchmarks/scale.py            # 2,000 pairs in shards; 10 million entries in 500 shards
    python benchmarks/scale.py --quick    # fewer pairs; under 50 s on 2 cores

The ten million entries are indexes as `tercet` writes them, beside sparse files of the size that a tar of them would
have.  Opening them, ordering them and reading captions is measured in a process of its own, memory by the kernel's own
count of its peak.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import torch

import pipeline
from tercet.config import DataConfig
from tercet.data.loader import TrainLoader, cleaned_captions
from tercet.data.order import PairOrder
from tercet.data.parts import TEXTS
from tercet.data.readers import open_sources
from tercet.data.shards import SCHEMA, index_path, save_index
from tercet.data.tokenizer import Tokenizer
from tercet.device import processor_name

ENTRIES, SHARDS = 10_000_000, 500
CAPTION, KEY_LENGTH, IMAGE_BYTES = (
    b"a photograph of something that was found on the web, described in a dozen words ",
    9,
    30_000,
)


def write_shards(folder: Path, images: list[bytes], pairs: int, shard_size: int) -> None:
    """Shards of JPEGs with captions."""
    for shard in range(-(-pairs // shard_size)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard * shard_size, min((shard + 1) * shard_size, pairs)):
                for name, data in (
                    (f"{number:09d}.jpg", images[number % len(images)]),
                    (f"{number:09d}.txt", CAPTION + str(number).encode()),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def pairs_per_second(folder: Path, workers: int, size: int, batch_size: int) -> float:
    """Of a training's loader, after the workers have started."""
    data = DataConfig(workers=workers)
    source = open_sources([str(folder)], data, "train")
    tokenizer = Tokenizer.train(cleaned_captions(source, data.max_words, 200), 200)
    loader = TrainLoader(source, tokenizer, data, size, batch_size, 0)
    batches = loader.batches(0)
    for _ in range(2 * workers + 1):  # batches prefetched while the workers started do not count
        next(batches)
    started, count = time.perf_counter(), 0
    for batch in batches:
        count += len(batch)
    seconds = time.perf_counter() - started
    loader.close()
    return count / seconds


def write_entries(folder: Path, entries: int, shards: int) -> None:
    """Indexes of `entries` pairs, and sparse files instead of shards."""
    each = entries // shards
    offsets = 512 + np.arange(each, dtype=np.int64) * (IMAGE_BYTES // 512 * 512 + 2048)
    captions = pa.array([[CAPTION.decode()]] * each, TEXTS)
    empty = np.zeros(each, np.int64)
    for shard in range(shards):
        path = folder / f"{shard:05d}.tar"
        with path.open("wb") as stream:
            stream.truncate(int(offsets[-1]) + IMAGE_BYTES)
        found = path.stat()
        data = DataConfig()
        state = {
            "size": found.st_size,
            "mark": str(found.st_mtime_ns),
            "caption_column": data.caption_column,
            "max_words": data.max_words,
        }
        names = pa.array([b"%0*d" % (KEY_LENGTH, shard * each + number) for number in range(each)], pa.large_binary())
        arrays = [names, captions, offsets, empty + IMAGE_BYTES, empty, empty, empty]
        columns = [pa.array(array).cast(kind) for array, kind in zip(arrays, SCHEMA.types, strict=True)]
        notes = {"rejected": [], "rejected_count": 0, "splits": {"": each}, "has_ids": False, "without_caption": 0}
        save_index(index_path(str(path)), state, pa.RecordBatch.from_arrays(columns, schema=SCHEMA), notes)


def peak_memory() -> float:
    """Peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def open_entries(folder: str) -> None:
    """In a process of its own: open, order, read captions; print the figures."""
    before = peak_memory()
    started, processor = time.perf_counter(), time.process_time()
    source = open_sources([folder], DataConfig(), "train")
    order = PairOrder(source.caption_counts, 256, 0, block_size=source.block_size)
    order.step_indices(0, 0)
    seconds, processor_seconds = time.perf_counter() - started, time.process_time() - processor
    after = peak_memory()
    for step in range(40):
        for image in order.step_indices(1, step * 900).images.tolist():
            assert source.captions(image) == [CAPTION.decode()]
    print(
        json.dumps(
            {
                "entries": source.image_count,
                "open_seconds": round(seconds, 2),
                "open_processor_seconds": round(processor_seconds, 2),
                "memory_mib": round(after),
                "of_which_imports_mib": round(before),
                "memory_after_10000_captions_mib": round(peak_memory()),
            }
        )
    )


def order_cost(pairs: int, steps: int = 40) -> float:
    """Milliseconds that the order of a step of 256 takes, by processor time."""
    order = PairOrder(np.ones(pairs, np.int32), 256, 0, block_size=1024)
    order.step_indices(0, 0)
    times = []
    for step in np.linspace(0, order.steps_per_epoch - 1, steps).astype(int).tolist():
        started = time.process_time()
        order.step_indices(1, step)
        times.append(time.process_time() - started)
    return round(1e3 * statistics.median(times), 3)


def sequential_share(pairs: int, open_blocks: int = 64) -> float:
    """Share of an epoch's reads that fall into a block that the disk is reading already, as `SampleTable` counts it."""
    order = PairOrder(np.ones(pairs, np.int32), 256, 0, block_size=1024)
    blocks: dict[int, None] = {}
    fetches = 0
    for step in range(order.steps_per_epoch):
        for block in (order.step_indices(0, step).images // 1024).tolist():
            fetches += block not in blocks
            blocks.pop(block, None)
            blocks[block] = None
            if len(blocks) > open_blocks:
                del blocks[next(iter(blocks))]
    return round(1 - fetches / (order.steps_per_epoch * 256), 5)


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Everything."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    pairs = 640 if arguments.quick else 2000
    folder = Path(arguments.photographs)
    images = pipeline.photographs(folder, 50) if folder.is_dir() else pipeline.scenes(50)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
        shards, entries = Path(root) / "shards", Path(root) / "entries"
        shards.mkdir()
        entries.mkdir()
        write_shards(shards, images, pairs, 200)
        rates = {workers: pairs_per_second(shards, workers, 256, 16) for workers in (1, 2)}
        write_entries(entries, ENTRIES, SHARDS)
        command = [sys.executable, __file__, "--open", str(entries)]
        runs = [
            json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(3)
        ]
        index_bytes = sum(path.stat().st_size for path in entries.glob("*.index"))
    opened = sorted(runs, key=lambda run: run["open_seconds"])[1]
    return {
        "name": "scale",
        "pairs_per_second": {
            f"{workers} worker{'s' * (workers > 1)}": round(rate, 1) for workers, rate in rates.items()
        },
        "opening": opened,
        "index_bytes_a_pair": round(index_bytes / ENTRIES, 1),
        "order_ms_a_step_of_256": {
            f"{size:,} pairs": order_cost(size) for size in (1_000_000, 10_000_000, 100_000_000)
        },
        "sequential_share": sequential_share(500_000 if arguments.quick else 2_000_000),
        "machine": {"processor": processor_name(), "cores": os.cpu_count()},
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer pairs, under 50 s on 2 cores")
    parser.add_argument("--photographs", default=str(pipeline.PHOTOGRAPHS), help="folder of .jpg files")
    parser.add_argument("--folder", help="folder for 2 GB of temporary files; default: the system's")
    parser.add_argument("--open", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.open:
        open_entries(arguments.open)
    else:
        print(json.dumps(measure(arguments)))


if __name__ == "__main__":
    main()
