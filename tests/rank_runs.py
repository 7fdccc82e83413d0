"""Processes that train together over Gloo, each forked from a server that has imported everything once."""

from __future__ import annotations

import dataclasses
import faulthandler
import multiprocessing
import os
import resource
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from tercet.config_io import load_config
from tercet.distributed import Ranks, init_distributed, rank_layout
from tercet.train import checkpoint
from tercet.train.evaluate import save_checkpoint
from tercet.train.loop import remaining_steps, train, train_step
from tercet.train.setup import open_run_folder, set_up
from tiny_run import TINY

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch._dynamo", "tercet.train.loop", "rank_runs"])
TIMEOUT = 120


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The result of `function(*arguments)` on each of `world` ranks, its error, or None for a rank that was killed.

    `function` joins the group by `tercet.distributed`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes, ends = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # as under torchrun; read when the server starts
        for rank in range(world):
            ours, theirs = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(target=_be_rank, args=(theirs, rank, world, port, function, arguments))
            process.start()
            theirs.close()
            processes.append(process)
            ends.append(ours)
    try:
        results = []
        for rank, end in enumerate(ends):
            assert end.poll(TIMEOUT), f"rank {rank} of {world} does not answer"
            try:
                results.append(end.recv())
            except EOFError:
                results.append(None)
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
    return results


def _be_rank(
    end: Connection, rank: int, world: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in named.items()})
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(TIMEOUT - 10, exit=True)  # shows where a rank hangs
    try:
        end.send(function(*arguments))
    except BaseException as error:
        traceback.print_exc()
        end.send(error if type(error).__module__.startswith("tercet") else RuntimeError(repr(error)))
    finally:
        end.close()


SMALL = {
    **TINY,
    "model.text.depth": 3,
    "model.text.dropout": 0.0,
    "objectives.gather_negatives": True,
    "train.batch_size": 8,
    "train.epochs": 2,
    "train.checkpoint_every": 3,
}


def train_run(recipe: str, overrides: dict[str, Any], resume: str | None = None) -> str:
    """Train a recipe, or resume the run `resume`; returns the run folder."""
    config = load_config(recipe if resume is None else resume, overrides)
    return str(train(config, None if resume is None else Path(resume)))


def train_runs(recipe: str, runs: list[dict[str, Any]]) -> list[str]:
    """Train several runs one after the other in the same processes; returns the run folders."""
    with init_distributed("cpu"):
        return [train_run(recipe, overrides) for overrides in runs]


def train_until_sigterm(overrides: dict[str, Any]) -> None:
    """Train; only the second rank gets a SIGTERM, after two logged steps."""

    def send() -> None:
        metrics = Path(overrides["output"], "metrics.jsonl")
        while not metrics.is_file() or metrics.read_text("utf-8").count('"train"') < 2:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    if os.environ["RANK"] == "1":
        threading.Thread(target=send, daemon=True).start()
    train_run("demo", overrides)


@contextmanager
def _open_run(overrides: dict[str, Any]) -> Iterator[tuple[Any, Iterator[Any]]]:
    """The state of a new run and its batches."""
    config = load_config("demo", overrides)
    with init_distributed("cpu"), open_run_folder(config) as folder:
        state = set_up(config, folder)
        yield state, remaining_steps(state)


def poisoned_step(overrides: dict[str, Any]) -> dict[str, Any]:
    """One good step, one whose images are not finite on rank 1 alone, and a good one."""
    with _open_run(overrides) as (state, steps):
        first = train_step(state, next(steps)).failure
        (batch,) = next(steps)
        before = {name: value.clone() for name, value in state.task.student.state_dict().items()}
        poisoned = dataclasses.replace(batch, images=torch.full(batch.images.shape, float("nan")))
        failure = train_step(state, [poisoned if state.ranks.rank == 1 else batch]).failure
        unchanged = all(torch.equal(value, before[name]) for name, value in state.task.student.state_dict().items())
        after = train_step(state, [batch]).failure
        return {"first": first, "failure": failure, "keys": batch.keys, "unchanged": unchanged, "after": after}


def fail_while_writing(overrides: dict[str, Any], rank: int, moment: str | None) -> None:
    """Two steps with a checkpoint each; in the second write one rank fails.

    It dies in the function `moment` of `tercet.train.checkpoint`; None: its disk is full, simulated by a limit on the
    size of files.
    """
    with _open_run(overrides) as (state, steps):
        for step in (1, 2):
            train_step(state, next(steps))
            state.step = step
            if step == 2 and state.ranks.rank == rank:
                if moment is None:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
                else:
                    setattr(checkpoint, moment, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
            save_checkpoint(state, wait=True)


def train_in_little_memory(overrides: dict[str, Any], more: int) -> None:
    """Train where the process may use `more` bytes beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    train_run("demo", overrides)


def gathered_rows(sizes: list[int]) -> dict[str, Any]:
    """`RankLayout.gather` of rows that hold their rank's number, and the gradient of a loss of each rank."""
    with init_distributed("cpu"):
        ranks = Ranks()
        rows = torch.full((sizes[ranks.rank], 2), float(ranks.rank + 1), requires_grad=True)
        layout = rank_layout(len(rows))
        everyone = layout.gather(rows)
        (everyone.sum(dim=1) * torch.arange(len(everyone)) * (ranks.rank + 1)).sum().backward()
        assert rows.grad is not None
        flags = layout.gather(torch.ones(len(rows), 3, dtype=torch.bool))
        values = ranks.gather_interleaved([f"{ranks.rank}.{number}" for number in range(sizes[ranks.rank])])
        return {
            "everyone": everyone.tolist(),
            "gradient": rows.grad.tolist(),
            "flags": flags.tolist(),
            "start": layout.start,
            "mean": layout.mean,
            "values": values,
            "any": [ranks.any(ranks.rank == 1), ranks.any(False)],
        }
