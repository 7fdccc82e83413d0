"""A model as a published checkpoint: what others' code reads, and back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tercet.cli import main
from tercet.config import HeadName, ModelConfig
from tercet.errors import TercetError
from tercet.model.convert import convert
from tercet.model.hub import empty_model, load_model, save_model
from tercet.model.published import QUEUES, state_to_published
from tercet.model.published_file import _with_teacher, write_published
from tiny_model import make_model


@pytest.mark.parametrize(
    ("heads", "suffix"),
    [
        ((), ".pth"),
        (("answer",), ".pth"),
        (("entailment",), ".safetensors"),
        (("nlvr",), ".pth"),
        (("assignment",), ".pth"),
    ],
)
def test_comes_back_bit_for_bit(tmp_path: Path, heads: tuple[HeadName, ...], suffix: str) -> None:
    model = make_model()
    model.add_heads(heads)
    written = write_published(model, tmp_path / f"model{suffix}")
    report = convert(written.file, tmp_path / "back", vision_heads=2, text_heads=2)
    back = load_model(tmp_path / "back")
    assert back.config.heads == list(heads)
    assert {name.split(".")[0] for name in report.made_new} == set(written.left_out)
    for name, value in model.state_dict().items():
        if name.split(".")[0] not in written.left_out:
            assert torch.equal(back.state_dict()[name], value), name


def test_style_of_fine_tuning(tmp_path: Path) -> None:
    model = make_model()
    written = write_published(model, tmp_path / "model.pth", "downstream")
    state = torch.load(written.file, weights_only=True)["model"]
    assert "text_encoder.encoder.layer.0.attention.self.query.weight" in state
    convert(written.file, tmp_path / "back", vision_heads=2, text_heads=2)
    assert all(torch.equal(load_model(tmp_path / "back").state_dict()[n], v) for n, v in model.state_dict().items())


def test_has_every_name_of_the_published_model(parity_dir: Path, tmp_path: Path) -> None:
    names = json.loads((parity_dir / "official_keys_base.json").read_text())["models"]["pretrain"]
    model = empty_model(ModelConfig())
    ours = _with_teacher(state_to_published(model.state_dict()))
    assert set(ours) == set(names) - set(QUEUES)
    assert all(list(ours[name].shape) == names[name]["shape"] for name in ours)


def test_teacher_equals_the_weights(tmp_path: Path) -> None:
    state: dict[str, Tensor] = load_file(write_published(make_model(), tmp_path / "model.safetensors").file)
    taught = [name for name in state if name.split(".")[0].endswith("_m")]
    assert "visual_encoder_m.pos_embed" in taught
    assert all(torch.equal(state[name], state[name.replace("_m.", ".", 1)]) for name in taught)


def test_command_round_trip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(make_model(), tmp_path / "model")
    assert (
        main(["convert", str(tmp_path / "model"), "--output", str(tmp_path / "tcl.pth"), "--layout", "published"]) == 0
    )
    assert "published form of pretraining" in capsys.readouterr().out
    heads = ["--vision-heads", "2", "--text-heads", "2"]
    vocabulary = ["--tokenizer", str(tmp_path / "model" / "tokenizer.json")]
    assert main(["convert", str(tmp_path / "tcl.pth"), "--output", str(tmp_path / "back"), *heads, *vocabulary]) == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_refusals(tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(TercetError, match=r"name the checkpoint FILE.pth"):
        write_published(model, tmp_path / "model")
    model.add_heads(["entailment", "nlvr"])
    with pytest.raises(TercetError, match=r"entailment and nlvr, which bear one name"):
        write_published(model, tmp_path / "model.pth")
    assert not list(tmp_path.iterdir())
