"""The files that readers once broke on, each of its kind: what happens with them now."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from typing import Any

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import torch

from fuzz.data_targets import ALBEF_QUESTIONS, DETECTIONS, INSTANCES, OFFICIAL_QUESTIONS, REFERENCES
from fuzz.model_targets import model_files
from fuzz.property import check
from fuzz.target import JPEG, as_json, as_lines
from fuzz.targets import all_targets

TARGETS = all_targets()


def damaged_offsets() -> bytes:
    """An Arrow file whose first caption ends far behind the text of all."""
    stream = io.BytesIO()
    captions = pyarrow.array(["a dog", "a cat", "a bird"])
    pyarrow.feather.write_feather(pyarrow.table({"image": [JPEG] * 3, "caption": captions}), stream, "uncompressed")
    offsets = captions.buffers()[1].to_pybytes()[:16]
    content = stream.getvalue()
    assert content.count(offsets) == 1
    return content.replace(offsets, offsets[:4] + (1 << 30).to_bytes(4, "little") + offsets[8:])


def damaged_inside() -> bytes:
    """Parquet whose pages are overwritten, while the footer that describes them is whole."""
    stream = io.BytesIO()
    table = pyarrow.table({"image": [JPEG] * 3, "caption": ["a dog", "a cat", "a bird"]})
    pyarrow.parquet.write_table(table, stream, compression="none")
    content = bytearray(stream.getvalue())
    content[4:200] = b"\xff" * 196
    return bytes(content)


def negative_size() -> bytes:
    """A shard with a whole pair, then a member of less than no bytes."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in {"1.jpg": JPEG, "1.txt": b"a dog", "2.jpg": b""}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    content = bytearray(stream.getvalue())
    header = content.index(b"2.jpg")
    content[header + 124 : header + 136] = b"\xff" * 4 + (-512).to_bytes(8, "big", signed=True)
    content[header + 148 : header + 156] = b" " * 8
    content[header + 148 : header + 156] = b"%06o\0 " % sum(content[header : header + 512])
    return bytes(content)


def many_records(length: int) -> bytes:
    """A shard that begins with an extended header of very many short records."""
    records = b"5 a=\n" * (length // 5)
    info = tarfile.TarInfo("head")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    padding = bytes(-len(records) % 512)
    return info.tobuf(tarfile.USTAR_FORMAT) + records + padding + TARGETS["tar"].seeds[0]


def endless_strides() -> bytes:
    """Weights of a few bytes that say that they are a terabyte."""
    stream = io.BytesIO()
    torch.save({"model": {"a": torch.zeros(1).expand(1 << 38)}}, stream)
    return stream.getvalue()


def aliases(levels: int) -> bytes:
    """YAML that says ten to the power of `levels` times the same in a few lines."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join([*lines, f"data: {{train: *a{levels - 1}}}"]).encode()


def changed(value: Any, path: tuple[Any, ...], odd: Any) -> bytes:
    """`value` as JSON with something odd at `path`."""
    copy = part = json.loads(json.dumps(value))
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = odd
    return as_json(copy)


def huge_config() -> bytes:
    """A model's config with a billion layers."""
    config = json.loads(model_files()["config.json"])
    config["model"]["vision"]["depth"] = 10**9
    return as_json(config)


def refused_tokenizer() -> bytes:
    """A tokenizer whose model knows no word for what is unknown to it."""
    tokenizer = json.loads(model_files()["tokenizer.json"])
    tokenizer["model"]["unk_token"] = "not there"
    return as_json(tokenizer)


PAIRS = [{"image": "1.jpg", "caption": "a dog"}, {"image": "2.jpg", "caption": "a cat"}]
READ = "read"
# The reader, the file, and a part of the message; READ where the file, or what is whole of it, is read.
FINDINGS: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "Arrow with damaged offsets": ("arrow", damaged_offsets, "a.arrow"),
    "Parquet damaged inside": ("parquet", damaged_inside, "a.parquet"),
    "tar member with a negative size": ("tar", negative_size, READ),
    "tar with an extended header of many records": ("tar", lambda: many_records(1_000_000), READ),
    "tar with an extended header over 1 MiB": ("tar", lambda: many_records(2_000_000), "a.tar"),
    "JSON number of thousands of digits": ("json", lambda: b"[" + b"9" * 5000 + b"]", "a.json"),
    "JSON nested thousands deep": ("json", lambda: b"[" * 100_000, "a.json"),
    "JSON lines nested thousands deep": ("jsonl", lambda: b'{"image":' * 100_000 + b"\n" + as_lines(PAIRS), READ),
    "a list for image_id": ("vqa questions", lambda: changed(
        json.loads(OFFICIAL_QUESTIONS), ("questions", 0, "image_id"), [1]), "v2_"),
    "a list for ref_id": ("references", lambda: changed(REFERENCES, (0, "ref_id"), [1]), "refs.json"),
    "an object for split": ("references", lambda: changed(REFERENCES, (0, "split"), {"a": 1}), "refs.json"),
    "a list for a question": ("vqa albef", lambda: changed(ALBEF_QUESTIONS, (0, "question"), ["what?"]), "q.json"),
    "an object for a box": ("detections", lambda: changed(DETECTIONS, ("1", 0), {}), "detections.json"),
    "a text for a side": ("instances", lambda: changed(INSTANCES, ("images", 0, "width"), "wide"), "instances.json"),
    "an image named /dev/zero": ("json", lambda: changed(PAIRS, (0, "image"), "/dev/zero"), READ),
    "an image with a name of 5,000 characters": ("json", lambda: changed(PAIRS, (0, "image"), "x" * 5000), READ),
    "a probe whose image is gone": ("probes", lambda: as_json(
        [{"image_0": "9", "image_1": "2", "caption_0": "a b", "caption_1": "b a"}]), "probe.json"),
    "a probe whose image is a device far outside": ("probes", lambda: as_json(
        [{"filename": f"{'../' * 20}dev/zero", "caption": "a b", "negative_caption": "b a"}]), "probe.json"),
    "YAML of aliases of aliases": ("config", lambda: aliases(12), "c.yaml"),
    "YAML tag on a value that it does not fit": ("config", lambda: b"train: {epochs: !!int x}\n", "c.yaml"),
    "a tokenizer without its own token for unknown words": ("tokenizer", refused_tokenizer, "tokenizer.json"),
    "a model of a billion layers": ("model config", huge_config, "model"),
    "a .pth whose strides make it a terabyte": ("weights pth", endless_strides, "w.pth"),
    "a compressed .pth": ("weights pth", lambda: TARGETS["weights packed pth"].seeds[0], "w.pth"),
    "a config that extends what is not there": ("config", lambda: b"extends: nowhere near\n", "c.yaml: extends: "),
    "a pattern with a null character": ("file names", lambda: b"a\0,y/a*", "null character"),
    "a trillion names of shards": ("file names", lambda: b"{000000..999999999999}.tar", ""),
}  # fmt: skip


@pytest.mark.parametrize("finding", FINDINGS)
def test_what_readers_broke_on_is_read_or_refused(finding: str) -> None:
    reader, make, said = FINDINGS[finding]
    outcome = check(TARGETS[reader], make())
    assert outcome == READ if said == READ else outcome != READ and said in outcome, outcome
