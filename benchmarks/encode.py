"""Encoding images and captions in bulk, ours and the published computation in turn, as one JSON line.

    python benchmarks/encode.py                  # base size: 8 images with 5 captions each
    python benchmarks/encode.py --quick          # a small model, under a minute
    python benchmarks/encode.py --int8           # encoders in int8; features are compared with those of fp32
    python benchmarks/encode.py --compile        # encoders compiled

A collection is images with five captions each, as COCO and Flickr have.  Ours passes captions of like length together;
the published way pads every caption to 30 word pieces.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from machine import add_options, describe_machine, prepare, spread, take_turns
from plain import PlainModel
from rerank import PADDED_TOKENS, natural_lengths
from tercet.config import ModelConfig
from tercet.model.int8 import quantise_encoders
from tercet.model.tercet import Tercet
from tercet.tasks.encoding import encode_texts
from tercet.train.dry_run import count_flops
from tercet.train.setup import compile_encoders

CAPTIONS_AN_IMAGE = 5
QUICK_MODEL = {
    "vision": {"width": 384, "depth": 6, "heads": 6, "image_size": 224},
    "text": {"width": 384, "mlp_width": 1536, "depth": 6, "fusion_layer": 3, "heads": 6},
}


class Collection:
    """Random images, and captions of natural lengths padded to `PADDED_TOKENS`."""

    def __init__(self, config: ModelConfig, images: int) -> None:
        text, side = config.text, config.vision.image_size
        self.images = torch.randint(256, (images, 3, side, side), dtype=torch.uint8)
        count = CAPTIONS_AN_IMAGE * images
        self.lengths = torch.tensor(natural_lengths(count))[torch.randperm(count)]
        first = max(text.pad_id, text.cls_id, text.sep_id, text.mask_id) + 1
        self.mask = torch.arange(PADDED_TOKENS)[None] < self.lengths[:, None]
        self.input_ids = torch.randint(first, text.vocabulary_size, (count, PADDED_TOKENS)).masked_fill(~self.mask, 0)
        self.input_ids[:, 0] = text.cls_id


@torch.no_grad()
def our_feats(model: Tercet, collection: Collection, size: int) -> tuple[Tensor, Tensor]:
    """`image_feats` and `text_feats` of a collection."""
    embeds = [model.encode_image(images)[:, 0] for images in collection.images.split(size)]
    texts = encode_texts(model, collection.input_ids, collection.mask)
    return model.project_image(torch.cat(embeds)), texts.text_feats


@torch.no_grad()
def plain_feats(model: PlainModel, pixels: Tensor, collection: Collection, size: int) -> tuple[Tensor, Tensor]:
    """The same by the published computation; normalising the pixels is left to its loader."""
    images = torch.cat([model.vision(part)[:, 0] for part in pixels.split(size)])
    pieces = zip(collection.input_ids.split(size), collection.mask.split(size), strict=True)
    texts = torch.cat([model.encode_text(ids, mask)[:, 0] for ids, mask in pieces])
    return (
        F.normalize(model.vision_projection(images), dim=-1),
        F.normalize(model.text_projection(texts), dim=-1),
    )


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Build, compare, count and time."""
    rate = prepare(arguments)
    model = Tercet(ModelConfig.model_validate(QUICK_MODEL if arguments.quick else {})).eval()
    plain = PlainModel.of(model).eval()
    collection = Collection(model.config, arguments.images)
    pixels = model.vision.normalise(collection.images)
    ours = copy.deepcopy(model)
    if arguments.int8:
        quantise_encoders(ours)
    if arguments.compile:
        compile_encoders([ours])
    feats: dict[str, tuple[Tensor, Tensor]] = {}

    def run_ours() -> None:
        feats["ours"] = our_feats(ours, collection, arguments.batch)

    def run_plain() -> None:
        feats["plain"] = plain_feats(plain, pixels, collection, arguments.batch)

    runs: dict[str, Callable[[], None]] = {"ours": run_ours}
    if arguments.plain:
        runs["plain"] = run_plain
    counted = arguments.int8 or arguments.compile
    flops = {} if counted else {name: count_flops(run) / arguments.images for name, run in runs.items()}
    for run in runs.values():
        run()
    if arguments.plain and not arguments.int8:
        for own, other in zip(feats["ours"], feats["plain"], strict=True):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)
    seconds = take_turns(runs, arguments.rounds, rate)
    medians = {name: statistics.median(times) / arguments.images for name, times in seconds.items()}
    cosines = {}
    if arguments.plain:
        for kind, own, other in zip(("images", "texts"), feats["ours"], feats["plain"], strict=True):
            cosines[kind] = round(F.cosine_similarity(own, other).min().item(), 6)
    return {
        "name": "encode",
        "ours": round(medians["ours"], 5),
        "plain": round(medians["plain"], 5) if arguments.plain else None,
        "ratio": round(medians["plain"] / medians["ours"], 3) if arguments.plain else None,
        "unit": f"seconds per image with {CAPTIONS_AN_IMAGE} captions",
        "size": "small" if arguments.quick else "base",
        "image_size": model.config.vision.image_size,
        "images": arguments.images,
        "int8": arguments.int8,
        "compile": arguments.compile,
        "mean_caption_tokens": round(collection.lengths.float().mean().item(), 2),
        "plain_caption_tokens": PADDED_TOKENS,
        "least_cosine_to_plain": cosines,
        "spread": {name: spread([one / arguments.images for one in times]) for name, times in seconds.items()},
        "gflop_per_image": {name: round(value / 1e9, 2) for name, value in flops.items()},
        "gemm_gflops": rate.summary(),
        "machine": describe_machine(arguments),
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_options(parser)
    parser.add_argument("--images", type=int, default=8, help="images of the collection")
    parser.add_argument("--batch", type=int, default=64, help="images, or captions of the plain version, a pass")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each kind")
    parser.add_argument("--int8", action="store_true", help="encoders in int8")
    parser.add_argument("--compile", action="store_true", help="torch.compile the encoders")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
