"""A real server on loopback over a real index of synthetic scenes, with a model of random weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import tercet
from scene_files import png_of
from tercet.data.scenes import split_scenes
from tercet.search.build import build_index
from tercet.search.index import Index
from tercet.serve.limits import ServeSettings
from tiny_model import make_model

sys.path.insert(0, str(Path(__file__).resolve().parent))

from serve_runs import PICTURES, Serving, serving


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads the captions of scenes and answers questions, at random."""
    model = make_model()
    model.add_heads(["answer"])
    model.answers = ["red", "blue", "green", "yes", "no", "two"]
    return tercet.Predictor(model).save(tmp_path_factory.mktemp("serve") / "model")


@pytest.fixture(scope="session")
def index_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of synthetic scenes with captions."""
    pictures, path = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("index") / "index"
    for number, scene in enumerate(split_scenes("test", PICTURES)):
        (pictures / f"scene-{number:02}.png").write_bytes(png_of(scene))
        (pictures / f"scene-{number:02}.txt").write_text(scene.captions[0])
    build_index([str(pictures)], tercet.load(model_folder), str(model_folder), str(path))
    return path


@pytest.fixture(scope="session")
def server(index_folder: Path, model_folder: Path) -> Iterator[Serving]:
    """The server that most tests share, with limits low enough to reach."""
    settings = ServeSettings(port=0, body_bytes=300_000, pixel_limit=200_000, body_seconds=2.0)
    with serving(Index.open(str(index_folder)), tercet.load(model_folder), settings) as running:
        yield running


@pytest.fixture
def serve(index_folder: Path, model_folder: Path) -> Iterator[Callable[..., Serving]]:
    """Starts servers with other settings over the same index; all stop when the test ends."""
    with ExitStack() as stack:

        def start(**settings: object) -> Serving:
            chosen = ServeSettings(port=0, **settings)  # pyright: ignore[reportArgumentType]
            return stack.enter_context(serving(Index.open(str(index_folder)), tercet.load(model_folder), chosen))

        yield start


@pytest.fixture
def first_id(server: Serving) -> str:
    """Id of an image of the index."""
    return server.post("/v1/search", {"text": "a red circle", "k": 1}).json()["hits"][0]["id"]
