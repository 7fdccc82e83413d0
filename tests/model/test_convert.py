"""Weights of others: the parity fixtures prove the values, the base-size name list that every entry is known."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tercet.errors import TercetError
from tercet.model.convert import _build_config, _leave, _published_source, convert
from tercet.model.hub import empty_model, load_model
from tercet.model.published import find_stack, gather, published_to_state
from tercet.model.tercet import Tercet
from tercet.model.text import CrossAttentionKV
from tercet.model.vision import resize_position_embed
from tercet.model.weights_file import read_weights

State = dict[str, Tensor]


def fixture(folder: Path, name: str, prefix: str) -> State:
    tensors = load_file(folder / f"{name}.safetensors")
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


@pytest.fixture(scope="module")
def published(parity_dir: Path) -> State:
    return fixture(parity_dir, "pretrain_grid4", "state.")


@pytest.fixture(scope="module")
def inputs(parity_dir: Path) -> State:
    return fixture(parity_dir, "pretrain_grid4", "in.")


@pytest.fixture(scope="module")
def outputs(parity_dir: Path) -> State:
    return fixture(parity_dir, "pretrain_grid4", "out.")


def near(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> bool:
    return torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def assert_equal_outputs(model: Tercet, inputs: State, outputs: State) -> None:
    images = model.encode_image(inputs["image"])
    texts = model.encode_text(inputs["input_ids"], inputs["attention_mask"])
    assert near(images, outputs["image_embeds"])
    assert near(texts, outputs["text_embeds"])
    assert near(model.project_image(images[:, 0]), outputs["image_feat"])
    assert near(model.project_text(texts[:, 0]), outputs["text_feat"])


@torch.no_grad()
def test_pretraining_checkpoint_gives_the_published_outputs(
    published: State, inputs: State, outputs: State, tmp_path: Path
) -> None:
    torch.save({"model": published, "epoch": 3, "config": argparse.Namespace(lr=1e-4)}, tmp_path / "tcl.pth")
    report = convert(tmp_path / "tcl.pth", tmp_path / "model", vision_heads=3, text_heads=4)
    model = load_model(tmp_path / "model")
    assert_equal_outputs(model, inputs, outputs)
    images = model.encode_image(inputs["image"])
    texts = model.encode_text(inputs["input_ids"], inputs["attention_mask"])
    memory = model.project_kv(images)
    assert near(model.fuse(texts, inputs["attention_mask"], memory), outputs["output_pos_last"])
    assert near(model.match_logits(texts, inputs["attention_mask"], memory), outputs["itm_logits"][:4])
    masked = model.encode_text(inputs["mlm_input_ids"], inputs["attention_mask"])
    logits = model.mlm_logits(model.fuse(masked, inputs["attention_mask"], memory))
    assert near(logits, outputs["mlm_logits"], 2e-5)
    assert model.temperature == published["temp"]
    assert not report.made_new and not report.kept


def test_every_entry_is_accounted_for(published: State, tmp_path: Path) -> None:
    torch.save({"model": published}, tmp_path / "tcl.pth")
    report = convert(tmp_path / "tcl.pth", tmp_path / "model", vision_heads=3, text_heads=4)
    used = [name for names in report.used.values() for name in names]
    left = [name for names in report.left_over.values() for name in names]
    assert sorted(used + left) == sorted(published)
    assert set(report.left_over) == {
        "the momentum teacher",
        "queues of features",
        "position numbers",
        "second names of tied tensors",
    }
    assert set(report.used) == set(load_model(tmp_path / "model").state_dict())
    assert "fusion.layers.{0-1}.cross_norm.bias <- " in str(report)


@torch.no_grad()
def test_retrieval_checkpoint_gives_the_published_scores(parity_dir: Path, tmp_path: Path) -> None:
    inputs, outputs = (fixture(parity_dir, "retrieval_eval", prefix) for prefix in ("in.", "out."))
    save_file(fixture(parity_dir, "retrieval_eval", "state."), tmp_path / "retrieval.safetensors")
    report = convert(tmp_path / "retrieval.safetensors", tmp_path / "model", vision_heads=3, text_heads=4)
    assert report.kind == "published retrieval model"
    assert {name.split(".")[0] for name in report.made_new} == {"mlm_head"}
    model = load_model(tmp_path / "model")
    images = model.encode_image(inputs["image"])
    texts = model.encode_text(inputs["input_ids"], inputs["attention_mask"])
    assert near(images, outputs["image_feats"]) and near(texts, outputs["text_feats"])
    similarity = model.project_image(images[:, 0]) @ model.project_text(texts[:, 0]).T
    assert near(similarity, outputs["sims_matrix"])
    memory: CrossAttentionKV = model.project_kv(images)
    row = outputs["score_i2t"][0]
    best = (row > -100).nonzero()[:, 0]
    first = memory.select(torch.zeros(1, dtype=torch.long))
    scores = model.match_logits(texts[best], inputs["attention_mask"][best], first)[:, 1]
    assert near(scores, row[best])


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
def test_downstream_checkpoints_give_all_but_what_they_lack(
    parity_dir: Path, tmp_path: Path, name: str, kind: str, new: set[str], heads: list[str]
) -> None:
    state = fixture(parity_dir, name, "state.")
    sizes = json.loads((parity_dir / f"{name}.json").read_text())
    torch.save({"model": state}, tmp_path / "weights.pth")
    report = convert(
        tmp_path / "weights.pth",
        tmp_path / "model",
        vision_heads=sizes["vit_config"]["num_heads"],
        text_heads=sizes["bert_config"]["num_attention_heads"],
    )
    assert kind in report.kind
    made = {key.split(".")[0] for key in report.made_new}
    assert new <= made <= {"vision_projection", "text_projection", "itm_head", "mlm_head", "temperature"}
    assert report.config.heads == heads
    assert "heads of other tasks" not in report.left_over
    used = [entry for entries in report.used.values() for entry in entries]
    assert sorted(used + [entry for entries in report.left_over.values() for entry in entries]) == sorted(state)
    assert report.config.text.depth == sizes["bert_config"]["num_hidden_layers"]
    assert report.config.text.fusion_layer == sizes["bert_config"]["fusion_layer"]
    weights = load_model(tmp_path / "model").state_dict()
    if "nlvr" in name:
        second = state[f"text_encoder.encoder.layer.{report.config.text.fusion_layer + 3}.output.dense.weight"]
        assert torch.equal(weights["second_fusion.layers.1.mlp.down.weight"], second)
    # The second fusion layer stands at 3 in a model for one image, at 4 in one that holds each layer twice.
    layer = report.config.text.fusion_layer + (2 if "nlvr" in name else 1)
    theirs = state[f"text_encoder.encoder.layer.{layer}.output.dense.weight"]
    assert torch.equal(weights["fusion.layers.1.mlp.down.weight"], theirs)


@pytest.mark.parametrize("name", ["pretrain", "retrieval", "vqa", "ve", "nlvr_pretrain", "nlvr"])
def test_every_base_size_entry_is_accounted_for(parity_dir: Path, name: str) -> None:
    """Used or left over for a reason, and what is left over belongs to no student."""
    entries = json.loads((parity_dir / "official_keys_base.json").read_text())["models"][name]
    state = {
        key: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]), device="meta")
        for key, entry in entries.items()
    }
    source = _published_source(state, None, None)
    gathered, used = gather(state, source.names, find_stack(state, source.names))
    left_over = _leave(source, used)
    taken = [entry for names in used.values() for entry in names]
    left = [entry for names in left_over.values() for entry in names]
    assert sorted(taken + left) == sorted(state)
    assert set(left_over) <= {
        "the momentum teacher",
        "queues of features",
        "position numbers",
        "second names of tied tensors",
    }
    wanted = empty_model(_build_config(source, None)).state_dict()
    assert gathered.keys() <= wanted.keys()
    assert all(gathered[key].shape == wanted[key].shape for key in gathered)
    heads = ("answer_decoder", "entailment_head", "second_fusion", "nlvr_head", "assignment_head")
    assert {key for key in wanted if key.startswith(heads)} <= gathered.keys()


@pytest.mark.slow
def test_base_checkpoint_file_converts(parity_dir: Path, tmp_path: Path) -> None:
    entries = json.loads((parity_dir / "official_keys_base.json").read_text())["models"]["pretrain"]
    state = {name: torch.zeros(entry["shape"], dtype=getattr(torch, entry["dtype"])) for name, entry in entries.items()}
    torch.save({"model": state}, tmp_path / "tcl.pth")
    report = convert(tmp_path / "tcl.pth", tmp_path / "model")
    assert not report.made_new
    assert sum(map(len, report.left_over.values())) + sum(map(len, report.used.values())) == len(state)
    assert load_model(tmp_path / "model").config == report.config


def as_bert(published: State, prefix: str, old_names: bool) -> State:
    """The text stack of a published checkpoint as BERT stores it: no cross-attention, a pooler besides."""
    state = {}
    for name, value in published.items():
        if name.startswith("text_encoder.") and "crossattention" not in name and "decoder" not in name:
            short = name.removeprefix("text_encoder.")
            short = prefix + short.removeprefix("bert.") if short.startswith("bert.") else short
            if old_names:
                short = short.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            state[short] = value
    state[f"{prefix}pooler.dense.weight"] = torch.ones(40, 40)
    return state


def as_timm(published: State) -> State:
    state = {
        name.removeprefix("visual_encoder."): value
        for name, value in published.items()
        if name.startswith("visual_encoder.")
    }
    return {**state, "head.weight": torch.ones(1000, 48), "head.bias": torch.ones(1000)}


@pytest.fixture(scope="module")
def base(published: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model folder, so that what a checkpoint lacks is not made in the base size."""
    folder = tmp_path_factory.mktemp("base")
    torch.save({"model": published}, folder / "tcl.pth")
    return convert(folder / "tcl.pth", folder / "model", vision_heads=3, text_heads=4).folder


