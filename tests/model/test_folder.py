"""Model folders: what is saved loads bit for bit, and every kind of damage is told in one line."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tercet.config import ModelConfig
from tercet.data.tokenizer import Tokenizer
from tercet.errors import TercetError
from tercet.model.hub import empty_model, load_model, push_model, require_tokenizer, save_model
from tercet.model.tercet import Tercet


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a red ball beside a blue box", "two green cones under a lamp"] * 4, 96)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Tercet:
    ids = {name: getattr(tokenizer, name) for name in ("pad_id", "cls_id", "sep_id", "mask_id")}
    sizes = {"width": 32, "depth": 2, "heads": 2}
    config = ModelConfig.model_validate(
        {
            "size": "tiny",
            "vision": {**sizes, "image_size": 32, "patch_size": 16},
            "text": {**sizes, **ids, "mlp_width": 48, "fusion_layer": 1, "vocabulary_size": 100, "max_positions": 12},
            "embed_dim": 8,
        }
    )
    torch.manual_seed(3)
    return Tercet(config).eval()


@pytest.fixture
def folder(model: Tercet, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    reading = copy.copy(model)
    reading.tokenizer = tokenizer
    return save_model(reading, tmp_path / "model")


def test_saves_and_loads_exactly(model: Tercet, tokenizer: Tokenizer, folder: Path) -> None:
    loaded = load_model(folder)
    assert loaded.config == model.config
    assert not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(loaded.encode_image(images), model.encode_image(images))
    texts = ["a red box", "two cones"]
    assert torch.equal(require_tokenizer(loaded).encode(texts, 12)[0], tokenizer.encode(texts, 12)[0])
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_loaded_model_is_whole(folder: Path) -> None:
    loaded = load_model(folder)
    assert not any(value.is_meta for value in (*loaded.parameters(), *loaded.buffers()))
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_loaded_model_trains_without_touching_the_file(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    loaded = load_model(folder)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1.0)
    assert (folder / "model.safetensors").read_bytes() == before


def test_empty_model_draws_nothing(model: Tercet) -> None:
    torch.manual_seed(11)
    empty = empty_model(model.config)
    drawn = torch.rand(3)
    torch.manual_seed(11)
    assert torch.equal(drawn, torch.rand(3))
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_half_precision_is_kept_as_float32(model: Tercet, tmp_path: Path) -> None:
    half = empty_model(model.config)
    half.load_state_dict({name: value.bfloat16() for name, value in model.state_dict().items()}, assign=True)
    save_model(half, tmp_path / "half")
    assert {value.dtype for value in load_model(tmp_path / "half").state_dict().values()} == {torch.float32}


def test_run_folder_gives_its_model(model: Tercet, tmp_path: Path) -> None:
    save_model(model, tmp_path / "run" / "model")
    assert load_model(tmp_path / "run").config == model.config


def test_what_trained_it_is_noted(model: Tercet, tmp_path: Path) -> None:
    assert load_model(save_model(model, tmp_path / "unknown")).matches
    for objectives, matches in ((["cma", "itm"], True), (["cma"], False)):
        noted = Tercet(model.config)
        noted.objectives = objectives
        loaded = load_model(save_model(noted, tmp_path / "noted"))
        assert loaded.objectives == objectives and loaded.matches is matches


def test_replaces_a_model_folder(model: Tercet, folder: Path) -> None:
    changed = load_model(folder)
    with torch.no_grad():
        changed.temperature.fill_(0.25)
    save_model(changed, folder)
    assert load_model(folder).temperature.item() == 0.25
    assert [entry.name for entry in folder.parent.iterdir()] == ["model"]


def test_never_replaces_a_folder_of_other_files(model: Tercet, tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"picture")
    with pytest.raises(TercetError, match=r"holds other files \(holiday.jpg\)"):
        save_model(model, tmp_path)
    assert (tmp_path / "holiday.jpg").read_bytes() == b"picture"


def test_without_tokenizer_loads_but_cannot_read(model: Tercet, tmp_path: Path) -> None:
    save_model(model, tmp_path / "mute")
    loaded = load_model(tmp_path / "mute")
    assert loaded.tokenizer is None
    with pytest.raises(TercetError, match="cannot read text; convert it again with --tokenizer"):
        require_tokenizer(loaded)


def test_refuses_a_tokenizer_of_another_model(model: Tercet, tmp_path: Path) -> None:
    foreign = Tokenizer.train([f"word{number}" for number in range(600)] * 2, 400)
    with pytest.raises(TercetError, match=r"word pieces, the model 100"):
        reading = copy.copy(model)
        reading.tokenizer = foreign
        save_model(reading, tmp_path / "model")


def test_refuses_other_special_tokens(model: Tercet, tokenizer: Tokenizer, tmp_path: Path) -> None:
    sizes = {**model.config.model_dump(), "text": {**model.config.text.model_dump(), "mask_id": 9}}
    other = Tercet(ModelConfig.model_validate(sizes))
    with pytest.raises(TercetError, match=r"mask_id 4, the model 9 \(model.text.mask_id\)"):
        other.tokenizer = tokenizer
        save_model(other, tmp_path / "model")


def _edit_config(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def _edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights = {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()}
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return damage


def _cut(name: str, length: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:length])

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut("config.json", 40), r"config.json: not valid JSON"),
        (_edit_config(lambda config: config.pop("library")), r"config.json: not the config of a Tercet model"),
        (_edit_config(lambda config: config.update(format_version=2)), r"format_version 2 is newer.*upgrade tercet"),
        (_edit_config(lambda config: config["model"].update(wings=2)), r"config.json: model.wings"),
        (_edit_config(lambda config: config["model"]["vision"].update(heads=5)), r"config.json: model.vision.*heads 5"),
        (
            _edit_config(lambda config: config["model"].update(embed_dim=16)),
            r"vision_projection.weight has shape \[8, 32\], the config asks for \[16, 32\] \(3 more",
        ),
        (_edit_weights(lambda weights: weights.pop("itm_head.bias")), r"model.safetensors: itm_head.bias is missing;"),
        (_edit_weights(lambda weights: weights.update(wing=torch.ones(2))), r"model.safetensors: wing is unexpected"),
        (
            _edit_weights(lambda weights: weights.update({"itm_head.bias": torch.ones(2, dtype=torch.int64)})),
            r"itm_head.bias holds int64 values",
        ),
        (_cut("model.safetensors", 5000), r"model.safetensors: cut short or not a safetensors file"),
        (_cut("model.safetensors", 0), r"model.safetensors: cut short or not a safetensors file"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"no model folder: it has no model.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), r"no model folder: it has no config.json"),
        (_cut("tokenizer.json", 30), r"tokenizer.json: the JSON ends too early"),
    ],
)
def test_damage_is_told_in_one_line(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(TercetError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_names_the_way_to_convert(tmp_path: Path) -> None:
    (tmp_path / "ALBEF.pth").write_bytes(b"weights")
    with pytest.raises(TercetError, match=r"tercet convert .*ALBEF.pth --output DIR"):
        load_model(tmp_path)
    with pytest.raises(TercetError, match=r"is a file, not a model folder"):
        load_model(tmp_path / "ALBEF.pth")
    with pytest.raises(TercetError, match=r"no model folder at"):
        load_model(tmp_path / "missing")


def test_hub_id_loads_from_the_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "cache"
    snapshot = cache / "models--somebody--birds" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (cache / "models--somebody--birds" / "refs").mkdir()
    (cache / "models--somebody--birds" / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert load_model("somebody/birds", local_only=True).tokenizer is not None
    with pytest.raises(TercetError, match=r"somebody/fish.*the cache has no copy"):
        load_model("somebody/fish", local_only=True)


def test_push_without_connection(model: Tercet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TercetError, match=r"cannot push to somebody/birds: the hub cannot be reached"):
        push_model(model, "somebody/birds", token="none")
