"""Several ranks equal one: the same losses from any number of them, with DDP or FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from rank_runs import SMALL, poisoned_step, run_ranks, train_run, train_runs, train_until_sigterm
from scene_files import scene_file
from tercet.cli import main
from tercet.data.scenes import split_scenes
from tercet.errors import TercetError
from tercet.files import lock_folder
from tercet.train.checkpoint import list_checkpoints
from tiny_run import NUMBERS, dotted, events, flags, lines

OBJECTIVES = ("cma", "imc", "lmi", "itm", "mlm")


def run(folder: Path, world: int, resume: bool = False, **keys: Any) -> Path:
    if resume:
        results = run_ranks(world, train_run, "", dotted(keys), str(folder))
    else:
        results = run_ranks(world, train_run, "demo", {**SMALL, **dotted(keys), "output": str(folder)})
    assert results == [str(folder)] * world
    return folder


def assert_same_losses(first: Path, second: Path, numbers: tuple[str, ...] = NUMBERS) -> None:
    """Every number of every step is within 1e-5 of its size."""
    expected, found = lines(first), lines(second)
    assert [line["step"] for line in expected] == [line["step"] for line in found]
    for one, other in zip(expected, found, strict=True):
        for name in numbers:
            assert other[name] == pytest.approx(one[name], rel=1e-5, abs=1e-5), (one["step"], name)


def assert_close_models(first: Path, second: Path) -> None:
    expected, found = (load_file(run / "model" / "model.safetensors") for run in (first, second))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        # AdamW divides by the root of a mean square: a gradient that is only rounding gives a whole step.
        torch.testing.assert_close(value, found[name], rtol=1e-3, atol=2e-4, msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank with 8 pairs a step."""
    return run(tmp_path_factory.mktemp("runs") / "alone", 1)


WITHOUT_TEACHER = {"objectives.teacher": False, "objectives.queue_size": 0}
# The objectives of each run, and further keys.
SUBSETS: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    (("cma",), {}),
    (("cma",), WITHOUT_TEACHER),
    (("cma", "imc"), {}),
    (("cma", "lmi"), {}),
    (("itm",), {}),
    (("mlm",), {}),
    (("itm", "mlm"), WITHOUT_TEACHER),
    (("cma", "imc", "lmi", "itm", "mlm"), {}),
]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_any_choice_of_objectives_equals_one_rank(tmp_path: Path, parallel: str) -> None:
    """No rank waits for parameters that an objective does not reach."""
    runs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for number, (names, keys) in enumerate(SUBSETS):
        weights = {f"objectives.{name}": float(name in names) for name in OBJECTIVES}
        own = {**SMALL, **weights, **keys, "train.max_steps": 3, "train.parallel": parallel}
        own["data.train"] = [scene_file("train", 16)]
        for world, named in runs.items():
            named.append({**own, "output": str(tmp_path / f"{number}-{world}")})
    for world, named in runs.items():
        assert run_ranks(world, train_runs, "demo", named) == [[each["output"] for each in named]] * world
    for number, (names, _) in enumerate(SUBSETS):
        one, two = tmp_path / f"{number}-1", tmp_path / f"{number}-2"
        assert_same_losses(one, two, ("loss", *names, "grad_norm", "temperature", "lr"))
        assert [set(OBJECTIVES) & line.keys() for line in lines(two)] == [set(names)] * 3


@pytest.mark.parametrize(("world", "parallel"), [(2, "ddp"), (2, "fsdp"), (4, "ddp")])
def test_ranks_with_gathered_features_equal_one_rank(alone: Path, tmp_path: Path, world: int, parallel: str) -> None:
    together = run(tmp_path / "together", world, train__parallel=parallel)
    assert len(lines(alone)) == 6
    assert_same_losses(alone, together)
    assert_close_models(alone, together)
    assert [path.name for path in list_checkpoints(together / "checkpoints")] == ["step-00000006", "step-00000003"]


