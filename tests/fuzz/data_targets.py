"""The readers of pairs, samples, predictions and pictures, each with small valid files to mutate."""

from __future__ import annotations

import contextlib
import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.feather
import pyarrow.parquet

from fuzz.target import BESIDE, JPEG, PIXEL_LIMIT, Target, as_json, as_lines, picture_bytes
from tercet.config import DataConfig
from tercet.data.class_readers import read_entailments, read_statements
from tercet.data.grounding_readers import open_expressions
from tercet.data.images import EncodedImage, decode
from tercet.data.loader import describe
from tercet.data.readers import open_sources
from tercet.data.storage import read_bytes
from tercet.data.table import SampleTable
from tercet.data.task_readers import open_questions, read_answer_list, read_gold, read_results
from tercet.errors import TercetError
from tercet.tasks.probes import crop, open_probes
from tercet.tasks.score import score_predictions


def read_pairs(name: str, **keys: Any) -> Callable[[Path], object]:
    """Reads pairs of images and captions, decoded."""

    def read(folder: Path) -> object:
        data = DataConfig(pixel_limit=PIXEL_LIMIT, **keys)
        source = open_sources([f"{folder / name}#all" if name else str(folder)], data, "train")
        for index in range(min(source.image_count, 50)):
            with contextlib.suppress(OSError):  # the loader counts and names these
                decode(source.image(index), source.key(index), data.pixel_limit)
            assert all(isinstance(caption, str) for caption in source.captions(index))
        return list(source.rejected)

    return read


def read_samples(source: SampleTable) -> None:
    """All samples and the first pictures."""
    for index in range(source.sample_count):
        source.sample(index)
    for index in range(min(source.image_count, 20)):
        with contextlib.suppress(OSError):
            source.pixels(index, PIXEL_LIMIT)


def pair_targets() -> dict[str, Target]:
    """Annotation files, folders, shards and tables."""
    row = {"image": "1.jpg", "caption": ["a red dog", "two dogs"], "image_id": 7, "split": "train"}
    karpathy = {
        "images": [
            {
                "filename": "1.jpg",
                "filepath": ".",
                "split": "test",
                "sentences": [{"raw": "a dog"}, {"raw": "b"}],
                "cocoid": 3,
            }
        ]
    }
    coco = {
        "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
        "annotations": [{"image_id": 1, "caption": "a dog"}, {"image_id": 2, "caption": "a cat"}],
    }
    rows = [row, {"image": "2.jpg", "caption": "a cat"}]
    sheet = 'image,caption,image_id,split\n1.jpg,a dog,1,train\n2.jpg,"a, cat",2,test\n'
    tokens = "1.jpg#0\ta dog\n1.jpg#1\ttwo dogs\n2.jpg#0\ta cat\n"
    return {
        "json": Target("a.json", [as_json(rows), as_json(karpathy), as_json(coco)], read_pairs("a.json"), BESIDE),
        "jsonl": Target("a.jsonl", [as_lines(rows)], read_pairs("a.jsonl"), BESIDE),
        "csv": Target("a.csv", [sheet.encode()], read_pairs("a.csv"), BESIDE),
        "tsv": Target("a.tsv", [sheet.replace(",", "\t").encode()], read_pairs("a.tsv"), BESIDE),
        "token file": Target("a.txt", [tokens.encode()], read_pairs("a.txt"), BESIDE),
        "caption beside": Target("1.txt", [b"a dog\ntwo dogs\n"], read_pairs(""), BESIDE, names=""),
        "tar": Target("a.tar", tar_seeds(), read_pairs("a.tar")),
        "parquet": Target("a.parquet", table_seeds("parquet"), read_pairs("a.parquet")),
        "arrow": Target("a.arrow", table_seeds("arrow"), read_pairs("a.arrow")),
    }


