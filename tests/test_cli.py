"""The command line: help, mistakes in one line, and commands that run."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scene_files import scene_file
from tercet.arguments import CommandParser
from tercet.cli import COMMANDS, load_command, main
from tercet.commands.terminal import print_table
from tercet.config import Config
from tercet.config_io import config_fields, load_config
from tiny_run import TINY, flags


def read(command: str, line: str) -> dict[str, Any]:
    return CommandParser(load_command(command), command).read(line.split())


def fail(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a mistake prints."""
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tercet: error: ") and captured.err.count("\n") == 1
    return captured.err


class TestHelp:
    @pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
    def test_usage_lists_the_commands(self, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert main(words) == 0
        text = capsys.readouterr().out
        assert all(f"  {name} " in text for name in COMMANDS)

    def test_usage_answers_at_once(self) -> None:
        def seconds() -> float:
            """Processor time, which a busy machine does not change."""
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-m", "tercet", "--help"], check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

        assert min(seconds() for _ in range(5)) < 0.1

    @pytest.mark.parametrize("name", COMMANDS)
    def test_every_command_has_help_with_a_meaning_for_each_argument(
        self, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([*name.split(), "--help"]) == 0
        assert f"usage: tercet {name}" in capsys.readouterr().out
        assert all(action.help for action in CommandParser(load_command(name), name)._actions)

    def test_train_shows_every_key(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["train", "--help"]) == 0
        text = capsys.readouterr().out
        for name, field in config_fields():
            entry = text.partition(f"\n  --{name} ")[2].partition("\n  --")[0]
            assert "".join(str(field.description).split()) in "".join(entry.split()), name

    def test_train_shows_the_values_of_the_recipe_and_the_flags(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["train", "demo", "--optim.beta1", "0.85", "--help"]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "(default: tiny)" in text and "decay (default: 0.85)" in text

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--version"]) == 0
        assert capsys.readouterr().out.startswith("tercet 0.")


class TestMistakes:
    @pytest.mark.parametrize(
        ("line", "names"),
        [
            ("trian", "'trian'; did you mean train?"),
            ("xyzzy", "'xyzzy'; the commands are demo, train,"),
            ("data pak", "'data pak'; did you mean data pack?"),
            ("train", "tercet train RECIPE"),
            ("train dmeo", "'dmeo'; did you mean demo?"),
            ("train demo --optim.rl 3", "--optim.rl; did you mean --optim.lr?"),
            ("train demo --lr 3", "--lr; did you mean --optim.lr?"),
            ("train demo --dry-rum", "--dry-rum; did you mean --dry-run?"),
            ("train demo --optim 3", "--optim is a section; set one of its keys, such as --optim.lr"),
            ("train demo --optim.lr", "--optim.lr: expected one argument"),
            ("train demo --optim.lr abc", "--optim.lr: 'abc' is not a number"),
            ("train demo --optim.lr -1", "--optim.lr: -1 must be above 0"),
            ("train demo --data.crop_scale 0.5", "--data.crop_scale: expected 2 arguments"),
            ("train demo --train.compile maybe", "--train.compile: 'maybe' is not true or false"),
            ("train demo --model.size huge", "--model.size: 'huge' is none of base, small, tiny"),
            ("train demo --objectives.teacher false", "objectives: imc and lmi read the teacher"),
            ("train demo extra", "extra; see tercet train --help"),
            ("train demo --resume runs/x", "runs/x; remove 'demo'"),
            ("train --resume runs/none", "no file runs/none"),
            ("train demo --processes 0", "--processes 0"),
            ("train demo --resume-if-there", "--output RUN"),
            ("demo --optim.rl 3", "--optim.rl; did you mean --optim.lr?"),
            ("evaluate", "MODEL, --data; see tercet evaluate --help"),
            ("evaluate model --dta x", "--dta; did you mean --data?"),
            ("evaluate model --data x --optim.lr 1", "unknown flag --optim.lr"),
            ("evaluate ./none --data x", "no model folder at ./none"),
            ("convert", "FILE, --output"),
            ("convert x --outptu y", "--outptu; did you mean --output?"),
            ("convert x --output y --layout published --text-heads 2", "--text-heads"),
            ("tokenizer --output x", "CAPTION"),
            ("tokenizer x --output x --size many", "--size: invalid int value: 'many'"),
            ("data pack x --output y --quality 101", "--quality"),
            ("data filter x --output y --by chance", "--by: invalid choice: 'chance'"),
            ("data scenes chess", "chess"),
            ("recipes demo", "unexpected argument: demo"),
            ("report none", "none"),
        ],
    )
    def test_one_line_and_status_2(self, line: str, names: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert names in fail(capsys, *line.split())

    def test_a_rank_other_than_the_first_says_which_it_is(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for rank, named in (("0", ""), ("3", "rank 3: ")):
            monkeypatch.setenv("RANK", rank)
            assert main(["train", "nothing-by-this-name"]) == 2
            assert capsys.readouterr().err.startswith(f"tercet: {named}error: ")

    def test_keyboard_interrupt(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        reason = ""

        def interrupt() -> None:
            """Stop."""
            raise KeyboardInterrupt(reason)

        monkeypatch.setattr("tercet.commands.training.recipes", interrupt)
        assert main(["recipes"]) == 130
        reason = "stopped; resume with --resume"
        assert main(["recipes"]) == 130
        assert capsys.readouterr().err == f"tercet: interrupted\ntercet: {reason}\n"

    def test_a_closed_pipe_is_no_error(self) -> None:
        command = f"{sys.executable} -m tercet train demo --dry-run | head -1"
        done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "name: demo\n", "")


class TestArguments:
    def test_forms_of_flags(self) -> None:
        line = (
            "--optim.lr=3e-4 demo --data.train a.json b.json --train.compile --dry_run --objectives.imc 0 "
            "--data.crop-scale 0.5 1 --data.test --optim.clip_norm none --objectives.teacher off"
        )
        read_line = read("train", line)
        own = ("recipe", "dry_run", "resume", "resume_if_there", "processes")
        assert [read_line.pop(name) for name in own] == ["demo", True, None, False, 1]
        config = load_config("demo", read_line | {"objectives.lmi": "0", "objectives.queue_size": "0"})
        assert (config.optim.lr, config.optim.clip_norm, config.train.compile) == (3e-4, None, True)
        assert (config.data.train, config.data.test) == (["a.json", "b.json"], [])
        assert config.data.crop_scale == (0.5, 1.0)
        assert config.objectives.enabled == ("cma", "itm", "mlm")

    def test_positional_arguments_between_flags(self) -> None:
        assert read("search", "index -k 3 red dog --json") | {"model": None} == {
            **dict.fromkeys(("image", "like", "without", "where", "rerank", "model", "html")),
            **{"index": "index", "text": ["red", "dog"], "k": 3, "no_thumbnails": False, "json": True},
        }
        assert read("search", "index -k 3 -- --dry-run")["text"] == ["--dry-run"]

    def test_every_key_is_a_flag(self) -> None:
        defaults = Config().model_dump(mode="json")
        for name, _ in config_fields():
            value: Any = defaults
            for part in name.split("."):
                value = value[part]
            words = [str(item) for item in value] if isinstance(value, list) else [str(value)]
            assert read("demo", " ".join([f"--{name}", *words])).keys() - {"scenes"} == {name}


class TestCommands:
    def test_recipes(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["recipes"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[1].startswith("demo ")
        assert any(line.startswith("pretrain-4m ") for line in lines)

    def test_dry_run_prints_a_config_that_loads(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["train", "pretrain-4m", "--dry-run", "--train.batch_size", "8"]) == 0
        text = capsys.readouterr().out
        path = tmp_path / "resolved.yaml"
        path.write_text(text)
        assert load_config(path) == load_config("pretrain-4m", {"train.batch_size": 8})
        assert "# parameters: 209." in text and "# FLOPs" in text and "# memory" in text

    def test_tokenizer(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = tmp_path / "words"
        assert main(["tokenizer", scene_file("train"), "--output", str(folder), "--size", "150"]) == 0
        assert "150 tokens" in capsys.readouterr().out
        assert len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]) == 150

    def test_train_evaluate_report(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run = tmp_path / "run"
        line = ["train", "demo", *flags({**TINY, "output": run, "train.max_steps": 2, "train.device": "cpu"})]
        assert main(line) == 0
        assert str(run / "report.html") in capsys.readouterr().out
        assert (run / "model" / "model.safetensors").is_file()
        assert load_config(run).train.max_steps == 2

        own = f"--data {scene_file('test')} --evaluate.limit 6 --evaluate.rerank 2 --data.workers 0 --train.device cpu"
        assert main(["evaluate", str(run), *own.split(), "--json"]) == 0
        metrics = json.loads(capsys.readouterr().out)
        assert set(metrics) == {"dual", "reranked"}
        assert main(["evaluate", str(run / "model"), *own.split()]) == 0
        table = capsys.readouterr().out.splitlines()
        assert [line.split("  ")[0] for line in table[1:]] == ["dual encoder", "re-ranked"]
        assert f"{metrics['dual']['r_mean']:.2f}" in table[1]

        (run / "report.html").unlink()
        assert main(["report", str(run)]) == 0
        capsys.readouterr()
        assert (run / "report.html").is_file()
        assert str(run) in fail(capsys, *line)

    def test_demo_learns_shapes_before_scenes(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run = tmp_path / "demo"
        line = (
            "--scenes 16 --train.max_steps 2 --train.batch_size 4 --data.workers 0 --data.validation --data.test "
            "--objectives.itm 0.5 --model.text.depth 2 --model.text.fusion_layer 1 --train.device cpu"
        )
        own = line.split()
        assert main(["demo", "--output", str(run), *own]) == 0
        capsys.readouterr()
        first, second = load_config(run / "shapes"), load_config(run)
        assert first.objectives.enabled == ("cma",) and second.init == str(run / "shapes" / "model")
        assert (first.objectives.itm, second.objectives.itm) == (0, 0.5)
        words = [(folder / "model" / "tokenizer.json").read_bytes() for folder in (run / "shapes", run)]
        assert words[0] == words[1]
        assert str(run) in fail(capsys, "demo", "--output", str(run), *own)

        other = tmp_path / "other"
        assert main(["demo", "--output", str(other), "--init", str(run / "model"), *own]) == 0
        assert not (other / "shapes").exists()


def test_a_table_on_a_terminal_keeps_square_brackets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    print_table(["text", "match [%]"], [["a [red] ring [/]", "12"]])
    shown = capsys.readouterr().out
    assert "a [red] ring [/]" in shown and "match [%]" in shown
