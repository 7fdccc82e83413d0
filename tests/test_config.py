"""Config files: layers, presets, the round trip, and one line for each mistake."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

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
    assert {"demo", "small-data", *PUBLISHED} <= set(recipe_names())


# The published schedule of each recipe, and the batch of each of the eight devices of the published commands.
PUBLISHED = {
    "pretrain-4m": ("pretrain_2500", 64),
    "pretrain-14m": (None, 64),
    "published": (None, 64),
    "retrieval-flickr": ("retrieval_flickr_350", 32),
    "retrieval-coco": ("retrieval_coco_350", 32),
    "vqa": ("vqa_600", 32),
    "entailment": ("ve_350", 32),
    "nlvr": ("nlvr_350", 16),
    "nlvr-pretrain": ("nlvr_pretrain_350", 64),
    "grounding": ("grounding_350", 32),
}


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_recipes_count_the_pairs_of_all_published_devices(recipe: str) -> None:
    assert load_config(recipe).train.batch_size == 8 * PUBLISHED[recipe][1]


@pytest.mark.parametrize(("recipe", "case"), [(recipe, case) for recipe, (case, _) in PUBLISHED.items() if case])
def test_recipes_follow_the_published_schedules(recipe: str, case: str, parity_dir: Path) -> None:
    config = load_config(recipe)
    published = yaml.safe_load((parity_dir / "scheduler.json").read_text())["cases"][case]["settings"]
    schedule, optim = published["schedular"], config.optim
    assert [optim.lr, optim.min_lr, optim.warmup_lr] == [float(schedule[key]) for key in ("lr", "min_lr", "warmup_lr")]
    assert optim.warmup_epochs == schedule["warmup_epochs"]
    assert config.train.epochs == schedule["epochs"]
    assert optim.weight_decay == published["optimizer"]["weight_decay"]


def test_flags_override_a_recipe_which_overrides_its_parent(tmp_path: Path) -> None:
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


def test_a_size_and_single_widths(tmp_path: Path) -> None:
    recipe = load_config("small-data").model
    model = ModelConfig.model_validate({"size": "tiny", "vision": {"depth": 2}})
    assert (model.vision.depth, model.vision.width, model.text.width) == (2, 128, 128)
    small = load_config("small-data", {"model.size": "small"}).model
    assert (small.vision.width, small.vision.heads, small.text.depth, small.embed_dim) == (384, 6, 8, 256)
    assert small.vision.image_size == recipe.vision.image_size
    model = load_config("small-data", {"model.size": "small", "model.vision.depth": "3"}).model
    assert (model.vision.depth, model.vision.width) == (3, 384)
    assert load_config("small-data", {"model.temperature": "0.1"}).model.vision == recipe.vision
    resolved = write(tmp_path, dump_config(load_config("pretrain-4m")))
    assert load_config(resolved, {"model.size": "small"}) == load_config("pretrain-4m", {"model.size": "small"})


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        *(
            (f"optim: {{lr: {text}}}", "optim.lr", 1e-4)
            for text in ("1e-4", "1E-4", "1.0e-4", ".0001", "0.0001", "'1e-4'")
        ),
        ("name: no", "name", "no"),
        ("name: 2024", "name", "2024"),
        ("data: {caption_column: off}", "data.caption_column", "off"),
        ("data: {train: pairs.json}", "data.train", ["pairs.json"]),
        ("train: {compile: off}", "train.compile", False),
        ("train: {compile: no}", "train.compile", False),
        ("train: {compile: true}", "train.compile", True),
        ("train: {compile: yes}", "train.compile", True),
        *((f"optim:\n  clip_norm: {text}", "optim.clip_norm", None) for text in ("none", "null", "~", "")),
    ],
)
def test_yaml_values(text: str, key: str, value: object, tmp_path: Path) -> None:
    found: Any = load_config(write(tmp_path, text + "\n"))
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("value", ["none", "null", ["none"]])
def test_none_empties_a_list(value: object) -> None:
    assert load_config("demo").data.test
    assert load_config("demo", {"data.test": value}).data.test == []


def test_an_empty_section_changes_nothing(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "extends: demo\nmodel:\noptim:\n")) == load_config("demo")


class TestMistakes:
    @pytest.mark.parametrize(
        ("text", "wanted"),
        [
            ("optim: {rl: 1}", "mine.yaml: optim.rl: unknown key; did you mean optim.lr?"),
            ("lr: 1", "mine.yaml: lr: unknown key; did you mean optim.lr?"),
            ("optimizer: {lr: 1}", "mine.yaml: optimizer: unknown key"),
            ("model: {vision: {pach_size: 8}}", "did you mean model.vision.patch_size?"),
            ("optim: {lr: fast}", "mine.yaml: optim.lr: 'fast' is not a number"),
            ("optim: {lr: inf}", "mine.yaml: optim.lr: 'inf' is not a finite number"),
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
            ("optim: {lr: 1, lr: 2}", "mine.yaml, line 1: not valid YAML: key 'lr' appears twice"),
            ("optim: {lr: 1", "mine.yaml, line 1: not valid YAML"),
            ("- a\n- b", "mine.yaml: holds a list"),
            ("extends: [a]", "mine.yaml: extends:"),
            ("[1]: 2", "mine.yaml, line 1: not valid YAML: key ['1'] is not text"),
        ],
    )
    def test_one_line_names_file_key_and_fix(self, text: str, wanted: str, tmp_path: Path) -> None:
        assert wanted in message(write(tmp_path, text))

    def test_a_mistake_names_the_layer_that_made_it(self, tmp_path: Path) -> None:
        write(tmp_path, "optim: {lr: fast}\n", "parent.yaml")
        child = write(tmp_path, "extends: parent.yaml\noptim: {min_lr: 0}\n")
        assert message(child).startswith(f"{tmp_path / 'parent.yaml'}: optim.lr")
        assert message("demo", {"optim.lr": "fast"}) == "--optim.lr: 'fast' is not a number"
        assert message(child, {"optim": {"lr": "slow"}}) == "--optim.lr: 'slow' is not a number"

    def test_what_is_no_recipe(self, tmp_path: Path) -> None:
        assert message("dmeo") == "no recipe or file named 'dmeo'; did you mean demo?"
        assert "the recipes are demo," in message("zzzzzzzz")
        write(tmp_path, "", "mine.yaml")
        assert message(tmp_path / "mien.yaml").endswith(f"did you mean {tmp_path / 'mine.yaml'}?")
        assert "without config.yaml" in message(tmp_path)
        (tmp_path / "picture.yaml").write_bytes(b"\x89PNG\xff\xfe")
        assert "cannot be read as text" in message(tmp_path / "picture.yaml")


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
    with TemporaryDirectory() as folder:
        assert load_config(write(Path(folder), text)) == config
    # Readers of YAML 1.1 see the same words and numbers.
    assert yaml.safe_load(text)["name"] == config.name
    assert yaml.safe_load(text)["data"]["train"] == config.data.train
