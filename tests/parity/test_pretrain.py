"""The pre-training step equals the published one: losses, gradients, teacher, queue, and three AdamW steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures import (
    Fixture,
    assert_gradients,
    assert_precise,
    assert_teacher,
    load_fixture,
    load_student,
    load_task,
    read_batch,
)
from torch import Tensor

from published_names import published_teacher
from tercet.config import ObjectivesConfig, OptimConfig
from tercet.model import layers
from tercet.model.names import published_to_state
from tercet.objectives.contrast import contrast, gather_candidates, same_image, similarity
from tercet.objectives.local import local_global
from tercet.objectives.loss import total
from tercet.tasks.pretrain import Pretraining
from tercet.train.optim import build_optimizer

CASES = ("pretrain_grid4", "pretrain_grid16")
LOSSES = ("cma", "imc", "lmi", "itm", "mlm")


@pytest.fixture(scope="module", params=CASES)
def fixture(request: pytest.FixtureRequest, parity_dir: Path) -> Fixture:
    return load_fixture(parity_dir, request.param)


def objectives(fixture: Fixture) -> ObjectivesConfig:
    settings = fixture.about["model_config"]
    return ObjectivesConfig(
        queue_size=settings["queue_size"], momentum=settings["momentum"], mlm_probability=settings["mlm_probability"]
    )


def expected_losses(part: dict[str, Tensor]) -> dict[str, float]:
    pairs = {
        "cma": ("loss_i2t", "loss_t2i"),
        "imc": ("loss_i2i", "loss_t2t"),
        "lmi": ("loss_i2i_inMod_l", "loss_t2t_inMod_l"),
    }
    named = {name: (part[first] + part[second]).item() / 2 for name, (first, second) in pairs.items()}
    for name in ("itm", "mlm"):
        if f"loss_{name}" in part:
            named[name] = part[f"loss_{name}"].item()
    return named


def run_step(task: Pretraining, fixture: Fixture, prefix: str = "in.", alpha: float | None = None):
    batch, negatives, recorded = read_batch(fixture, prefix)
    task.begin_step()
    output = task(batch, recorded if alpha is None else alpha, negatives)
    return batch, output


def test_losses_and_gradients_equal_the_published_step(fixture: Fixture) -> None:
    task = load_task(fixture, objectives(fixture))
    _, output = run_step(task, fixture)
    loss = total(output.losses, task.config)
    loss.backward()

    expected = expected_losses(fixture.part("out."))
    assert set(output.losses) == set(LOSSES)
    for name in LOSSES:
        assert output.losses[name].item() == pytest.approx(expected[name], rel=1e-5), name
    assert loss.item() == pytest.approx(fixture.tensors["out.loss_total"].item(), rel=1e-5)

    assert_gradients(fixture, task.student)


def test_onednn_products_equal_the_published_ones_too(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrices of the fixtures are small, and this processor may be Intel's; here oneDNN multiplies all of them."""
    product, multiplied = layers._onednn_product, []

    def counted(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        multiplied.append(weight.shape)
        return product(hidden, weight, bias)

    monkeypatch.setattr(layers, "MIN_ONEDNN_WORK", 1)
    monkeypatch.setattr(layers, "is_intel", lambda: False)
    monkeypatch.setattr(layers, "_onednn_product", counted)
    test_losses_and_gradients_equal_the_published_step(fixture)
    vision = fixture.about["vit_config"]
    up = torch.Size((vision["mlp_ratio"] * vision["embed_dim"], vision["embed_dim"]))
    assert multiplied.count(up) >= 2 * vision["depth"]  # by student and teacher
    assert multiplied.count(up[::-1]) >= 3 * vision["depth"]  # and the gradient by the input of the up-projection


def test_teacher_and_queue_after_the_forward_pass(fixture: Fixture) -> None:
    task = load_task(fixture, objectives(fixture))
    batch, output = run_step(task, fixture)
    task.enqueue(batch, output)
    after = fixture.part("after_fwd.")

    assert_teacher(fixture, task.teacher)
    assert task.queue is not None
    torch.testing.assert_close(task.queue.image_feats, after["image_queue"].T, rtol=0, atol=1e-5)
    torch.testing.assert_close(task.queue.text_feats, after["text_queue"].T, rtol=0, atol=1e-5)
    assert task.queue.pointer.item() == after["queue_ptr"].item()


def test_parameters_after_three_steps_of_adamw(fixture: Fixture) -> None:
    """Without weight decay, temperature and half of the matrices would be up to 145 times the precision off."""
    settings = fixture.about["optimizer"]
    task = load_task(fixture, objectives(fixture))
    config = OptimConfig(lr=settings["lr"], warmup_lr=settings["lr"], weight_decay=settings["weight_decay"])
    optimizer = build_optimizer(task.student, config, published=True)
    for prefix in ("in.", "in2.", "in3."):
        optimizer.zero_grad()
        batch, output = run_step(task, fixture, prefix)
        expected = expected_losses(fixture.part(prefix.replace("in", "out")))
        for name in LOSSES:
            assert output.losses[name].item() == pytest.approx(expected[name], rel=2e-5), (prefix, name)
        total(output.losses, task.config).backward()
        optimizer.step()
        task.enqueue(batch, output)

    assert_precise(fixture, "after3", task.student.state_dict())
    assert task.teacher is not None and task.queue is not None
    assert_precise(fixture, "after3", task.teacher.model.state_dict(), published_teacher)
    after = fixture.part("after3.")
    torch.testing.assert_close(task.queue.image_feats, after["image_queue"].T, rtol=0, atol=2e-5)
    assert task.queue.pointer.item() == after["queue_ptr"].item()


@pytest.mark.parametrize(
    ("variant", "alpha", "temperature"),
    [("out_temp0p6.", None, 0.6), ("out_alpha0.", 0.0, None), ("out_alpha1.", 1.0, None)],
)
def test_variants(fixture: Fixture, variant: str, alpha: float | None, temperature: float | None) -> None:
    task = load_task(fixture, objectives(fixture))
    if temperature is not None:
        task.student.temperature.data.fill_(temperature)
    _, output = run_step(task, fixture, alpha=alpha)
    expected = fixture.part(variant)
    for name, value in expected_losses(expected).items():
        assert output.losses[name].item() == pytest.approx(value, rel=1e-5), name
    contrastive = {name: output.losses[name] for name in ("cma", "imc", "lmi")}
    total(contrastive, task.config).backward()
    assert task.student.temperature.item() == pytest.approx(expected["temp_after_forward"].item(), abs=1e-7)


def test_features_similarities_and_targets(fixture: Fixture) -> None:
    task = load_task(fixture, objectives(fixture))
    batch, _, alpha = read_batch(fixture, "in.")
    out = fixture.part("out.")
    task.begin_step()
    assert task.teacher is not None and batch.second_views is not None
    student, model = task.student, task.teacher.model
    feats = {}
    for suffix, encoder, images in (("", student, batch.images), ("_m", model, batch.second_views)):
        image_embeds = encoder.encode_image(images)
        text_embeds = encoder.encode_text(batch.input_ids, batch.attention_mask)
        feats[f"image_feat{suffix}"] = encoder.project_image(image_embeds[:, 0])
        feats[f"text_feat{suffix}"] = encoder.project_text(text_embeds[:, 0])
        embeds = {f"image_embeds{suffix}": image_embeds, f"text_embeds{suffix}": text_embeds}
        for name, value in (embeds | feats).items():
            torch.testing.assert_close(value, out[name], rtol=1e-5, atol=1e-5, msg=name)
    images, texts, own = feats["image_feat"], feats["text_feat"], (feats["image_feat_m"], feats["text_feat_m"])
    teacher = task._ask_teacher(batch, alpha)
    assert teacher.feats is not None and teacher.mlm_logits is not None
    assert torch.equal(teacher.feats[0], own[0]) and torch.equal(teacher.feats[1], own[1])

    temperature = student.temperature
    candidates = gather_candidates(*own, None, task.queue, exclude_empty=False)
    for name, left, right in (
        ("sim_i2t", images, candidates.text_feats),
        ("sim_t2i", texts, candidates.image_feats),
        ("sim_i2i", images, candidates.image_feats),
        ("sim_t2t", texts, candidates.text_feats),
    ):
        torch.testing.assert_close(similarity(left, right, temperature), out[name], rtol=0, atol=5e-5, msg=name)
    for name, left, right, soft in (
        ("loss_i2t", images, candidates.text_feats, own[0]),
        ("loss_t2i", texts, candidates.image_feats, own[1]),
        ("loss_i2i", images, candidates.image_feats, None),
        ("loss_t2t", texts, candidates.text_feats, None),
    ):
        loss = contrast(left, right, candidates, temperature, None, soft, alpha)
        assert loss.item() == pytest.approx(out[name].item(), rel=1e-5), name
    assert teacher.region_feats is not None and teacher.token_feats is not None
    same = same_image(None, len(images), images.device)
    for name, left, right, mask in (
        ("loss_i2i_inMod_l", images, teacher.region_feats, None),
        ("loss_t2t_inMod_l", texts, teacher.token_feats, batch.attention_mask[:, 1:]),
    ):
        loss = local_global(left, right, temperature, same, mask)
        assert loss.item() == pytest.approx(out[name].item(), rel=1e-5), name

    for name, left, right in (("weights_i2t", images, own[1]), ("weights_t2i", texts, own[0])):
        recorded = out[name] / out[name].sum(1, keepdim=True)
        drawn = similarity(left, (right,), temperature).masked_fill(same, float("-inf")).softmax(dim=1)
        torch.testing.assert_close(drawn, recorded, rtol=1e-4, atol=1e-6, msg=name)


def test_logits_of_the_fused_passes(fixture: Fixture) -> None:
    """The plain passes through the public model give the published logits at every position."""
    model = load_student(fixture).eval()
    batch, negatives, _ = read_batch(fixture, "in.")
    out = fixture.part("out.")
    with torch.no_grad():
        image_embeds = model.encode_image(batch.images)
        text_embeds = model.encode_text(batch.input_ids, batch.attention_mask)
        kv = model.project_kv(image_embeds)
        mask = batch.attention_mask
        fused = model.fuse(text_embeds, mask, kv)
        torch.testing.assert_close(fused[mask], out["output_pos_last"][mask], rtol=1e-4, atol=2e-5)
        logits = torch.cat(
            [
                model.match_logits(text_embeds, mask, kv),
                model.match_logits(text_embeds, mask, kv.select(negatives.images)),
                model.match_logits(text_embeds[negatives.texts], mask[negatives.texts], kv),
            ]
        )
        torch.testing.assert_close(logits, out["itm_logits"], rtol=1e-5, atol=1e-5)
        assert batch.masked is not None
        masked_embeds = model.encode_text(batch.masked.input_ids, mask)
        words = model.mlm_logits(model.fuse(masked_embeds, mask, kv))
        torch.testing.assert_close(words[mask], out["mlm_logits"][mask], rtol=1e-5, atol=2e-5)
        rows = model.fuse(masked_embeds, mask, kv, batch.masked.rows)
        chosen = model.mlm_logits(rows.flatten(0, 1)[batch.masked.chosen])
        labels = fixture.tensors["in.mlm_labels"]
        torch.testing.assert_close(chosen, words[labels != -100], rtol=1e-5, atol=1e-5)


def test_weight_decay_groups_are_the_published_ones(fixture: Fixture) -> None:
    task = load_task(fixture, objectives(fixture))
    optimizer = build_optimizer(task.student, OptimConfig(weight_decay=0.02), published=True)
    names = {id(value): name for name, value in task.student.named_parameters()}
    for group in fixture.about["optimizer"]["groups"]:
        ones = {name: torch.ones_like(fixture.tensors[f"state.{name}"]) for name in group["params"]}
        expected = set(published_to_state(ones))
        actual = [
            names[id(value)]
            for ours in optimizer.param_groups
            if (ours["weight_decay"] > 0) == (group["weight_decay"] > 0)
            for value in ours["params"]
        ]
        assert set(actual) == expected and len(actual) == len(expected)


def test_the_default_mode_differs_only_in_the_empty_slots(fixture: Fixture) -> None:
    """Our own mode excludes empty slots from the contrast; everything else of the step is the same."""
    published = load_task(fixture, objectives(fixture))
    ours = Pretraining(published.student, objectives(fixture))
    assert ours.teacher is not None and ours.queue is not None and published.teacher is not None
    ours.teacher.load_state_dict(published.teacher.state_dict())
    ours.queue.load_state_dict(published.queue.state_dict())  # type: ignore[union-attr]
    ours.queue.image_ids.fill_(10_000)
    ours.train()
    batch, negatives, alpha = read_batch(fixture, "in.")
    for task in (published, ours):
        task.begin_step()
    expected, actual = published(batch, alpha, negatives), ours(batch, alpha, negatives)
    for name in LOSSES:
        assert actual.losses[name].item() == pytest.approx(expected.losses[name].item(), rel=1e-6), name