def tar_seeds() -> list[bytes]:
    """Shards in the three tar formats, one with long names and one with every kind of caption."""
    seeds = []
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=kind) as tar:
            long = "x" * (60 if kind == tarfile.USTAR_FORMAT else 150) + "é"
            for name, content in {
                "1.jpg": JPEG,
                "1.txt": b"a dog",
                f"{long}.jpg": JPEG,
                f"{long}.json": as_json({"caption": "a cat", "image_id": 1, "split": "train"}),
            }.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        seeds.append(stream.getvalue()[: 9 * 1024])
    return seeds


def table_seeds(kind: str) -> list[bytes]:
    """Tables with images as bytes, as structs and as paths, compressed and not."""
    images = [JPEG, None, JPEG]
    columns = {
        "binary": pyarrow.array(images, pyarrow.binary()),
        "struct": pyarrow.array([{"bytes": image, "path": "x"} if image else None for image in images]),
    }
    seeds: list[bytes] = []
    for image in columns.values():
        table = pyarrow.table({"image": image, "caption": ["a dog", "a cat", "a bird"], "image_id": [1, 2, None]})
        for compression in ("none", "zstd") if kind == "parquet" else ("uncompressed", "lz4"):
            stream = io.BytesIO()
            if kind == "parquet":
                pyarrow.parquet.write_table(table, stream, compression=compression)
            else:
                pyarrow.feather.write_feather(table, stream, compression)
            seeds.append(stream.getvalue())
    if kind == "arrow":
        stream = io.BytesIO()
        table = pyarrow.table({"image": columns["binary"], "caption": [["a dog"], ["a cat", "b"], []]})
        with pyarrow.ipc.new_stream(stream, table.schema) as writer:
            writer.write_table(table)
        seeds.append(stream.getvalue())
    return seeds


QUESTIONS, ANNOTATIONS = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"
OFFICIAL_QUESTIONS = as_json(
    {"data_subtype": "val2014", "questions": [{"image_id": 1, "question": "what?", "question_id": 10}]}
)
OFFICIAL_ANNOTATIONS = as_json(
    {
        "annotations": [
            {"question_id": 10, "image_id": 1, "answer_type": "other", "answers": [{"answer": "yes"}, {"answer": "no"}]}
        ]
    }
)
ALBEF_QUESTIONS = [{"image": "1.jpg", "question": "what?", "question_id": 3, "answer": ["a", "b"], "dataset": "vqa"}]
STATEMENTS = [
    {"sentence": "two dogs", "label": "True", "identifier": "dev-1-2-0", "directory": 3},
    {"sentence": "two dogs", "label": "False", "images": ["1.jpg", "2.jpg"], "identifier": "dev-1-3-0"},
]
ENTAILMENTS = [
    {"gold_label": "neutral", "sentence2": "a dog", "Flickr30K_ID": "1", "pairID": "1.jpg#0r1n"},
    {"label": "entailment", "sentence": "a dog", "image": "1.jpg", "pairID": "x"},
]
EXPRESSIONS = [
    {
        "image": "1.jpg",
        "text": "left dog",
        "boxes": [[1, 1, 5, 5]],
        "size": [12, 10],
        "types": ["animals"],
        "ref_id": 4,
    },
    {"image": "1.jpg", "phrase": "a dog", "boxes_xyxy": [[0, 0, 3, 3]], "orig_size": [12, 10], "split": "val"},
]
REFERENCES = [
    {
        "ref_id": 1,
        "ann_id": 2,
        "image_id": 1,
        "file_name": "1_0.jpg",
        "split": "val",
        "sentences": [{"sent": "a dog"}, {"sent": "dog"}],
    }
]
INSTANCES = {
    "images": [{"id": 1, "width": 12, "height": 10, "file_name": "1.jpg"}],
    "annotations": [{"id": 2, "image_id": 1, "bbox": [1, 1, 5, 5]}],
}
DETECTIONS = {"1": [[1, 1, 4, 4, 0.5], [0, 0, 9, 9]]}
PROBES = [
    as_json({"0": {"filename": "1.jpg", "caption": "A dog.", "negative_caption": "A cat."}}),
    as_json(
        [
            {
                "image_path": "1.jpg",
                "bbox_x": 1,
                "bbox_y": 1,
                "bbox_w": 4,
                "bbox_h": 4,
                "relation_name": "on",
                "true_caption": "a b",
                "false_caption": "b a",
            }
        ]
    ),
    as_json([{"image_0": "1", "image_1": "2", "caption_0": "a b", "caption_1": "b a", "collapsed_tag": "Object"}]),
]


