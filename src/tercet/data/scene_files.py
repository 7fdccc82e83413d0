"""Writes synthetic scenes as the files that users have: tar shards of pairs, and annotation files of the tasks.

    shapes-000000.tar ...        JPEGs of one shape each, with captions, to learn shapes and colours from
    train-000000.tar ...         scenes with three captions each
    validation-000000.tar, test-000000.tar         held-out scenes, each with the one caption that is true of it alone
    vqa.jsonl, vqa-test.jsonl, nlvr.jsonl ...      annotations of the tasks, whose images lie in the shards beside them
    pairs-train-000000.tar ...   the images of the statements about two scenes
    detections.json              boxes of all objects of the held-out scenes, to choose from in grounding

Everything follows from its name: shards that exist are kept, so that more can be added later.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from tercet.data.scene_pairs import draw_pair, shared_statements
from tercet.data.scene_tasks import (
    Question,
    entailments,
    expressions,
    location_questions,
    questions,
    referred_questions,
)
from tercet.data.scenes import HELD_OUT, SPLITS, Scene, split_scenes
from tercet.errors import TercetError
from tercet.files import write_atomic

SHARD_SIZE = 1000
HELD_OUT_SCENES = 500
DEMO = {"shapes": 25_600, "train": 18_000, "validation": HELD_OUT_SCENES, "test": HELD_OUT_SCENES}
# Files to train on for each task, and of how many scenes (or pairs of scenes).
TASKS = {
    "vqa": {"vqa-first": 36_000, "vqa-referred": 47_000, "vqa": 48_000},
    "entailment": {"entailment": 12_000},
    "nlvr": {"nlvr-first": 16_000, "nlvr": 60_000},
    "grounding": {"grounding": 12_000},
}
ANNOTATORS = 10  # of a held-out question; all agree
# Further statements about a pair that is trained on.  A pair is made so that its own sentence is nearly true, or nearly
# false; the others are easier, and the more there are the easier learning begins.
FURTHER_STATEMENTS = {"nlvr-first": 8, "nlvr": 2}
SHARING_PAIRS = 8  # pairs in a row that share their further statements


def write_demo(folder: Path, count: int | None = None) -> None:
    """Write what the demo trains on: pairs of all splits, and the held-out annotations of all tasks.

    Args:
        folder: folder to write into.
        count: scenes of each split at most.
    """
    for split, scenes in DEMO.items():
        write_pairs(folder, split, min(scenes, count or scenes))
    for task in TASKS:
        _write_held_out(folder, task, count)


def write_task(folder: Path, task: str, count: int | None = None) -> None:
    """Write what a task trains on and is measured by, with its images.

    Args:
        folder: folder to write into.
        task: 'vqa', 'entailment', 'nlvr' or 'grounding'.
        count: scenes of each split at most.

    Raises:
        TercetError: there are no scenes for the task.
    """
    if task not in TASKS:
        raise TercetError(f"no scenes for a task {task!r}; choose from {', '.join(TASKS)}")
    sizes = {name: min(scenes, count or scenes) for name, scenes in TASKS[task].items()}
    _write_images(folder, task, "train", max(sizes.values()))
    for name, scenes in sizes.items():
        _write_rows(folder / f"{name}.jsonl", _ROWS[name]("train", scenes))
    _write_held_out(folder, task, count)


def _write_held_out(folder: Path, task: str, count: int | None) -> None:
    scenes = min(HELD_OUT_SCENES, count or HELD_OUT_SCENES)
    boxes: dict[str, list[Any]] = {}
    for split in HELD_OUT:
        _write_images(folder, task, split, scenes)
        _write_rows(folder / f"{task}-{split}.jsonl", _ROWS[task](split, scenes))
        for index, scene in enumerate(split_scenes(split, scenes)):
            boxes[_name(split, index)] = [[left, top, r - left, b - top] for left, top, r, b in scene.boxes]
    if task == "grounding":
        write_atomic(folder / "detections.json", json.dumps(boxes))


def _write_images(folder: Path, task: str, split: str, count: int) -> None:
    if task == "nlvr":
        _write_shards(folder, f"pairs-{split}", count, partial(_statement_members, split))
    else:
        write_pairs(folder, split, count)


def write_pairs(folder: Path, split: str, count: int) -> None:
    """Write the first `count` scenes of a split with their captions as tar shards."""
    _write_shards(folder, split, count, partial(_pair_members, split))


Members = Callable[[int, int], Iterator[tuple[str, bytes]]]


def _write_shards(folder: Path, name: str, count: int, members: Members) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        (folder / f"{name}-{start // SHARD_SIZE:06}.tar", members, start, min(SHARD_SIZE, count - start))
        for start in range(0, count, SHARD_SIZE)
    ]
    workers = min(len(jobs), os.cpu_count() or 1)
    if workers > 1:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            list(pool.map(_write_shard, *zip(*jobs, strict=True)))
    else:
        for job in jobs:
            _write_shard(*job)


def _write_shard(path: Path, members: Members, start: int, count: int) -> None:
    last = f"{path.stem.rpartition('-')[0]}-{start + count - 1:06}"
    if path.exists():
        with tarfile.open(path) as shard:
            names = shard.getnames()
        if names and names[-1].startswith(last) and len(names) == 2 * count:
            return
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as shard:
        for name, data in members(start, count):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
    write_atomic(path, stream.getvalue())


def _pair_members(split: str, start: int, count: int) -> Iterator[tuple[str, bytes]]:
    for index, scene in enumerate(split_scenes(split, count, start), start):
        captions = scene.captions[:1] if split in HELD_OUT else scene.captions
        yield f"{_name(split, index)}.jpg", encode_jpeg(scene.image)
        yield f"{_name(split, index)}.json", json.dumps({"caption": captions}).encode()


def _statement_members(split: str, start: int, count: int) -> Iterator[tuple[str, bytes]]:
    for index in range(start, start + count):
        pair = draw_pair(_pair_seed(split, index))
        for scene, name in zip((pair.left, pair.right), _pair_names(split, index), strict=True):
            yield name, encode_jpeg(scene.image)


def encode_jpeg(image: np.ndarray) -> bytes:
    """A JPEG of an RGB picture, uint8 `[height, width, 3]`, that keeps the colours of every pixel."""
    options = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    done, data = cv2.imencode(".jpg", np.ascontiguousarray(image[:, :, ::-1]), options)
    assert done
    return data.tobytes()


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_atomic(path, "".join(f"{json.dumps(row)}\n" for row in rows))


def _name(split: str, index: int) -> str:
    return f"{split}-{index:06}"


def _pair_names(split: str, index: int) -> tuple[str, str]:
    return f"pairs-{_name(split, index)}-left.jpg", f"pairs-{_name(split, index)}-right.jpg"


def _pair_seed(split: str, index: int) -> int:
    """Pairs 2n and 2n + 1 share their sentence; no two splits share a pair."""
    group, side = divmod(index, 2)
    return 2 * (3 * group + SPLITS[split]) + side


def _ask_everything(index: int, scene: Scene) -> list[Question]:
    return questions(scene)


def _question_rows(split: str, count: int, ask: Callable[[int, Scene], list[Question]]) -> Iterator[dict[str, Any]]:
    numbers = itertools.count()
    for index, scene in enumerate(split_scenes(split, count)):
        for question in ask(index, scene):
            yield {
                "question_id": next(numbers),
                "image": f"{_name(split, index)}.jpg",
                "question": question.text,
                "answer": [question.answer] * (ANNOTATORS if split in HELD_OUT else 1),
                "answer_type": question.kind,
            }


def _ask_in_turn(index: int, scene: Scene) -> list[Question]:
    """A third of the scenes each is asked about everything, about locations, and about shapes named by them."""
    return (questions, location_questions, referred_questions)[index % 3](scene)


def _vqa_rows(split: str, count: int) -> Iterator[dict[str, Any]]:
    return _question_rows(split, count, _ask_everything if split in HELD_OUT else _ask_in_turn)


def _entailment_rows(split: str, count: int) -> Iterator[dict[str, Any]]:
    for index, scene in enumerate(split_scenes(split, count)):
        for sentence, label in entailments(scene):
            yield {"image": f"{_name(split, index)}.jpg", "sentence": sentence, "label": label}


def _grounding_rows(split: str, count: int) -> Iterator[dict[str, Any]]:
    for index, scene in enumerate(split_scenes(split, count)):
        for text, box, kind in expressions(scene):
            image, size = f"{_name(split, index)}.jpg", [scene.size, scene.size]
            yield {"image": image, "text": text, "boxes": [box], "size": size, "kinds": [kind]}


def _statement_rows(split: str, count: int, name: str = "nlvr") -> Iterator[dict[str, Any]]:
    for start in range(0, count, SHARING_PAIRS):
        pairs = [draw_pair(_pair_seed(split, index)) for index in range(start, min(start + SHARING_PAIRS, count))]
        further: list[list[tuple[str, bool]]] = [[]] * len(pairs)
        if split not in HELD_OUT:
            further = shared_statements(pairs, _pair_seed(split, start), FURTHER_STATEMENTS[name])
        for index, pair, others in zip(itertools.count(start), pairs, further, strict=False):
            images = _pair_names(split, index)
            # As in NLVR2: the pairs of one sentence differ in the third part of their identifiers alone.
            identifier = f"{split}-{index // 2}-{index % 2}-0"
            yield {"images": images, "sentence": pair.sentence, "label": pair.truth, "identifier": identifier}
            yield from ({"images": images, "sentence": sentence, "label": truth} for sentence, truth in others)


Rows = Callable[[str, int], Iterator[dict[str, Any]]]
_ROWS: dict[str, Rows] = {
    "vqa-first": partial(_question_rows, ask=_ask_everything),
    "vqa-referred": partial(_question_rows, ask=lambda _, scene: referred_questions(scene)),
    "vqa": _vqa_rows,
    "entailment": _entailment_rows,
    "nlvr-first": partial(_statement_rows, name="nlvr-first"),
    "nlvr": _statement_rows,
    "grounding": _grounding_rows,
}
