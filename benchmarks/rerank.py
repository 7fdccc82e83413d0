"""Re-ranking one image's candidates with the fusion encoder, ours and the published computation in turn, as JSON.

    python benchmarks/rerank.py            # base size, 384 px, 128 captions: some minutes
    python benchmarks/rerank.py --quick    # a small model, under a minute
    python benchmarks/rerank.py --device cuda --images 64    # bf16, on a GPU, images as in an evaluation

Ours projects an image once and passes captions of like length together, on a GPU those of several images; the
published way takes one image after the other, repeats it for every pair and pads every caption to 30 word pieces.
Both read texts that were encoded before, and both have to give the same scores in fp32 before they are timed.
"""

from __future__ import annotations

import argparse
import json
import statistics

import numpy as np
import torch
from torch import Tensor

from machine import add_options, describe_machine, prepare, spread, take_turns
from plain import PlainModel, plain_scores
from tercet.config import ModelConfig, merge
from tercet.device import resolve_device
from tercet.model.tercet import Tercet
from tercet.tasks.rerank import score_images
from tercet.train.dry_run import count_flops

PADDED_TOKENS = 30
# Word pieces, [CLS] included, of the 5,000 captions of Flickr8k's test split: how many captions have 3, 4, ... 30.
LENGTH_COUNTS = (3, 24, 51, 114, 311, 382, 428, 523, 555, 534, 458, 386, 326, 228, 221, 155, 95, 76, 38, 29, 23)
LENGTH_COUNTS += (14, 8, 3, 5, 1, 3, 6)
SHORTEST = 3
QUICK_MODEL = {
    "vision": {"width": 384, "depth": 1, "heads": 6, "image_size": 384},
    "text": {"width": 384, "mlp_width": 1536, "depth": 8, "fusion_layer": 4, "heads": 6},
}


def natural_lengths(count: int) -> list[int]:
    """Lengths of `count` captions, spread over `LENGTH_COUNTS` evenly."""
    whole = [SHORTEST + index for index, captions in enumerate(LENGTH_COUNTS) for _ in range(captions)]
    return [whole[(2 * index + 1) * len(whole) // (2 * count)] for index in range(count)]


def draw_inputs(model: Tercet, images: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Encoder outputs of images `[images, tokens, width]` and of captions `[count, 30, width]`, and the captions' mask.

    Every image is asked for all captions."""
    config = model.config
    device = model.temperature.device
    image_embeds = torch.randn(images, 1 + config.vision.grid**2, config.vision.width)
    text_embeds = torch.randn(count, PADDED_TOKENS, config.text.width)
    lengths = torch.tensor(natural_lengths(count))[torch.randperm(count)]
    mask = torch.arange(PADDED_TOKENS)[None] < lengths[:, None]
    return image_embeds.to(device), text_embeds.to(device), mask.to(device)


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Build, compare, count and time."""
    rate = prepare(arguments)
    sizes = merge(QUICK_MODEL if arguments.quick else {}, {"vision": {"image_size": arguments.image_size}})
    cuda = arguments.device == "cuda"
    placement = resolve_device(arguments.device, "bf16" if cuda else "fp32")
    model = Tercet(ModelConfig.model_validate(sizes)).to(placement.device).eval()
    plain = PlainModel.of(model).to(placement.device).eval()
    captions, images = arguments.captions, arguments.images
    count = captions * images
    image_embeds, text_embeds, mask = draw_inputs(model, images, captions)
    own = [text[:length] for text, length in zip(text_embeds, mask.sum(dim=1).tolist(), strict=True)]
    everything = np.arange(captions)
    scores: dict[str, Tensor] = {}

    def run_ours() -> None:
        asked = [(tokens, everything) for tokens in image_embeds]
        scores["ours"] = torch.stack(list(score_images(model, asked, own, placement.device)))

    def run_plain() -> None:
        every = [plain_scores(plain, tokens, text_embeds, mask, batch=captions) for tokens in image_embeds]
        scores["plain"] = torch.stack(every).cpu()

    runs = {"ours": run_ours} | ({"plain": run_plain} if arguments.plain else {})
    flops = {name: count_flops(run) / count for name, run in runs.items()}
    for run in runs.values():
        run()
    if arguments.plain:
        # A GPU sums long rows in another order for every shape.
        tolerance = 1e-4 if cuda else 1e-5
        torch.testing.assert_close(scores["ours"], scores["plain"], rtol=tolerance, atol=tolerance)
    with placement.autocast():
        for run in runs.values():
            run()  # in the precision that is timed
        seconds = take_turns(runs, arguments.rounds, rate)
    medians = {name: statistics.median(times) / count for name, times in seconds.items()}
    return {
        "name": "rerank",
        "ours": round(medians["ours"], 6),
        "plain": round(medians["plain"], 6) if arguments.plain else None,
        "ratio": round(medians["plain"] / medians["ours"], 2) if arguments.plain else None,
        "unit": "seconds per pair",
        "size": "small" if arguments.quick else "base",
        "image_size": model.config.vision.image_size,
        "images": images,
        "captions": captions,
        "precision": placement.precision,
        "mean_caption_tokens": round(mask.sum().item() / captions, 2),
        "plain_caption_tokens": PADDED_TOKENS,
        "rounds": arguments.rounds,
        "spread": {name: spread([one / count for one in times]) for name, times in seconds.items()},
        "gflop_per_pair": {name: round(value / 1e9, 3) for name, value in flops.items()},
        "gemm_gflops": rate.summary(),
        "utilisation": round(flops["ours"] / (medians["ours"] * rate.median()), 3),
        **({"pairs_per_second": round(1 / medians["ours"])} if cuda else {}),
        "machine": describe_machine(arguments),
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_options(parser)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: bf16, the card's own rate")
    parser.add_argument("--image-size", type=int, default=384, help="side of the image in pixels")
    parser.add_argument("--images", type=int, default=1, help="images, each with all captions")
    parser.add_argument("--captions", type=int, default=128, help="candidates of the image")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each kind")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
