"""Reading the numbers of the published method: models, batches and expected results."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from published_names import published_queues, published_teacher
from tercet.config import HeadName, ModelConfig, ObjectivesConfig
from tercet.model.names import published_to_state
from tercet.model.tercet import Tercet
from tercet.objectives.masking import masked_positions
from tercet.objectives.matching import Negatives
from tercet.objectives.state import Teacher
from tercet.tasks.classification import ClassificationTask
from tercet.tasks.pretrain import PairBatch, Pretraining
from tercet.tasks.vqa import QuestionAnswering

FP32_EPS = torch.finfo(torch.float32).eps
HeadTask = TypeVar("HeadTask", bound=ClassificationTask | QuestionAnswering)


@dataclass
class Fixture:
    """One file of published numbers."""

    about: dict[str, Any]
    tensors: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under a prefix, without it."""
        return {name[len(prefix) :]: value for name, value in self.tensors.items() if name.startswith(prefix)}

    def precision(self, group: str, name: str) -> float:
        """Largest difference between fp32 and fp64 of the reference itself; 0 where it was not measured."""
        return self.about["precision_fp32_vs_fp64"].get(group, {}).get(name, {}).get("max_abs_diff", 0.0)


def load_fixture(folder: Path, name: str) -> Fixture:
    """The fixture `name` of the parity folder."""
    about = json.loads((folder / f"{name}.json").read_text("utf-8"))
    return Fixture(about, load_file(folder / f"{name}.safetensors"))


def model_config(fixture: Fixture) -> ModelConfig:
    """The sizes of a fixture's model."""
    vision, text, model = (fixture.about[name] for name in ("vit_config", "bert_config", "model_config"))
    special = fixture.about["special_token_ids"]
    return ModelConfig.model_validate(
        {
            "vision": {
                "image_size": vision["img_size"],
                "patch_size": vision["patch_size"],
                "width": vision["embed_dim"],
                "depth": vision["depth"],
                "heads": vision["num_heads"],
                "mlp_ratio": vision["mlp_ratio"],
            },
            "text": {
                "vocabulary_size": text["vocab_size"],
                "max_positions": text["max_position_embeddings"],
                "width": text["hidden_size"],
                "mlp_width": text["intermediate_size"],
                "depth": text["num_hidden_layers"],
                "fusion_layer": text["fusion_layer"],
                "heads": text["num_attention_heads"],
                "dropout": 0.0,
                "pad_id": special["pad"],
                "cls_id": special["cls_bos"],
                "sep_id": special["sep_eos"],
                "mask_id": special["mask"],
            },
            "embed_dim": model.get("embed_dim", 8),  # of no weight where the task does not compare features
        }
    )


def load_student(fixture: Fixture, heads: Sequence[HeadName] = ()) -> Tercet:
    """The fixture's model with `heads`; what its task does not have keeps its random start."""
    model = Tercet(model_config(fixture).model_copy(update={"heads": list(heads)}))
    missing, unexpected = model.load_state_dict(published_to_state(fixture.part("state.")), strict=False)
    assert not unexpected
    lacking = ("mlm_head", "itm_head", "vision_projection", "text_projection", "temperature") if heads else "mlm_head"
    assert all(name.startswith(lacking) for name in missing), missing
    return model


def load_task_with_head(fixture: Fixture, head: HeadName, build: Callable[[Tercet], HeadTask]) -> HeadTask:
    """A task with the fixture's student and teacher."""
    task = build(load_student(fixture, [head]))
    if task.teacher is not None:
        task.teacher.model.load_state_dict(published_teacher(fixture.part("state.")))
    return task.train()