@torch.no_grad()
@pytest.mark.parametrize(("prefix", "old_names", "suffix"), [("bert.", True, ".safetensors"), ("", False, ".bin")])
def test_bert_gives_text_and_fusion(
    published: State,
    inputs: State,
    outputs: State,
    base: Path,
    tmp_path: Path,
    prefix: str,
    old_names: bool,
    suffix: str,
) -> None:
    state = as_bert(published, prefix, old_names)
    if suffix == ".bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        save_file(state, tmp_path / "model.safetensors")
    settings = {"model_type": "bert", "num_attention_heads": 4, "hidden_size": 40, "hidden_dropout_prob": 0.0}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    report = convert(tmp_path, tmp_path / "out", base=base)
    model = load_model(tmp_path / "out")
    assert near(model.encode_text(inputs["input_ids"], inputs["attention_mask"]), outputs["text_embeds"])
    assert model.config.text.dropout == 0.0
    kept = {
        name for name in model.state_dict() if ".cross_" in name or not name.startswith(("text.", "fusion.", "mlm"))
    }
    assert set(report.kept) == kept
    assert not report.made_new
    expected = published_to_state(published)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert f"{prefix}pooler.dense.weight" in report.left_over["heads of other tasks"]


@torch.no_grad()
def test_vision_transformer_and_bert_start_as_the_paper(
    published: State, inputs: State, outputs: State, tmp_path: Path
) -> None:
    torch.save({"model": as_timm(published)}, tmp_path / "deit.pth")
    first = convert(tmp_path / "deit.pth", tmp_path / "start", vision_heads=3)
    assert set(first.left_over["heads of other tasks"]) == {"head.weight", "head.bias"}
    assert all(name.startswith("vision.") for name in first.used)
    save_file(as_bert(published, "bert.", True), tmp_path / "bert.safetensors")
    second = convert(tmp_path / "bert.safetensors", tmp_path / "start", base=tmp_path / "start", text_heads=4)
    model = load_model(tmp_path / "start")
    assert near(model.encode_image(inputs["image"]), outputs["image_embeds"])
    assert near(model.encode_text(inputs["input_ids"], inputs["attention_mask"]), outputs["text_embeds"])
    assert {name.split(".")[0] for name in second.kept} == {"vision", "vision_projection", "temperature"}
    # The base's text side was 768 wide, so nothing of it fits; the cross-attention is what BERT does not have.
    assert {name.split(".")[0] for name in second.made_new} == {"fusion", "text_projection", "itm_head"}
    assert all(".cross_" in name for name in second.made_new if name.startswith("fusion"))


