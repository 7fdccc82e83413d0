"""The readers of models, weights, checkpoints, configs and records, each with small valid files to mutate."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from functools import cache
from pathlib import Path

import matplotlib.font_manager  # noqa: F401 - makes its cache folders when it is first imported
import torch
from safetensors.torch import save as safetensors_bytes

from fuzz.target import Target, as_json
from tercet.config_io import dump_config, load_config
from tercet.data.readers import find_files
from tercet.data.tokenizer import Tokenizer
from tercet.model.convert import convert
from tercet.model.hub import load_model, save_model
from tercet.model.names import state_to_published
from tercet.model.weights import read_weights
from tercet.report.run import read_run
from tercet.train.checkpoint import Checkpoints, Position, list_checkpoints
from tiny_model import make_model


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
        "model/answers.json", [as_json(["yes", "no"])], lambda folder: load_model(folder / "model"), beside_model(files)
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
        "checkpoint tensors": target("shard-00001-model-00001-of-00001.safetensors"),
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
    record.curve("loss")
    return write_report(folder), record.seconds, record.skipped


def yaml_seeds() -> list[bytes]:
    """A short config and a whole one."""
    short = (
        b"extends: demo\nmodel:\n  size: tiny\n  vision: {width: 64, heads: 4}\noptim: {lr: 1e-4}\ndata: {train: [a]}\n"
    )
    return [short, dump_config(load_config("demo")).encode()]
