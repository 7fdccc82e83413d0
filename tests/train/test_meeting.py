"""Ranks that find one another in a store that an earlier start has used."""

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
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage] - a public class
from torch.distributed.distributed_c10d import Store

from tercet.errors import TercetError
from tercet.train.meeting import agree_on_name


def meet(store: Store, delays: list[float]) -> set[str]:
    """The names that ranks get who come so many seconds late."""

    def come(rank: int) -> str:
        time.sleep(delays[rank])
        return agree_on_name(store, rank, len(delays))

    with ThreadPoolExecutor(len(delays)) as ranks:
        return set(ranks.map(come, range(len(delays))))


@pytest.mark.parametrize("delays", [[0.0, 0.0, 0.0], [0.3, 0.0, 0.1], [0.0, 0.3, 0.1], [0.0, 0.1, 0.3]])
def test_each_start_has_a_name_of_its_own(delays: list[float]) -> None:
    store = HashStore()
    first, second, third = (meet(store, now) for now in ([0.0, 0.0, 0.0], delays, delays[::-1]))
    assert len(first) == len(second) == len(third) == 1
    assert len(first | second | third) == 3


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_after_a_start_in_which_one_died_before_it_agreed(gone: int) -> None:
    store = HashStore()
    store.set_timeout(timedelta(seconds=0.3))
    with ThreadPoolExecutor(2) as ranks:
        waits = [ranks.submit(agree_on_name, store, rank, 3) for rank in range(3) if rank != gone]
        for wait in waits:
            with pytest.raises(TercetError, match="not all of the 3 processes came"):
                wait.result()
    store.set_timeout(timedelta(seconds=60))
    assert len(meet(store, [0.2, 0.0, 0.1])) == 1


def test_who_does_not_come_is_waited_for_no_longer_than_the_store_waits() -> None:
    store = HashStore()
    meet(store, [0.0, 0.0])
    store.set_timeout(timedelta(seconds=0.2))
    with pytest.raises(TercetError, match="not all of the 2 processes came"):
        agree_on_name(store, 0, 2)


def be_rank(late: int) -> None:
    """Join; in the first start rank 1 is then killed, in the second one rank comes two seconds late."""
    import torch.distributed as dist

    from tercet.train.meeting import fresh_store

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
def test_under_torchrun_whoever_comes_back_late(late: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", __file__, str(late)]
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2] / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)
    assert (done.stdout.count("joined"), done.returncode) == (2, 0), done.stderr


if __name__ == "__main__":
    be_rank(int(sys.argv[1]))