def references(file: str) -> Callable[[Path], object]:
    """Reads references with their boxes and detections, to measure and to train."""

    def read(folder: Path) -> None:
        data = DataConfig(instances=str(folder / "instances.json"), detections=str(folder / "detections.json"))
        read_samples(open_expressions([f"{folder / file}#all"], data, "test"))
        open_expressions([f"{folder / file}#all"], data, "train")

    return read


def read_probe_pixels(folder: Path) -> None:
    """Probes and their pictures."""
    probes = open_probes([str(folder / "probe.json")], DataConfig(), "test")
    for sample in map(probes.sample, range(probes.sample_count)):
        for image in sample.images:
            try:
                crop(probes.pixels(image, PIXEL_LIMIT), sample)
            except OSError as error:  # an evaluation skips the row with these words
                raise TercetError(describe(sample.key, error)) from error


def sample_targets() -> dict[str, Target]:
    """Annotations of the downstream tasks."""
    data = DataConfig()
    coco = {"val2014/COCO_val2014_000000000001.jpg": JPEG}
    around = {"instances.json": as_json(INSTANCES), "detections.json": as_json(DETECTIONS), **BESIDE}
    pickled = [pickle.dumps(REFERENCES, protocol) for protocol in (0, 2, 4)]

    def questions(folder: Path, file: str = QUESTIONS) -> None:
        read_samples(open_questions([f"{folder / file}"], data, "test"))
        read_samples(open_questions([f"{folder / file}"], data, "train"))
        read_gold(str(folder / file))

    return {
        "vqa questions": Target(
            QUESTIONS, [OFFICIAL_QUESTIONS], questions, {ANNOTATIONS: OFFICIAL_ANNOTATIONS, **coco}
        ),
        "vqa annotations": Target(
            ANNOTATIONS, [OFFICIAL_ANNOTATIONS], questions, {QUESTIONS: OFFICIAL_QUESTIONS, **coco}, "v2_"
        ),
        "vqa albef": Target("q.json", [as_json(ALBEF_QUESTIONS)], lambda folder: questions(folder, "q.json"), BESIDE),
        "vqa answers": Target(
            "a.json", [as_json(["yes", "no"])], lambda folder: read_answer_list(str(folder / "a.json"))
        ),
        "vqa results": Target(
            "r.json",
            [as_json([{"question_id": 10, "answer": "yes"}])],
            lambda folder: read_results(str(folder / "r.json")),
        ),
        "nlvr": Target(
            "n.json",
            [as_lines(STATEMENTS)],
            lambda folder: read_samples(read_statements(str(folder / "n.json"), None, data)),
            BESIDE,
        ),
        "entailment": Target(
            "e.jsonl",
            [as_lines(ENTAILMENTS)],
            lambda folder: read_samples(read_entailments(str(folder / "e.jsonl"), None, data)),
            BESIDE,
        ),
        "expressions": Target("x.json", [as_json(EXPRESSIONS)], references("x.json"), around),
        "references": Target("refs.json", [as_json(REFERENCES)], references("refs.json"), around),
        "references pickled": Target("refs.p", pickled, references("refs.p"), around),
        "instances": Target(
            "instances.json",
            [as_json(INSTANCES)],
            references("refs.json"),
            {**around, "refs.json": as_json(REFERENCES)},
            "",
        ),
        "detections": Target(
            "detections.json",
            [as_json(DETECTIONS)],
            references("refs.json"),
            {**around, "refs.json": as_json(REFERENCES)},
            "",
        ),
        "probes": Target("probe.json", PROBES, read_probe_pixels, BESIDE),
    }


