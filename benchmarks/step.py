"""A pre-training step of the base model on this machine, ours and the published computation in turn, as one JSON line.

    python benchmarks/step.py            # base size, 256 px, batch 4, all five objectives: some minutes
    python benchmarks/step.py --quick    # a small model, under a minute
    python benchmarks/step.py --precision bf16    # on a processor with AMX, where it is what a training takes
    python benchmarks/step.py --device cuda --compile --batch 256 --steps 20    # bf16, on a GPU

`effective` is the published method's FLOPs a pair over what the machine's matrix rate would do in our time a pair:
utilisation by useful work, above which only less work or more speed can bring it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import cast

import torch

from machine import add_options, describe_machine, prepare, spread, take_turns
from plain import PlainModel
from plain_step import PlainBatch, PlainPretraining, plain_optimizer, sum_of_losses
from tercet.config import Config, ModelConfig, ObjectivesConfig, TrainConfig
from tercet.data.batch import Batch, to_device
from tercet.device import resolve_device
from tercet.distributed import Ranks
from tercet.model.layers import set_grad_checkpointing
from tercet.model.tercet import Tercet
from tercet.tasks.pretrain import Pretraining
from tercet.train.dry_run import count_flops, measure_step
from tercet.train.loop import StepResult, train_step
from tercet.train.optim import build_optimizer
from tercet.train.setup import TrainState, compile_encoders, compiled_models

# Counted on the published code: base size, 256 px, queue 65536, captions of 8 to 14 word pieces.
PUBLISHED_FLOPS_A_PAIR = 264.2e9
# 30 epochs over the 5.1 million pairs of 4 million images.
PAPER_PAIRS = 30 * 5.1e6
QUICK_MODEL = {
    "vision": {"width": 384, "depth": 6, "heads": 6, "image_size": 224},
    "text": {"width": 384, "mlp_width": 1536, "depth": 6, "fusion_layer": 3, "heads": 6},
}


class OurStep:
    """`tercet.train.loop.train_step` itself, over one random batch."""

    def __init__(self, config: Config, batch: Batch) -> None:
        # As the loader returns it.
        self.batch = batch.pin_memory() if config.train.device == "cuda" else batch
        student = Tercet(config.model)
        spec = resolve_device(config.train.device, config.train.precision)
        self.last: StepResult | None = None
        self.task = Pretraining(student, config.objectives).to(spec.device).train()
        set_grad_checkpointing(student, config.train.grad_checkpointing)
        if config.train.compile:
            compile_encoders(compiled_models(self.task))
        assert self.task.queue is not None
        # A queue that earlier batches filled: empty slots would be excluded from the contrast.
        self.task.queue.image_ids.copy_(torch.arange(self.task.queue.size) + 1_000_000)
        optimizer = build_optimizer(student, config.optim, published=False)
        # What a step needs: everything but the files, the source and the loader.
        self.state = cast(
            TrainState,
            SimpleNamespace(
                config=config,
                task=self.task,
                optimizer=optimizer,
                spec=spec,
                trained=self.task,
                ranks=Ranks(),
                step=0,
                steps_per_epoch=1000,
            ),
        )

    def __call__(self) -> None:
        """One step."""
        # The previous step is checked after this one is launched, as in the training loop.
        before, self.last = self.last, train_step(self.state, [self.batch])
        assert before is None or before.failure is None, before.failure
        self.state.step += 1


class PlainStep:
    """The published computation of the same step on the same weights; normalising the pixels is left to its loader."""

    def __init__(self, config: Config, batch: Batch, student: Tercet) -> None:
        self.spec = resolve_device(config.train.device, config.train.precision)
        batch = to_device(batch, self.spec.device)
        model = PlainModel.of(student)
        self.task = PlainPretraining(model, config.model.text, config.objectives).to(self.spec.device).train()
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
        with self.spec.autocast():
            loss = sum_of_losses(self.task(self.batch, self.alpha))
        loss.backward()
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
        texts=[""] * pairs,
        keys=[str(index) for index in range(pairs)],
    )


def step_config(
    quick: bool,
    batch: int,
    device: str = "cpu",
    precision: str | None = None,
    compile: bool = False,
    grad_checkpointing: bool = False,
) -> Config:
    """The run whose step is timed; `precision` None is bf16 on a GPU and fp32 on a processor."""
    train = {
        "device": device,
        "precision": precision or ("bf16" if device == "cuda" else "fp32"),
        "batch_size": batch,
        "compile": compile,
        "grad_checkpointing": grad_checkpointing,
    }
    return Config(
        model=ModelConfig.model_validate(QUICK_MODEL if quick else {}),
        objectives=ObjectivesConfig(alpha_warmup=0),
        train=TrainConfig.model_validate(train),
    )


def count_each(runs: dict[str, OurStep | PlainStep], config: Config, arguments: argparse.Namespace) -> dict[str, float]:
    """FLOPs a pair; on fake tensors for compiled layers, which PyTorch's counter does not see into."""
    flops: dict[str, float] = {name: count_flops(step) for name, step in runs.items() if not arguments.compile}
    if arguments.compile:
        data = config.data.model_copy(update={"max_tokens": arguments.caption_tokens})
        flops["ours"] = measure_step(config.model_copy(update={"data": data}), arguments.batch, "fp32").flops
        if "plain" in runs:
            flops["plain"] = count_flops(runs["plain"])
    return {name: value / arguments.batch for name, value in flops.items()}


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Build, count and time."""
    rate = prepare(arguments)
    config = step_config(
        arguments.quick,
        arguments.batch,
        arguments.device,
        arguments.precision,
        arguments.compile,
        arguments.grad_checkpointing,
    )
    model = config.model
    batch = draw_batch(model, arguments.batch, arguments.caption_tokens)
    ours = OurStep(config, batch)
    runs: dict[str, OurStep | PlainStep] = {"ours": ours}
    if arguments.plain:
        runs["plain"] = PlainStep(config, batch, ours.task.student)
    flops = count_each(runs, config, arguments)
    # The pages that a step works in are mapped in the first few.
    for step in runs.values():
        for _ in range(arguments.warm_up):
            step()
    # A GPU goes from one step to the next without a pause; a turn of several shows it.
    turn = arguments.turn or (5 if arguments.device == "cuda" else 1)
    turns = {name: partial(train_steps, step, turn) for name, step in runs.items()}
    seconds = take_turns(turns, max(1, arguments.steps // turn), rate)
    seconds = {name: [one / turn for one in times] for name, times in seconds.items()}
    medians = {name: statistics.median(times) / arguments.batch for name, times in seconds.items()}
    yardstick = PUBLISHED_FLOPS_A_PAIR if not arguments.quick else flops.get("plain")
    gemm = rate.median()
    return {
        "name": "step",
        "ours": round(medians["ours"], 6),
        "plain": round(medians["plain"], 6) if arguments.plain else None,
        "ratio": round(medians["plain"] / medians["ours"], 3) if arguments.plain else None,
        "unit": "seconds per pair",
        "size": "small" if arguments.quick else "base",
        "image_size": model.vision.image_size,
        "batch": arguments.batch,
        "caption_tokens": arguments.caption_tokens,
        "compile": arguments.compile,
        "grad_checkpointing": arguments.grad_checkpointing,
        "precision": config.train.precision,
        "steps": arguments.steps,
        "ratio_quartiles": quartiles(seconds) if arguments.plain and len(seconds["ours"]) > 1 else None,
        "spread": {name: spread([one / arguments.batch for one in times]) for name, times in seconds.items()},
        "gflop_per_pair": {name: round(value / 1e9, 2) for name, value in flops.items()},
        "gemm_gflops": rate.summary(),
        "utilisation": round(flops["ours"] / (medians["ours"] * gemm), 3),
        "effective": round(yardstick / (medians["ours"] * gemm), 3) if yardstick else None,
        **(on_a_card(ours, medians["ours"]) if arguments.device == "cuda" else {}),
        **({"milliseconds_of_a_step": profile(ours)} if arguments.profile else {}),
        "machine": describe_machine(arguments),
    }


def quartiles(seconds: Mapping[str, list[float]]) -> list[float]:
    """Of the ratios of neighbouring turns: how far a machine that others keep busy moves the ratio."""
    ratios = [plain / ours for plain, ours in zip(seconds["plain"], seconds["ours"], strict=True)]
    return [round(ratio, 3) for ratio in statistics.quantiles(ratios)]


def train_steps(step: Callable[[], object], count: int) -> None:
    """`count` steps without a look at what they gave."""
    for _ in range(count):
        step()


def on_a_card(ours: OurStep, seconds: float) -> dict[str, object]:
    """Further results on a GPU: pairs a second, memory, and how long the paper's training would take on it."""
    torch.cuda.reset_peak_memory_stats()
    ours()
    return {
        "pairs_per_second": round(1 / seconds, 1),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "hours_of_the_paper": round(PAPER_PAIRS * seconds / 3600, 1),
    }


