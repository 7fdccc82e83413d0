"""Makes the benchmarks, and the readers of the published numbers, importable by the tests of this folder."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS / "parity"), str(TESTS.parent / "benchmarks")]
