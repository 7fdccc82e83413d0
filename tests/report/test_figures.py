"""Charts of any length, and the picture of an explanation for images of any shape and texts of any length."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scene_files import png_of
from tercet.cli import main
from tercet.model.hub import save_model
from tercet.report.figures import comparison_chart, draw_explanation, run_chart, smooth
from tercet.tasks.explaining import Explanation, WordHeat
from tiny_model import SCENES, TEXTS, make_model

from .conftest import Page


def test_smoothing_keeps_constants_and_does_not_lag() -> None:
    assert np.allclose(smooth(np.full(200, 3.0)), 3.0)
    line = np.arange(400.0)
    assert np.abs(smooth(line)[100:300] - line[100:300]).max() < 1.0


def test_a_long_curve_stays_small_and_inside_its_chart() -> None:
    values = np.random.default_rng(0).random(100_000)
    values[7] = 1e9  # a spike, which must not flatten the rest
    svg = run_chart(np.arange(100_000.0), values, "a <b> \" & 'c")
    assert len(svg) < 60_000
    assert Page(svg).tags[0][1]["aria-label"] == "a <b> \" & 'c"
    points = [float(y) for line in re.findall(r'points="([^"]*)"', svg) for y in re.findall(r",([\d.]+)", line)]
    assert min(points) > 0 and 50 < np.median(points) < 70 and max(points) < 126


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [3e-7, 3e-7, 3e-7], [-2e9, 5.0], [1e-12] * 60])
def test_any_values_make_a_chart_with_labels(values: list[float]) -> None:
    page = Page(run_chart(np.arange(len(values)) * 10.0, np.array(values), "x"))
    assert page.text and "nan" not in page.text
    assert Page(comparison_chart([(7, np.zeros(1), np.array(values[:1]))], "x")).tags


@pytest.mark.parametrize("shape", [(64, 64), (20, 640), (640, 20), (1, 1)])
@pytest.mark.parametrize("words", [1, 14])
def test_any_shape(shape: tuple[int, int], words: int, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    heats = [WordHeat("$word" * (1 + index), torch.rand(4, 4), (index + 1) / words) for index in range(words)]
    explanation = Explanation("costs $5 _and_ ^more " * words, pixels, torch.rand(4, 4), heats, 0.5)
    path = draw_explanation(explanation, tmp_path / "e.png")
    width, height = Image.open(path).size
    assert 400 < width < 1600 and 50 < height < 30_000


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, picture, target = make_model(), tmp_path / "a.png", tmp_path / "e.png"
    picture.write_bytes(png_of(SCENES[0]))

    def explain(output: Path) -> tuple[int, str, str]:
        words = ["explain", str(save_model(model, tmp_path / "model")), str(picture), TEXTS[0], "--output", str(output)]
        return main(words), *capsys.readouterr()

    status, printed, warned = explain(target)
    assert (status, printed.strip()) == (0, str(target)) and "not trained" not in warned
    assert Image.open(target).width > 400
    for wrong, named in ((tmp_path / "e.jpg", "a name that ends in .png"), (picture / "e.png", "cannot write")):
        status, _, error = explain(wrong)
        assert status == 2 and named in error
    model.objectives = ["cma"]
    status, _, warned = explain(target)
    assert status == 0 and "matching head was not trained" in warned