def test_made_new_follows_from_the_seed(published: State, base: Path, tmp_path: Path) -> None:
    state = {name: value for name, value in published.items() if not name.startswith("text_encoder.cls")}
    downstream = {name.replace("text_encoder.bert.", "text_encoder."): value for name, value in state.items()}
    torch.save(downstream, tmp_path / "retrieval.pth")

    def head(seed: int) -> Tensor:
        convert(tmp_path / "retrieval.pth", tmp_path / "model", vision_heads=3, text_heads=4, seed=seed)
        return load_model(tmp_path / "model").mlm_head.transform.weight

    before = torch.random.get_rng_state()
    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))
    assert torch.equal(before, torch.random.get_rng_state())
    report = convert(tmp_path / "retrieval.pth", tmp_path / "model", base=base, vision_heads=3, text_heads=4)
    assert {name.split(".")[0] for name in report.kept} == {"mlm_head"}


def test_distilled_vision_transformer(published: State, base: Path, tmp_path: Path) -> None:
    state = as_timm(published)
    table = state["pos_embed"]
    state["pos_embed"] = torch.cat([table[:, :1], torch.full((1, 1, 48), 9.0), table[:, 1:]], dim=1)
    state["dist_token"] = torch.zeros(1, 1, 48)
    torch.save({"model": state}, tmp_path / "deit.pth")
    report = convert(tmp_path / "deit.pth", tmp_path / "model", base=base, vision_heads=3)
    assert torch.equal(load_model(tmp_path / "model").vision.position_embed, table)
    assert any("distillation token" in note for note in report.notes)


