"""Pre-training on any subset of the objectives, on awkward batches, with no work that nothing reads."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from tercet.config import OBJECTIVE_NAMES, ModelConfig, ObjectivesConfig
from tercet.model.tercet import Tercet
from tercet.objectives.loss import total
from tercet.objectives.masking import mask_tokens
from tercet.tasks.pretrain import PairBatch, Pretraining

SUBSETS = [subset for size in range(1, 6) for subset in combinations(OBJECTIVE_NAMES, size)]
TEXT = {"width": 32, "mlp_width": 64, "depth": 2, "fusion_layer": 1, "heads": 2, "vocabulary_size": 60}
TEXT |= {"cls_id": 2, "sep_id": 3, "mask_id": 4}
VISION = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 1, "heads": 2}
CONFIG = ModelConfig.model_validate({"size": "tiny", "vision": VISION, "text": TEXT, "embed_dim": 16})


def weights(subset: tuple[str, ...], **others: float) -> ObjectivesConfig:
    named = {name: float(name in subset) for name in OBJECTIVE_NAMES}
    return ObjectivesConfig.model_validate({**named, "queue_size": 10, **others})


def make_batch(lengths: list[int], ids: list[int] | None = None, probability: float = 0.5) -> PairBatch:
    generator = torch.Generator().manual_seed(7)
    batch, tokens = len(lengths), max(lengths)
    input_ids = torch.randint(5, 60, (batch, tokens), generator=generator)
    input_ids[:, 0] = 2
    mask = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    input_ids = input_ids.masked_fill(~mask, 0)
    views = torch.randint(0, 256, (2, batch, 3, 32, 32), generator=generator, dtype=torch.uint8)
    masked = mask_tokens(input_ids, mask, probability, CONFIG.text, generator)
    image_ids = torch.tensor(ids if ids is not None else list(range(batch)))
    return PairBatch(views[0], views[1], input_ids, mask, image_ids, masked)


def step(task: Pretraining, batch: PairBatch) -> torch.Tensor:
    task.begin_step()
    output = task(batch, 0.4)
    loss = total(output.losses, task.config)
    loss.backward()
    task.enqueue(batch, output)
    return loss


@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_every_subset_trains_and_reaches_every_parameter_that_learns(subset: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    task = Pretraining(Tercet(CONFIG), weights(subset)).train()
    batch = make_batch([5, 3, 6, 4])
    if "mlm" not in subset:
        batch.masked = None
    task.begin_step()
    output = task(batch, 0.4)
    assert set(output.losses) == set(subset)
    total(output.losses, task.config).backward()
    for name, parameter in task.student.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        else:
            assert parameter.grad is None, name
    assert any(parameter.grad.abs().sum() > 0 for parameter in task.student.parameters() if parameter.grad is not None)


AWKWARD = {
    "one pair": ([5], None, 0.5),
    "one of [CLS]": ([1], None, 1.0),
    "all of [CLS]": ([1, 1, 1], None, 1.0),
    "one word each": ([2, 2, 2], None, 1.0),
    "nothing masked": ([1, 6, 2], None, 0.0),
    "one image": ([4, 4, 4], [3, 3, 3], 0.5),
    "two captions": ([4, 5, 4], [3, 3, 1], 0.5),
}


@pytest.mark.parametrize(("lengths", "ids", "probability"), AWKWARD.values(), ids=AWKWARD)
def test_awkward_batches_give_finite_losses_and_gradients(
    lengths: list[int], ids: list[int] | None, probability: float
) -> None:
    torch.manual_seed(0)
    task = Pretraining(Tercet(CONFIG), weights(OBJECTIVE_NAMES)).train()
    for _ in range(3):
        assert step(task, make_batch(lengths, ids, probability)).isfinite()
    step(task, make_batch([3] * 5))  # of another size
    assert task.queue is not None and task.queue.pointer.item() == (3 * len(lengths) + 5) % 10
    for name, parameter in task.student.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("config", "teacher", "queue"),
    [
        (weights(("cma",)), True, True),
        (weights(("lmi",)), True, False),
        (weights(("itm",)), False, False),
        (weights(("mlm",)), True, False),
        (weights(("mlm",), alpha=0.0), False, False),
        (weights(("cma", "itm"), teacher=False, queue_size=0), False, False),
    ],
)
def test_teacher_and_queue_exist_only_where_something_reads_them(
    config: ObjectivesConfig, teacher: bool, queue: bool
) -> None:
    task = Pretraining(Tercet(CONFIG), config)
    assert (task.teacher is not None) == teacher
    assert (task.queue is not None) == queue


def test_the_temperature_is_clamped() -> None:
    task = Pretraining(Tercet(CONFIG), weights(("cma",)))
    for start, expected in ((9.0, 0.5), (-1.0, 0.001)):
        task.student.temperature.data.fill_(start)
        task.begin_step()
        assert task.student.temperature.item() == pytest.approx(expected)


def test_dropout_makes_an_equal_teacher_differ_from_its_student() -> None:
    torch.manual_seed(0)
    task = Pretraining(Tercet(CONFIG), weights(OBJECTIVE_NAMES)).train()
    assert task.teacher is not None
    batch = make_batch([6, 6])
    task.teacher.update(task.student, 0.0)
    own = task.student.encode_text(batch.input_ids, batch.attention_mask)
    other = task.teacher.model.encode_text(batch.input_ids, batch.attention_mask)
    assert (own - other).abs().max() > 1e-3


@pytest.mark.gpu
def test_a_step_on_cuda_equals_the_cpu() -> None:
    sizes = {"dropout": 0.0}
    config = CONFIG.model_copy(update={"text": CONFIG.text.model_copy(update=sizes)})
    torch.manual_seed(0)
    task = Pretraining(Tercet(config), weights(OBJECTIVE_NAMES, itm=0.0)).train()
    batch = make_batch([5, 3, 6, 4])
    expected = {name: loss.item() for name, loss in task(batch, 0.4).losses.items()}
    task.cuda()
    assert batch.second_views is not None and batch.masked is not None
    tensors = (batch.images, batch.second_views, batch.input_ids, batch.attention_mask, batch.image_ids)
    moved = PairBatch(*(tensor.cuda() for tensor in tensors), masked=batch.masked.to("cuda"))
    actual = {name: loss.item() for name, loss in task(moved, 0.4).losses.items()}
    assert actual == pytest.approx(expected, rel=1e-3)
