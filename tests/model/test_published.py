"""Published names: the parity fixtures prove the mapping both ways, the base-size list that it is complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tercet.model.hub import empty_model
from tercet.model.published import (
    QUEUES,
    is_teacher,
    published_queues,
    published_teacher,
    published_to_state,
    state_to_published,
)
from tercet.model.sizes import published_config
from tercet.model.tercet import Tercet
from tercet.model.vision import resize_position_embed, to_patches

State = dict[str, Tensor]


def fixture(folder: Path, name: str, prefix: str) -> State:
    tensors = load_file(folder / f"{name}.safetensors")
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


@pytest.fixture(scope="module")
def published(parity_dir: Path) -> State:
    return fixture(parity_dir, "pretrain_grid4", "state.")


def near(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> bool:
    return torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_teacher_gives_the_published_outputs(parity_dir: Path, published: State) -> None:
    inputs, outputs = (fixture(parity_dir, "pretrain_grid4", prefix) for prefix in ("in.", "out."))
    # The published forward moves the teacher before it asks it.
    teacher = published_teacher(fixture(parity_dir, "pretrain_grid4", "after_fwd."))
    assert teacher.keys() == published_teacher(published).keys()
    model = Tercet(published_config(published, 3, 4)).eval()
    left_out = model.load_state_dict(teacher, strict=False)
    assert left_out.missing_keys == ["temperature", "itm_head.weight", "itm_head.bias"]
    assert not left_out.unexpected_keys
    images = model.encode_image(inputs["image_aug"])
    texts = model.encode_text(inputs["input_ids"], inputs["attention_mask"])
    assert near(images, outputs["image_embeds_m"])
    assert near(texts, outputs["text_embeds_m"])
    assert near(model.project_image(images[:, 0]), outputs["image_feat_m"])
    assert near(model.project_text(texts[:, 0]), outputs["text_feat_m"])
    assert published_queues(published).keys() == {"image_queue", "text_queue", "queue_ptr"}


def test_gradients_map_as_weights(parity_dir: Path, published: State) -> None:
    gradients = published_to_state(fixture(parity_dir, "pretrain_grid4", "grad."))
    weights = published_to_state(published)
    assert {name: value.shape for name, value in gradients.items()} == {
        name: value.shape for name, value in weights.items()
    }


@pytest.mark.parametrize("name", ["pretrain_grid4", "retrieval_train", "vqa", "ve", "nlvr", "nlvr_pretrain"])
def test_back_to_the_published_names_exactly(parity_dir: Path, name: str) -> None:
    style = "pretraining" if name == "pretrain_grid4" else "downstream"
    state = fixture(parity_dir, name, "state.")
    student = {key: value for key, value in state.items() if not is_teacher(key) and key not in QUEUES}
    back = state_to_published(published_to_state(state), style)
    assert back.keys() == student.keys()
    assert all(torch.equal(back[key], value) for key, value in student.items())
    model = published_to_state(state)
    again = published_to_state(back)
    assert all(torch.equal(again[key], value) for key, value in model.items())


@pytest.fixture(scope="module")
def base_names(parity_dir: Path) -> dict:
    return json.loads((parity_dir / "official_keys_base.json").read_text())


def test_random_base_checkpoint_loads_whole(base_names: dict) -> None:
    """Every entry holds its own number in one cell that all of its cells share, so 220 million values cost nothing."""
    entries = base_names["models"]["pretrain"]
    numbers = torch.rand(len(entries), generator=torch.Generator().manual_seed(5)).tolist()
    state = {
        name: torch.full((), number).to(getattr(torch, entry["dtype"])).expand(entry["shape"])
        for number, (name, entry) in zip(numbers, entries.items(), strict=True)
    }
    for first, *others in base_names["tied_parameters"]["pretrain"]:
        state.update(dict.fromkeys(others, state[first]))
    config = published_config(state)
    assert config.model_dump(exclude={"temperature"}) == type(config)().model_dump(exclude={"temperature"})
    model = empty_model(config)
    model.load_state_dict(published_to_state(state), assign=True)
    back = state_to_published(model.state_dict())
    assert back.keys() == {name for name in state if not is_teacher(name) and name not in QUEUES}
    for name, value in back.items():
        if not name.endswith("position_ids"):
            assert value.shape == state[name].shape, name
            assert value.flatten()[[0, -1]].tolist() == state[name].flatten()[[0, -1]].tolist(), name
    teacher = empty_model(config).load_state_dict(published_teacher(state), strict=False, assign=True)
    assert teacher.missing_keys == ["temperature", "itm_head.weight", "itm_head.bias"]


@pytest.mark.parametrize("name", ["retrieval", "vqa", "ve", "nlvr_pretrain", "nlvr"])
def test_base_downstream_checkpoints_fit(base_names: dict, name: str) -> None:
    entries = base_names["models"][name]
    state = {key: torch.empty(entry["shape"], device="meta") for key, entry in entries.items()}
    config = published_config(state)
    assert (config.text.depth, config.text.fusion_layer) == (12, 6)
    assert config.vision.image_size == (256 if name == "nlvr_pretrain" else 384)
    missing = empty_model(config).load_state_dict(published_to_state(state), strict=False, assign=True)
    assert not missing.unexpected_keys
    heads = ("mlm_head", "itm_head", "vision_projection", "text_projection", "temperature")
    assert all(key.startswith(heads) for key in missing.missing_keys)


def test_patches_are_the_published_convolution() -> None:
    kernel, images = torch.randn(5, 3, 4, 4), torch.randn(2, 3, 12, 8)
    expected = torch.nn.functional.conv2d(images, kernel, stride=4).flatten(2).transpose(1, 2)
    assert near(to_patches(images, 4) @ kernel.flatten(1).T, expected)


@pytest.mark.parametrize(
    ("source", "target", "grid"),
    [("16", "24", 24), ("16", "14", 14), ("14", "14_to_16", 16), ("16", "16", 16)],
)
def test_position_embeddings_resize_as_published(parity_dir: Path, source: str, target: str, grid: int) -> None:
    tensors = load_file(parity_dir / "interpolate_pos_embed.safetensors")
    resized = resize_position_embed(tensors[f"in.pos_embed_{source}"], grid, grid)
    assert near(resized, tensors[f"out.pos_embed_{target}"], 1e-6)
