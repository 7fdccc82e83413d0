"""A server under load on loopback: 50 clients, with batching and without in turn, as JSON.

    python benchmarks/serve.py            # 60 s of each load in turn and 60 s of all together: some minutes
    python benchmarks/serve.py --quick    # 5 s of each: under two minutes on 2 idle cores

Two servers are started over one index of synthetic scenes with a model of random weights (speed does not depend on
them): one batches requests, the other takes them one by one.  Each load goes to both in turn, in short slices, so
that both see the same machine.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from machine import processor_name
from tercet.config import ModelConfig
from tercet.data.scene_files import encode_jpeg
from tercet.data.scenes import split_scenes
from tercet.data.tokenizer import Tokenizer, clean_caption
from tercet.model.hub import save_model
from tercet.model.tercet import Tercet

CLIENTS = 50
MIXED = "mixed"
SLICES = 3  # turns of each load


@dataclass
class Load:
    """What clients ask, and what they got.

    Attributes:
        requests: bodies by address; clients take them in turn.
        seconds: of every successful response.
        statuses: how many of each.
        spent: seconds that the load ran.
    """

    requests: list[tuple[str, bytes]]
    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    spent: float = 0.0

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.seconds) / self.spent

    def summary(self) -> dict[str, object]:
        """Throughput, latencies in milliseconds, and the statuses."""
        cuts = statistics.quantiles(self.seconds, n=100) if len(self.seconds) > 1 else [float("nan")] * 99
        return {
            "requests_per_second": round(self.rate, 1),
            "p50_ms": round(1000 * cuts[49], 1),
            "p99_ms": round(1000 * cuts[98], 1),
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
        }


def write_scenes(folder: Path, count: int) -> None:
    """A folder of synthetic scenes with captions."""
    folder.mkdir()
    scenes = list(split_scenes("test", count))
    for index in range(count):
        (folder / f"{index:04}.jpg").write_bytes(encode_jpeg(scenes[index].image))
        (folder / f"{index:04}.txt").write_text(scenes[index].captions[0])


def make_model(folder: Path, size: str) -> None:
    """A model of random weights that reads the captions of scenes and answers questions."""
    torch.manual_seed(0)
    scenes = list(split_scenes("test", 200))
    captions = [clean_caption(caption, 30) for index in range(200) for caption in scenes[index].captions]
    tokenizer = Tokenizer.train(captions, 256)
    ids = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in ("pad", "cls", "sep", "mask")}
    config = {"size": size, "text": {"vocabulary_size": tokenizer.vocabulary_size, **ids}}
    model = Tercet(ModelConfig.model_validate(config))
    model.add_heads(["answer"])
    model.answers = ["yes", "no", "red", "green", "blue", "yellow", "one", "two", "three"]
    model.tokenizer = tokenizer
    save_model(model, folder)


def make_loads() -> dict[str, list[tuple[str, bytes]]]:
    """Requests of each kind, and all of them in turn."""
    scenes = list(split_scenes("validation", 64))
    captions = [scenes[index].captions[0] for index in range(64)]
    pictures = [{"base64": base64.b64encode(encode_jpeg(scenes[index].image)).decode()} for index in range(64)]
    pairs = list(zip(pictures, captions, strict=True))
    labels = ["circle", "star", "ring"]
    loads = {
        "search": [("/v1/search", {"text": caption}) for caption in captions],
        "search_dual": [("/v1/search", {"text": caption, "rerank": 0}) for caption in captions],
        "match": [("/v1/match", {"image": picture, "texts": [caption]}) for picture, caption in pairs],
        "ask": [("/v1/ask", {"image": picture, "question": "what colour is it?"}) for picture, _ in pairs],
        "classify": [("/v1/classify", {"image": picture, "labels": labels}) for picture, _ in pairs],
        "explain": [("/v1/explain", {"image": picture, "text": caption}) for picture, caption in pairs],
        "embed": [("/v1/embed", {"texts": [caption]}) for caption in captions],
    }
    encoded = {name: [(path, json.dumps(body).encode()) for path, body in requests] for name, requests in loads.items()}
    encoded[MIXED] = [request for together in zip(*encoded.values(), strict=True) for request in together]
    return encoded


def start_server(index: Path, batch: int) -> tuple[subprocess.Popen[str], int]:
    """A server in a process of its own; gives its port."""
    command = [sys.executable, "-m", "tercet", "serve", str(index), "--port", "0", "--batch", str(batch)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    if "http://" not in line:
        raise SystemExit(f"the server did not start: {line}")
    return process, int(line.rpartition(" at ")[2].split("/")[2].rpartition(":")[2])


async def run_client(port: int, load: Load, start: int, until: float) -> None:
    """One client: the next request as soon as the last is answered, over one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
    number = start
    try:
        while time.perf_counter() < until:
            path, body = load.requests[number % len(load.requests)]
            number += CLIENTS
            began = time.perf_counter()
            head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(answer.partition(b"content-length: ")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
            status = int(answer.split(b" ", 2)[1])
            load.statuses[status] += 1
            if status == 429:
                await asyncio.sleep(1)
            else:
                load.seconds.append(time.perf_counter() - began)
    finally:
        writer.close()


async def run_load(port: int, load: Load, seconds: float) -> None:
    """All clients at once for so long."""
    began = time.perf_counter()
    await asyncio.gather(*(run_client(port, load, number, began + seconds) for number in range(CLIENTS)))
    load.spent += time.perf_counter() - began


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Start both servers, load them in turn, and stop them."""
    seconds = arguments.seconds or (5.0 if arguments.quick else 60.0)
    requests = make_loads()
    names = arguments.loads or list(requests)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_model(folder / "model", arguments.size)
        write_scenes(folder / "scenes", arguments.images)
        command = [sys.executable, "-m", "tercet", "index", str(folder / "scenes"), "--model", str(folder / "model")]
        subprocess.run([*command, "--output", str(folder / "index")], check=True, stdout=subprocess.DEVNULL)
        servers = {"batched": start_server(folder / "index", 64), "one_by_one": start_server(folder / "index", 1)}
        results: dict[str, dict[str, object]] = {}
        try:
            for name in names:
                loads = {kind: Load(requests[name]) for kind in servers}
                for _, port in servers.values():
                    asyncio.run(run_load(port, Load(requests[name]), min(2.0, seconds / 4)))  # what is made once
                for _ in range(SLICES):
                    for kind, (_, port) in servers.items():
                        asyncio.run(run_load(port, loads[kind], seconds / SLICES))
                results[name] = {kind: load.summary() for kind, load in loads.items()}
                print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
                results[name]["ratio"] = round(loads["batched"].rate / loads["one_by_one"].rate, 2)
        finally:
            for process, _ in servers.values():
                process.terminate()
            codes = [process.wait(60) for process, _ in servers.values()]
    return {
        "name": "serve",
        "clients": CLIENTS,
        "seconds": seconds,
        "size": arguments.size,
        "images": arguments.images,
        "loads": results,
        "exit_codes": codes,
        "machine": {
            "processor": processor_name(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
    }


def measure_calls(size: str, images: int, loads: list[str], jobs: int = 32, rounds: int = 3) -> dict[str, object]:
    """The model's part alone, without HTTP: processor time of jobs one by one over that of all together."""
    from tercet import load
    from tercet.data.images import resize
    from tercet.search.build import build_index
    from tercet.search.search import Query, Searcher

    torch.set_num_threads(1)
    scenes = list(split_scenes("validation", jobs))
    captions = [scenes[index].captions[0] for index in range(jobs)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_model(folder / "model", size)
        predictor = load(folder / "model")
        write_scenes(folder / "scenes", images)
        index, _ = build_index([str(folder / "scenes")], predictor, "model", str(folder / "index"))
        searcher, side = Searcher(index, predictor), predictor.model.config.vision.image_size
        pictures = [resize(scenes[number].image, side) for number in range(jobs)]
        labels, questions = ["circle", "star"], ["what colour is it?"] * jobs
        calls: dict[str, tuple[Callable[..., object], tuple[list, ...]]] = {
            "match": (predictor.match_each, (pictures, [[caption] for caption in captions])),
            "classify": (lambda own: predictor.classify(own, labels), (pictures,)),
            "ask": (predictor.answer, (pictures, questions)),
            "explain": (predictor.explain, (pictures, captions)),
            "embed": (predictor.embed_texts, (captions,)),
            # Image tokens are cached in the first round, which is not counted.
            "search": (searcher.search_many, ([Query(caption) for caption in captions],)),
            "search_dual": (searcher.search_many, ([Query(caption, rerank=0) for caption in captions],)),
        }
        ratios = {name: compare_batches(*calls[name], rounds) for name in loads or calls}
    machine = {"processor": processor_name(), "threads": 1, "torch": torch.__version__}
    return {"name": "serve_calls", "size": size, "jobs": jobs, "images": images, "ratio": ratios, "machine": machine}


def compare_batches(call: Callable[..., object], columns: tuple[list, ...], rounds: int) -> float:
    """Processor time of jobs one by one over that of all together, in turn, after one round of each unmeasured."""
    jobs = len(columns[0])
    spent: dict[int, list[float]] = {1: [], jobs: []}
    for _ in range(rounds + 1):
        for batch, times in spent.items():
            began = time.process_time()
            for start in range(0, jobs, batch):
                call(*(column[start : start + batch] for column in columns))
            times.append(time.process_time() - began)
    return round(statistics.median(spent[1][1:]) / statistics.median(spent[jobs][1:]), 2)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="5 s of each load")
    parser.add_argument("--seconds", type=float, help="of each load, instead of 60 or 5")
    parser.add_argument("--images", type=int, default=500, help="synthetic scenes in the index, up to 500")
    parser.add_argument("--size", default="tiny", help="of the model: tiny, small or base")
    parser.add_argument("--loads", nargs="*", help="some of the loads; default all")
    parser.add_argument("--calls", action="store_true", help="the model's part alone, in processor time")
    arguments = parser.parse_args()
    if arguments.calls:
        print(json.dumps(measure_calls(arguments.size, arguments.images, arguments.loads or [])))
    else:
        print(json.dumps(measure(arguments)))


if __name__ == "__main__":
    main()
