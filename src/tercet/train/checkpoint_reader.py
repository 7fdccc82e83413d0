"""Reading checkpoints that others may have made, without running anything that they hold.

torch.distributed.checkpoint keeps where each tensor lies in a pickle, `.metadata`, and settings such as betas in
pickles of their own; it opens both without restraint.  Here the first is scanned, taken apart into plain values, each
of which is checked, and put together anew; the second are opened as PyTorch opens weights of others.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from tercet.errors import TercetError

METADATA = ".metadata"
# What the pickler writes of such a record.  Not among them: what names a place in its memory, which a file of a few
# bytes makes as large as it likes.
_OPCODES = frozenset(
    {
        *("PROTO", "FRAME", "STOP"),
        *("MEMOIZE", "BINGET", "LONG_BINGET", "MARK"),
        *("EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS"),
        *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
        *("SHORT_BINUNICODE", "BINUNICODE"),
        *("STACK_GLOBAL", "NEWOBJ", "BUILD", "REDUCE"),
    }
)
_DCP = "torch.distributed.checkpoint"
_NAMES = frozenset(
    {
        *(f"{_DCP}.metadata.{name}" for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
        *(f"{_DCP}.metadata.{name}" for name in ("TensorStorageMetadata", "BytesStorageMetadata")),
        *(f"{_DCP}.metadata.{name}" for name in ("ChunkStorageMetadata", "_MEM_FORMAT_ENCODING")),
        f"{_DCP}.filesystem._StorageInfo",
        "torch.Size",
        "torch.serialization._get_layout",
        # The folder where it was written, which nobody asks for.
        *(f"pathlib{part}.{kind}Path" for part in ("", "._local") for kind in ("Posix", "Windows")),
    }
)
_MOST_DIMENSIONS = 64


class _ForeignError(Exception):
    """What a pickle asks for and is not given."""


class _Piece:
    """What stands for an object of the pickle: its arguments and its state, as plain values and pieces.

    A class is made for each name and file, so that a file cannot change what the next one is read with.
    """

    name = ""
    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _PieceUnpickler(pickle.Unpickler):
    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self._kinds: dict[str, type[_Piece]] = {}

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        name = f"{module_name}.{global_name}"
        if name in _NAMES:
            return self._kinds.setdefault(name, type(global_name, (_Piece,), {"name": global_name}))
        found = vars(torch).get(global_name) if module_name == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        raise _ForeignError(name)

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _ForeignError("an object outside of it")


def read_metadata(file: Path, sizes: dict[str, int]) -> Metadata:
    """What the file `.metadata` of a checkpoint says.

    Args:
        file: its path.
        sizes: bytes of every file that tensors may lie in.

    Raises:
        TercetError: it is damaged, asks for anything but the record of a checkpoint, or names other files.
    """
    try:
        content = file.read_bytes()
        foreign = next((code.name for code, _, _ in pickletools.genops(content) if code.name not in _OPCODES), None)
        if foreign is not None:
            raise TercetError(f"{file} is not the record of a checkpoint ({foreign} in it); it is not opened")
        return _metadata(_PieceUnpickler(content).load(), sizes)
    except TercetError:
        raise
    except _ForeignError as error:
        raise TercetError(
            f"{file} asks for {error}, which could run any program; it is not opened. Go on with a run that you trust"
        ) from error
    except Exception as error:  # damaged pickles raise nearly anything
        reason = " ".join(str(error).split())[:200]
        raise TercetError(f"{file} is damaged: it cannot be read ({reason or type(error).__name__})") from error


def _fields(value: Any, name: str) -> dict[str, Any]:
    """The fields of a piece of the kind `name`."""
    if not isinstance(value, _Piece) or value.name != name:
        raise ValueError(f"no {name} where one belongs")
    if value.state is None:
        return {}
    if not isinstance(value.state, dict):
        raise ValueError(f"the fields of {name} are no dict")
    return value.state


def _metadata(value: Any, sizes: dict[str, int]) -> Metadata:
    record = _fields(value, "Metadata")
    stored, described, version = record["storage_data"], record["state_dict_metadata"], record.get("version")
    if not isinstance(stored, dict) or not isinstance(described, dict):
        raise ValueError("no lists of tensors")
    storage_data = {_index(index): _place(place, sizes) for index, place in stored.items()}
    chunks = 0
    state_dict_metadata: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for name, described_as in described.items():
        if isinstance(described_as, _Piece) and described_as.name == "BytesStorageMetadata":
            state_dict_metadata[_text(name)] = BytesStorageMetadata()
            continue
        fields = _fields(described_as, "TensorStorageMetadata")
        chunks += len(fields["chunks"])
        if chunks > len(storage_data):  # a list that is named again and again
            raise ValueError("more pieces of tensors than lie in files")
        state_dict_metadata[_text(name)] = TensorStorageMetadata(
            _properties(fields["properties"]), _size(fields["size"]), [_chunk(chunk) for chunk in fields["chunks"]]
        )
    return Metadata(state_dict_metadata, None, storage_data, StorageMeta(), None if version is None else _text(version))


def _index(value: Any) -> MetadataIndex:
    fields = _fields(value, "MetadataIndex")
    offset, index = fields.get("offset"), fields.get("index")
    return MetadataIndex(
        _text(fields["fqn"]), None if offset is None else _size(offset), None if index is None else _count(index)
    )


def _place(value: Any, sizes: dict[str, int]) -> _StorageInfo:
    fields = _fields(value, "_StorageInfo")
    name, offset, length = _text(fields["relative_path"]), _count(fields["offset"]), _count(fields["length"])
    if name not in sizes:
        raise ValueError(f"a tensor lies in {name[:100]!r}, which is no file of this checkpoint")
    if offset + length > sizes[name]:
        raise ValueError(f"a tensor lies behind the end of {name}")
    if fields.get("transform_descriptors"):
        raise ValueError(f"{name} is packed")
    return _StorageInfo(name, offset, length)


def _properties(value: Any) -> TensorProperties:
    if not isinstance(value, _Piece) or value.name != "TensorProperties":
        raise ValueError("no TensorProperties where they belong")
    dtype = value.state[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor of no type")
    return TensorProperties(dtype=dtype)  # the others are no longer used


def _chunk(value: Any) -> ChunkStorageMetadata:
    fields = _fields(value, "ChunkStorageMetadata")
    return ChunkStorageMetadata(_size(fields["offsets"]), _size(fields["sizes"]))


def _size(value: Any) -> torch.Size:
    if not isinstance(value, _Piece) or value.name != "Size" or len(value.arguments) != 1:
        raise ValueError("no Size where one belongs")
    (sides,) = value.arguments
    if not isinstance(sides, tuple) or len(sides) > _MOST_DIMENSIONS:
        raise ValueError("a Size that is none")
    return torch.Size([_count(side) for side in sides])


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("no text where one belongs")
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise ValueError("no count where one belongs")
    return value


class CheckedReader(FileSystemReader):
    """Reads tensors where a checked record says that they lie."""

    def __init__(self, folder: Path, names: Collection[str]) -> None:
        """Read and check the record.

        Args:
            folder: of the checkpoint.
            names: of its files; each is there.

        Raises:
            TercetError: see `read_metadata`.
        """
        super().__init__(folder)
        self._metadata = read_metadata(folder / METADATA, {name: (folder / name).stat().st_size for name in names})

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The record that was checked."""
        return self._metadata

    def _slice_file(self, file: Any, sinfo: _StorageInfo) -> Any:
        """One value's bytes, refused where they are not as PyTorch writes them: packed ones unpack to any size."""
        content = io.BytesIO(super()._slice_file(file, sinfo).read())
        try:
            with zipfile.ZipFile(content) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise ValueError(f"{sinfo.relative_path} is not what was written ({error})") from error
        stored = all(item.compress_type == zipfile.ZIP_STORED for item in members)
        if not stored or sum(item.file_size for item in members) > sinfo.length:
            raise ValueError(f"{sinfo.relative_path} is packed, as no checkpoint is")
        content.seek(0)
        return content


class CheckedPlanner(DefaultLoadPlanner):
    """Opens settings that are no tensors as weights of others are opened, and takes those alone that fit the run's."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put the setting that `value` holds where it belongs."""
        name = read_item.dest_index.fqn
        content = torch.load(value, map_location="cpu", weights_only=True)
        present = self.state_dict[name]
        if _kind(content) != _kind(present):
            raise ValueError(f"{name} is a {type(content).__name__}, not a {type(present).__name__}")
        *parents, last = self.mappings[name]
        container: Any = self.original_state_dict
        for parent in parents:
            container = container[parent]
        container[last] = content


def _kind(value: Any) -> Any:
    """Settings of one kind may stand for one another: switches and numbers, with None for unset."""
    if value is None or isinstance(value, bool | int | float):
        return "number"
    return [type(value), *map(_kind, value)] if isinstance(value, list | tuple) else type(value)
