"""Models on the hub: what was pushed comes back bit for bit, with its card; refusals in one line."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tercet
from tercet.cli import main
from tercet.errors import TercetError
from tercet.model.hub import save_model
from tercet.predictor import Predictor
from tiny_model import make_model

_SPEC = importlib.util.spec_from_file_location("fake_hub", Path(__file__).with_name("fake_hub.py"))
assert _SPEC is not None and _SPEC.loader is not None
_MODULE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_MODULE)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with _MODULE.running_hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield hub


def test_push_and_load(hub: Any, tmp_path: Path) -> None:
    model = Predictor(make_model())
    address = model.push_to_hub("somebody/birds", card="# Birds\n", private=True, token="good")
    assert address.startswith(f"{hub.url}/somebody/birds/commit/")
    assert sorted(hub.models["somebody/birds"]) == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert hub.private["somebody/birds"] is True
    # The hub's library reads its address when it is imported.
    code = f"""
import tercet
tercet.load("somebody/birds").save({str(tmp_path / "back")!r})
"""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **settings}, timeout=120)
    back = tercet.load(tmp_path / "back")
    assert back.model.card == "# Birds\n"
    assert all(torch.equal(back.model.state_dict()[name], value) for name, value in model.model.state_dict().items())
    texts = ["a red circle"]
    torch.testing.assert_close(back.embed_texts(texts), model.embed_texts(texts))


def test_command_pushes_a_run(hub: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "good")
    save_model(make_model(), tmp_path / "run" / "model", card="# From a run\n")
    assert main(["push", str(tmp_path / "run"), "--output", "somebody/birds"]) == 0
    assert "/somebody/birds/commit/" in capsys.readouterr().out
    assert hub.models["somebody/birds"]["README.md"] == b"# From a run\n"


def test_command_writes_into_a_folder(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_model()
    save_model(model, "run/model", card="# From a run\n")
    assert main(["push", "run", "--output", "./shared/birds"]) == 0
    assert "shared/birds" in capsys.readouterr().out
    back = tercet.load("shared/birds")
    assert all(torch.equal(back.model.state_dict()[name], value) for name, value in model.state_dict().items())
    assert Path("shared/birds/README.md").read_text("utf-8") == "# From a run\n"


def test_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TercetError, match=r"cannot push to somebody/birds: the hub cannot be reached \(.*check the"):
        Predictor(make_model()).push_to_hub("somebody/birds", token="none")


def test_refusals(hub: Any, tmp_path: Path) -> None:
    with pytest.raises(TercetError, match=r"cannot push to somebody/birds: "):
        Predictor(make_model()).push_to_hub("somebody/birds", token="bad")
    with pytest.raises(TercetError, match=r"somebody/fish.*no such repository"):
        tercet.load("somebody/fish")
    assert main(["push", str(tmp_path / "none"), "--output", "somebody/birds"]) == 2
