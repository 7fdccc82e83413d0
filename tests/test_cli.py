"""The command line: help, mistakes in one line, and each command against what it calls."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tercet.arguments import options_of, split_flags
from tercet.cli import main
from tercet.commands import COMMANDS
from tercet.commands.evaluation import EvaluateArguments
from tercet.commands.printing import print_table
from tercet.commands.training import DemoArguments, TrainArguments
from tercet.config import Config
from tercet.config_io import config_fields, load_config
from tercet.errors import TercetError


def fail(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a mistake prints."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tercet: error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("tercet: error: ").rstrip("\n")


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--help"])
    assert not stop.value.code
    return capsys.readouterr().out


class TestHelp:
    def test_usage_lists_the_commands(self, capsys: pytest.CaptureFixture[str]) -> None:
        for arguments in ([], ["--help"], ["-h"]):
            assert main(arguments) == 0
            text = capsys.readouterr().out
            assert all(f"  {name} " in text for name in COMMANDS)

    @pytest.mark.parametrize("name", COMMANDS)
    def test_meaning_is_that_of_the_docstring(self, name: str) -> None:
        assert (COMMANDS[name].load(name).__doc__ or "").splitlines()[0] == COMMANDS[name].meaning

    def test_help_answers_at_once(self) -> None:
        def seconds() -> float:
            start = time.perf_counter()
            subprocess.run([sys.executable, "-m", "tercet", "--help"], check=True, capture_output=True)
            return time.perf_counter() - start

        assert min(seconds() for _ in range(3)) < 0.5

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--version"]) == 0
        assert capsys.readouterr().out.startswith("tercet 0.")

    def test_train_shows_every_field_with_default_and_meaning(self, capsys: pytest.CaptureFixture[str]) -> None:
        words = " ".join(help_of(capsys, "train").replace("│", " ").split())
        for name, field in config_fields():
            assert f" --{name} " in words
            start = words.rindex(f" --{name} ")
            assert str(field.description) in words[start : start + 400], name
            assert "(default:" in words[start : start + 400], name

    def test_train_shows_the_values_of_the_recipe_and_the_flags(self, capsys: pytest.CaptureFixture[str]) -> None:
        words = " ".join(help_of(capsys, "train", "demo", "--optim.beta1", "0.85").replace("│", " ").split())
        assert "--model.size {base,small,tiny} preset of sizes that the other keys refine (default: tiny)" in words
        assert "decay (default: 0.85)" in words

    @pytest.mark.parametrize("command", sorted(COMMANDS))
    def test_every_command_has_help(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert f"usage: tercet {command}" in help_of(capsys, command)


class TestMistakes:
    @pytest.mark.parametrize(
        ("line", "wanted"),
        [
            ("trian", "no command 'trian'; did you mean train?"),
            ("xyzzy", "no command 'xyzzy'; the commands are demo, train,"),
            ("train", "name a recipe: tercet train RECIPE"),
            ("train dmeo", "no recipe or file named 'dmeo'; did you mean demo?"),
            ("train demo --optim.rl 3", "unknown flag --optim.rl; did you mean --optim.lr?"),
            ("train demo --lr 3", "unknown flag --lr; did you mean --optim.lr?"),
            ("train demo --dry-rum", "unknown flag --dry-rum; did you mean --dry-run?"),
            ("train demo --optim 3", "--optim is a section; set one of its keys, such as --optim.lr"),
            ("train demo --optim.lr", "--optim.lr needs a value: peak learning rate"),
            ("train demo --optim.lr abc", "--optim.lr: 'abc' is not a number"),
            ("train demo --optim.lr -1", "--optim.lr: '-1' must be above 0"),
            ("train demo --data.crop_scale 0.5", "--data.crop_scale needs 2 values"),
            ("train demo --train.compile maybe", "--train.compile: 'maybe' is not true or false"),
            ("train demo --model.size huge", "--model.size: 'huge' is none of base, small, tiny"),
            ("train demo --objectives.teacher false", "objectives: imc and lmi read the teacher"),
            ("train demo extra", "Unrecognized options: extra; see tercet train --help"),
            ("train demo --resume runs/x", "--resume goes on with the config of runs/x; leave 'demo' out"),
            ("train --resume runs/none", "no file runs/none"),
            ("demo --optim.rl 3", "unknown flag --optim.rl; did you mean --optim.lr?"),
            ("demo extra", "Unrecognized options: extra; see tercet demo --help"),
            ("evaluate", "Missing from tercet evaluate: MODEL"),
            ("evaluate model --dta x", "unknown flag --dta; did you mean --data?"),
            ("evaluate ./none --data scenes:test", "no model folder at ./none"),
            ("convert", "Missing from tercet convert: FILE"),
            ("convert x --too y", "unknown flag --too; did you mean --to?"),
            ("tokenizer --to x", "name the sources of captions"),
            ("tokenizer scenes --to x --size many", "Error parsing --size: invalid literal"),
            ("recipes demo", "Unrecognized options: demo"),
            ("report none", "no run folder none; check the path"),
        ],
    )
    def test_one_line_and_status_2(self, line: str, wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert wanted in fail(capsys, *line.split())

    def test_a_rank_other_than_the_first_says_which_it_is(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for rank, named in (("0", ""), ("3", "rank 3: ")):
            monkeypatch.setenv("RANK", rank)
            assert main(["train", "nothing-by-this-name"]) == 2
            assert capsys.readouterr().err.startswith(f"tercet: {named}error: no recipe")

    def test_no_traceback_from_the_command_itself(self) -> None:
        command = [sys.executable, "-m", "tercet", "train", "demo", "--optim.lr", "abc"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (2, "tercet: error: --optim.lr: 'abc' is not a number\n")

    def test_interruption(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        def interrupt(arguments: list[str]) -> None:
            raise KeyboardInterrupt(*arguments)

        monkeypatch.setattr("tercet.commands.training.demo", interrupt)
        assert main(["demo"]) == 130
        assert main(["demo", "stopped; go on"]) == 130
        assert capsys.readouterr().err == "tercet: interrupted\ntercet: stopped; go on\n"

    def test_a_reader_that_goes_away_is_no_error(self) -> None:
        command = f"{sys.executable} -m tercet train demo --dry-run | head -1"
        done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "name: demo\n", "")


class TestFlags:
    def test_forms(self) -> None:
        line = (
            "demo --optim.lr=3e-4 --data.train a.json b.json --train.compile --dry-run --objectives.imc 0 "
            "--data.crop-scale 0.5 1 --data.test --optim.clip_norm none --objectives.teacher off"
        )
        overrides, rest = split_flags(line.split(), TrainArguments)
        assert rest == ["demo", "--dry-run"]
        config = load_config("demo", overrides | {"objectives.lmi": "0", "objectives.queue_size": "0"})
        assert config.optim.lr == 3e-4
        assert config.data.train == ["a.json", "b.json"]
        assert config.data.test == []
        assert config.data.crop_scale == (0.5, 1.0)
        assert config.train.compile is True
        assert config.optim.clip_norm is None
        assert config.objectives.enabled == ("cma", "itm", "mlm")

    def test_flags_may_stand_before_the_recipe(self) -> None:
        overrides, rest = split_flags(["--optim.lr", "1", "demo"], TrainArguments)
        assert (overrides, rest) == ({"optim.lr": "1"}, ["demo"])

    def test_a_command_takes_its_own_sections_alone(self) -> None:
        with pytest.raises(TercetError, match=r"unknown flag --optim\.lr"):
            split_flags(["--optim.lr", "1"], EvaluateArguments)
        assert split_flags(["--evaluate.rerank", "8", "--data", "x"], EvaluateArguments) == (
            {"evaluate.rerank": "8"},
            ["--data", "x"],
        )

    def test_every_field_of_the_tree_is_a_flag(self) -> None:
        defaults = Config().model_dump(mode="json")
        for name, _ in config_fields():
            value: object = defaults
            for part in name.split("."):
                value = value[part]  # pyright: ignore[reportIndexIssue]
            text = [str(item) for item in value] if isinstance(value, list) else [str(value)]
            overrides, rest = split_flags([f"--{name}", *text], DemoArguments)
            assert list(overrides) == [name]
            assert rest == []

    def test_options(self) -> None:
        own = ["--help", "--recipe", "--dry_run", "--resume", "--resume_if_there", "--processes"]
        assert options_of(TrainArguments) == [*own, "--dry-run", "--resume-if-there"]


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
        for words in ("# parameters: 209.", "# FLOPs a pair: ", "# memory of one device alone, bf16: about "):
            assert words in text

    def test_dry_run_of_a_task_that_is_not_counted(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["train", "vqa", "--dry-run"]) == 0
        assert "not for vqa" in capsys.readouterr().out

    def test_tokenizer(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = tmp_path / "words"
        line = ["tokenizer", "scenes", "--to", str(folder), "--size", "150", "--data.scenes", "40"]
        assert main(line) == 0
        assert "150 word pieces" in capsys.readouterr().out
        assert len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]) == 150

    def test_train_evaluate_report(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run = tmp_path / "run"
        line = (
            f"train demo --output {run} --train.max_steps 2 --train.batch_size 4 --data.scenes 16 --data.workers 0 "
            "--data.validation --data.test --objectives.queue_size 8 --model.vision.depth 1 --model.text.depth 2 "
            "--model.text.fusion_layer 1 --train.log_every 1 --data.tokenizer_size 100 --train.device cpu"
        )
        assert main(line.split()) == 0
        assert f"The report is {run / 'report.html'}" in capsys.readouterr().out
        assert (run / "model" / "model.safetensors").is_file()
        assert load_config(run).train.max_steps == 2

        flags = "--data scenes:test --evaluate.limit 6 --evaluate.rerank 2 --data.workers 0 --train.device cpu"
        assert main(["evaluate", str(run), *flags.split(), "--json"]) == 0
        metrics = json.loads(capsys.readouterr().out)
        assert set(metrics) == {"dual", "reranked"}
        assert 0 <= metrics["dual"]["image_r10"] <= 100
        assert main(["evaluate", str(run / "model"), *flags.split()]) == 0
        table = capsys.readouterr().out.splitlines()
        assert [line.split("  ")[0] for line in table[1:]] == ["dual encoder", "re-ranked"]
        assert f"{metrics['dual']['r_mean']:.2f}" in table[1]

        (run / "report.html").unlink()
        assert main(["report", str(run)]) == 0
        capsys.readouterr()
        assert (run / "report.html").is_file()
        assert "holds a run already" in fail(capsys, *line.split())

    def test_demo_learns_figures_before_scenes(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run = tmp_path / "demo"
        line = (
            "--train.max_steps 2 --train.batch_size 4 --data.scenes 16 --data.workers 0 --data.validation --data.test "
            "--objectives.itm 0.5 --model.text.depth 2 --model.text.fusion_layer 1 --train.device cpu"
        )
        flags = line.split()
        assert main(["demo", "--output", str(run), *flags]) == 0
        said, told = capsys.readouterr().err, ["losses: cma\n", f"starts from {run}/figures/model", "losses: cma, imc"]
        assert [said.index(words) for words in told] == sorted(said.index(words) for words in told)
        first, second = load_config(run / "figures"), load_config(run)
        assert first.data.train == ["scenes:figures"] and second.data.train == ["scenes"]
        assert (first.objectives.itm, second.objectives.itm) == (0, 0.5)
        words = [(folder / "model" / "tokenizer.json").read_bytes() for folder in (run / "figures", run)]
        assert words[0] == words[1] == (run / "tokenizer" / "tokenizer.json").read_bytes()
        assert "holds a run already" in fail(capsys, "demo", "--output", str(run), *flags)

        other = tmp_path / "other"
        assert main(["demo", "--output", str(other), "--init", str(run / "model"), *flags]) == 0
        assert not (other / "figures").exists()


def test_a_table_on_a_terminal_keeps_square_brackets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    print_table(["text", "match [%]"], [["a [red] ring [/]", "12"]])
    shown = capsys.readouterr().out
    assert "a [red] ring [/]" in shown and "match [%]" in shown
