"""The benchmarks of encoding and of starting run, and compare the same computation."""

from __future__ import annotations

import argparse
from importlib import import_module

import pytest

TINY = {
    "vision": {"image_size": 32, "width": 32, "depth": 1, "heads": 2},
    "text": {"width": 32, "mlp_width": 64, "depth": 2, "fusion_layer": 1, "heads": 2, "vocabulary_size": 200},
}


@pytest.mark.parametrize("int8", [False, True])
def test_encode(int8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = import_module("encode")
    monkeypatch.setattr(encode, "QUICK_MODEL", TINY)
    settings = {"quick": True, "plain": True, "return_memory": False, "device": "cpu", "compile": False}
    result = encode.measure(
        argparse.Namespace(**settings, int8=int8, images=2, batch=4, rounds=1, processor_time=False)
    )
    assert result["ours"] > 0 and result["ratio"] > 0
    assert min(result["least_cosine_to_plain"].values()) > (0.99 if int8 else 0.99999)


def test_startup(monkeypatch: pytest.MonkeyPatch) -> None:
    startup = import_module("startup")
    monkeypatch.setattr(startup, "QUICK_MODEL", TINY)
    result = startup.measure(argparse.Namespace(quick=True, repeats=1))
    assert result["folder_mb"] > 0.1 and 0 < result["import_seconds"] < 1 and 0 < result["help_seconds"] < 5
