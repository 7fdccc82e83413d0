"""Config files: layers, presets, the round trip, and one line for each mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from tercet.config import Config, ModelConfig
from tercet.config_io import (
    config_fields,
    default_config,
    dump_config,
    load_config,
    recipe_meaning,
    recipe_names,
)
from tercet.errors import TercetError


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, "utf-8")
    return path


def message(recipe: str | Path, overrides: dict[str, Any] | None = None) -> str:
    with pytest.raises(TercetError) as caught:
        load_config(recipe, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_says_what_it_is(name: str) -> None:
    config = load_config(name)
    assert config.name == name
    assert 20 < len(recipe_meaning(name)) < 130


def test_recipes_of_the_design_are_there() -> None:
    wanted = {"demo", "pretrain-4m", "pretrain-14m", "retrieval-coco", "retrieval-flickr", "vqa", "entailment"}
    assert wanted | {"nlvr-pretrain", "nlvr", "grounding", "small-data"} <= set(recipe_names())


SCHEDULES = {
    "pretrain-4m": "pretrain_2500",
    "retrieval-flickr": "retrieval_flickr_350",
    "retrieval-coco": "retrieval_coco_350",
    "vqa": "vqa_600",
    "entailment": "ve_350",
    "nlvr": "nlvr_350",
    "nlvr-pretrain": "nlvr_pretrain_350",
    "grounding": "grounding_350",
}


@pytest.mark.parametrize(("recipe", "case"), SCHEDULES.items())
def test_recipes_follow_the_published_schedules(recipe: str, case: str, parity_dir: Path) -> None:
    settings_of = yaml.safe_load((parity_dir / "scheduler.json").read_text())["cases"][case]["settings"]
    published, optim = settings_of["schedular"], load_config(recipe).optim
    assert optim.lr == float(published["lr"])
    assert optim.min_lr == float(published["min_lr"])
    assert optim.warmup_lr == float(published["warmup_lr"])
    assert optim.warmup_epochs == published["warmup_epochs"]
    assert load_config(recipe).train.epochs == published["epochs"]
    assert optim.weight_decay == settings_of["optimizer"]["weight_decay"]


DEVICES = 8  # of the published commands; each takes the batch of the published configs
BATCHES = {
    "pretrain-4m": 64,
    "pretrain-14m": 64,
    "published": 64,
    "retrieval-flickr": 32,
    "retrieval-coco": 32,
    "vqa": 32,
    "entailment": 32,
    "nlvr": 16,
    "nlvr-pretrain": 64,
    "grounding": 32,
}


@pytest.mark.parametrize(("recipe", "batch_size"), BATCHES.items())
def test_recipes_count_the_pairs_of_all_published_devices(recipe: str, batch_size: int) -> None:
    assert load_config(recipe).train.batch_size == DEVICES * batch_size


def test_flags_lie_over_a_recipe_which_lies_over_its_parent(tmp_path: Path) -> None:
    write(tmp_path, "optim: {lr: 1e-3, min_lr: 1e-6}\ntrain: {epochs: 7}\n", "parent.yaml")
    child = write(tmp_path, "extends: parent.yaml\noptim:\n  lr: 2e-3\n")
    config = load_config(child, {"optim.beta1": "0.8", "data.train": ["a.json", "b.json"]})
    assert (config.optim.lr, config.optim.min_lr, config.optim.beta1) == (2e-3, 1e-6, 0.8)
    assert config.train.epochs == 7
    assert config.data.train == ["a.json", "b.json"]
    assert load_config(write(tmp_path, "extends: demo\n")).model.size == "tiny"


def test_a_run_folder_is_a_recipe(tmp_path: Path) -> None:
    write(tmp_path, dump_config(load_config("small-data")), "config.yaml")
    assert load_config(tmp_path) == load_config("small-data")


def test_circle_of_parents_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    write(tmp_path, "extends: a.yaml\n", "b.yaml")
    assert "break the circle" in message(tmp_path / "a.yaml")


class TestPreset:
    def test_keys_beside_the_size_refine_it(self) -> None:
        model = ModelConfig.model_validate({"size": "tiny", "vision": {"depth": 2}})
        assert (model.vision.depth, model.vision.width, model.text.width) == (2, 128, 128)

    def test_a_size_named_by_a_flag_replaces_the_widths_of_the_recipe(self) -> None:
        model = load_config("small-data", {"model.size": "small"}).model
        assert (model.vision.width, model.vision.heads, model.text.depth, model.embed_dim) == (384, 6, 8, 256)
        assert model.vision.image_size == load_config("small-data").model.vision.image_size

    def test_single_sizes_as_flags_win_over_the_size(self) -> None:
        model = load_config("small-data", {"model.size": "small", "model.vision.depth": "3"}).model
        assert (model.vision.depth, model.vision.width) == (3, 384)

    def test_a_size_laid_over_a_resolved_config_takes_hold(self, tmp_path: Path) -> None:
        resolved = write(tmp_path, dump_config(load_config("pretrain-4m")))
        assert load_config(resolved, {"model.size": "small"}) == load_config("pretrain-4m", {"model.size": "small"})

    def test_other_flags_leave_the_recipe_s_sizes(self) -> None:
        changed = load_config("small-data", {"model.temperature": "0.1"}).model
        assert changed.vision == load_config("small-data").model.vision


class TestPlainYaml:
    @pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", ".0001", "0.0001", "'1e-4'"])
    def test_numbers(self, text: str, tmp_path: Path) -> None:
        assert load_config(write(tmp_path, f"optim: {{lr: {text}}}\n")).optim.lr == 1e-4

    def test_no_and_off_are_words_where_words_are_asked_for(self, tmp_path: Path) -> None:
        config = load_config(write(tmp_path, "name: no\ndata: {caption_column: off}\n"))
        assert (config.name, config.data.caption_column) == ("no", "off")

    @pytest.mark.parametrize(("text", "value"), [("off", False), ("no", False), ("true", True), ("yes", True)])
    def test_and_truths_where_truths_are(self, text: str, value: bool, tmp_path: Path) -> None:
        assert load_config(write(tmp_path, f"train: {{compile: {text}}}\n")).train.compile is value

    def test_none_unsets(self, tmp_path: Path) -> None:
        for text in ("none", "null", "~", ""):
            assert load_config(write(tmp_path, f"optim:\n  clip_norm: {text}\n")).optim.clip_norm is None

    @pytest.mark.parametrize("value", ["none", "null", ["none"]])
    def test_none_unsets_a_list(self, value: object) -> None:
        assert load_config("demo").data.test
        assert load_config("demo", {"data.test": value}).data.test == []

    def test_an_empty_section_changes_nothing(self, tmp_path: Path) -> None:
        assert load_config(write(tmp_path, "extends: demo\nmodel:\noptim:\n")) == load_config("demo")

    def test_one_path_is_a_list_of_one(self, tmp_path: Path) -> None:
        config = load_config(write(tmp_path, "name: 2024\ndata: {train: pairs.json}\n"))
        assert (config.name, config.data.train) == ("2024", ["pairs.json"])


class TestMistakes:
    @pytest.mark.parametrize(
        ("text", "wanted"),
        [
            ("optim: {rl: 1}", "mine.yaml: optim.rl: unknown key; did you mean optim.lr?"),
            ("lr: 1", "mine.yaml: lr: unknown key; did you mean optim.lr?"),
            ("optimizer: {lr: 1}", "mine.yaml: optimizer: unknown key"),
            ("model: {vision: {pach_size: 8}}", "did you mean model.vision.patch_size?"),
            ("optim: {lr: fast}", "mine.yaml: optim.lr: 'fast' is not a number"),
            ("optim: {lr: .inf}", "mine.yaml: optim.lr: inf is not a finite number"),
            ("optim: {lr: -1}", "mine.yaml: optim.lr: -1 must be above 0"),
            ("train: {epochs: 1.5}", "mine.yaml: train.epochs: 1.5 is not a whole number"),
            ("train: {epochs: 0}", "mine.yaml: train.epochs: 0 must be 1 or more"),
            ("objectives: {mlm_probability: 2}", "objectives.mlm_probability: 2 must be 1 or less"),
            (
                "objectives: {mask_probability: 1}",
                "mine.yaml: objectives.mask" + "_probability: is now objectives.mlm_",
            ),
            ("train: {compile: perhaps}", "mine.yaml: train.compile: 'perhaps' is not true or false"),
            ("compat: publshed", "compat: 'publshed' is none of tercet, published; did you mean published?"),
            ("model: {size: [1]}", "model.size: [1] is none of base, small, tiny"),
            ("optim: 3", "mine.yaml: optim: 3 is not a section with keys of its own"),
            ("data: {crop_scale: [1]}", "mine.yaml: data.crop_scale"),
            ("data: {train: {a: b}}", "mine.yaml: data.train: {'a': 'b'} is not a list"),
            ("optim.lr: 3", "mine.yaml: optim.lr: write the key under its section"),
            ("model: {vision: {width: 100}}", "mine.yaml: model.vision: width 100 is not a multiple of heads 12"),
            ("objectives: {teacher: false}", "mine.yaml: objectives: imc and lmi read the teacher"),
            ("optim: {lr: 1, lr: 2}", "mine.yaml, line 1: not valid YAML: key 'lr' stands twice"),
            ("optim: {lr: 1", "mine.yaml, line 1: not valid YAML"),
            ("- a\n- b", "mine.yaml: holds a list"),
            ("extends: [a]", "mine.yaml: extends:"),
            ("1: 2", "mine.yaml, line 1: not valid YAML: key 1 is not text"),
        ],
    )
    def test_one_line_names_file_key_and_mend(self, text: str, wanted: str, tmp_path: Path) -> None:
        assert wanted in message(write(tmp_path, text))

    def test_the_mistake_is_laid_at_the_layer_that_made_it(self, tmp_path: Path) -> None:
        write(tmp_path, "optim: {lr: fast}\n", "parent.yaml")
        child = write(tmp_path, "extends: parent.yaml\noptim: {min_lr: 0}\n")
        assert message(child).startswith(f"{tmp_path / 'parent.yaml'}: optim.lr")
        assert message("demo", {"optim.lr": "fast"}) == "--optim.lr: 'fast' is not a number"
        assert message(child, {"optim": {"lr": "slow"}}) == "--optim.lr: 'slow' is not a number"

    def test_unknown_recipe_and_missing_file(self, tmp_path: Path) -> None:
        assert message("dmeo") == "no recipe or file named 'dmeo'; did you mean demo?"
        assert "the recipes are demo," in message("zzzzzzzz")
        write(tmp_path, "", "mine.yaml")
        assert message(tmp_path / "mien.yaml").endswith(f"did you mean {tmp_path / 'mine.yaml'}?")
        assert "without config.yaml" in message(tmp_path)

    def test_a_file_that_is_no_text(self, tmp_path: Path) -> None:
        path = tmp_path / "picture.yaml"
        path.write_bytes(b"\x89PNG\xff\xfe")
        assert "cannot be read as text" in message(path)


def test_every_field_says_what_it_means() -> None:
    fields = dict(config_fields())
    assert len(fields) > 60
    assert not [name for name, field in fields.items() if not field.description]
    assert not [name for name, field in fields.items() if field.is_required()]


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12) | st.sampled_from(
    ["no", "off", "1e-4", "0x1f", "1:30", "2024-01-01", "null", "~", "yes", "010", "- a", "a: b", "#", " x "]
)
POSITIVE = st.floats(1e-30, 1e30)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    given_size = draw(st.sampled_from(["base", "small", "tiny"]))
    return default_config(
        {
            "name": draw(WORDS),
            "model": {
                "size": given_size,
                "temperature": draw(POSITIVE),
                "vision": {"image_size": 16 * draw(st.integers(2, 30))},
            },
            "objectives": {"cma": draw(POSITIVE), "imc": draw(st.floats(0, 10)), "queue_size": draw(st.integers(0))},
            "data": {
                "train": draw(st.lists(WORDS, max_size=3)),
                "image_column": draw(WORDS),
                "crop_scale": draw(st.tuples(POSITIVE, POSITIVE)),
            },
            "optim": {"lr": draw(POSITIVE), "clip_norm": draw(st.none() | POSITIVE)},
            "train": {"compile": draw(st.booleans()), "max_steps": draw(st.none() | st.integers(1))},
        }
    )


@settings(max_examples=60, deadline=None)
@given(configs())
@example(default_config({"name": "next\x85line", "data.train": ["a\u2028b", "tab\t", "\ufeff", "line\n", "😀"]}))
def test_a_written_config_reads_as_itself(config: Config) -> None:
    text = dump_config(config)
    assert config_of(text) == config
    # Readers of YAML 1.1 see the same words and numbers.
    assert yaml.safe_load(text)["name"] == config.name
    assert yaml.safe_load(text)["data"]["train"] == config.data.train


def config_of(text: str) -> BaseModel:
    from tercet.config_io import Layer, _parse, build_config

    return build_config([Layer("text", _parse(text, "text"))])