def load_task(fixture: Fixture, config: ObjectivesConfig, match_ids: bool = False) -> Pretraining:
    """Student, teacher and queue of a fixture, in compat mode."""
    task = Pretraining(load_student(fixture), config, published=True, match_ids=match_ids)
    state = fixture.part("state.")
    assert task.teacher is not None
    task.teacher.model.load_state_dict(teacher_state(task, state))
    assert task.queue is not None
    queues = published_queues(state)
    task.queue.image_feats.copy_(queues["image_queue"].T)
    task.queue.text_feats.copy_(queues["text_queue"].T)
    task.queue.pointer.copy_(queues["queue_ptr"][0])
    if "idx_queue" in queues:
        task.queue.image_ids.copy_(queues["idx_queue"][0])
    return task.train()


def teacher_state(task: Pretraining, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published teacher's tensors that ours keeps; without `mlm` nothing reads its fusion layers."""
    teacher = published_teacher(state)
    if task.distills_mlm:
        return teacher
    return {name: value for name, value in teacher.items() if not name.startswith("fusion.")}


def read_image(part: dict[str, Tensor], name: str) -> Tensor:
    """An image tensor, which some fixtures keep small: `[batch, 3, height, width]`."""
    if name in part:
        return part[name]
    small = (part[f"{name}_lowres_u8"].float() - 128) / 64
    return small.repeat_interleave(4, dim=-1).repeat_interleave(4, dim=-2)


def read_batch(fixture: Fixture, prefix: str) -> tuple[PairBatch, Negatives, float]:
    """Inputs and recorded random choices of a step."""
    part = fixture.part(prefix)
    batch = part["input_ids"].shape[0]
    masked = masked_positions(part["mlm_input_ids"], part["mlm_labels"]) if "mlm_labels" in part else None
    everywhere = torch.ones(batch, dtype=torch.bool)
    pairs = PairBatch(
        images=read_image(part, "image"),
        second_views=read_image(part, "image_aug"),
        input_ids=part["input_ids"],
        attention_mask=part["attention_mask"].bool(),
        image_ids=part.get("idx", torch.arange(batch)),
        masked=masked,
    )
    negatives = Negatives(part["neg_image_idx_for_text"], part["neg_text_idx_for_image"], everywhere)
    return pairs, negatives, part["alpha"].item()


def assert_precise(
    fixture: Fixture,
    group: str,
    actual: dict[str, Tensor],
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] = published_to_state,
) -> None:
    """Every tensor of a `group` is within ten times what the reference's own fp32 run differs from its fp64 run by, and
    one rounding of its largest value, or of the probabilities that a bias's gradient sums."""
    part = fixture.part(f"{group}.")
    allowed = {
        name: torch.full_like(
            value, 10 * fixture.precision(group, name) + FP32_EPS * max(1.0, float(value.abs().max()))
        )
        for name, value in part.items()
        if value.is_floating_point()
    }
    expected, bounds = rename(part), rename(allowed)
    assert set(expected) == set(actual)
    for name, value in expected.items():
        excess = ((actual[name] - value).abs() - bounds[name]).max().item()
        assert excess <= 0, f"{group} {name}: {excess:.3g} beyond its bound of {bounds[name].max():.3g}"


def assert_gradients(fixture: Fixture, student: Tercet) -> None:
    """The gradients of all parameters that learn are the recorded ones."""
    gradients = {name: value.grad for name, value in student.named_parameters() if value.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    assert_precise(fixture, "grad", {name: gradient for name, gradient in gradients.items() if gradient is not None})


def assert_teacher(fixture: Fixture, teacher: Teacher | None) -> None:
    """The teacher is the recorded one after the forward pass."""
    assert teacher is not None
    actual, expected = teacher.model.state_dict(), published_teacher(fixture.part("after_fwd."))
    assert set(actual) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-6, atol=1e-7, msg=name)


def assert_close_to_norm(actual: Tensor, expected: Tensor, relative: float, absolute: float, name: str) -> None:
    """The difference is within `relative` of the tensor's norm, or `absolute` where rounding forbids that."""
    difference = (actual - expected).norm().item()
    allowed = relative * expected.norm().item() + absolute * expected.numel() ** 0.5
    assert difference <= allowed, f"{name}: {difference:.3g} is more than {allowed:.3g}"
