"""Weights of others as model folders: the parity fixtures prove the values."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from published_names import fixture_part
from tercet.errors import TercetError
from tercet.model.convert import ConversionReport, convert
from tercet.model.hub import load_model
from tercet.model.names import published_to_state
from tercet.model.vision import resize_position_embed

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def published(parity_dir: Path) -> State:
    return fixture_part(parity_dir, "pretrain_grid4", "state.")


@pytest.fixture(scope="module")
def base(published: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model folder, so that what a checkpoint lacks is not made in the base size."""
    return convert_state(published, tmp_path_factory.mktemp("base")).folder


def convert_state(state: object, folder: Path, **options: object) -> ConversionReport:
    """Convert a state dict, by a file in `folder`, to `folder`/model."""
    torch.save(state, folder / "w.pth")
    heads = {"vision_heads": 3, "text_heads": 4}
    return convert(folder / "w.pth", folder / "model", **heads | options)  # pyright: ignore[reportArgumentType]


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def parts(names: list[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@torch.no_grad()
def test_a_pretraining_checkpoint_gives_the_published_outputs(
    parity_dir: Path, published: State, tmp_path: Path
) -> None:
    inputs, outputs = (fixture_part(parity_dir, "pretrain_grid4", prefix) for prefix in ("in.", "out."))
    report = convert_state({"model": published, "epoch": 3, "config": argparse.Namespace(lr=1e-4)}, tmp_path)
    assert not report.random and not report.kept
    model = load_model(tmp_path / "model")
    assert set(report.used) == set(model.state_dict())
    mask = inputs["attention_mask"]
    images, texts = model.encode_image(inputs["image"]), model.encode_text(inputs["input_ids"], mask)
    close(images, outputs["image_embeds"])
    close(texts, outputs["text_embeds"])
    close(model.project_image(images[:, 0]), outputs["image_feat"])
    close(model.project_text(texts[:, 0]), outputs["text_feat"])
    kv = model.project_kv(images)
    close(model.fuse(texts, mask, kv), outputs["output_pos_last"])
    close(model.match_logits(texts, mask, kv), outputs["itm_logits"][:4])
    masked = model.fuse(model.encode_text(inputs["mlm_input_ids"], mask), mask, kv)
    close(model.mlm_logits(masked), outputs["mlm_logits"], 2e-5)
    assert model.temperature == published["temp"]


@pytest.mark.parametrize(
    ("name", "kind", "new", "heads"),
    [
        ("vqa", "question answering", {"vision_projection", "itm_head", "mlm_head"}, ["answer"]),
        ("ve", "visual entailment", {"vision_projection", "itm_head", "mlm_head"}, ["entailment"]),
        ("nlvr", "NLVR2", {"vision_projection", "itm_head", "mlm_head"}, ["nlvr"]),
        ("nlvr_pretrain", "text-assignment", {"itm_head", "mlm_head"}, ["assignment"]),
        ("retrieval_train", "retrieval", {"mlm_head"}, []),
    ],
)
def test_fine_tuned_checkpoints_give_all_but_what_they_lack(
    parity_dir: Path, tmp_path: Path, name: str, kind: str, new: set[str], heads: list[str]
) -> None:
    state = fixture_part(parity_dir, name, "state.")
    sizes = json.loads((parity_dir / f"{name}.json").read_text())
    bert, vision_heads = sizes["bert_config"], sizes["vit_config"]["num_heads"]
    report = convert_state(
        {"model": state}, tmp_path, vision_heads=vision_heads, text_heads=bert["num_attention_heads"]
    )
    assert kind in report.kind and report.config.heads == heads
    assert (
        new <= parts(report.random) <= {"vision_projection", "text_projection", "itm_head", "mlm_head", "temperature"}
    )
    assert "heads of other tasks" not in report.skipped
    entries = [*report.used.values(), *report.skipped.values()]
    assert sorted(key for keys in entries for key in keys) == sorted(state)
    text = report.config.text
    assert (text.depth, text.fusion_layer) == (bert["num_hidden_layers"], bert["fusion_layer"])
    weights = load_model(tmp_path / "model").state_dict()
    assert all(torch.equal(weights[key], value) for key, value in published_to_state(state).items())
    # Models for two images hold a pair of layers in place of each fusion layer.
    two = "nlvr" in name
    layers = {"fusion": text.fusion_layer + 1 + two} | ({"second_fusion": text.fusion_layer + 3} if two else {})
    for stack, layer in layers.items():
        theirs = state[f"text_encoder.encoder.layer.{layer}.output.dense.weight"]
        assert torch.equal(weights[f"{stack}.layers.1.mlp.down.weight"], theirs)


def as_bert(published: State, prefix: str, old_names: bool) -> State:
    """The text stack of a published checkpoint as BERT stores it: without cross-attention, with a pooler."""
    state = {f"{prefix}pooler.dense.weight": torch.ones(40, 40)}
    for name, value in published.items():
        if name.startswith("text_encoder.") and "crossattention" not in name and "decoder" not in name:
            short = name.removeprefix("text_encoder.")
            short = prefix + short.removeprefix("bert.") if short.startswith("bert.") else short
            if old_names:
                short = short.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            state[short] = value
    return state


def as_timm(published: State) -> State:
    vision = {name.removeprefix("visual_encoder."): own for name, own in published.items() if "visual_encoder." in name}
    return vision | {"head.weight": torch.ones(1000, 48), "head.bias": torch.ones(1000)}


@pytest.mark.parametrize(("prefix", "old_names", "suffix"), [("bert.", True, ".safetensors"), ("", False, ".bin")])
def test_bert_gives_text_and_fusion_encoder(
    published: State, base: Path, tmp_path: Path, prefix: str, old_names: bool, suffix: str
) -> None:
    state = as_bert(published, prefix, old_names)
    if suffix == ".bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        save_file(state, tmp_path / "model.safetensors")
    settings = {"model_type": "bert", "num_attention_heads": 4, "hidden_size": 40, "hidden_dropout_prob": 0.0}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    report = convert(tmp_path, tmp_path / "out", base=base)
    weights = load_model(tmp_path / "out").state_dict()
    expected = published_to_state(published)
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    own = {name for name in weights if name.startswith(("text.", "fusion.", "mlm")) and ".cross_" not in name}
    assert set(report.used) == own and set(report.kept) == weights.keys() - own and not report.random
    assert (report.config.text.dropout, report.config.text.heads) == (0.0, 4)
    assert f"{prefix}pooler.dense.weight" in report.skipped["heads of other tasks"]


@torch.no_grad()
def test_vision_transformer_and_bert_give_the_start_of_the_paper(
    parity_dir: Path, published: State, tmp_path: Path
) -> None:
    inputs, outputs = (fixture_part(parity_dir, "pretrain_grid4", prefix) for prefix in ("in.", "out."))
    first = convert_state({"model": as_timm(published)}, tmp_path)
    assert set(first.skipped["heads of other tasks"]) == {"head.weight", "head.bias"}
    assert parts(list(first.used)) == {"vision"}
    second = convert_state(as_bert(published, "bert.", True), tmp_path, base=tmp_path / "model")
    model = load_model(tmp_path / "model")
    close(model.encode_image(inputs["image"]), outputs["image_embeds"])
    close(model.encode_text(inputs["input_ids"], inputs["attention_mask"]), outputs["text_embeds"])
    assert parts(second.kept) == {"vision", "vision_projection", "temperature"}
    # The base's text side was 768 wide, so nothing of it fits; BERT has no cross-attention.
    assert parts(second.random) == {"fusion", "text_projection", "itm_head"}
    assert all(".cross_" in name for name in second.random if name.startswith("fusion"))


def test_random_values_follow_from_the_seed(published: State, base: Path, tmp_path: Path) -> None:
    state = {name.replace("text_encoder.bert.", "text_encoder."): value for name, value in published.items()}
    state = {name: value for name, value in state.items() if not name.startswith("text_encoder.cls")}

    def head(seed: int) -> Tensor:
        convert_state(state, tmp_path, seed=seed)
        return load_model(tmp_path / "model").mlm_head.transform.weight

    before = torch.random.get_rng_state()
    assert torch.equal(head(1), head(1)) and not torch.equal(head(1), head(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert parts(convert_state(state, tmp_path, base=base).kept) == {"mlm_head"}


def test_a_distilled_vision_transformer(published: State, base: Path, tmp_path: Path) -> None:
    state = as_timm(published)
    table = state["pos_embed"]
    state["pos_embed"] = torch.cat([table[:, :1], torch.full((1, 1, 48), 9.0), table[:, 1:]], dim=1)
    report = convert_state({"model": state | {"dist_token": torch.zeros(1, 1, 48)}}, tmp_path, base=base)
    assert torch.equal(load_model(tmp_path / "model").vision.position_embed, table)
    assert any("distillation token" in note for note in report.notes)


def test_image_size_resizes_the_positions(published: State, tmp_path: Path) -> None:
    report = convert_state(published, tmp_path, image_size=96)
    model = load_model(tmp_path / "model")
    expected = resize_position_embed(published["visual_encoder.pos_embed"], 6, 6)
    assert torch.equal(model.vision.position_embed, expected) and model.config.vision.image_size == 96
    assert len(report.resized) == 1 and "4x4 to 6x6" in report.resized[0]
    with pytest.raises(TercetError, match="100 is not a multiple of the patch size 16"):
        convert_state(published, tmp_path, image_size=100)


def test_the_tokenizer_beside_the_weights(published: State, tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(195))]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    report = convert_state(published, tmp_path)
    model = load_model(tmp_path / "model")
    assert model.tokenizer is not None and model.tokenizer.encode(["w0 w3"], 8)[0].tolist() == [[2, 5, 8]]
    assert (model.config.text.cls_id, model.config.text.mask_id) == (2, 4)
    assert "vocab.txt" in report.notes[0]


def drop(name: str) -> Callable[[State], object]:
    return lambda state: state.pop(name)


def put(name: str, *shape: int) -> Callable[[State], object]:
    return lambda state: state.update({name: torch.zeros(shape)})


LAYER = "text_encoder.bert.encoder.layer"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("visual_encoder.norm.bias"), r"visual_encoder.norm.bias is missing"),
        (drop(f"{LAYER}.1.attention.self.key.bias"), r"layer.1.attention.self.key.bias is missing"),
        (drop(f"{LAYER}.3.crossattention.output.dense.weight"), r"3.crossattention.output.dense.weight is missing"),
        (drop("visual_encoder.pos_embed"), r"visual_encoder.pos_embed is missing"),
        (drop("itm_head.weight"), r"itm_head.weight is missing"),
        (drop("temp"), r"temp is missing"),
        (put(f"{LAYER}.0.output.dense.weight", 40, 90), r"0.output.dense.weight .*\[40, 90\].*\[40, 96\]"),
        (put(f"{LAYER}.0.attention.self.key.weight", 40, 39), r"key.weight .*\[40, 39\].*query.weight"),
        (put("visual_encoder.pos_embed", 1, 18, 48), r"visual_encoder.pos_embed has 17 rows .* square grid"),
        (put("visual_encoder.patch_embed.proj.weight", 48, 4, 16, 16), r"patches has shape \[48, 4, 16, 16\]"),
        (put("visual_encoder.blocks.0.ls1.gamma", 48), r"ls1.gamma is no part"),
        (put("visual_encoder.norm_pre.weight", 48), r"norm_pre.weight is no part"),
        (put("text_encoder.cls.predictions.decoder.bias", 200), r"decoder.bias differs from .*predictions.bias"),
    ],
)
def test_errors_name_file_and_entry(
    published: State, tmp_path: Path, change: Callable[[State], object], message: str
) -> None:
    ones = {f"text_encoder.cls.predictions.{name}": torch.ones(200) for name in ("bias", "decoder.bias")}
    state = dict(published) | ones
    change(state)
    with pytest.raises(TercetError, match=message) as caught:
        convert_state({"model": state}, tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "w.pth"))
    assert not (tmp_path / "model").exists()


