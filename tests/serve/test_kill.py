"""A server that is killed at any moment leaves an index that the next one opens and searches; SIGTERM ends it well."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from serve_runs import PICTURES

KILLS = 20


def start(index: Path) -> tuple[subprocess.Popen[str], str]:
    """`tercet serve` in a process of its own, and where it listens."""
    command = [sys.executable, "-m", "tercet", "serve", str(index), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith(f"{PICTURES} images at http://127.0.0.1:"), line
    return process, line.split(" at ")[1].split()[0]


def keep_busy(url: str, stop: threading.Event) -> None:
    """Search until the server is gone."""
    with httpx.Client(base_url=url, timeout=60) as client:
        while not stop.is_set():
            try:
                client.post("/v1/search", json={"text": "a red circle"})
            except httpx.TransportError:
                return


def test_sigterm_answers_and_ends_with_0(index_folder: Path) -> None:
    process, url = start(index_folder)
    try:
        assert httpx.post(f"{url}v1/search", json={"text": "a red circle"}, timeout=60).status_code == 200
    finally:
        process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


@pytest.mark.slow
def test_killed_at_random_moments(index_folder: Path) -> None:
    draw = random.Random(0)
    expected: list[str] | None = None
    for _ in range(KILLS):
        process, url = start(index_folder)
        stop = threading.Event()
        threads = [threading.Thread(target=keep_busy, args=(url, stop)) for _ in range(8)]
        try:
            found = httpx.post(f"{url}v1/search", json={"text": "a red circle"}, timeout=60).json()["hits"]
            expected = expected or [hit["id"] for hit in found]
            assert [hit["id"] for hit in found] == expected
            for thread in threads:
                thread.start()
            time.sleep(draw.uniform(0.05, 1.5))
        finally:
            process.kill()
            stop.set()
        assert process.wait(60) == -signal.SIGKILL
        for thread in threads:
            thread.join(60)
