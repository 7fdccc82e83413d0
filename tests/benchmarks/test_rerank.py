"""The benchmark of re-ranking runs, and both ways give the same scores, which it checks itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import rerank


def test_few_captions_of_a_small_image() -> None:
    options = ["--quick", "--image-size", "64", "--captions", "6", "--images", "2", "--rounds", "1"]
    done = subprocess.run([sys.executable, rerank.__file__, *options], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    assert Path(rerank.__file__).stem == found["name"] and found["ours"] > 0
    assert found["gflop_per_pair"]["ours"] < found["gflop_per_pair"]["plain"]
