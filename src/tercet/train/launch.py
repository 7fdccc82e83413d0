"""Several processes of a run on this machine, started and watched over by PyTorch's elastic agent, as torchrun does."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tercet.errors import TercetError

HERE = "localhost"
GRACE = 300  # seconds that ranks have to end their step and write a checkpoint, once told to stop


def launch(words: Sequence[str], processes: int) -> int:
    """Run `tercet WORDS` as `processes` ranks, and wait for them.

    On a CPU each takes its share of the cores, unless OMP_NUM_THREADS says how many threads it may have.

    Returns:
        The exit status: 0, or that of the rank that failed first, which has told why.

    Raises:
        TercetError: a rank was killed.
        KeyboardInterrupt: this process was told to stop; the ranks have been told as well.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # The agent would say at length what the failed rank has said already.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{HERE}:0",
        local_addr=HERE,
        max_restarts=0,
        shutdown_timeout=GRACE,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "tercet", *words)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            raise TercetError(f"process {rank} of {processes} was killed by signal {-failure.exitcode}") from None
        return failure.exitcode
    except SignalException as stop:
        raise KeyboardInterrupt(f"stopped by {stop.sigval.name}") from None
    return 0
