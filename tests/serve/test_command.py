"""`tercet serve` before it serves: what is missing is told, with what to install."""

from __future__ import annotations

import sys

import pytest

from tercet.cli import main


@pytest.mark.parametrize("name", ["fastapi", "uvicorn", "prometheus_client"])
def test_without_the_extra(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["serve", "nowhere"]) == 2
    assert f"serving needs {name}; pip install 'tercet[serve]'" in capsys.readouterr().err
