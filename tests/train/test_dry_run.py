"""Estimates of a step's cost against the model itself, and advice where memory is short."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rank_runs import SMALL, run_ranks, train_in_little_memory
from tercet.config_io import load_config
from tercet.device import DeviceSpec
from tercet.errors import TercetError
from tercet.model.hub import save_model
from tercet.model.tercet import Tercet
from tercet.objectives.masking import mask_tokens
from tercet.tasks.pretrain import PairBatch, Pretraining
from tercet.train import dry_run
from tercet.train.dry_run import (
    MemoryModel,
    advise_less_memory,
    count_flops,
    describe,
    explain_oom,
    measure_step,
    warn_if_oom_likely,
)
from tiny_model import make_model
from tiny_run import dotted, kept_bytes

CPU = DeviceSpec(torch.device("cpu"), "fp32")
BATCH = 6
TINY = {"data.tokenizer": "vocab.txt", "data.max_tokens": 12, "objectives.queue_size": 40, "model.text.dropout": 0.1}


def real_step(config: Any) -> tuple[Pretraining, PairBatch]:
    """The task and a batch of the shape that `measure_step` assumes."""
    torch.manual_seed(0)
    text, side = config.model.text, config.model.vision.image_size
    task = Pretraining(Tercet(config.model), config.objectives)
    ids = torch.full((BATCH, 12), text.vocabulary_size - 1)
    ids[:, 0] = text.cls_id
    mask = torch.ones(BATCH, 12, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    masked = mask_tokens(ids, mask, config.objectives.mlm_probability, text, generator)
    images, views = torch.randint(0, 256, (2, BATCH, 3, side, side), dtype=torch.uint8)
    return task, PairBatch(
        images=images,
        second_views=views if task.teacher else None,
        input_ids=ids,
        attention_mask=mask,
        image_ids=torch.arange(BATCH),
        masked=masked if "mlm" in task.enabled else None,
    )


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"model.vision.stem": "patch", "objectives.alpha": 0},
        {"objectives.imc": 0, "objectives.lmi": 0, "objectives.teacher": False, "objectives.queue_size": 0},
        {"objectives.itm": 0, "objectives.mlm": 0, "objectives.patch_drop": 0.5},
    ],
    ids=str,
)
def test_cost_of_a_step_is_that_of_the_real_one(keys: dict[str, Any]) -> None:
    config = load_config("demo", {**TINY, **keys})
    cost = measure_step(config, BATCH, "fp32")
    task, batch = real_step(config)
    student = list(task.student.parameters())
    trained = sum(weight.numel() for weight in student if weight.requires_grad)
    assert sum(cost.parameters.values()) == sum(weight.numel() for weight in student) - 1  # without the temperature
    assert cost.trained == trained and cost.fixed["AdamW moments"] == 8 * trained
    teacher = 0 if task.teacher is None else sum(weight.nbytes for weight in task.teacher.parameters())
    assert cost.fixed["teacher"] == pytest.approx(teacher, abs=1000)
    assert cost.fixed["queue"] == (0 if task.queue is None else sum(part.nbytes for part in task.queue.buffers()))

    losses: dict[str, Tensor] = {}
    held = 0

    def forward() -> None:
        nonlocal held
        held = kept_bytes(lambda: losses.update(task(batch, config.objectives.alpha).losses), task.parameters())

    assert count_flops(forward) == pytest.approx(cost.forward, rel=1e-3)
    backward = count_flops(lambda: torch.stack(list(losses.values())).sum().backward())
    assert backward == pytest.approx(cost.backward, rel=1e-3)
    assert held <= cost.passing <= 1.5 * held + 8 * trained


def test_memory_of_any_batch_follows_from_two() -> None:
    config = load_config("demo", {**TINY, "train.batch_size": 64})
    model = MemoryModel(config, "fp32", cuda=True)
    for batch in (16, 32):
        measured = measure_step(config, batch, "fp32", cuda=True).bytes_on(cuda=True)
        assert measured <= model.bytes_for(batch) <= 1.1 * measured  # memory is convex in the batch
    most = model.largest_batch(1e9)
    assert model.bytes_for(most) <= 1e9 < model.bytes_for(most + 1)
    assert model.largest_batch(1.0) == 0


def test_options_that_save_memory_are_counted() -> None:
    def passing(precision: str = "fp32", **keys: Any) -> int:
        config = load_config("demo", {**TINY, "model.vision.depth": 4, **dotted(keys)})
        return measure_step(config, 16, precision).passing

    plain = passing()
    assert passing(train__grad_checkpointing=True) < 0.8 * plain
    assert passing("bf16") < 0.9 * plain
    assert passing(objectives__itm=0) < plain


def test_the_description_is_a_config_with_notes(tmp_path: Path) -> None:
    keys = {"train.precision": "fp32", "train.device": "cpu", "optim.grad_accum_steps": 2}
    text = describe(load_config("demo", keys))
    (tmp_path / "mine.yaml").write_text(text)
    assert load_config(tmp_path / "mine.yaml").optim.grad_accum_steps == 2
    assert "# vocabulary: 512 word pieces" in text
    assert re.search(r"FLOPs a step over all devices: \S+ T for 128 pairs in 2 batches", text)
    assert re.search(r"memory of one CPU, fp32: about \S+ [MG]iB for 64 pairs", text)
    assert re.search(r"2: \S+ MiB for 32 pairs; 4: \S+ MiB for 16 pairs; 8: \S+ MiB for 8 pairs", text)
    assert "largest batch on a GPU of 80 GB: about " in text
    assert "not for vqa" in describe(load_config("demo-vqa"))


def test_init_decides_the_sizes(tmp_path: Path) -> None:
    folder = save_model(make_model(), tmp_path / "start")
    keys = {"train.batch_size": 8, "data.max_tokens": 12, "model.vision.image_size": 32}
    text = describe(load_config("demo", {"init": str(folder), **keys}))
    sizes = make_model().config
    assert f"width: {sizes.vision.width}\n" in text and f"vocabulary_size: {sizes.text.vocabulary_size}\n" in text
    parameters = sum(weight.numel() for weight in make_model().parameters()) - 1
    assert f"# parameters: {parameters / 1e6:,.2f} M" in text
    with pytest.raises(TercetError, match="nowhere"):
        describe(load_config("demo", {"init": str(tmp_path / "nowhere")}))


@pytest.mark.parametrize(
    ("batch", "steps", "devices", "fits", "advice"),
    [
        (512, 1, 1, 294, (256, 2)),
        (512, 2, 1, 100, (64, 16)),
        (512, 1, 2, 100, (128, 4)),
        (500, 1, 1, 300, (250, 2)),
        (7, 1, 1, 3, (1, 7)),
        (64, 1, 1, None, (32, 2)),
    ],
)
def test_the_same_pairs_in_less_memory(
    batch: int, steps: int, devices: int, fits: int | None, advice: tuple[int, int]
) -> None:
    config = load_config("pretrain-4m", {"train.batch_size": batch, "optim.grad_accum_steps": steps})
    flags = f"--train.batch_size {advice[0]} --optim.grad_accum_steps {advice[1]}"
    assert flags in advise_less_memory(config, devices, fits)


def test_oom_in_training_names_flags(tmp_path: Path) -> None:
    keys = {**SMALL, "train.batch_size": 24, "objectives.queue_size": 4_000_000, "output": str(tmp_path / "run")}
    (error,) = run_ranks(1, train_in_little_memory, keys, 300 << 20)
    assert isinstance(error, TercetError)
    assert "24 pairs" in str(error) and "--train.batch_size 12 --optim.grad_accum_steps 2" in str(error)
    assert "--train.grad_checkpointing true" in str(error)
    with pytest.raises(RuntimeError, match="something else"), explain_oom(load_config("demo")):
        raise RuntimeError("something else")


def test_only_a_step_that_may_not_fit_gives_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {**TINY, "train.batch_size": 256}
    config = load_config("demo", keys)
    need = MemoryModel(config, "fp32", cuda=False).bytes_for(256)
    for memory, warned in ((need + (1 << 20), False), (need - (1 << 20), True)):
        monkeypatch.setattr(dry_run, "available_memory", lambda device, memory=memory: memory)
        messages = warn_if_oom_likely(config, CPU, 1_300_000)
        assert bool(messages) == warned
    assert "256 pairs" in messages[0] and "--optim.grad_accum_steps" in messages[0]
    assert not warn_if_oom_likely(load_config("demo", {**keys, "train.parallel": "fsdp"}), CPU, 1_300_000)