def test_image_size_resizes_the_positions(published: State, tmp_path: Path) -> None:
    torch.save(published, tmp_path / "tcl.pth")
    report = convert(tmp_path / "tcl.pth", tmp_path / "model", vision_heads=3, text_heads=4, image_size=96)
    model = load_model(tmp_path / "model")
    expected = resize_position_embed(published["visual_encoder.pos_embed"], 6, 6)
    assert torch.equal(model.vision.position_embed, expected)
    assert model.config.vision.image_size == 96
    assert report.resized == ["vision.position_embed from a grid of 4x4 to 6x6 (96 pixels)"]
    with pytest.raises(TercetError, match="image size 100 is not a multiple of the patch size 16"):
        convert(tmp_path / "tcl.pth", tmp_path / "model", vision_heads=3, text_heads=4, image_size=100)


def test_tokenizer_beside_the_weights(published: State, tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(195))]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    torch.save(published, tmp_path / "tcl.pth")
    report = convert(tmp_path / "tcl.pth", tmp_path / "model", vision_heads=3, text_heads=4)
    model = load_model(tmp_path / "model")
    assert model.tokenizer is not None
    assert model.tokenizer.encode(["w0 w3"], 8)[0].tolist() == [[2, 5, 8]]
    assert (model.config.text.cls_id, model.config.text.mask_id) == (2, 4)
    assert report.notes == ["the tokenizer is the vocab.txt beside it"]


def test_wrapper_prefix_is_dropped(published: State, tmp_path: Path) -> None:
    torch.save({"state_dict": {f"module.{name}": value for name, value in published.items()}}, tmp_path / "ddp.pth")
    assert read_weights(tmp_path / "ddp.pth").keys() == published.keys()


