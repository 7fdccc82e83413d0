"""The tutorial, whole, at a small size."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

TUTORIAL = Path(__file__).resolve().parents[2] / "examples" / "tutorial.py"


def test_from_pictures_to_answers(tmp_path: Path) -> None:
    sizes = ["--work", str(tmp_path / "work"), "--scenes", "48", "--steps", "2", "--query", "a circle"]
    done = subprocess.run([sys.executable, str(TUTORIAL), *sizes], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    held_out = tmp_path / "work" / "held_out"
    assert len(list(held_out.glob("*.jpg"))) == 6
    found = [line.split() for line in lines if str(held_out) in line and not line.startswith("{")]
    if importlib.util.find_spec("lancedb") is None:
        assert any("pip install 'tercet[search]'" in line for line in lines)
    else:
        assert f"{tmp_path / 'work' / 'index'}: 6 pictures" in lines
        # Both searches rank all six pictures by the same model.
        found, indexed = found[:5], found[5:]
        assert indexed == found[:3]
    assert len(found) == 5
    assert [float(row[0]) for row in found] == sorted((float(row[0]) for row in found), reverse=True)
    last = json.loads(lines[-1])
    assert last["picture"] == found[0][1] and last["answer"]
    assert (tmp_path / "work" / "search" / "report.html").is_file()
    assert (tmp_path / "work" / "answers" / "model" / "answers.json").is_file()
