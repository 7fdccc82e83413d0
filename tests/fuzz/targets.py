"""Every reader of files that others made, each with small valid files to mutate."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import matplotlib.font_manager  # noqa: F401 - makes its cache folders when it is first imported
import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import torch
from PIL import Image
from safetensors.torch import save as safetensors_bytes

from tercet.config import DataConfig
from tercet.config_io import dump_config, load_config
from tercet.data.entailment_files import read_entailments
from tercet.data.grounding_files import open_expressions
from tercet.data.images import decode
from tercet.data.nlvr_files import read_statements
from tercet.data.samples import SampleSource
from tercet.data.sources import find_files, open_sources
from tercet.data.storage import read_bytes
from tercet.data.texts import Tokenizer
from tercet.data.vqa_files import open_questions, read_answer_list, read_gold, read_results
from tercet.model.convert import convert
from tercet.model.folder import load_model, save_model
from tercet.model.published import state_to_published
from tercet.model.weights_file import read_weights
from tercet.report.record import read_run
from tercet.tasks.probes import open_probes
from tercet.tasks.score import score_predictions
from tercet.train.checkpoint import Checkpoints, Position, list_checkpoints
from tiny_model import make_model

PIXEL_LIMIT = 1_000_000


@dataclass(frozen=True)
class Target:
    """A reader and what it reads.

    Attributes:
        file: name of the file that is mutated.
        seeds: valid contents of it.
        read: reads everything that the folder holds, to the last row and pixel.
        beside: the other files of the folder.
        names: what an error must name; default the file.
    """

    file: str
    seeds: Sequence[bytes]
    read: Callable[[Path], object]
    beside: dict[str, bytes] = field(default_factory=dict)
    names: str | None = None

    def put(self, folder: Path) -> Path:
        """Write what lies beside the file, and return its path."""
        for name, content in self.beside.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        path = folder / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def picture_bytes(kind: str = "JPEG", mode: str = "RGB", **options: Any) -> bytes:
    """A small picture of 12 x 10 pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (10, 12, 3), np.uint8)
    image = Image.fromarray(noise).convert("RGB")
    if mode == "I;16":
        image = Image.fromarray(np.random.default_rng(0).integers(0, 65536, (10, 12)).astype(np.uint16))
    elif mode != "RGB":
        image = image.convert(mode)
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


JPEG = picture_bytes()
BESIDE = {"1.jpg": JPEG, "2.jpg": JPEG}


def as_json(value: object) -> bytes:
    """JSON in UTF-8."""
    return json.dumps(value).encode()


def as_lines(values: Sequence[object]) -> bytes:
    """A JSON value on each line."""
    return b"".join(as_json(value) + b"\n" for value in values)


def read_pairs(name: str, **keys: Any) -> Callable[[Path], object]:
    """Reads pairs of images and captions, decoded."""

    def read(folder: Path) -> object:
        data = DataConfig(pixel_limit=PIXEL_LIMIT, **keys)
        source = open_sources([f"{folder / name}#all" if name else str(folder)], data, "train")
        for index in range(min(source.image_count, 50)):
            with contextlib.suppress(OSError):  # the loader counts and names these
                decode(source.image(index), source.key(index), data.pixel_limit)
            assert all(isinstance(caption, str) for caption in source.captions(index))
        return list(source.problems)

    return read


def read_samples(source: SampleSource) -> None:
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
    for index, probe in enumerate(probes.probes):
        for place in range(len(probe.images)):
            with contextlib.suppress(OSError):
                probes.pixels(index, place, PIXEL_LIMIT)


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


