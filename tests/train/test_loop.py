"""The loop on pairs: exact resume, bad steps, refused runs, the best checkpoint.  Kills and stops are in `faults`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scene_files import scene_file
from tercet.config import Config
from tercet.config_io import load_config
from tercet.errors import TercetError
from tercet.train.checkpoint import list_checkpoints
from tercet.train.loop import remaining_steps, train, train_step
from tercet.train.setup import CHECKPOINTS, open_run_folder, set_up
from tiny_run import TINY, assert_equal, dotted, events, lines, losses


def tiny(output: Path, **keys: Any) -> Config:
    return load_config("demo", {**TINY, "output": str(output), **dotted(keys)})


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny(tmp_path_factory.mktemp("loop") / "unbroken"))


def test_a_run_folder_is_complete(unbroken: Path) -> None:
    assert len(lines(unbroken)) == 12
    files = {file.name for file in (unbroken / "model").iterdir()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert [path.name for path in list_checkpoints(unbroken / CHECKPOINTS)] == ["step-00000012", "step-00000010"]
    assert load_config(unbroken).train.batch_size == 6
    assert not list(unbroken.rglob(".*"))


@pytest.mark.parametrize(("steps", "workers"), [(2, 0), (5, 0), (8, 2)])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(
    unbroken: Path, tmp_path: Path, steps: int, workers: int
) -> None:
    run = train(tiny(tmp_path / "run", train__max_steps=steps, data__workers=workers))
    assert train(load_config(run, {"train.max_steps": None}), run) == run
    assert_equal(unbroken, run)


def test_what_cannot_be_resumed_is_refused(unbroken: Path, tmp_path: Path) -> None:
    with pytest.raises(TercetError, match="--resume"):
        train(tiny(unbroken))
    run = train(tiny(tmp_path / "run", train__max_steps=2))
    with pytest.raises(TercetError, match="not what"):
        train(load_config(run, {"data.train": [scene_file("train", 30)]}), run)
    for path in list_checkpoints(run / CHECKPOINTS):
        next(path.glob("*.safetensors")).unlink()
    with pytest.raises(TercetError, match="damaged"):
        train(load_config(run), run)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_mistake_in_an_evaluation_file_stops_the_run_before_its_first_step(tmp_path: Path, split: str) -> None:
    questions = tmp_path / "questions.json"
    questions.write_text('[{"image": "a.png", "question": "who?", "answer": "a dog"}]')
    keys = {"task": "vqa", "data__train": [scene_file("vqa-first", 8)], f"data__{split}": [str(questions)]}
    with pytest.raises(TercetError, match=r"questions\.json row 1: no 'question_id'"):
        train(tiny(tmp_path / "run", **keys))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    train(tiny(tmp_path / "run", train__max_steps=1))  # the folder is not taken


def test_a_step_that_is_not_finite_is_skipped_and_named(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run")
    with open_run_folder(config) as folder:
        state = set_up(config, folder)
        steps = remaining_steps(state)
        assert train_step(state, next(steps)).failure is None
        (batch,) = next(steps)
        before = {name: value.clone() for name, value in state.task.state_dict().items()}
        poisoned = dataclasses.replace(batch, images=torch.full(batch.images.shape, float("nan")))
        failure = train_step(state, [poisoned]).failure
        assert failure is not None
        assert all(word in failure for word in ("cma", "imc", "lmi", "itm", "mlm", batch.keys[0]))
        after = state.task.state_dict()
        for name, value in before.items():
            if not name.startswith("teacher."):  # the teacher moved towards a student that is still sound
                assert torch.equal(value, after[name]), name
        assert all(value.isfinite().all() for value in after.values() if value.is_floating_point())
        assert train_step(state, [batch]).failure is None


def test_a_run_that_diverges_gives_up_with_a_sound_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    keys = {"optim__lr": 1e30, "optim__warmup_lr": 1e30, "optim__clip_norm": None, "train__max_bad_steps": 2}
    with pytest.raises(TercetError, match="2 steps in a row"):
        train(tiny(run, **keys))
    assert list_checkpoints(run / CHECKPOINTS)
    assert events(run).count("not finite") == 2


def test_steps_whose_images_are_all_broken_are_skipped(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(8):
        (folder / f"{index}.jpg").write_bytes(b"\xff\xd8\xff broken")
        (folder / f"{index}.txt").write_text("a red circle", "utf-8")
    with pytest.raises(TercetError, match="in a row"):
        train(tiny(tmp_path / "run", data__train=[str(folder)], train__max_bad_steps=2))
    assert "every sample of the step is broken" in events(tmp_path / "run")


@pytest.mark.gpu
def test_a_run_on_a_gpu_is_resumed_and_ends_near_one_on_a_cpu(unbroken: Path, tmp_path: Path) -> None:
    run = train(tiny(tmp_path / "run", train__device="cuda", train__precision="fp32", train__max_steps=5))
    train(load_config(run, {"train.max_steps": None}), run)
    assert losses(run)[-1][1] == pytest.approx(losses(unbroken)[-1][1], rel=0.05)


@pytest.mark.parametrize(
    ("keys", "logged"),
    [
        ({"optim__grad_accum_steps": 2, "train__epochs": 2}, [1, 2, 3, 4]),
        ({"train__max_steps": 3, "train__log_every": 10}, [3]),  # the last step is always logged
        ({"data__train": [scene_file("train", 8)], "train__batch_size": 50, "train__epochs": 2}, [1, 2]),
    ],
    ids=["accumulated", "rarely logged", "fewer pairs than a batch"],
)
def test_logged_steps(tmp_path: Path, keys: dict[str, Any], logged: list[int]) -> None:
    assert [line["step"] for line in lines(train(tiny(tmp_path / "run", **keys)))] == logged


def test_starting_from_a_model_folder_with_another_image_size(unbroken: Path, tmp_path: Path) -> None:
    run = train(tiny(tmp_path / "run", init=str(unbroken / "model"), model__vision__image_size=48, train__max_steps=1))
    weights = load_file(run / "model" / "model.safetensors")
    assert weights["vision.position_embed"].shape[1] == 1 + 6 * 6


def test_the_step_that_validates_best_is_kept_with_its_model(tmp_path: Path) -> None:
    keys = {"train__evaluate_every": 3, "train__keep_checkpoints": 1, "train__epochs": 2}
    keys |= {"data__train": [scene_file("train", 48)], "data__validation": [scene_file("validation")]}
    run = train(tiny(tmp_path / "run", evaluate__rerank=0, evaluate__limit=16, **keys))
    values = {line["step"]: line["dual"]["r_mean"] for line in lines(run, "evaluate")}
    assert list(values) == [3, 6, 9, 12, 15, 16]
    best = json.loads((run / CHECKPOINTS / "best.json").read_text("utf-8"))
    assert best["metric"] == "dual.r_mean" and best["value"] == max(values.values())
    assert best["step"] == next(step for step, value in values.items() if value == best["value"])
    kept = {path.name for path in list_checkpoints(run / CHECKPOINTS)}
    assert kept == {"step-00000016", f"step-{best['step']:08d}"}
    assert (run / "best-model" / "model.safetensors").is_file()
