"""Compiled layers, checkpointed layers and dropped patches in whole steps of a tiny model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tercet.config import ModelConfig, ObjectivesConfig
from tercet.data.batch import Batch
from tercet.model.layers import set_grad_checkpointing
from tercet.model.tercet import Tercet
from tercet.objectives.loss import total
from tercet.tasks.pretrain import Pretraining
from tercet.train.setup import compile_encoders, compiled_models
from tiny_run import kept_bytes

OBJECTIVES = ObjectivesConfig(queue_size=12)
BATCH = 3


def make_task(dropout: float = 0.0, objectives: ObjectivesConfig = OBJECTIVES) -> Pretraining:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vision": {"image_size": 32, "patch_size": 8, "width": 32, "depth": 3, "heads": 2},
        "text": {"vocabulary_size": 200, "width": 32, "mlp_width": 64, "depth": 5, "fusion_layer": 2, "heads": 2},
        "embed_dim": 16,
    }
    sizes["text"]["dropout"] = dropout
    return Pretraining(Tercet(ModelConfig.model_validate(sizes)), objectives).train()


def draw_batch(tokens: int) -> Batch:
    generator = torch.Generator().manual_seed(tokens)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    input_ids = draw(104, 200, BATCH, tokens)
    input_ids[:, 0] = 101
    return Batch(
        images=draw(0, 256, BATCH, 3, 32, 32).byte(),
        second_views=draw(0, 256, BATCH, 3, 32, 32).byte(),
        input_ids=input_ids,
        attention_mask=torch.ones(BATCH, tokens, dtype=torch.bool),
        image_ids=torch.arange(BATCH),
        texts=[""] * BATCH,
        keys=[str(index) for index in range(BATCH)],
    )


def run_step(task: Pretraining, tokens: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses and gradients of a step."""
    task.begin_step()
    task.zero_grad(set_to_none=True)
    prepared = task.prepare(draw_batch(tokens), task.student.temperature.device, seed=5)
    torch.manual_seed(5)
    output = task(prepared, 0.4)
    total(output.losses, task.config).backward()
    task.enqueue(prepared, output)
    gradients = {name: value.grad for name, value in task.student.named_parameters() if value.grad is not None}
    return {name: loss.item() for name, loss in output.losses.items()}, gradients


def assert_same_step(first: Pretraining, second: Pretraining, tokens: int, tolerance: float) -> None:
    (losses, gradients), (others, other_gradients) = run_step(first, tokens), run_step(second, tokens)
    assert losses == pytest.approx(others, rel=tolerance)
    assert gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(gradient, other_gradients[name], rtol=tolerance, atol=tolerance * scale, msg=name)


def test_compiled_once_for_all_caption_lengths_with_the_same_losses() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    plain, compiled = make_task(), make_task()
    names = list(compiled.state_dict())
    assert compile_encoders(compiled_models(compiled), backend=counter) == 2 * (3 + 5)
    assert list(compiled.state_dict()) == names
    # A single row, as for [CLS] or one masked token in each caption, has its own graph.
    for tokens in (5, 9, 17):
        assert_same_step(compiled, plain, tokens, 1e-5)
    compiled_so_far = counter.frame_count
    assert compiled_so_far > 0
    for tokens in (12, 23, 10, 7, 14, 20):
        assert_same_step(compiled, plain, tokens, 1e-5)
    assert counter.frame_count == compiled_so_far
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_inductor_gives_the_same_losses(device: str) -> None:
    torch._dynamo.reset()
    plain, compiled = make_task().to(device), make_task().to(device)
    compile_encoders(compiled_models(compiled))
    for tokens in (9, 12, 20):
        assert_same_step(compiled, plain, tokens, 1e-4)
    torch._dynamo.reset()


def test_checkpointed_layers_give_the_same_step_bit_for_bit_and_keep_less() -> None:
    plain, checkpointed = make_task(dropout=0.1), make_task(dropout=0.1)
    set_grad_checkpointing(checkpointed.student)
    for tokens in (9, 14):
        assert_same_step(checkpointed, plain, tokens, 0.0)
    kept = []
    for task in (checkpointed, plain):
        batch = task.prepare(draw_batch(12), torch.device("cpu"), seed=5)
        kept.append(kept_bytes(lambda task=task, batch=batch: task(batch, 0.4), task.parameters()))
    assert 0 < kept[0] < 0.6 * kept[1]


def test_dropped_patches_train_the_student_alone() -> None:
    task = make_task(objectives=OBJECTIVES.model_copy(update={"patch_drop": 0.5}))
    losses, gradients = run_step(task, 9)
    assert set(losses) == {"cma", "imc", "lmi", "itm", "mlm"}
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    images = draw_batch(9).images
    student = task.student
    assert student.encode_image(images, 0.5).shape == (BATCH, 1 + 8, 32)
    assert student.encode_image(images, 0.99).shape == (BATCH, 1 + 1, 32)
    assert student.encode_image(images).shape == (BATCH, 1 + 16, 32)
    student.eval()
    torch.testing.assert_close(student.encode_image(images, 0.5), student.encode_image(images))
