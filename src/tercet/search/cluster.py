"""Indexing on a Ray cluster: images are read and embedded by one actor a device, rows stream back to be committed here.

An actor that is lost with its process or its machine is started again elsewhere, and what it was given is done again.
Needs the extra `ray`.  Every machine of the cluster must reach the images by the same paths or URLs.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from tercet.data.listing import ListedImage
from tercet.errors import TercetError
from tercet.model.tercet import Tercet
from tercet.search.building import BATCH, Embedded, embed_prepared
from tercet.search.preparing import Prepared, prepare_some

# What of a prepared image travels back; its pixels do not.
SENT = ("sha256", "width", "height", "thumbnail")


class Embedder:
    """What runs on the cluster: a model, and batches of listed images in, their rows out."""

    def __init__(self, model: Any) -> None:
        import ray

        device = "cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu"
        self.model: Tercet = (ray.get(model) if isinstance(model, ray.ObjectRef) else model).to(device).eval()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Columns of listed images to the same columns, `SENT`, `embedding`, and `broken`: why one was left out."""
        images = [
            ListedImage(**_plain(dict(zip(batch, row, strict=True)))) for row in zip(*batch.values(), strict=True)
        ]
        prepared = prepare_some(images, self.model.config.vision.image_size)
        embedded = iter(zip(*_parts(embed_prepared(self.model, prepared)), strict=True))
        rows: list[dict[str, Any]] = []
        for image, one in zip(images, prepared, strict=True):
            if isinstance(one, str):
                nothing = {"sha256": "", "width": 0, "height": 0, "thumbnail": b"", "embedding": []}
                rows.append(asdict(image) | nothing | {"broken": one})
            else:
                _, feats = next(embedded)
                sent = {name: getattr(one, name) for name in SENT}
                rows.append(asdict(one.image) | sent | {"embedding": feats.tolist(), "broken": ""})
        return {name: [_whole(name, row[name]) for row in rows] for name in rows[0]}


def embed_on_cluster(model: Tercet, images: Sequence[ListedImage], address: str | None = None) -> Iterator[Embedded]:
    """Read and embed on a Ray cluster, in no certain order.

    Args:
        model: copied to every actor.
        images: what to embed.
        address: of the cluster; default what RAY_ADDRESS names, or else one on this machine for this call.

    Raises:
        TercetError: the extra is not installed, the cluster cannot be reached, or it gives up.
    """
    try:
        import ray
        import ray.data
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
        yield from _stream(model, images)
    except RayError as error:
        raise TercetError(f"the Ray cluster gave up: {' '.join(str(error).split())[-300:]}") from error
    finally:
        if started:
            ray.shutdown()


def _stream(model: Tercet, images: Sequence[ListedImage]) -> Iterator[Embedded]:
    import ray
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    resources = ray.cluster_resources()
    devices = int(resources.get("GPU", 0))
    actors = devices or max(1, int(resources.get("CPU", 1)) - 1)
    shared = ray.put(copy.deepcopy(model).cpu())
    # Blocks are what is handed out, and done again when an actor is lost: a few batches each.
    blocks = max(1, min(len(images) // (4 * BATCH), 10_000))
    listed = ray.data.from_items([_sendable(image) for image in images], override_num_blocks=blocks)
    rows = listed.map_batches(
        Embedder,
        batch_size=BATCH,
        fn_constructor_args=(shared,),
        # Ray starts a lost actor anew and does its blocks again, as often as it takes: its own default for a pool.
        compute=ray.data.ActorPoolStrategy(size=min(actors, max(1, blocks))),
        num_gpus=1 if devices else 0,
        num_cpus=1,
    )
    for batch in rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        table: Any = batch
        yield _received(table.to_pylist())


def _received(rows: list[dict[str, Any]]) -> Embedded:
    """Rows as they came back."""
    broken = [row["broken"] for row in rows if row["broken"]]
    sound = [row for row in rows if not row["broken"]]
    empty = np.zeros((0, 0, 3), np.uint8)
    prepared = [
        Prepared(
            ListedImage(**_plain({name: row[name] for name in _LISTED})),
            pixels=empty,
            **{name: row[name] for name in SENT},
        )
        for row in sound
    ]
    return Embedded(prepared, np.array([row["embedding"] for row in sound], np.float32), broken)


_LISTED = ("uri", "caption", "size", "modified", "offset")
# A column that holds nothing but None has no type on the way; these stand for it.
_NO_CAPTION, _NO_OFFSET = "\0", -1


def _sendable(image: ListedImage) -> dict[str, Any]:
    row = asdict(image)
    return {name: _whole(name, value) for name, value in row.items()}


def _whole(name: str, value: Any) -> Any:
    if value is None:
        return _NO_CAPTION if name == "caption" else _NO_OFFSET
    return value


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `ListedImage` out of a row of Arrow or NumPy values."""
    caption, offset = str(row["caption"]), int(row["offset"])
    return {
        "uri": str(row["uri"]),
        "caption": None if caption == _NO_CAPTION else caption,
        "size": int(row["size"]),
        "modified": int(row["modified"]),
        "offset": None if offset == _NO_OFFSET else offset,
    }


def _parts(embedded: Embedded) -> tuple[list[Prepared], list[np.ndarray]]:
    return embedded.prepared, list(embedded.image_feats)