def test_a_run_resumes_with_other_ranks_and_shards(alone: Path, tmp_path: Path) -> None:
    """Two ranks with whole models, then three with shards (8 pairs: 2, 3 and 3), then one."""
    folder = run(tmp_path / "run", 2, train__max_steps=2)
    run(folder, 3, resume=True, train__max_steps=4, train__parallel="fsdp")
    run(folder, 1, resume=True, train__max_steps=None, train__parallel="ddp")
    assert_same_losses(alone, folder)
    assert_close_models(alone, folder)
    messages = events(folder).splitlines()
    assert [text for text in messages if "resumed" in text] == ["resumed at step 2", "resumed at step 4"]
    assert not any("come twice" in text for text in messages)


def test_accumulated_batches_are_exchanged_once(tmp_path: Path) -> None:
    keys = {"optim__grad_accum_steps": 3, "train__epochs": 3, "objectives__queue_size": 0}
    assert_same_losses(run(tmp_path / "one", 1, **keys), run(tmp_path / "two", 2, **keys))


def test_broken_images_on_one_rank_neither_hang_nor_bias_the_other(tmp_path: Path) -> None:
    """The first rank of two loses pairs, in some steps all of them; the losses are those of the whole pairs."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, scene in enumerate(split_scenes("train", 12)):
        Image.fromarray(scene.image).save(folder / f"{index:02}.png")
        (folder / f"{index:02}.txt").write_text(scene.captions[0], "utf-8")
        if index % 2 == 0:
            (folder / f"{index:02}.png").write_bytes(b"broken")
    keys = {"data__train": [str(folder)], "train__batch_size": 4, "train__epochs": 4}
    one, two = run(tmp_path / "one", 1, **keys), run(tmp_path / "two", 2, **keys)
    assert_same_losses(one, two)
    assert sum(line["skipped"] for line in lines(two)) == sum(line["skipped"] for line in lines(one)) == 24


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all_and_named(tmp_path: Path) -> None:
    first, second = run_ranks(2, poisoned_step, {**SMALL, "output": str(tmp_path / "run")})
    assert first["failure"] == second["failure"]
    assert "Samples of rank 1" in first["failure"] and "rank 0" not in first["failure"]
    assert second["keys"][0] in first["failure"] and first["keys"][0] not in first["failure"]
    assert all(part["unchanged"] and part["first"] is None and part["after"] is None for part in (first, second))


def test_every_rank_reports_that_the_folder_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with lock_folder(folder, ".lock", "training in"):
        for error in run_ranks(2, train_run, "demo", {**SMALL, "output": str(folder)}):
            assert isinstance(error, TercetError)
            assert str(error).startswith(f"another process is training in {folder}; ")
    assert list(folder.iterdir()) == []
    run(folder, 2, train__max_steps=1)
    assert not (folder / ".lock").exists()


def test_a_signal_to_one_rank_stops_all_after_the_same_step(alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    keys = {**SMALL, "train.checkpoint_every": 1000, "output": str(folder)}
    for error in run_ranks(2, train_until_sigterm, keys):
        assert type(error).__name__ == "Stopped"
        assert str(error) == f"stopped by SIGTERM; go on with: tercet train --resume {folder}"
    stopped = lines(folder)[-1]["step"]
    assert 2 <= stopped < 6
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == [f"step-{stopped:08d}"]
    run(folder, 2, resume=True)
    assert_same_losses(alone, folder)


def test_another_batch_size_is_reported_on_resume(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", 1, train__max_steps=1)
    run(folder, 1, resume=True, train__max_steps=2, train__batch_size=6)
    (message,) = [text for text in events(folder).splitlines() if text.startswith("a step takes 6 pairs and took 8: ")]
    assert "come twice" in message


def test_one_command_starts_a_run_and_resumes_it(tmp_path: Path) -> None:
    command = ["train", "demo", *flags(SMALL), "--resume-if-there"]
    assert main([*command, "--train.max_steps", "2"]) == 2  # no --output to look in
    command += ["--output", str(tmp_path / "run")]
    assert main([*command, "--train.max_steps", "2"]) == 0
    assert main([*command, "--train.max_steps", "4"]) == 0
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]
    assert "resumed at step 2" in events(tmp_path / "run")
