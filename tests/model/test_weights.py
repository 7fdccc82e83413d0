"""Checkpoint files: what others wrote is read without running it, and ours come back bit for bit."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tercet.cli import main
from tercet.config import HeadName
from tercet.errors import TercetError
from tercet.model.convert import convert
from tercet.model.hub import load_model, save_model
from tercet.model.weights import read_weights, write_published
from tiny_model import make_model

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(3)}


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"model": state}, lambda s: {"state_dict": s}])
def test_wrappers_are_removed(wrap: Callable[[dict], dict], tmp_path: Path) -> None:
    torch.save(wrap({f"module.{name}": value for name, value in STATE.items()}), tmp_path / "w.pth")
    read = read_weights(tmp_path / "w.pth")
    assert read.keys() == STATE.keys() and all(torch.equal(read[name], value) for name, value in STATE.items())


class Hostile:
    """What an attacker puts into a checkpoint: reading it the ordinary way makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_checkpoint_is_not_run(tmp_path: Path, zipped: bool) -> None:
    content = {"model": STATE, "config": Hostile(tmp_path / "broken_in")}
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(TercetError, match=r"evil.pth: holds (posix|os|nt).mkdir.*run code"):
        read_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "broken_in").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.pth", STATE, "cut short"),
        ("noise.pth", b"\x80\x02not a checkpoint", "cut short or not a PyTorch checkpoint"),
        ("empty.pth", b"", "cut short or not a PyTorch checkpoint"),
        ("noise.safetensors", b"noise", "cut short or not a safetensors file"),
        ("list.pth", [torch.ones(2)], "holds a list"),
        ("none.pth", {"model": {"epoch": 3}}, "no tensors"),
        ("huge.pth", {"a": torch.zeros(1).expand(10**12)}, r"a \[1000000000000\] is not stored whole"),
    ],
)
def test_what_holds_no_weights(tmp_path: Path, name: str, content: object, message: str) -> None:
    if not isinstance(content, bytes):
        torch.save(content, tmp_path / "saved")
        content = (tmp_path / "saved").read_bytes()[: -300 if "cut" in name else None]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TercetError, match=f"{name}: .*{message}"):
        read_weights(tmp_path / name)


@pytest.mark.parametrize(
    ("heads", "style", "suffix"),
    [
        ((), None, ".pth"),
        ((), "downstream", ".pth"),
        (("answer",), None, ".pth"),
        (("entailment",), None, ".safetensors"),
        (("nlvr",), None, ".pth"),
        (("assignment",), None, ".pth"),
    ],
)
def test_published_and_back(tmp_path: Path, heads: tuple[HeadName, ...], style: None, suffix: str) -> None:
    model = make_model()
    model.add_heads(heads)
    written = write_published(model, tmp_path / f"model{suffix}", style)
    report = convert(written.file, tmp_path / "back", vision_heads=2, text_heads=2)
    back = load_model(tmp_path / "back")
    assert back.config.heads == list(heads)
    assert {name.split(".")[0] for name in report.random} == set(written.skipped)
    for name, value in model.state_dict().items():
        if name.split(".")[0] not in written.skipped:
            assert torch.equal(back.state_dict()[name], value), name


def test_moving_averages_equal_the_weights(tmp_path: Path) -> None:
    state: dict[str, Tensor] = load_file(write_published(make_model(), tmp_path / "model.safetensors").file)
    averaged = [name for name in state if name.split(".")[0].endswith("_m")]
    assert "visual_encoder_m.pos_embed" in averaged
    assert all(torch.equal(state[name], state[name.replace("_m.", ".", 1)]) for name in averaged)


def test_the_command_in_both_directions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file, back = tmp_path / "model", tmp_path / "tcl.pth", tmp_path / "back"
    save_model(make_model(), folder)
    assert main(["convert", str(folder), "--output", str(file), "--layout", "published"]) == 0
    assert "pretraining" in capsys.readouterr().out
    flags = ["--vision-heads", "2", "--text-heads", "2", "--tokenizer", str(folder / "tokenizer.json")]
    assert main(["convert", str(file), "--output", str(back), *flags]) == 0
    before, after = (load_file(path / "model.safetensors") for path in (folder, back))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_what_has_no_published_form(tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(TercetError, match=r"name the checkpoint FILE.pth"):
        write_published(model, tmp_path / "model")
    model.add_heads(["entailment", "nlvr"])
    with pytest.raises(TercetError, match="heads for entailment and nlvr"):
        write_published(model, tmp_path / "model.pth")
    assert not list(tmp_path.iterdir())
