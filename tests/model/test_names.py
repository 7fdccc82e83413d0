"""Name tables: the parity fixtures prove the mapping in both directions, base-size key lists that it is complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from published_names import fixture_part, is_teacher, published_teacher
from tercet.model.convert import published_config, skipped_entries
from tercet.model.hub import empty_model
from tercet.model.names import QUEUES, find_family, gather, published_to_state, state_to_published
from tercet.model.vision import to_patches
from tercet.model.weights import teacher_names

REASONS = {"the momentum teacher", "queues of features", "position numbers", "second names of tied tensors"}


@pytest.fixture(scope="module")
def key_lists(parity_dir: Path) -> dict:
    """Names, shapes and types of the published models at base size."""
    return json.loads((parity_dir / "official_keys_base.json").read_text())


@pytest.mark.parametrize("name", ["pretrain_grid4", "retrieval_train", "vqa", "ve", "nlvr", "nlvr_pretrain"])
def test_back_to_the_published_names_exactly(parity_dir: Path, name: str) -> None:
    style = "pretraining" if name == "pretrain_grid4" else "downstream"
    state = fixture_part(parity_dir, name, "state.")
    student = {key: value for key, value in state.items() if not is_teacher(key) and key not in QUEUES}
    ours = published_to_state(state)
    back = state_to_published(ours, style)
    assert back.keys() == student.keys()
    assert all(torch.equal(back[key], value) for key, value in student.items())
    again = published_to_state(back)
    assert again.keys() == ours.keys() and all(torch.equal(again[key], value) for key, value in ours.items())


def test_a_base_checkpoint_loads_whole(key_lists: dict) -> None:
    """Every entry holds its own number in one cell that all its cells share, so 220 million values cost nothing."""
    entries = key_lists["models"]["pretrain"]
    numbers = torch.rand(len(entries), generator=torch.Generator().manual_seed(5)).tolist()
    state = {
        name: torch.full((), number).to(getattr(torch, entry["dtype"])).expand(entry["shape"])
        for number, (name, entry) in zip(numbers, entries.items(), strict=True)
    }
    for first, *others in key_lists["tied_parameters"]["pretrain"]:
        state.update(dict.fromkeys(others, state[first]))
    config = published_config(state)
    assert config.model_dump(exclude={"temperature"}) == type(config)().model_dump(exclude={"temperature"})
    model = empty_model(config)
    model.load_state_dict(published_to_state(state), assign=True)
    back = state_to_published(model.state_dict())
    assert (back | teacher_names(back)).keys() == state.keys() - set(QUEUES)
    for name, value in back.items():
        if not name.endswith("position_ids"):
            assert value.shape == state[name].shape, name
            assert value.flatten()[[0, -1]].tolist() == state[name].flatten()[[0, -1]].tolist(), name


@pytest.mark.parametrize("name", ["pretrain", "retrieval", "vqa", "ve", "nlvr_pretrain", "nlvr"])
def test_every_base_size_key_is_used_or_skipped_for_a_reason(key_lists: dict, name: str) -> None:
    state = {
        key: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]), device="meta")
        for key, entry in key_lists["models"][name].items()
    }
    family = find_family(state)
    assert family is not None
    gathered = gather(state, family)
    skipped = skipped_entries(state, family, gathered)
    entries = [*gathered.used.values(), *skipped.values()]
    assert sorted(key for keys in entries for key in keys) == sorted(state)
    assert skipped.keys() <= REASONS
    config = published_config(state)
    assert (config.text.depth, config.text.fusion_layer) == (12, 6)
    assert config.vision.image_size == (256 if "pretrain" in name else 384)
    wanted = empty_model(config).state_dict()
    ours = gathered.weights
    assert ours.keys() <= wanted.keys()
    assert all(value.shape == wanted[key].shape for key, value in ours.items())
    heads = ("answer_decoder", "entailment_head", "second_fusion", "nlvr_head", "assignment_head")
    assert {key for key in wanted if key.startswith(heads)} <= ours.keys()
    back = state_to_published(ours, "pretraining" if name == "pretrain" else "downstream")
    assert back.keys() == {key for key in state if not is_teacher(key) and key not in QUEUES}
    if name == "vqa":
        assert published_teacher(state).keys() == ours.keys() and config.heads == ["answer"]
        new = {key.split(".")[0] for key in wanted.keys() - ours.keys()}
        assert new == {"vision_projection", "text_projection", "itm_head", "mlm_head", "temperature"}


def test_patches_are_the_published_convolution() -> None:
    kernel, images = torch.randn(5, 3, 4, 4), torch.randn(2, 3, 12, 8)
    expected = torch.nn.functional.conv2d(images, kernel, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(to_patches(images, 4) @ kernel.flatten(1).T, expected, rtol=1e-5, atol=1e-5)