@cache
def model_files() -> dict[str, bytes]:
    """A model folder's files."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        save_model(make_model(), Path(folder) / "model")
        return {file.name: file.read_bytes() for file in (Path(folder) / "model").iterdir()}


@cache
def published_bytes() -> dict[str, bytes]:
    """A published checkpoint of the tiny model, as each kind of file."""
    state = {name: value.clone() for name, value in state_to_published(make_model().state_dict()).items()}
    modern, old = io.BytesIO(), io.BytesIO()
    torch.save({"model": state, "epoch": 3}, modern)
    torch.save({"model": state}, old, _use_new_zipfile_serialization=False)
    return {"modern": modern.getvalue(), "old": old.getvalue(), "safetensors": safetensors_bytes(state)}


def small_weights() -> dict[str, bytes]:
    """Checkpoints of two tensors, small enough that mutations meet their headers."""
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(3, dtype=torch.int64)}
    modern, old = io.BytesIO(), io.BytesIO()
    torch.save({"model": state, "epoch": 3}, modern)
    torch.save({"model": state}, old, _use_new_zipfile_serialization=False)
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(modern.getvalue())) as given, zipfile.ZipFile(packed, "w", 8) as taken:
        for name in given.namelist():
            taken.writestr(name, given.read(name))
    return {
        "modern": modern.getvalue(),
        "old": old.getvalue(),
        "packed": packed.getvalue(),
        "safetensors": safetensors_bytes(state),
    }


def weight_targets() -> dict[str, Target]:
    """Model folders and weights of others."""
    files = model_files()
    small, published = small_weights(), published_bytes()

    def loads(name: str) -> Target:
        beside = {file: content for file, content in files.items() if file != name}
        return Target(
            f"model/{name}", [files[name]], lambda folder: load_model(folder / "model"), beside_model(beside), "model"
        )

    def converts(name: str, seed: bytes) -> Target:
        def read(folder: Path) -> None:
            convert(folder / name, folder / "out", vision_heads=2, text_heads=2)

        return Target(name, [seed], read)

    answers = Target(
        "model/answers.json",
        [as_json(["yes", "no"])],
        lambda folder: load_model(folder / "model"),
        beside_model(files),
    )
    return {
        "model config": loads("config.json"),
        "model weights": loads("model.safetensors"),
        "model tokenizer": loads("tokenizer.json"),
        "model answers": answers,
        "weights pth": Target("w.pth", [small["modern"]], lambda folder: read_weights(folder / "w.pth")),
        "weights packed pth": Target("w.pth", [small["packed"]], lambda folder: read_weights(folder / "w.pth")),
        "weights old pth": Target("w.pth", [small["old"]], lambda folder: read_weights(folder / "w.pth")),
        "weights safetensors": Target(
            "w.safetensors", [small["safetensors"]], lambda folder: read_weights(folder / "w.safetensors")
        ),
        "convert pth": converts("w.pth", published["modern"]),
        "convert safetensors": converts("w.safetensors", published["safetensors"]),
    }


@cache
def checkpoint_files() -> dict[str, bytes]:
    """The files of a checkpoint of a tiny linear model."""
    import tempfile

    model, optimizer = _linear()
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), 1)
        checkpoints.save(model, optimizer, Position(1, "abc", 8))
        checkpoints.wait()
        return {file.name: file.read_bytes() for file in list_checkpoints(Path(folder))[0].iterdir()}


def _linear() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def checkpoint_targets() -> dict[str, Target]:
    """Checkpoints in the run folder of a stranger, whose digests are right whatever the files hold."""
    files = checkpoint_files()

    def read(folder: Path) -> object:
        step = folder / "step-00000001"
        try:
            record = json.loads((step / "checkpoint.json").read_bytes())
            for name in set(files) & record["files"].keys():
                record["files"][name] = hashlib.sha256((step / name).read_bytes()).hexdigest()
            (step / "checkpoint.json").write_bytes(as_json(record))
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            pass  # a record that is damaged stays as it is
        return Checkpoints(folder, 1).load(*_linear())

    def target(name: str) -> Target:
        beside = {f"step-00000001/{file}": content for file, content in files.items() if file != name}
        return Target(f"step-00000001/{name}", [files[name]], read, beside, "step-00000001")

    best = as_json({"step": 1, "metric": "dual.r_mean", "value": 31.5})
    return {
        "checkpoint record": target("checkpoint.json"),
        "checkpoint metadata": target(".metadata"),
        "checkpoint tensors": target("__0_0.distcp"),
        "checkpoint best": Target("best.json", [best], lambda folder: Checkpoints(folder, 1).best),
    }


def beside_model(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files under the folder `model`."""
    return {f"model/{name}": content for name, content in files.items()}


