"""Collectives, their gradients, and the rendezvous after a restart."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage] - a public class
from torch.distributed.distributed_c10d import Store

from rank_runs import gathered_rows, run_ranks
from tercet.distributed import RankLayout, Ranks, agree_on_prefix
from tercet.errors import TercetError


def test_rows_of_unequal_ranks_are_gathered_with_their_gradients() -> None:
    results = run_ranks(3, gathered_rows, [2, 0, 1])
    for rank, (result, own) in enumerate(zip(results, ([0, 1], [], [2]), strict=True)):
        assert result["everyone"] == [[1.0, 1.0], [1.0, 1.0], [3.0, 3.0]]
        # Row i counts i times the rank's number plus one on each of three ranks.
        assert result["gradient"] == [[6.0 * row, 6.0 * row] for row in own]
        assert result["flags"] == [[True] * 3] * 3
        assert (result["start"], result["mean"]) == ((0, 2, 2)[rank], 1.0)
        assert result["values"] == ["0.0", "2.0", "0.1"]
        assert result["any"] == [True, False]


def test_one_process_alone_is_a_group_of_one() -> None:
    ranks, layout = Ranks(), RankLayout((4,))
    assert (ranks.rank, ranks.world, ranks.first) == (0, 1, True)
    rows = torch.randn(4, 3)
    assert layout.gather(rows) is rows and layout.rows == slice(0, 4) and layout.mean == layout.total == 4
    assert ranks.gather("here") == ["here"] and ranks.gather_interleaved([1, 2]) == [1, 2]
    assert ranks.on_rank0(lambda: 7) == 7 and ranks.any(True) and not ranks.any(False)
    assert torch.equal(ranks.gather_tensor(torch.tensor([5, 6])), torch.tensor([[5, 6]]))


def agree(store: Store, delays: list[float]) -> set[str]:
    """The prefixes of ranks that start so many seconds late."""

    def start(rank: int) -> str:
        time.sleep(delays[rank])
        return agree_on_prefix(store, rank, len(delays))

    with ThreadPoolExecutor(len(delays)) as ranks:
        return set(ranks.map(start, range(len(delays))))


@pytest.mark.parametrize("delays", [[0.0, 0.0, 0.0], [0.3, 0.0, 0.1], [0.0, 0.1, 0.3]])
def test_each_start_agrees_on_a_new_prefix(delays: list[float]) -> None:
    store = HashStore()
    first, second, third = (agree(store, now) for now in ([0.0, 0.0, 0.0], delays, delays[::-1]))
    assert len(first) == len(second) == len(third) == 1
    assert len(first | second | third) == 3


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_agreement_after_a_start_in_which_a_rank_died(dead: int) -> None:
    store = HashStore()
    store.set_timeout(timedelta(seconds=0.3))
    with ThreadPoolExecutor(2) as ranks:
        waits = [ranks.submit(agree_on_prefix, store, rank, 3) for rank in range(3) if rank != dead]
        for wait in waits:
            with pytest.raises(TercetError, match="3 processes"):
                wait.result()
    store.set_timeout(timedelta(seconds=60))
    assert len(agree(store, [0.2, 0.0, 0.1])) == 1


def be_rank(late: int) -> None:
    """In the first start rank 1 is killed; in the second one rank comes two seconds late."""
    import torch.distributed as dist

    from tercet.distributed import fresh_store

    starts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    time.sleep(2 if starts and int(os.environ["RANK"]) == late else 0)
    store, rank, world = fresh_store()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    dist.barrier()
    if not starts:
        time.sleep(0.5)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(100)
    print("joined", flush=True)


@pytest.mark.slow
@pytest.mark.parametrize("late", [0, 1])
def test_torchrun_restarts_with_a_late_rank(late: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", __file__, str(late)]
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1] / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)
    assert (done.stdout.count("joined"), done.returncode) == (2, 0), done.stderr


if __name__ == "__main__":
    be_rank(int(sys.argv[1]))
