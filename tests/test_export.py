"""Exported graphs: equal to the model on inputs of many sizes, whole or absent, and usable without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from scene_files import png_of
from tercet.config import ModelConfig, merge
from tercet.errors import TercetError
from tercet.export import TOLERANCE, Runner, export_model, largest_difference, onnx_runner, program_runner
from tercet.model.tercet import Tercet
from tercet.predictor import Predictor
from tiny_model import SCENES, TEXTS, make_model

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "search_onnx.py"
NAMES = ("vision", "text", "image_kv", "fusion")


@pytest.fixture(scope="module")
def model() -> Tercet:
    """Of few layers, since tracing a graph takes seconds a layer."""
    reader = make_model()
    sizes = {"vision": {"depth": 1}, "text": {"depth": 3, "fusion_layer": 1}, "heads": ["entailment"]}
    torch.manual_seed(1)
    model = Tercet(ModelConfig.model_validate(merge(reader.config.model_dump(), sizes)))
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.tokenizer = reader.tokenizer
    return model.eval()


@pytest.fixture(scope="module")
def folder(model: Tercet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "out"
    report = export_model(model, folder, checks=3)
    assert report.files == [name + suffix for name in NAMES for suffix in (".onnx", ".pt2")]
    assert all(difference < TOLERANCE for difference in report.differences.values())
    return folder


@pytest.mark.parametrize(("inputs", "seed"), [(12, 7), pytest.param(100, 1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("runner", [onnx_runner, program_runner])
def test_equals_the_model(
    model: Tercet, folder: Path, runner: Callable[[Path], Runner], inputs: int, seed: int
) -> None:
    assert largest_difference(model, runner(folder), inputs, seed=seed) < TOLERANCE


def test_a_wrong_weight_shows(model: Tercet, folder: Path) -> None:
    changed = Tercet(model.config)
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        changed.fusion.layers[0].get_parameter("cross_attention.query.bias").add_(0.1)
    assert largest_difference(changed.eval(), onnx_runner(folder), 2) > TOLERANCE


def test_names_its_inputs(model: Tercet, folder: Path) -> None:
    facts = json.loads((folder / "export.json").read_text())
    assert facts["graphs"]["fusion"]["inputs"]["text_embeds"]["shape"] == ["images", "texts", "tokens", 32]
    assert facts["graphs"]["fusion"]["outputs"] == ["itm_logits", "entailment_logits"]
    assert facts["image"]["size"] == model.config.vision.image_size
    assert (folder / "tokenizer.json").is_file()


def test_example_searches_without_torch(model: Tercet, folder: Path, tmp_path: Path) -> None:
    for index in range(len(TEXTS)):
        (tmp_path / f"{index}.png").write_bytes(png_of(SCENES[index]))
    query = f"{TEXTS[0].title()}!"
    run = f"import runpy, sys; sys.argv = {[str(EXAMPLE), str(folder), str(tmp_path), query]!r}"
    run += f"; runpy.run_path({str(EXAMPLE)!r}, run_name='__main__'); assert 'torch' not in sys.modules"
    printed = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in printed.splitlines()]
    found = {Path(path).name: (float(chance), float(cosine)) for chance, cosine, path in rows}
    files = [tmp_path / f"{index}.png" for index in range(len(TEXTS))]
    predictor = Predictor(model)
    chances, cosines = predictor.match(files, [query]), predictor.similarity(files, [query])
    assert isinstance(chances, torch.Tensor) and isinstance(cosines, torch.Tensor)
    for index, file in enumerate(files):
        np.testing.assert_allclose(found[file.name], (chances[index, 0], cosines[index, 0]), atol=2e-4)
    assert [float(row[0]) for row in rows] == sorted((float(row[0]) for row in rows), reverse=True)


def test_never_replaces_other_files(model: Tercet, tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"picture")
    with pytest.raises(TercetError, match=r"holds other files \(holiday.jpg\)"):
        export_model(model, tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["holiday.jpg"]


def test_names_the_extra_that_is_missing(model: Tercet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(TercetError, match=r"need onnxscript; pip install 'tercet\[export\]'"):
        export_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
