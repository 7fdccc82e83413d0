"""Model folders and the hub: what is saved or pushed loads bit for bit, and every kind of damage is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tercet
from fake_hub import FakeHub, running_hub
from tercet.cli import main
from tercet.data.tokenizer import Tokenizer
from tercet.errors import TercetError
from tercet.model.hub import empty_model, load_model, require_tokenizer, save_model
from tercet.model.tercet import Tercet
from tercet.predictor import Predictor
from tiny_model import make_model


@pytest.fixture(scope="module")
def model() -> Tercet:
    return make_model()


@pytest.fixture
def folder(model: Tercet, tmp_path: Path) -> Path:
    return save_model(model, tmp_path / "model")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with running_hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield hub


def assert_equal(loaded: Tercet, model: Tercet) -> None:
    assert loaded.config == model.config
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())


class TestFolder:
    def test_saves_and_loads_exactly(self, model: Tercet, folder: Path) -> None:
        loaded = load_model(folder)
        assert_equal(loaded, model)
        assert_equal(load_model(folder.parent), model)  # as of a run
        assert not loaded.training and all(parameter.requires_grad for parameter in loaded.parameters())
        assert not any(value.is_meta for value in (*loaded.parameters(), *loaded.buffers()))
        images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
        assert torch.equal(loaded.encode_image(images), model.encode_image(images))
        ids = [require_tokenizer(one).encode(["a red box"], 12)[0] for one in (loaded, model)]
        assert torch.equal(*ids)
        files = ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
        assert sorted(file.name for file in folder.iterdir()) == files

    def test_a_loaded_model_trains_without_changing_the_file(self, folder: Path) -> None:
        before = (folder / "model.safetensors").read_bytes()
        for parameter in load_model(folder).parameters():
            parameter.data.add_(1.0)
        assert (folder / "model.safetensors").read_bytes() == before

    def test_an_empty_model_draws_no_random_numbers(self, model: Tercet) -> None:
        state = torch.random.get_rng_state()
        assert all(parameter.is_meta for parameter in empty_model(model.config).parameters())
        assert torch.equal(state, torch.random.get_rng_state())

    def test_half_precision_is_saved_as_float32(self, model: Tercet, tmp_path: Path) -> None:
        half = empty_model(model.config)
        half.load_state_dict({name: value.bfloat16() for name, value in model.state_dict().items()}, assign=True)
        saved = load_model(save_model(half, tmp_path / "half"))
        assert {value.dtype for value in saved.state_dict().values()} == {torch.float32}

    def test_attributes_are_saved(self, model: Tercet, tmp_path: Path) -> None:
        assert load_model(save_model(model, tmp_path / "unknown")).matches
        for objectives, matches in ((["cma", "itm"], True), (["cma"], False)):
            noted = Tercet(model.config)
            noted.objectives, noted.answers, noted.card = objectives, ["yes", "nö"], "# Birds\n"
            loaded = load_model(save_model(noted, tmp_path / "noted"))
            assert loaded.objectives == objectives and loaded.matches is matches
            assert loaded.answers == ["yes", "nö"] and loaded.card == "# Birds\n"

    def test_replaces_a_model_folder_alone(self, folder: Path) -> None:
        changed = load_model(folder)
        changed.temperature.data.fill_(0.25)
        save_model(changed, folder)
        assert load_model(folder).temperature.item() == 0.25
        assert [entry.name for entry in folder.parent.iterdir()] == ["model"]
        (folder / "holiday.jpg").write_bytes(b"picture")
        with pytest.raises(TercetError, match=r"holds other files \(holiday.jpg\)"):
            save_model(changed, folder)
        assert (folder / "holiday.jpg").read_bytes() == b"picture"

    def test_without_tokenizer_it_cannot_read_text(self, model: Tercet, tmp_path: Path) -> None:
        loaded = load_model(save_model(Tercet(model.config), tmp_path / "bare"))
        with pytest.raises(TercetError, match=r"no tokenizer.json.*--tokenizer"):
            require_tokenizer(loaded)

    def test_a_tokenizer_of_another_model(self, model: Tercet, tmp_path: Path) -> None:
        other = Tercet(model.config)
        other.tokenizer = Tokenizer.train([f"word{number}" for number in range(600)] * 2, 400)
        with pytest.raises(TercetError, match=r"model.text.vocabulary_size"):
            save_model(other, tmp_path / "model")
        other.tokenizer = model.tokenizer
        other.config = model.config.model_copy(update={"text": model.config.text.model_copy(update={"mask_id": 9})})
        with pytest.raises(TercetError, match=r"mask_id 4, the model 9 \(model.text.mask_id\)"):
            save_model(other, tmp_path / "model")


def config_with(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def weights_with(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights = {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()}
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return damage


def cut(name: str, length: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut("config.json", 40), r"config.json: not valid JSON"),
        (config_with(lambda config: config.pop("library")), r"config.json: not the config of a Tercet model"),
        (config_with(lambda config: config.update(format_version=2)), r"format_version 2 .*upgrade tercet"),
        (config_with(lambda config: config["model"].update(wings=2)), r"config.json: model.wings"),
        (config_with(lambda config: config["model"]["vision"].update(heads=5)), r"config.json: model.vision.*heads 5"),
        (
            config_with(lambda config: config["model"].update(embed_dim=8)),
            r"vision_projection.weight has shape \[16, 32\], .*\[8, 32\] \(3 more",
        ),
        (weights_with(lambda weights: weights.pop("itm_head.bias")), r"model.safetensors: itm_head.bias is missing"),
        (weights_with(lambda weights: weights.update(wing=torch.ones(2))), r"model.safetensors: wing is unexpected"),
        (
            weights_with(lambda weights: weights.update({"itm_head.bias": torch.ones(2, dtype=torch.int64)})),
            r"itm_head.bias holds int64",
        ),
        (cut("model.safetensors", 5000), r"model.safetensors: cut short"),
        (cut("model.safetensors", 0), r"model.safetensors: cut short"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"has no model.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), r"has no config.json"),
        (cut("tokenizer.json", 30), r"tokenizer.json"),
        (lambda folder: (folder / "answers.json").write_text("[1]"), r"answers.json: not a list of answers"),
    ],
)
def test_damage_is_one_line_that_names_the_file(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(TercetError, match=message) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_other_weights_name_the_command_that_converts(tmp_path: Path) -> None:
    (tmp_path / "ALBEF.pth").write_bytes(b"weights")
    for source in (tmp_path, tmp_path / "ALBEF.pth"):
        with pytest.raises(TercetError, match=r"tercet convert .*ALBEF.pth --output DIR"):
            load_model(source)
    with pytest.raises(TercetError, match=r"no model folder at .*missing"):
        load_model(tmp_path / "missing")


class TestHub:
    def test_push_and_load(self, hub: FakeHub, model: Tercet, tmp_path: Path) -> None:
        address = Predictor(model).push_to_hub("somebody/birds", card="# Birds\n", private=True, token="good")
        assert address.startswith(f"{hub.url}/somebody/birds/commit/")
        files = ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
        assert sorted(hub.models["somebody/birds"]) == files and hub.private["somebody/birds"] is True
        # The hub's library reads its address when it is imported.
        code = f'import tercet; tercet.load("somebody/birds").save({str(tmp_path / "back")!r})'
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **settings}, timeout=120)
        back = tercet.load(tmp_path / "back")
        assert_equal(back.model, model)
        assert back.model.card == "# Birds\n"
        torch.testing.assert_close(back.embed_texts("a red circle"), Predictor(model).embed_texts("a red circle"))

    def test_the_command(self, hub: FakeHub, model: Tercet, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
        monkeypatch.setenv("HF_TOKEN", "good")
        monkeypatch.chdir(tmp_path)
        save_model(model, "run/model", card="# From a run\n")
        assert main(["push", "run", "--output", "somebody/birds"]) == 0
        assert "/somebody/birds/commit/" in capsys.readouterr().out
        assert hub.models["somebody/birds"]["README.md"] == b"# From a run\n"
        assert main(["push", "run", "--output", "./shared/birds"]) == 0
        assert_equal(load_model("shared/birds"), model)
        assert main(["push", "none", "--output", "somebody/birds"]) == 2

    def test_from_the_cache(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        commit, cache = "0123456789abcdef0123456789abcdef01234567", tmp_path / "cache"
        snapshot = cache / "models--somebody--birds" / "snapshots" / commit
        snapshot.parent.mkdir(parents=True)
        folder.rename(snapshot)
        (cache / "models--somebody--birds" / "refs").mkdir()
        (cache / "models--somebody--birds" / "refs" / "main").write_text(commit)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        assert load_model("somebody/birds", local_only=True).tokenizer is not None
        with pytest.raises(TercetError, match=r"somebody/fish.*the cache has no copy"):
            load_model("somebody/fish", local_only=True)

    def test_errors(self, hub: FakeHub, model: Tercet, monkeypatch: pytest.MonkeyPatch) -> None:
        predictor = Predictor(model)
        with pytest.raises(TercetError, match="somebody/birds"):
            predictor.push_to_hub("somebody/birds", token="bad")
        with pytest.raises(TercetError, match=r"somebody/fish.*no such repository"):
            tercet.load("somebody/fish")
        for name, value in (("ENDPOINT", "http://127.0.0.1:9"), ("HF_HUB_OFFLINE", True)):
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
            with pytest.raises(TercetError, match=r"somebody/birds: the hub cannot be reached.*connection"):
                predictor.push_to_hub("somebody/birds", token="none")
