"""Embedding on a Ray cluster: one actor a device reads and embeds images, rows stream back to be committed here.

Ray starts a lost actor again elsewhere and repeats its work.  Needs the extra `ray`.  Every machine of the cluster must
reach the images by the same paths or URLs.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import torch

from tercet.errors import TercetError
from tercet.predictor import Predictor
from tercet.search.build import BATCH, embed_rows, read_rows

BLOCK = 4 * BATCH  # images handed to an actor at a time, and repeated when it is lost


class Embedder:
    """An actor: a model; tables of listed images in, tables of embedded images out."""

    def __init__(self, model: Any) -> None:
        import ray

        device = "cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu"
        self.predictor = Predictor((ray.get(model) if isinstance(model, ray.ObjectRef) else model).to(device))

    def __call__(self, listed: pa.Table) -> pa.Table:
        """Read and embed."""
        return embed_rows(self.predictor, *read_rows(listed, self.predictor.model.config.vision.image_size))


def embed_on_cluster(predictor: Predictor, listed: pa.Table, address: str | None = None) -> Iterator[pa.Table]:
    """Read and embed on a Ray cluster, in no particular order.

    Args:
        predictor: its model is copied to every actor.
        listed: images to embed; see `tercet.search.build.LISTED`.
        address: of the cluster; default what RAY_ADDRESS names, or else one on this machine for this call.

    Returns:
        Tables of `tercet.search.build.embedded_schema`.

    Raises:
        TercetError: the extra is not installed, the cluster cannot be reached, or it gives up.
    """
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError as error:
        raise TercetError("--engine ray needs Ray; pip install 'tercet[ray]'") from error
    started = not ray.is_initialized()
    if started:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            raise TercetError(f"cannot reach the Ray cluster: {' '.join(str(error).split())[:300]}") from error
    try:
        yield from _stream(predictor, listed)
    except RayError as error:
        raise TercetError(f"the Ray cluster gave up: {' '.join(str(error).split())[-300:]}") from error
    finally:
        if started:
            ray.shutdown()


def _stream(predictor: Predictor, listed: pa.Table) -> Iterator[pa.Table]:
    import ray
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    actors = gpus or max(1, int(resources.get("CPU", 1)) - 1)
    blocks = [listed.slice(start, BLOCK) for start in range(0, len(listed), BLOCK)]
    embedded = ray.data.from_arrow(blocks).map_batches(
        Embedder,
        batch_size=BATCH,
        batch_format="pyarrow",
        fn_constructor_args=(ray.put(copy.deepcopy(predictor.model).cpu()),),
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(blocks))),
        num_gpus=1 if gpus else 0,
        num_cpus=1,
    )
    batches: Iterator[Any] = iter(embedded.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
    yield from batches
