"""The loop on pairs: exact resume, stops, bad steps, damaged checkpoints."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
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
from tiny_run import TINY, flag


def tiny(output: Path, **overrides: Any) -> Config:
    named = {name.replace("__", "."): value for name, value in overrides.items()}
    return load_config("demo", {**TINY, "output": str(output), **named})


def lines(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [line for line in read if line["kind"] == kind]


def losses(run: Path) -> list[tuple[float, ...]]:
    names = ("step", "loss", "cma", "imc", "lmi", "itm", "mlm", "lr", "temperature", "grad_norm", "alpha")
    return [tuple(line[name] for name in names) for line in lines(run)]


def assert_same_model(first: Path, second: Path) -> None:
    expected, actual = (load_file(run / "model" / "model.safetensors") for run in (first, second))
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny(tmp_path_factory.mktemp("loop") / "unbroken"))


def test_a_run_folder_is_complete(unbroken: Path) -> None:
    assert len(lines(unbroken)) == 12
    assert {file.name for file in (unbroken / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
    }
    assert [path.name for path in list_checkpoints(unbroken / CHECKPOINTS)] == ["step-00000012", "step-00000010"]
    assert load_config(unbroken).train.batch_size == 6
    assert not list(unbroken.rglob(".*"))


@pytest.mark.parametrize("steps", [2, 5, 8])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(unbroken: Path, tmp_path: Path, steps: int) -> None:
    run = train(tiny(tmp_path / "run", train__max_steps=steps))
    resumed = load_config(run, {"train.max_steps": None})
    assert train(resumed, run) == run
    assert losses(run) == losses(unbroken)
    assert_same_model(run, unbroken)


def test_workers_change_nothing(unbroken: Path, tmp_path: Path) -> None:
    run = train(tiny(tmp_path / "run", data__workers=2))
    assert losses(run) == losses(unbroken)
    assert_same_model(run, unbroken)


def test_sigterm_writes_a_checkpoint_and_the_run_goes_on(unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = [part for name, value in {**TINY, "output": str(run)}.items() for part in flag(name, value)]
    command = [sys.executable, "-m", "tercet", "train", "demo", *flags, "--train.checkpoint_every", "1000"]
    # The same number of threads as here: sums in another order round differently.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    waited = time.monotonic()
    while not ((run / "metrics.jsonl").is_file() and len(lines(run)) >= 3):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() - waited < 120, "the run did not start"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 130, messages
    assert "--resume" in messages and "Traceback" not in messages
    stopped = lines(run)[-1]["step"]
    assert [path.name for path in list_checkpoints(run / CHECKPOINTS)] == [f"step-{stopped:08d}"]
    train(load_config(run), run)
    assert_same_model(run, unbroken)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(unbroken: Path, tmp_path: Path) -> None:
    run = train(tiny(tmp_path / "run", train__max_steps=5))
    newest, before = list_checkpoints(run / CHECKPOINTS)
    assert (newest.name, before.name) == ("step-00000005", "step-00000004")
    tensors = next(newest.glob("*.safetensors"))
    content = bytearray(tensors.read_bytes())
    content[len(content) // 2] ^= 0xFF
    tensors.write_bytes(content)
    train(load_config(run, {"train.max_steps": None}), run)
    events = " ".join(line["message"] for line in lines(run, "event"))
    assert f"{newest.name} is damaged" in events and "resumed at step 4" in events
    assert losses(run) == losses(unbroken)
    assert_same_model(run, unbroken)


def test_no_readable_checkpoint_is_one_error(tmp_path: Path) -> None:
    run = train(tiny(tmp_path / "run", train__max_steps=2))
    for path in list_checkpoints(run / CHECKPOINTS):
        next(path.glob("*.safetensors")).unlink()
    with pytest.raises(TercetError, match="damaged"):
        train(load_config(run), run)


def test_other_data_is_refused_on_resume(tmp_path: Path) -> None:
    run = train(tiny(tmp_path / "run", train__max_steps=2))
    with pytest.raises(TercetError, match="not what"):
        train(load_config(run, {"data.train": [scene_file("train", 30)]}), run)


def test_a_second_run_does_not_overwrite_the_first(unbroken: Path) -> None:
    with pytest.raises(TercetError, match="--resume"):
        train(tiny(unbroken))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_mistake_in_what_is_held_out_is_told_before_the_first_step(tmp_path: Path, split: str) -> None:
    questions = tmp_path / "held_out.json"
    questions.write_text('[{"image": "a.png", "question": "who?", "answer": "a dog"}]')
    settings = {"task": "vqa", "data__train": [scene_file("vqa-first", 8)], f"data__{split}": [str(questions)]}
    with pytest.raises(TercetError, match=r"held_out\.json row 1: no 'question_id'"):
        train(tiny(tmp_path / "run", **settings))
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
        for word in ("cma", "imc", "lmi", "itm", "mlm", batch.keys[0]):
            assert word in failure
        after = state.task.state_dict()
        for name, value in before.items():
            if not name.startswith("teacher."):  # the teacher moved towards a student that is still sound
                assert torch.equal(value, after[name]), name
        assert all(value.isfinite().all() for value in after.values() if value.is_floating_point())
        assert train_step(state, [batch]).failure is None


def test_a_run_that_diverges_gives_up_with_a_sound_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tiny(run, optim__lr=1e30, optim__warmup_lr=1e30, optim__clip_norm=None, train__max_bad_steps=2)
    with pytest.raises(TercetError, match="2 steps in a row"):
        train(config)
    assert list_checkpoints(run / CHECKPOINTS)
    assert sum("not finite" in line["message"] for line in lines(run, "event")) == 2


@pytest.mark.gpu
def test_a_run_on_a_gpu_is_resumed_and_ends_near_one_on_a_cpu(unbroken: Path, tmp_path: Path) -> None:
    run = train(tiny(tmp_path / "run", train__device="cuda", train__precision="fp32", train__max_steps=5))
    train(load_config(run, {"train.max_steps": None}), run)
    (_, last, *_), (_, expected, *_) = losses(run)[-1], losses(unbroken)[-1]
    assert last == pytest.approx(expected, rel=0.05)


def test_accumulated_batches_train(tmp_path: Path) -> None:
    run = train(tiny(tmp_path / "run", optim__grad_accum_steps=2, train__epochs=2))
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4]


def test_the_last_step_is_logged_whatever_the_interval(tmp_path: Path) -> None:
    run = train(tiny(tmp_path / "run", train__max_steps=3, train__log_every=10))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [3]


def test_a_set_smaller_than_a_batch_trains(tmp_path: Path) -> None:
    run = train(tiny(tmp_path / "run", data__train=[scene_file("train", 8)], train__batch_size=50, train__epochs=2))
    assert [line["step"] for line in lines(run)] == [1, 2]


def test_pictures_that_are_all_broken_leave_steps_out(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(8):
        (folder / f"{index}.jpg").write_bytes(b"\xff\xd8\xff broken")
        (folder / f"{index}.txt").write_text("a red circle", "utf-8")
    config = tiny(tmp_path / "run", data__train=[str(folder)], train__max_bad_steps=2)
    with pytest.raises(TercetError, match="in a row"):
        train(config)
    events = " ".join(line["message"] for line in lines(tmp_path / "run", "event"))
    assert "every sample of the step is broken" in events


def test_starting_from_a_model_folder_with_another_image_size(unbroken: Path, tmp_path: Path) -> None:
    run = train(tiny(tmp_path / "run", init=str(unbroken / "model"), model__vision__image_size=48, train__max_steps=1))
    weights = load_file(run / "model" / "model.safetensors")
    assert weights["vision.position_embed"].shape[1] == 1 + 6 * 6


def test_the_step_that_validates_best_is_kept_with_its_model(tmp_path: Path) -> None:
    config = tiny(
        tmp_path / "run",
        data__train=[scene_file("train", 48)],
        data__validation=[scene_file("validation")],
        evaluate__rerank=0,
        evaluate__limit=16,
        train__evaluate_every=3,
        train__keep_checkpoints=1,
        train__epochs=2,
    )
    run = train(config)
    values = {line["step"]: line["dual"]["r_mean"] for line in lines(run, "evaluate")}
    assert list(values) == [3, 6, 9, 12, 15, 16]
    best = json.loads((run / CHECKPOINTS / "best.json").read_text("utf-8"))
    assert best["metric"] == "dual.r_mean" and best["value"] == max(values.values())
    assert best["step"] == next(step for step, value in values.items() if value == best["value"])
    kept = {path.name for path in list_checkpoints(run / CHECKPOINTS)}
    assert kept == {"step-00000016", f"step-{best['step']:08d}"}
    assert (run / "best-model" / "model.safetensors").is_file()
