"""A model with random weights, and folders of pictures to index."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tercet.predictor import Predictor
from tiny_model import SCENES, TEXTS, make_model


@pytest.fixture(scope="session")
def predictor() -> Predictor:
    return Predictor(make_model())


@pytest.fixture(scope="session")
def model_folder(predictor: Predictor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return predictor.save(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Four scenes of several shapes, one in a subfolder; two with a caption."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(["a.png", "b.jpg", "more/c.png", "d.webp"]):
        picture = Image.fromarray(SCENES[number].image).resize((64 + 20 * number, 64))
        picture.save(folder / name)
    (folder / "a.txt").write_text(f"{TEXTS[0]}\nanother line\n")
    (folder / "more/c.txt").write_text('it\'s a "c"\n')
    return folder