def text_targets() -> dict[str, Target]:
    """Tokenizers, configs, records of runs, and names of files."""
    words = b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n##b\ndog\n"
    record = b"".join(
        as_json(line) + b"\n"
        for line in (
            {"kind": "train", "step": 1, "time": 1.0, "loss": 2.0, "skipped": 0},
            {"kind": "evaluate", "step": 1, "time": 2.0, "data": "test", "recall": {"text_r1": 3.0}},
            {"kind": "event", "step": 1, "time": 3.0, "message": "resumed"},
        )
    )

    def load_words(folder: Path, name: str) -> None:
        tokenizer = Tokenizer.load(folder / name)
        tokenizer.encode(["a dog ab", "é"], 8)

    def load_yaml(folder: Path) -> None:
        dump_config(load_config(folder / "c.yaml"))

    def names(folder: Path) -> None:
        spec = (folder / "spec").read_bytes().decode("utf-8", "replace")
        find_files(f"{folder}/{spec}")

    run = {"config.yaml": b"task: pretrain\n", "gallery.json": b"[]"}
    return {
        "tokenizer": Target(
            "tokenizer.json", [model_files()["tokenizer.json"]], lambda f: load_words(f, "tokenizer.json")
        ),
        "vocabulary": Target("vocab.txt", [words], lambda f: load_words(f, "vocab.txt")),
        "tokenizer settings": Target(
            "tokenizer_config.json",
            [b'{"do_lower_case": false}'],
            lambda f: load_words(f, "vocab.txt"),
            {"vocab.txt": words},
        ),
        "config": Target("c.yaml", yaml_seeds(), load_yaml),
        "metrics": Target("metrics.jsonl", [record], read_record, run, ""),
        "run config": Target(
            "config.yaml", [b"task: vqa\nmodel: {size: tiny}\n"], read_record, {"metrics.jsonl": record}, ""
        ),
        "gallery": Target(
            "gallery.json",
            [
                as_json(
                    [{"query": "a", "rank": 1, "results": [{"key": "k", "score": 1.0, "right": True, "thumbnail": ""}]}]
                )
            ],
            read_record,
            {"metrics.jsonl": record, "config.yaml": b"task: pretrain\n"},
            "",
        ),
        "file names": Target("spec", [b"a-{000..003}.tar#x+y", b"{a,b}{c,d}*.json", b"**/[a]?.json"], names, {}, ""),
    }


def read_record(folder: Path) -> object:
    """A run's record and its page."""
    from tercet.report.page import write_report

    record = read_run(folder)
    record.series("loss")
    return write_report(folder), record.seconds, record.skipped


def yaml_seeds() -> list[bytes]:
    """A short config and a whole one."""
    short = (
        b"extends: demo\nmodel:\n  size: tiny\n  vision: {width: 64, heads: 4}\noptim: {lr: 1e-4}\ndata: {train: [a]}\n"
    )
    return [short, dump_config(load_config("demo")).encode()]


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
        return decode(content, "picture", PIXEL_LIMIT, minimum_side=4)

    return {kind: Target("picture", seeds, read) for kind, seeds in kinds.items()}


@cache
def all_targets() -> dict[str, Target]:
    """Every reader by name."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    return {
        **pair_targets(),
        **sample_targets(),
        **score_targets(),
        **text_targets(),
        **weight_targets(),
        **checkpoint_targets(),
        **image_targets(),
    }


def mutated_json(seed: bytes, draw: Callable[[Sequence[Any]], Any], parts: Callable[[], Any]) -> bytes:
    """`seed` with some of its values replaced by odd ones.

    Args:
        seed: JSON, or JSON lines.
        draw: chooses one of a sequence.
        parts: makes an odd value.
    """
    try:
        values = [json.loads(seed)]
    except ValueError:
        values = [json.loads(line) for line in seed.split(b"\n") if line.strip()]
    for _ in range(draw(range(1, 4))):
        places = list(_places(values))
        container, key = draw(places)
        what = draw(("replace", "replace", "remove", "double"))
        if what == "replace":
            container[key] = parts()
        elif what == "remove":
            del container[key]
        elif isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        if not values:
            break
    return b"\n".join(json.dumps(value).encode() for value in values)


def _places(value: Any) -> Any:
    keys = range(len(value)) if isinstance(value, list) else list(value)
    for key in keys:
        yield value, key
        if isinstance(value[key], list | dict):
            yield from _places(value[key])