# What a GPU's kernels are for, by words of their names; the first that fits counts.
KERNELS = {
    "attention": ("attention", "sdpa", "flash", "fmha", "cudnn::fusion"),
    "matrix products": ("gemm", "nvjet", "cutlass", "splitkreduce"),
    "layer norm": ("layer_norm", "gammabeta"),
    "GELU": ("gelu",),
    "optimizer and teacher": ("multi_tensor_apply",),
    "copies": ("memcpy", "memset", "copy"),
}


def profile(step: OurStep, steps: int = 3) -> dict[str, float]:
    """Milliseconds of a step on a GPU by what its kernels are for, and the time in which none runs."""
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        started = time.perf_counter()
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
        taken = time.perf_counter() - started
    spent = dict.fromkeys([*KERNELS, "others"], 0.0)
    for kernel in profiler.key_averages():
        name = kernel.key.lower()
        kind = next((kind for kind, words in KERNELS.items() if any(word in name for word in words)), "others")
        spent[kind] += kernel.self_device_time_total / 1e3
    spent["nothing"] = max(0.0, taken * 1e3 - sum(spent.values()))
    return {name: round(value / steps, 2) for name, value in spent.items()}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_options(parser)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: on the card")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), help="of both; default bf16 on a GPU, and fp32 on a processor"
    )
    parser.add_argument("--compile", action="store_true", help="ours compiled")
    parser.add_argument("--grad-checkpointing", action="store_true", help="ours with activation checkpointing")
    parser.add_argument("--profile", action="store_true", help="on a GPU: what a step's milliseconds go to")
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument("--caption-tokens", type=int, default=20, help="word pieces of every caption")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each kind")
    parser.add_argument("--turn", type=int, help="steps in a row that are timed together; default 5 on a GPU, else 1")
    parser.add_argument("--warm-up", type=int, default=3, help="steps of each kind before the timed ones")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
