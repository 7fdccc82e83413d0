"""Checkpoints of others: what they hold is never run, and what does not belong there is one named error."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from tercet.errors import TercetError
from tercet.train.checkpoint import RECORD, Checkpoints, _digest, list_checkpoints
from tercet.train.checkpoint_reader import METADATA
from train.test_checkpoint import parts, write

RAN = "ran"


class Hostile:
    """Makes a file where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / RAN

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def reseal(path: Path) -> None:
    """The digests of what lies there now, as whoever makes a checkpoint can write them."""
    record = json.loads((path / RECORD).read_text("utf-8"))
    record["files"] = {name: _digest(path / name) for name in record["files"]}
    (path / RECORD).write_text(json.dumps(record), "utf-8")


def refused(folder: Path, path: Path) -> str:
    reseal(path)
    with pytest.raises(TercetError) as caught:
        Checkpoints(folder, 2).load(*parts(1))
    assert not list(folder.rglob(RAN))
    return str(caught.value)


def change(path: Path, what: Callable[[Metadata], object]) -> None:
    """Change the record of a checkpoint."""
    metadata = pickle.loads((path / METADATA).read_bytes())
    what(metadata)
    (path / METADATA).write_bytes(pickle.dumps(metadata))


def test_a_hostile_record_is_named_and_not_run(tmp_path: Path) -> None:
    path = write(tmp_path, *parts(0), 1, keep=1)
    hostile = pickle.dumps(Hostile(tmp_path))
    pickle.loads(hostile)
    assert (tmp_path / RAN).is_file(), "the pickle does nothing"
    (tmp_path / RAN).unlink()
    (path / METADATA).write_bytes(hostile)
    message = refused(tmp_path, path)
    assert f"{path / METADATA} asks for " in message and "which could run any program" in message


@pytest.mark.parametrize("field", ["planner_data", "storage_data", "storage_meta", "version"])
def test_nor_is_one_that_hides_in_a_true_record(tmp_path: Path, field: str) -> None:
    path = write(tmp_path, *parts(0), 1, keep=1)
    change(path, lambda metadata: setattr(metadata, field, Hostile(tmp_path)))
    assert "which could run any program" in refused(tmp_path, path)


def test_a_hostile_setting_is_not_run(tmp_path: Path) -> None:
    """Settings that are no tensors lie in pickles of their own, among the tensors."""
    path = write(tmp_path, *parts(0), 1, keep=1)
    stream = io.BytesIO()
    torch.save(Hostile(tmp_path), stream)
    put(path, "optimizer.param_groups.weight.lr", stream.getvalue())
    assert "Weights only load failed" in refused(tmp_path, path)


def test_a_setting_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, *parts(0), 1, keep=1)
    stream = io.BytesIO()
    torch.save("fast", stream)
    put(path, "optimizer.param_groups.weight.lr", stream.getvalue())
    assert ".lr is a str, not a float" in refused(tmp_path, path)


def test_a_packed_tensor_is_refused(tmp_path: Path) -> None:
    """One that unpacks to more than lies on the disk."""
    path = write(tmp_path, *parts(0), 1, keep=1)
    stream, packed = io.BytesIO(), io.BytesIO()
    torch.save(torch.zeros(64, 64), stream)
    with zipfile.ZipFile(stream) as given, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as taken:
        for name in given.namelist():
            taken.writestr(name, given.read(name))
    put(path, "task.weight", packed.getvalue())
    assert "is packed" in refused(tmp_path, path)


def put(path: Path, name: str, content: bytes) -> None:
    """Put other bytes in the place of one value."""
    file = path / "__0_0.distcp"
    start = file.stat().st_size
    file.write_bytes(file.read_bytes() + content)

    def point(metadata: Metadata) -> None:
        found = [index for index in metadata.storage_data if index.fqn.startswith(name.rsplit(".", 2)[0])]
        index = next(index for index in found if index.fqn.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1])
        assert isinstance(index, MetadataIndex)
        metadata.storage_data[index].offset, metadata.storage_data[index].length = start, len(content)

    change(path, point)


@pytest.mark.parametrize("name", ["../../outside", "/dev/zero", "checkpoint.json/..", "other.distcp"])
def test_tensors_lie_in_the_checkpoint_alone(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, *parts(0), 1, keep=1)
    (tmp_path.parent / "outside").write_bytes(b"x" * 10_000)

    def elsewhere(metadata: Metadata) -> None:
        for place in metadata.storage_data.values():
            place.relative_path = name

    change(path, elsewhere)
    assert "is no file of this checkpoint" in refused(tmp_path, path)


def test_a_record_of_files_elsewhere_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, *parts(0), 1, keep=1)
    record = json.loads((path / RECORD).read_text("utf-8"))
    record["files"]["/dev/zero"] = "0" * 64
    (path / RECORD).write_text(json.dumps(record), "utf-8")
    with pytest.raises(TercetError, match="damaged: /dev/zero is not what was written"):
        Checkpoints(tmp_path, 2).load(*parts(1))
    assert list_checkpoints(tmp_path) == [path]


def test_a_place_in_memory_of_any_size_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, *parts(0), 1, keep=1)
    (path / METADATA).write_bytes(b"\x80\x02}r\xff\xff\xff\x7f.")
    assert "LONG_BINPUT" in refused(tmp_path, path)
