"""A pre-training step of the base model on this machine, ours and the published computation in turn, as one JSON line.

    python benchmarks/step.py            # base size, 256 px, batch 4, all five objectives: some minutes
    python benchmarks/step.py --quick    # a small model, under a minute

`effective` is the published method's FLOPs a pair over what the machine's matrix rate would do in our time a pair:
utilisation by useful work, above which only less work or more speed can bring it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from types import SimpleNamespace
from typing import cast

import torch

from machine import add_options, count_flops, describe_machine, prepare, spread, take_turns
from plain import PlainModel
from plain_step import PlainBatch, PlainPretraining, plain_optimizer, sum_of_losses
from tercet.config import Config, ModelConfig, ObjectivesConfig, TrainConfig
from tercet.data.loader import Batch
from tercet.model.tercet import Tercet
from tercet.tasks.pretrain import Pretraining
from tercet.train.loop import take_step
from tercet.train.optim import build_optimizer
from tercet.train.parallel import place
from tercet.train.session import Session

# Counted on the published code: base size, 256 px, queue 65536, captions of 8 to 14 word pieces.
PUBLISHED_FLOPS_A_PAIR = 264.2e9
QUICK_MODEL = {
    "vision": {"width": 384, "depth": 6, "heads": 6, "image_size": 224},
    "text": {"width": 384, "mlp_width": 1536, "depth": 6, "fusion_layer": 3, "heads": 6},
}


class OurStep:
    """`tercet.train.loop.take_step` itself, over one batch drawn at random."""

    def __init__(self, config: Config, batch: Batch) -> None:
        self.batch = batch
        student = Tercet(config.model)
        self.task = Pretraining(student, config.objectives).train()
        assert self.task.queue is not None
        # A queue that earlier batches filled: empty slots would be left out of the contrast.
        self.task.queue.image_ids.copy_(torch.arange(self.task.queue.size) + 1_000_000)
        optimizer = build_optimizer(student, config.optim, published=False)
        # What a step reads of a session: all but the files, the source and the loader.
        self.session = cast(
            Session,
            SimpleNamespace(
                config=config,
                task=self.task,
                optimizer=optimizer,
                placement=place(config.train),
                step=0,
                steps_per_epoch=1000,
            ),
        )

    def __call__(self) -> None:
        """One step."""
        result = take_step(self.session, [self.batch])
        assert result.trouble is None, result.trouble
        self.session.step += 1


class PlainStep:
    """The published computation of the same step on the same weights; normalising the pixels is left to its loader."""

    def __init__(self, config: Config, batch: Batch, student: Tercet) -> None:
        model = PlainModel.of(student)
        self.task = PlainPretraining(model, config.model.text, config.objectives).train()
        self.optimizer = plain_optimizer(model, config.optim)
        self.alpha = config.objectives.alpha
        assert batch.second_views is not None
        self.batch = PlainBatch(
            student.vision.normalise(batch.images),
            student.vision.normalise(batch.second_views),
            batch.input_ids,
            batch.attention_mask,
        )

    def __call__(self) -> None:
        """One step."""
        self.optimizer.zero_grad(set_to_none=True)
        sum_of_losses(self.task(self.batch, self.alpha)).backward()
        self.optimizer.step()


def draw_batch(model: ModelConfig, pairs: int, tokens: int) -> Batch:
    """Random pairs whose captions all have `tokens` word pieces."""
    text, size = model.text, model.vision.image_size
    first = max(text.pad_id, text.cls_id, text.sep_id, text.mask_id) + 1
    input_ids = torch.randint(first, text.vocabulary_size, (pairs, tokens))
    input_ids[:, 0] = text.cls_id

    def images() -> torch.Tensor:
        return torch.randint(256, (pairs, 3, size, size), dtype=torch.uint8)

    return Batch(
        images=images(),
        second_views=images(),
        input_ids=input_ids,
        attention_mask=torch.ones(pairs, tokens, dtype=torch.bool),
        image_ids=torch.arange(pairs),
        captions=[""] * pairs,
        keys=[str(index) for index in range(pairs)],
        epoch=0,
        step=0,
        skipped=0,
    )


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Build, count and time."""
    rate = prepare(arguments)
    model = ModelConfig.model_validate(QUICK_MODEL if arguments.quick else {})
    config = Config(
        model=model,
        objectives=ObjectivesConfig(alpha_ramp=0),
        train=TrainConfig(device="cpu", precision="fp32", batch_size=arguments.batch),
    )
    batch = draw_batch(model, arguments.batch, arguments.caption_tokens)
    ours = OurStep(config, batch)
    runs: dict[str, OurStep | PlainStep] = {"ours": ours}
    if arguments.plain:
        runs["plain"] = PlainStep(config, batch, ours.task.student)
    flops = {name: count_flops(step) / arguments.batch for name, step in runs.items()}
    # The pages that a step works in are mapped in the first few.
    for step in runs.values():
        for _ in range(arguments.warm_up):
            step()
    seconds = take_turns(runs, arguments.steps, rate)
    medians = {name: statistics.median(times) / arguments.batch for name, times in seconds.items()}
    yardstick = PUBLISHED_FLOPS_A_PAIR if not arguments.quick else flops.get("plain")
    gemm = rate.median()
    return {
        "name": "step",
        "ours": round(medians["ours"], 4),
        "plain": round(medians["plain"], 4) if arguments.plain else None,
        "ratio": round(medians["plain"] / medians["ours"], 3) if arguments.plain else None,
        "unit": "seconds per pair",
        "size": "small" if arguments.quick else "base",
        "image_size": model.vision.image_size,
        "batch": arguments.batch,
        "caption_tokens": arguments.caption_tokens,
        "steps": arguments.steps,
        "spread": {name: spread([one / arguments.batch for one in times]) for name, times in seconds.items()},
        "gflop_per_pair": {name: round(value / 1e9, 2) for name, value in flops.items()},
        "gemm_gflops": rate.summary(),
        "utilisation": round(flops["ours"] / (medians["ours"] * gemm), 3),
        "effective": round(yardstick / (medians["ours"] * gemm), 3) if yardstick else None,
        "machine": describe_machine(arguments),
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_options(parser)
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument("--caption-tokens", type=int, default=20, help="word pieces of every caption")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each kind")
    parser.add_argument("--warm-up", type=int, default=3, help="steps of each kind before the timed ones")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