def score_targets() -> dict[str, Target]:
    """Predictions against their annotations, and annotations against their predictions."""
    golds = {
        "retrieval": [{"image": "1.jpg", "caption": "a dog"}, {"image": "2.jpg", "caption": "a cat"}],
        "vqa": ALBEF_QUESTIONS,
        "entailment": ENTAILMENTS,
        "nlvr": STATEMENTS,
        "grounding": EXPRESSIONS,
    }
    predictions: dict[str, list[dict[str, Any]]] = {
        "retrieval": [
            {"caption": "a dog", "images": ["1.jpg", "2.jpg"]},
            {"caption": "a cat", "images": ["2.jpg"]},
            {"image": "1.jpg", "captions": ["a dog"]},
            {"image": "2.jpg", "captions": ["a dog", "a cat"]},
        ],
        "vqa": [{"question_id": 3, "answer": "a"}],
        "entailment": [{"id": "1.jpg#0r1n", "label": "neutral"}, {"id": "x", "label": "entailment"}],
        "nlvr": [{"identifier": "dev-1-2-0", "label": "True"}, {"identifier": "dev-1-3-0", "label": "False"}],
        "grounding": [
            {"ref_id": 4, "point": [2, 2], "box": [1, 1, 4, 4]},
            {"sample": "gold.json row 2", "point": [2, 2]},
        ],
    }
    targets: dict[str, Target] = {}
    for task, gold in golds.items():
        given = as_json(predictions[task])

        def read(folder: Path, task: str = task) -> object:
            gold = "gold.json" if task == "vqa" else "gold.json#all"
            return score_predictions(task, str(folder / "pred.json"), str(folder / gold), DataConfig())

        beside = {"gold.json": as_json(gold), **BESIDE}
        targets[f"score {task}"] = Target("pred.json", [given], read, beside, "json")
        targets[f"gold {task}"] = Target("gold.json", [as_json(gold)], read, {"pred.json": given, **BESIDE}, "json")
    lines = b"dev-1-2-0,true\ndev-1-3-0,false\n"

    def read_lines(folder: Path) -> object:
        return score_predictions("nlvr", str(folder / "pred.csv"), str(folder / "gold.json"), DataConfig())

    targets["score lines"] = Target("pred.csv", [lines], read_lines, {"gold.json": as_json(STATEMENTS)}, "")
    return targets


def image_targets() -> dict[str, Target]:
    """Pictures of every format that is read."""
    kinds: dict[str, list[bytes]] = {
        "jpeg": [
            JPEG,
            picture_bytes("JPEG", "L"),
            picture_bytes("JPEG", "CMYK"),
            picture_bytes("JPEG", progressive=True),
        ],
        "png": [
            picture_bytes("PNG"),
            picture_bytes("PNG", "P"),
            picture_bytes("PNG", "I;16"),
            picture_bytes("PNG", "LA"),
        ],
        "webp": [picture_bytes("WEBP"), picture_bytes("WEBP", "RGBA", lossless=True)],
        "gif": [picture_bytes("GIF", "P")],
        "tiff": [picture_bytes("TIFF"), picture_bytes("TIFF", "CMYK"), picture_bytes("TIFF", compression="tiff_lzw")],
        "bmp": [picture_bytes("BMP"), picture_bytes("BMP", "P")],
        "ppm": [picture_bytes("PPM"), b"P3 2 2 255 1 2 3 4 5 6 7 8 9 10 11 12"],
        "jpeg2000": [picture_bytes("JPEG2000")],
        "ico": [picture_bytes("ICO")],
        "avif": [picture_bytes("AVIF")],
    }

    def read(folder: Path) -> object:
        content = read_bytes(str(folder / "picture"))
        decode(content, "picture", PIXEL_LIMIT)
        return EncodedImage(content, "picture", PIXEL_LIMIT).pixels(8)

    return {kind: Target("picture", seeds, read) for kind, seeds in kinds.items()}