class Hostile:
    """What an attacker puts into a checkpoint: reading it the ordinary way would make a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_checkpoint_is_not_run(tmp_path: Path, zipped: bool) -> None:
    content = {"model": {"weight": torch.ones(2)}, "config": Hostile(tmp_path / "broken_in")}
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(TercetError, match=r"holds (posix|nt|os).mkdir, which can run code.*save its weights alone"):
        convert(tmp_path / "evil.pth", tmp_path / "model")
    assert not (tmp_path / "broken_in").exists()


def _drop(name: str) -> Callable[[State], object]:
    return lambda state: state.pop(name)


def _put(name: str, *shape: int) -> Callable[[State], object]:
    return lambda state: state.update({name: torch.zeros(shape)})


LAYER = "text_encoder.bert.encoder.layer"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("visual_encoder.norm.bias"), r"visual_encoder.norm.bias is missing, and vision.norm.bias needs it"),
        (_drop(f"{LAYER}.1.attention.self.key.bias"), r"layer.1.attention.self.key.bias is missing, though"),
        (_drop(f"{LAYER}.3.crossattention.output.dense.weight"), r"3.crossattention.output.dense.weight is missing"),
        (_drop("visual_encoder.pos_embed"), r"visual_encoder.pos_embed is missing"),
        (_drop("itm_head.weight"), r"itm_head.weight is missing, and itm_head.weight needs it"),
        (_drop("temp"), r"temp is missing"),
        (_put(f"{LAYER}.0.output.dense.weight", 40, 90), r"0.output.dense.weight give .* the shape \[40, 90\]"),
        (_put(f"{LAYER}.0.attention.self.key.weight", 40, 39), r"key.weight has shape \[40, 39\], which does not fit"),
        (_put("visual_encoder.pos_embed", 1, 18, 48), r"17 rows besides the class row, which make no square grid"),
        (_put("visual_encoder.blocks.0.ls1.gamma", 48), r"ls1.gamma is no part of Tercet's encoders"),
        (_put("visual_encoder.norm_pre.weight", 48), r"norm_pre.weight is no part of Tercet's encoders"),
        (_put("text_encoder.cls.predictions.decoder.bias", 200), r"decoder.bias differs from .*they are tied"),
    ],
)
def test_what_does_not_fit_is_named(
    published: State, tmp_path: Path, change: Callable[[State], object], message: str
) -> None:
    state = dict(published)
    state["text_encoder.cls.predictions.bias"] = torch.ones(200)
    state["text_encoder.cls.predictions.decoder.bias"] = torch.ones(200)
    change(state)
    torch.save({"model": state}, tmp_path / "tcl.pth")
    with pytest.raises(TercetError, match=message) as caught:
        convert(tmp_path / "tcl.pth", tmp_path / "model", vision_heads=3, text_heads=4)
    assert str(caught.value).startswith(str(tmp_path / "tcl.pth"))
    assert not (tmp_path / "model").exists()


def test_unknown_files_are_refused(published: State, tmp_path: Path) -> None:
    def refused(name: str, content: object, message: str) -> None:
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            torch.save(content, tmp_path / name)
        with pytest.raises(TercetError, match=message):
            convert(tmp_path / name, tmp_path / "model")

    refused("noise.pth", b"\x80\x02not a checkpoint", "cut short or not a PyTorch checkpoint")
    refused("empty.pth", b"", "cut short or not a PyTorch checkpoint")
    refused("noise.safetensors", b"noise", "cut short or not a safetensors file")
    refused("list.pth", [torch.ones(2)], "holds a list, not named weights")
    refused("none.pth", {"model": {"epoch": 3}}, "no tensors in it")
    refused("resnet.pth", {"conv1.weight": torch.ones(2)}, "neither a TCL or ALBEF checkpoint.*conv1.weight")
    refused("tiny.pth", {"model": published}, r"cannot be told from width 48; give it as --vision-heads")
    torch.save({"model": published}, tmp_path / "whole.pth")
    refused("cut.pth", (tmp_path / "whole.pth").read_bytes()[:-5000], "cut short or not a PyTorch checkpoint")
    with pytest.raises(TercetError, match="no file"):
        convert(tmp_path / "missing.pth", tmp_path / "model")


def test_other_text_encoders_are_refused(published: State, tmp_path: Path) -> None:
    save_file(as_bert(published, "bert.", False), tmp_path / "model.safetensors")
    for settings, message in [
        ({"model_type": "roberta"}, r"config.json: model_type is 'roberta'"),
        ({"hidden_act": "relu"}, r"config.json: hidden_act is 'relu'"),
        ({"hidden_size": 64, "num_attention_heads": 4}, r"hidden_size 40, config.json beside them 64"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(settings))
        with pytest.raises(TercetError, match=message):
            convert(tmp_path, tmp_path / "out")