def test_unknown_files(published: State, base: Path, tmp_path: Path) -> None:
    with pytest.raises(TercetError, match=r"w.pth: neither .* conv1.weight"):
        convert_state({"conv1.weight": torch.ones(2)}, tmp_path)
    with pytest.raises(TercetError, match=r"width 48.*--vision-heads"):
        convert_state(published, tmp_path, vision_heads=None)
    with pytest.raises(TercetError, match=r"--text-heads 3 does not divide width 40"):
        convert_state(published, tmp_path, text_heads=3)
    with pytest.raises(TercetError, match="Tercet's own weights"):
        convert(base / "model.safetensors", tmp_path / "model")
    with pytest.raises(TercetError, match=r"no file .*missing.pth"):
        convert(tmp_path / "missing.pth", tmp_path / "model")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "roberta"}, r"config.json: model_type is 'roberta'"),
        ({"hidden_act": "relu"}, r"config.json: hidden_act is 'relu'"),
        ({"hidden_size": 64, "num_attention_heads": 4}, r"hidden_size 40, config.json .* 64"),
    ],
)
def test_other_text_encoders(published: State, tmp_path: Path, settings: dict, message: str) -> None:
    save_file(as_bert(published, "bert.", False), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(TercetError, match=message):
        convert(tmp_path, tmp_path / "out")


def test_the_card_names_the_origin(base: Path) -> None:
    card = load_model(base).card
    assert card is not None and "w.pth is a published pre-training model" in card
